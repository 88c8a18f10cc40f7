"""Archives and objects that the first version with them made are restored and opened."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from agentflow.checkpoint.offload import open_value
from agentflow.checkpoint.records import Place
from agentflow.checkpoint.rows import ValueRow
from tests.golden.objects_v1 import FILE, KEYS, TENANT, THREAD, VALUE
from tests.integration.offloaded import damages, everything, opened
from tests.integration.sealed import ring


def unpack(folder: Path, files: dict[str, str]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


@pytest.mark.parametrize("name", KEYS)
def test_golden_archive_and_object(database_url: str, tmp_path: Path, name: str) -> None:
    golden: dict[str, Any] = json.loads(FILE.read_text())[name]
    unpack(tmp_path / "archives", golden["archive"])
    unpack(tmp_path / "objects", golden["object"])
    key = KEYS[name]
    keys = ring(key) if key else None
    with opened(database_url, tmp_path / "objects", keys=keys, tenant=TENANT) as saver:
        row = ValueRow(**{**golden["row"], "data": base64.b64decode(golden["row"]["data"])})
        body = open_value(saver._codec, Place(TENANT, THREAD, ""), row, "")
        assert saver._codec.deserialize(body) == VALUE
        saver.restore(THREAD, source=f"file://{tmp_path / 'archives'}")
        assert json.loads(json.dumps(everything(saver, THREAD))) == golden["thread"]
        channels = ["log", "notes"]
        config: Any = {"configurable": {"thread_id": THREAD}}
        history = saver.get_delta_channel_history(config=config, channels=channels)
        assert history["notes"]["writes"]
        assert damages(saver) == []
