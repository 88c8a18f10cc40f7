"""Long threads, whose rows do not fit into one statement of the database."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.sql import rows, sqlite, statements

LIMIT = 1000
"""Parameters of a statement; some builds of SQLite allow no more."""
COUNT = 1200


def at(checkpoint_id: str | None = None) -> RunnableConfig:
    named = {"thread_id": "t", "checkpoint_ns": ""}
    return {"configurable": {**named, "checkpoint_id": checkpoint_id} if checkpoint_id else named}


async def fill(saver: Saver) -> list[Checkpoint]:
    """Put a line of checkpoints, each with a value of its own and one for all."""
    made: list[Checkpoint] = []
    puts = []
    for number in range(COUNT):
        version = f"{number + 1:08}"
        checkpoint: Checkpoint = {
            **empty_checkpoint(),
            "channel_values": {"own": f"{number} " * 60},
            "channel_versions": {"own": version},
        }
        parent = made[-1]["id"] if made else None
        metadata: Any = {"run_id": f"run-{number // 2}"}
        puts.append(
            asyncio.ensure_future(saver.aput(at(parent), checkpoint, metadata, {"own": version}))
        )
        made.append(checkpoint)
        if number % 100 == 0:
            await puts[-1]
    await asyncio.gather(*puts)
    return made


def test_long_threads_are_listed_and_deleted_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, sqlite, statements):
        monkeypatch.setattr(module, "MAX_PARAMETERS", LIMIT)
    with open_checkpointer(f"sqlite:///{tmp_path}/a.db") as saver:

        @sa.event.listens_for(saver._database._connections.engine, "connect")
        def _limit(connection: sqlite3.Connection, _: Any) -> None:
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, LIMIT)

        made = asyncio.run(fill(saver))
        values = [item.checkpoint["channel_values"] for item in saver.list(at())]
        assert values == [each["channel_values"] for each in reversed(made)]
        saver.delete_for_runs([f"run-{number}" for number in range(0, COUNT // 2, 2)])
        kept = {each["id"] for n, each in enumerate(made) if n // 2 % 2 == 1}
        assert {item.checkpoint["id"] for item in saver.list(at())} == kept
        saver.prune(["t", *(f"other-{number}" for number in range(LIMIT))])
        assert [item.checkpoint["id"] for item in saver.list(at())] == [made[-1]["id"]]
