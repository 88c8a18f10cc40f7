"""Fifty runs in one batch, four of which go wrong: the others never notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from sqlalchemy.engine import Connection

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.database.writer import Call
from agentflow.errors import (
    ConflictError,
    FencedError,
    InvalidInputError,
    SerializationError,
    StoreUnavailableError,
)
from agentflow.failpoints import arm, disarm
from agentflow.types import FencingToken, Lease

RUNS = 50
LARGE = 50 * 1024 * 1024


def at(thread: str, checkpoint_id: str | None = None) -> RunnableConfig:
    configurable: dict[str, Any] = {"thread_id": thread, "checkpoint_ns": ""}
    if checkpoint_id:
        configurable["checkpoint_id"] = checkpoint_id
    return {"configurable": configurable}


def made(checkpoint_id: str, value: Any) -> tuple[Checkpoint, Any, Any]:
    made = {**empty_checkpoint(), "id": checkpoint_id, "channel_values": {"x": value}}
    made["channel_versions"] = {"x": checkpoint_id}
    return made, {"source": "loop", "step": 1}, {"x": checkpoint_id}  # type: ignore[return-value]  # the dictionary is one


def hold(saver: Saver) -> Callable[[], None]:
    """Keep the writer busy, so that what is queued meanwhile becomes one batch."""
    entered, go_on = threading.Event(), threading.Event()

    def wait(_: Connection) -> None:
        entered.set()
        go_on.wait(30)

    saver._database.submit(Call(wait))
    entered.wait(30)
    return go_on.set


def lose_reply_once(batches: list[int]) -> None:
    """Break the connection after the next commit of puts."""

    def lose() -> None:
        batches.append(1)
        if len(batches) == 2:  # the first is that of the operation which held the writer
            raise StoreUnavailableError("the database", "the connection broke", "unknown")

    arm("database.after_commit", lose)


@pytest.mark.slow
@pytest.mark.parametrize("is_reply_lost", [False, True])
async def test_four_that_go_wrong_are_told_so_and_the_others_never_notice(
    database_url: str, is_reply_lost: bool
) -> None:
    threads = [f"run {number}" for number in range(RUNS)]
    nul, fenced, conflict, large = threads[7], threads[18], threads[29], threads[40]
    async with open_checkpointer(database_url) as saver:
        for thread in threads:
            saver.put(at(thread), *made("c1", "first"))
        lease = Lease(tenant="", run_id="r", thread_id=fenced, worker="w", token=FencingToken(3))
        await saver.acquire(lease)
        saver.put(at(conflict, "c1"), *made("c1b", "somebody else"))

        batches: list[int] = []
        if is_reply_lost:
            lose_reply_once(batches)
        go_on = hold(saver)
        with ThreadPoolExecutor(RUNS) as pool:
            calls: dict[str, Any] = {}
            for number, thread in enumerate(threads):
                parent = at(thread, "c1")
                # A NUL in a value is stored like any other; in an id no database takes it.
                value: Any = "x" * LARGE if thread == large else f"second\x00 of {thread}"
                checkpoint_id = "c2\x00" if thread == nul else "c2"
                arguments = (parent, *made(checkpoint_id, value))
                if number % 2:
                    calls[thread] = asyncio.wrap_future(pool.submit(saver.put, *arguments))
                else:
                    saver.aput_writes(parent, [("x", thread)], "task").close()
                    calls[thread] = asyncio.ensure_future(saver.aput(*arguments))
            while len(saver._database._writer._queue) < RUNS - 2:  # noqa: ASYNC110 -- no event tells it
                await asyncio.sleep(0.01)
            go_on()
            outcomes = dict(
                zip(
                    calls,
                    await asyncio.gather(*calls.values(), return_exceptions=True),
                    strict=True,
                )
            )
        disarm()
        errors = {t: type(e) for t, e in outcomes.items() if isinstance(e, BaseException)}
        assert errors == {nul: InvalidInputError, fenced: FencedError, conflict: ConflictError}
        expected = {nul: "c1", fenced: "c1", conflict: "c1b"}
        for reader in (saver, open_checkpointer(database_url)):
            with reader:
                for number, thread in enumerate(threads):
                    line = list(reader.list(at(thread)))
                    assert line[0].checkpoint["id"] == expected.get(thread, "c2")
                    assert [each.checkpoint["id"] for each in line][-1] == "c1"
                    assert len(line) == (1 if thread in {nul, fenced} else 2)
                    if thread not in {nul, fenced, conflict, large}:
                        values = line[0].checkpoint["channel_values"]
                        assert values == {"x": f"second\x00 of {thread}"}
                    if thread not in expected and number % 2 == 0:
                        assert line[1].pending_writes == [("task", "x", thread)]
                found = reader.get_tuple(at(large))
                assert found is not None
                assert len(found.checkpoint["channel_values"]["x"]) == LARGE


async def test_value_that_cannot_be_stored_costs_its_neighbours_nothing(database_url: str) -> None:
    async with open_checkpointer(database_url) as saver:
        go_on = hold(saver)
        good = [
            asyncio.ensure_future(saver.aput(at(f"t{number}"), *made("c1", "a\x00b")))
            for number in range(10)
        ]
        with pytest.raises(SerializationError, match="channel 'x' of thread 'bad'"):
            await saver.aput(at("bad"), *made("c1", object()))  # never reaches the batch
        go_on()
        await asyncio.gather(*good)
        assert len(list(saver.list(None))) == 10


def test_id_of_an_older_checkpoint_is_taken_also_within_its_own_batch(sqlite_url: str) -> None:
    with open_checkpointer(sqlite_url) as saver, ThreadPoolExecutor(3) as pool:
        saver.put(at("warm"), *made("c0", "warm"))
        go_on = hold(saver)
        puts = [(None, "c1", "first"), ("c1", "c2", "second"), (None, "c1", "other")]
        outcomes = []
        for number, (parent, name, value) in enumerate(puts, 1):
            outcomes.append(pool.submit(saver.put, at("t", parent), *made(name, value)))
            while len(saver._database._writer._queue) < number:
                assert not outcomes[-1].done()
        go_on()
        errors = [outcome.exception(30) for outcome in outcomes]
        assert [type(error) for error in errors] == [type(None), type(None), ConflictError]
        values = [each.checkpoint["channel_values"]["x"] for each in saver.list(at("t"))]
        assert values == ["second", "first"]
