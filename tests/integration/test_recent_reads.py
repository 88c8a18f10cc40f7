"""Under a lease a thread is read once, as long as nobody has written it."""

from __future__ import annotations

import asyncio
from functools import partial

import psycopg
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, CheckpointTuple, empty_checkpoint

from agentflow.checkpoint import Saver
from agentflow.checkpoint.base import _Kept
from agentflow.checkpoint.rows import CheckpointRow, FoundCheckpoint
from agentflow.checkpoint.sql.rows import SqlRows
from agentflow.codec import Codec
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.types import FencingToken, Lease, new_id

AT: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the database was asked for, one entry for each checkpoint."""
    queries: list[str] = []
    find = SqlRows.find_checkpoint

    def noted(rows: SqlRows, key: tuple[str, str, str], checkpoint_id: str | None) -> object:
        queries.append(key[1])
        return find(rows, key, checkpoint_id)

    monkeypatch.setattr(SqlRows, "find_checkpoint", noted)
    return queries


def lease(token: int) -> Lease:
    return Lease(tenant="", run_id="r", thread_id="t", worker="w", token=FencingToken(token))


def made(text: str) -> Checkpoint:
    values = {"x": [text]}
    return {**empty_checkpoint(), "channel_values": values, "channel_versions": {"x": new_id()}}


async def put(saver: Saver, after: RunnableConfig, text: str) -> RunnableConfig:
    checkpoint = made(text)
    return await saver.aput(after, checkpoint, {"step": 1}, checkpoint["channel_versions"])


async def read(saver: Saver) -> CheckpointTuple:
    found = await saver.aget_tuple(AT)
    assert found is not None
    return found


async def test_thread_is_read_once_until_it_is_written(saver: Saver, asked: list[str]) -> None:
    await saver.acquire(lease(1))
    first = saver.with_lease(lease(1))
    assert await first.aget_tuple(AT) is None
    assert asked == [], "nothing was ever written to it"
    await put(first, AT, "one")
    assert (await read(first)).checkpoint["channel_values"]["x"] == ["one"]
    seen = await read(first)
    assert seen.checkpoint["channel_values"]["x"] == ["one"]
    assert len(asked) == 1, "the second look was answered by the first"

    seen.checkpoint["channel_values"]["x"].append("mine alone")
    seen.checkpoint["channel_versions"].clear()
    again = await read(first)
    assert again.checkpoint["channel_values"]["x"] == ["one"]
    assert again.checkpoint["channel_versions"]
    await put(first, again.config, "two")
    assert (await read(first)).checkpoint["channel_values"]["x"] == ["two"]
    assert len(asked) == 2


async def test_what_the_next_holder_wrote_is_read(saver: Saver) -> None:
    await saver.acquire(lease(1))
    first = saver.with_lease(lease(1))
    await put(first, AT, "one")
    await read(first)
    await saver.acquire(lease(2))
    second = saver.with_lease(lease(2))
    await put(second, (await read(second)).config, "two")
    assert (await read(first)).checkpoint["channel_values"]["x"] == ["two"]
    await saver.release(lease(2))
    await put(saver, (await read(saver)).config, "three")
    assert (await read(second)).checkpoint["channel_values"]["x"] == ["three"]


@pytest.mark.postgres
async def test_what_was_written_while_a_claim_waited_for_the_thread_is_read(
    postgres_url: str,
) -> None:
    """One statement takes the thread and finds its head, and sees nothing of what it waits for."""
    codec, database = Codec(), Database(postgres_url, Settings())
    saver = Saver(database, codec=codec, owns_database=True)
    async with saver:
        await saver.acquire(lease(1))
        await put(saver.with_lease(lease(1)), AT, "one")
        changed = {"seq", "checkpoint_id", "run_id"}
        columns = ", ".join(name for name in CheckpointRow._fields if name not in changed)
        with psycopg.connect(postgres_url) as other:
            other.execute("UPDATE agentflow_threads SET seq = seq + 1")
            other.execute(
                f"INSERT INTO agentflow_checkpoints (seq, checkpoint_id, run_id, {columns}) "
                f"SELECT seq + 1, 'c2', 'late', {columns} FROM agentflow_checkpoints"
            )
            taking = asyncio.create_task(
                database.write(partial(saver.take_within, lease=lease(2), is_read=True))
            )
            with psycopg.connect(postgres_url, autocommit=True) as watch:
                waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                while watch.execute(waiting).fetchone() == (0,):  # noqa: ASYNC110 -- it tells nobody
                    await asyncio.sleep(0)
            other.commit()
        taken = await taking
    assert isinstance(taken.kept, _Kept)
    assert taken.kept.recent is not None
    found = taken.kept.recent.find_checkpoint(("", "t", ""), None)
    assert isinstance(found, FoundCheckpoint)
    assert found.row.run_id == "late"
