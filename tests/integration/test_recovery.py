"""Runs that go on elsewhere, later, from somewhere else, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from types import FrameType

import pytest

from agentflow import AgentFlow, RetryPolicy
from tests.integration.graphs import State, chain

ONCE = RetryPolicy(initial_interval=0, max_attempts=1)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on an empty database."""
    async with AgentFlow(database_url) as opened:
        yield opened


class Counts:
    """A node that says how often it was executed, and fails as long as it is told to."""

    def __init__(self, name: str, *, is_broken: bool = False) -> None:
        self.name = name
        self.calls = 0
        self.is_broken = is_broken

    def __call__(self, state: State) -> State:
        self.calls += 1
        if self.is_broken:
            raise ConnectionError
        return {"log": [f"{self.name}{self.calls}"]}


async def resumed(app: AgentFlow, run_id: str) -> list[str]:
    log = await app.list_events(run_id)
    return [event.data["reason"] for event in log if event.type == "run.resumed"]


async def test_run_whose_worker_is_gone_goes_on_with_one_event_before_its_first_step(
    app: AgentFlow,
) -> None:
    """Twice in a row, under one and the same name of a worker."""
    seen: list[list[str]] = []

    async def look(state: State) -> State:
        seen.append(await resumed(app, "r"))
        return {"log": ["looked"]}

    first = Counts("a")
    app.register(chain(("a", first), ("b", look)), name="g")
    await app.submit("g", {}, run_id="r")
    short = timedelta(milliseconds=50)
    for _ in range(2):
        while await app._store.claim_run("", "r", worker="same", lease=short) is None:
            pytest.fail("it is due")
        await asyncio.to_thread(_wait, short)
    run = await app.drive("r")
    assert run.output == {"log": ["a1", "looked"]}
    assert seen == [["recovery"]]
    kinds = [event.type for event in await app.list_events("r")]
    assert kinds.count("run.recovered") == 2
    assert kinds[-2:] == ["run.resumed", "run.succeeded"]


def _wait(length: timedelta) -> None:
    signal.sigtimedwait([], length.total_seconds() * 2)


async def test_interrupt_at_the_keyboard_lets_a_driven_run_come_to_the_end_of_its_step(
    app: AgentFlow,
) -> None:
    def usual(number: int, frame: FrameType | None) -> None:
        raise KeyError

    async def interrupt(state: State) -> State:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0)
        return {"log": ["done"]}

    after = Counts("b")
    app.register(chain(("a", interrupt), ("b", after)), name="g")
    await app.submit("g", {}, run_id="r")
    before = signal.signal(signal.SIGINT, usual)
    try:
        with pytest.raises(KeyError):
            await app.drive("r")
        assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)
    assert (await app.get_run("r")).status == "queued"
    assert after.calls == 0
    assert (await app.drive("r")).output == {"log": ["done", "b1"]}
    assert await resumed(app, "r") == ["drain"]
