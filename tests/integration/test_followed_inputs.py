"""A checkpoint of an input under an attempt's lease, which nobody waits for before the next one."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.errors import FencedError, SerializationError
from agentflow.types import FencingToken, Lease

THREAD: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


def lease(token: int) -> Lease:
    return Lease(tenant="", run_id="r", thread_id="t", worker="w", token=FencingToken(token))


async def driven(saver: Saver, token: int = 1) -> Saver:
    """Return the saver of an attempt."""
    assert await saver.acquire(lease(token)) == token
    return saver.with_lease(lease(token), is_input_followed=True)


async def put_input(saver: Saver, value: Any = "x") -> Any:
    return await saver.aput(
        THREAD, holding(value), {"source": "input", "step": -1}, {"__start__": "1"}
    )


async def put_first(saver: Saver, after: Any) -> Any:
    """Put the checkpoint that follows that of the input."""
    return await saver.aput(after, empty_checkpoint(), {"source": "loop", "step": 0}, {})


def holding(value: Any) -> Checkpoint:
    made = empty_checkpoint()
    made["channel_values"] = {"__start__": value}
    made["channel_versions"] = {"__start__": "1"}
    return made


async def test_input_is_accepted_while_the_database_is_busy_and_durable_with_what_follows(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.db"
    async with open_checkpointer(f"sqlite:///{path}") as saver:
        attempt = await driven(saver)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        accepted = await put_input(attempt)
        follows = asyncio.create_task(put_first(attempt, accepted))
        assert other.execute("SELECT count(*) FROM agentflow_checkpoints").fetchone() == (0,)
        other.execute("ROLLBACK")
        await follows
        steps = "SELECT step FROM agentflow_checkpoints ORDER BY seq"
        assert other.execute(steps).fetchall() == [(-1,), (0,)]
        other.close()


async def test_input_alone_becomes_durable_and_flush_waits_for_it(saver: Saver) -> None:
    attempt = await driven(saver)
    await put_input(attempt)
    await attempt.flush("t")
    found = await saver.aget_tuple(THREAD)
    assert found is not None
    assert found.metadata["source"] == "input"


async def test_input_of_an_attempt_that_was_replaced_is_refused_with_what_follows(
    saver: Saver,
) -> None:
    late = await driven(saver)
    await driven(saver, 2)
    accepted = await put_input(late)
    with pytest.raises(FencedError):
        await put_first(late, accepted)
    assert await saver.aget_tuple(THREAD) is None


async def test_input_that_cannot_be_stored_fails_what_follows_it(saver: Saver) -> None:
    attempt = await driven(saver)
    accepted = await put_input(attempt, object())
    with pytest.raises(SerializationError):
        await put_first(attempt, accepted)
    with pytest.raises(SerializationError):
        await attempt.flush("t")
    assert await saver.aget_tuple(THREAD) is None


async def test_without_an_attempt_an_input_is_durable_on_return(saver: Saver) -> None:
    await saver.acquire(lease(1))
    plain = saver.with_lease(lease(2))
    with pytest.raises(FencedError):
        await put_input(plain)
