"""Made `objects-v1.json` with the first archives and objects, and shows what is in it.

The file is never made again: every later version has to restore these archives and to open these
objects. It has both without keys and with the key `one` of `tests.integration.sealed`: an archive
of a thread that has every kind of row, file by file; and a value in an object, with its reference.
It was made by

    python -c "from tests.golden.objects_v1 import make; make()"
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

from agentflow.checkpoint import Saver
from agentflow.checkpoint.rows import ValueRow
from agentflow.checkpoint.sql import open_rows
from agentflow.codec import is_apart
from agentflow.testing.savers.graphs import CONFIG, DeltaState, chain
from tests.integration.offloaded import everything, objects, opened, text
from tests.integration.sealed import ring

FILE = Path(__file__).parent / "objects-v1.json"
TENANT, THREAD = "acme", "t"
VALUE = text("large")
KEYS = {"plain": None, "encrypted": "one"}


def make() -> None:
    """Write the file."""
    found = {}
    for name, key in KEYS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _made(Path(folder), key)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def _made(folder: Path, key: str | None) -> dict[str, Any]:
    url, store = f"sqlite:///{folder / 'agentflow.db'}", folder / "archives"
    store.mkdir()
    keys = ring(key) if key else None
    with opened(url, folder / "objects", keys=keys, tenant=TENANT) as saver:
        fill(saver)
        (row,) = saver._database.query_now(
            lambda session: [
                each
                for each in open_rows(session).sweep((0, 9), ValueRow, None, 99)
                if is_apart(each.data)
            ]
        )
        (path,) = objects(folder / "objects")
        shown = everything(saver, THREAD)
        saver.archive(THREAD, to=f"file://{store}")
        return {
            "row": {**row._asdict(), "data": encoded(row.data)},
            "object": {str(path.relative_to(folder / "objects")): encoded(path.read_bytes())},
            "archive": {
                str(each.relative_to(store)): encoded(each.read_bytes()) for each in objects(store)
            },
            "thread": json.loads(json.dumps(shown)),
        }


def fill(saver: Saver) -> None:
    """Make a thread with a value in an object, logged writes, anchors and a base."""
    nodes = [(f"n{n}", lambda _: {"log": ["x" * 99], "notes": {"a": 1}}) for n in range(5)]
    large = ("large", lambda _: {"value": VALUE})
    graph = chain(large, *nodes, state=DeltaState).compile(checkpointer=saver)
    graph.invoke({"log": ["0"]}, CONFIG, durability="sync")
    saver.prune([THREAD])
    (head,) = saver.list(CONFIG)
    saver.put_writes(head.config, [("value", "written")], "task")


def encoded(data: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(data).decode()
