"""Decisions that are taken back: the question is asked again, and nothing else happens again."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from langgraph.types import interrupt

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.errors import ConflictError
from agentflow.types import Approval, RunStatus
from tests.integration.graphs import State, chain, fan, logs

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    async with AgentFlow(database_url) as opened:
        yield opened


async def pending(app: AgentFlow) -> Approval:
    (found,) = (await app.approvals.list()).items
    return found


async def answer(app: AgentFlow, value: Any) -> Approval:
    """Give the answer to the only question, and drive on."""
    asked = await pending(app)
    await app.approvals.decide(asked.id, {"type": "respond", "value": value}, by="ada")
    await app.drive("r")
    return asked


async def start(app: AgentFlow, graph: Any) -> None:
    app.register(graph, name="g", retry=ONCE)
    await app.submit("g", {"log": []}, run_id="r")
    await app.drive("r")


def wizard(calls: Counter[str]) -> Any:
    """One node that asks twice, with an effect before, between and after."""

    @effect
    async def act(what: str) -> str:
        calls[what] += 1
        return what

    async def node(state: State) -> State:
        await act("before")
        first = interrupt("first")
        await act("between")
        second = interrupt("second")
        await act("after")
        if second == "wrong":
            raise ValueError(second)
        return {"log": [first, second]}

    return node


@pytest.mark.parametrize("is_nested", [False, True], ids=["node", "subgraph"])
async def test_answer_to_an_earlier_question_is_taken_back(app: AgentFlow, is_nested: bool) -> None:
    calls: Counter[str] = Counter()

    def beside(state: State) -> State:
        calls["beside"] += 1
        return {"log": ["beside"]}

    node = wizard(calls)
    asking = chain(("asks", node)).compile() if is_nested else node
    await start(app, fan(("a", asking), ("b", beside), then=logs("end")))
    first = await answer(app, "typo")
    second = await pending(app)
    reopened = await app.approvals.reopen(first.id, by="bob", comment="a typo")
    assert (reopened.id, reopened.version) == (first.id, first.version + 1)
    assert (await app.drive("r")).status is RunStatus.WAITING
    asked = await pending(app)
    assert (asked.id, asked.request) == (first.id, first.request), "the same question"
    assert (await app.approvals.get(second.id)).status == "superseded"
    await answer(app, "right")
    again = await answer(app, "done")
    assert (again.request, again.id != second.id) == (second.request, True)
    run = await app.get_run("r")
    assert sorted(run.output["log"]) == sorted(["right", "done", "beside", "end"])
    assert calls == {"before": 1, "between": 1, "after": 1, "beside": 1}
    events = Counter(event.type for event in await app.list_events("r"))
    assert (events["approval.reopened"], events["approval.superseded"]) == (1, 1)


@pytest.mark.parametrize("is_nested", [False, True], ids=["node", "subgraph"])
async def test_run_that_failed_on_an_answer_asks_again(app: AgentFlow, is_nested: bool) -> None:
    calls: Counter[str] = Counter()
    node = wizard(calls)
    await start(app, chain(("a", chain(("asks", node)).compile() if is_nested else node)))
    await answer(app, "one")
    second = await answer(app, "wrong")
    assert (await app.get_run("r")).status is RunStatus.FAILED
    await app.approvals.reopen(second.id, by="bob")
    before = dict(calls)
    assert (await app.drive("r")).status is RunStatus.WAITING
    assert calls == before, "it stands where it asked; nothing has to run for that"
    assert (await pending(app)).id == second.id
    await answer(app, "two")
    run = await app.get_run("r")
    assert (run.status, run.output["log"]) == (RunStatus.SUCCEEDED, ["one", "two"])
    assert calls == {"before": 1, "between": 1, "after": 1}
    assert not (await app.dead_letters.list()).items


async def test_decision_that_the_run_has_not_taken_yet_is_taken_back(app: AgentFlow) -> None:
    await start(app, chain(("a", wizard(Counter()))))
    first = await pending(app)
    await app.approvals.decide(first.id, {"type": "respond", "value": "typo"}, by="ada")
    await app.approvals.reopen(first.id, by="ada")
    assert (await app.drive("r")).status is RunStatus.WAITING
    assert (await pending(app)).id == first.id


@dataclass(frozen=True)
class Order:
    """A class of the user's."""

    number: int


async def test_decision_is_taken_back_where_nobody_knows_the_classes_of_the_run(
    app: AgentFlow, database_url: str
) -> None:
    app.register(chain(("a", lambda _: {"log": [interrupt(Order(1))]})), name="g", retry=ONCE)
    await app.submit("g", {"log": [], "value": Order(1)}, run_id="r")
    await app.drive("r")
    first = await pending(app)
    await app.approvals.decide(first.id, {"type": "respond", "value": "typo"}, by="ada")
    async with AgentFlow(database_url, allow=["none:None"]) as stranger:
        await stranger.approvals.reopen(first.id, by="bob")
    assert (await app.drive("r")).status is RunStatus.WAITING
    assert (await answer(app, "right")).id == first.id
    assert (await app.get_run("r")).output["log"] == ["right"]


async def test_what_cannot_be_taken_back_is_left_as_it_is(app: AgentFlow) -> None:
    def fails(state: State) -> State:
        raise ValueError

    await start(app, chain(("a", lambda _: {"log": [interrupt("?")]}), ("b", fails)))
    asked = await pending(app)
    with pytest.raises(ConflictError, match="nothing to reopen"):
        await app.approvals.reopen(asked.id, by="bob")
    await answer(app, "on")
    before = await app.get_run("r")
    with pytest.raises(ConflictError, match="is past the step"):
        await app.approvals.reopen(asked.id, by="bob")
    assert (await app.get_run("r")) == before
    assert before.status is RunStatus.FAILED
    assert (await app.approvals.get(asked.id)).status == "resolved"
