"""Made `database-v2.sqlite3.gz` and its encrypted twin: rows of the second schema and codec.

They have what `database_v1` writes, by the code of that time, and what came with this version: a
thread that was pruned, with the history of its delta channels and an anchor. Like the first one
they are never made again. They were made by

    python -c "from tests.golden.database_v2 import make; make()"
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import tempfile
from pathlib import Path

from agentflow.checkpoint import open_checkpointer
from tests.golden import database_v1 as v1
from tests.golden.graphs_v1 import journal
from tests.golden.listing import list_database

FOLDER = v1.FOLDER
FORMS = ("plain", "encrypted")
REVISION = "0002"
"""The revision of the schema that the files have."""
KEYS = f"golden={base64.b64encode(bytes(range(32))).decode()}"
"""What `AGENTFLOW_KEYS` was for the encrypted one."""
NAMES = {"plain": "database-v2", "encrypted": "database-v2-encrypted"}
PRUNED = "pruned"
TENANTS = ("", v1.TENANT)


def database_of(form: str) -> Path:
    """Return where a form is."""
    return FOLDER / f"{NAMES[form]}.sqlite3.gz"


def listing_of(form: str) -> Path:
    """Return where everything is that must be found in a form."""
    return FOLDER / f"{NAMES[form]}.json.gz"


def write(url: str) -> None:
    """Write everything into the empty database at `url`."""
    v1.write(url)
    with open_checkpointer(url) as saver:
        graph = journal().compile(checkpointer=saver)
        for number in range(3):
            graph.invoke({"entries": [f"turn {number}"]}, v1.on(PRUNED), durability="sync")
        saver.prune([PRUNED])


def environment(form: str) -> dict[str, str]:
    """Return the environment that a form needs."""
    return {"AGENTFLOW_KEYS": KEYS if form == "encrypted" else ""}


def make() -> None:
    """Make all files; only the second version may."""
    from agentflow.database import migrate

    assert migrate.HEAD == REVISION
    for form in FORMS:
        os.environ.update(environment(form))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "golden.db"
            url = f"sqlite:///{file}"
            write(url)
            listing = asyncio.run(list_database(url, tenants=TENANTS))
            assert [each.name for each in Path(folder).iterdir()] == [file.name]
            packed = gzip.compress(file.read_bytes(), mtime=0)
            database_of(form).write_bytes(packed)
        text = json.dumps(listing, ensure_ascii=False)
        listing_of(form).write_bytes(gzip.compress(text.encode(), mtime=0))
