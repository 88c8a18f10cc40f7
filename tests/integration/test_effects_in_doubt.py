"""Calls of which it is not known whether they have happened, although nobody has died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.effects import Happened
from agentflow.errors import InvalidDecisionError, InvalidInputError, OutcomeUnknownError
from agentflow.types import Run, RunStatus
from tests.integration.graphs import State, chain

AGAIN = RetryPolicy(initial_interval=0, jitter=False, max_attempts=3)


@dataclass(frozen=True)
class Receipt:
    """An outcome of a class."""

    amount: int


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


async def drive(app: AgentFlow, act: Callable[[int], Any]) -> Run:
    """Drive a run whose node calls a function with an effect."""

    async def node(state: State) -> State:
        return {"log": [await act(1)]}

    app.register(chain(("a", node)), name="g", retry=AGAIN)
    await app.submit("g", {"log": []}, run_id="r")
    return await app.drive("r")


async def reset() -> None:
    raise ConnectionResetError("gone")


async def wrapped() -> None:
    try:
        await reset()
    except OSError as error:
        raise ValueError("the bank does not answer") from error


async def said() -> None:
    raise OutcomeUnknownError("502")


async def hung_up() -> None:
    async with server(is_silent=False) as url, httpx.AsyncClient() as client:
        await client.post(url)


async def too_late() -> None:
    soon = httpx.Timeout(30, read=0.05)
    async with server(is_silent=True) as url, httpx.AsyncClient(timeout=soon) as client:
        await client.post(url)


async def never_sent() -> None:
    async with server(is_silent=False) as url:
        pass
    async with httpx.AsyncClient() as client:
        await client.post(url)


async def cleared_up() -> None:
    try:
        await reset()
    except OSError:
        raise ValueError("the bank says that it has not happened") from None


@asynccontextmanager
async def server(*, is_silent: bool) -> AsyncIterator[str]:
    """Serve nobody: take a request, and hang up or do not answer."""
    over = asyncio.Event()
    serving: list[asyncio.Task[Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.append(task)
        await reader.readuntil(b"\r\n\r\n")
        if is_silent:
            await over.wait()
        writer.close()
        await writer.wait_closed()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        host, port = listening.sockets[0].getsockname()
        try:
            yield f"http://{host}:{port}/"
        finally:
            over.set()
            await asyncio.gather(*serving)


@pytest.mark.parametrize("fail", [reset, wrapped, said, hung_up, too_late])
async def test_call_that_may_have_happened_is_asked_about_and_not_repeated(
    app: AgentFlow, fail: Callable[[], Any]
) -> None:
    calls = []

    @effect(retry=AGAIN)
    async def pay(n: int) -> int:
        calls.append(n)
        if len(calls) == 1:
            await fail()
        return n

    assert (await drive(app, pay)).status is RunStatus.WAITING
    assert calls == [1]
    (asked,) = (await app.approvals.list()).items
    assert asked.request.proposal["raised"]["type"].partition(":")[2]
    assert (await app.effects.list(in_doubt=True)).items[0].id == asked.request.proposal["effect"]
    answer = {"type": "respond", "value": {"happened": False}}
    await app.approvals.decide(asked.id, answer, by="ada")
    assert (await app.drive("r")).output == {"log": [1]}
    assert calls == [1, 1]


@pytest.mark.parametrize("fail", [never_sent, cleared_up])
async def test_call_that_has_not_happened_is_repeated_by_its_policy(
    app: AgentFlow, fail: Callable[[], Any]
) -> None:
    calls = []

    @effect(retry=RetryPolicy(initial_interval=0, jitter=False, retry_on=lambda _: True))
    async def pay(n: int) -> int:
        calls.append(n)
        if len(calls) == 1:
            await fail()
        return n

    assert (await drive(app, pay)).output == {"log": [1]}
    assert calls == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"on_in_doubt": "retry", "retry": AGAIN},
        {"in_doubt_on": [], "retry": AGAIN},
        {"check": lambda _: None, "retry": AGAIN},
        {"check": lambda _: None},
        {"check": Happened},
    ],
)
async def test_effect_says_what_follows_when_a_connection_breaks(
    app: AgentFlow, options: dict[str, Any]
) -> None:
    calls = []

    @effect(**options)
    async def pay(n: int) -> int:
        calls.append(n)
        if len(calls) == 1:
            await reset()
        return n

    assert (await drive(app, pay)).output == {"log": [1]}
    check = options.get("check")
    assert len(calls) == (1 if check is not None and check(1) else 2)


async def test_what_a_caller_is_handling_says_nothing_about_a_call(app: AgentFlow) -> None:
    @effect
    def pay(n: int) -> int:
        raise ValueError("declined")

    async def act(n: int) -> int:
        try:
            await reset()
        except OSError:
            return int(pay(n))
        raise AssertionError

    run = await drive(app, act)
    assert (run.status, (await app.approvals.list()).items) == (RunStatus.FAILED, ())


async def test_answer_has_to_be_an_outcome_of_the_function(app: AgentFlow) -> None:
    @effect
    async def pay(n: int) -> Receipt:
        raise OutcomeUnknownError

    await drive(app, pay)
    (asked,) = (await app.approvals.list()).items
    for wrong in ({"happened": True}, {"happened": True, "outcome": {"amount": "much"}}):
        with pytest.raises(InvalidDecisionError, match="outcome"):
            await app.approvals.decide(asked.id, {"type": "respond", "value": wrong}, by="ada")
    named = asked.request.proposal["effect"]
    with pytest.raises(InvalidInputError, match="amount"):
        await app.effects.resolve(named, happened=True, outcome={}, by="ada")
    right = {"happened": True, "outcome": {"amount": 3}}
    await app.approvals.decide(asked.id, {"type": "respond", "value": right}, by="ada")
    assert (await app.drive("r")).output == {"log": [Receipt(3)]}
