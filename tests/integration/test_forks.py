"""Forks: a run that goes on from a checkpoint of another one, without repeating its effects."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from langgraph.types import interrupt

from agentflow import AgentFlow, RetryPolicy, effect, request_approval
from agentflow.checkpoint import Retention
from agentflow.errors import NotFoundError
from tests.integration.graphs import State, chain

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


def line(calls: Counter[Any]) -> Any:
    @effect
    async def act(what: str, value: Any) -> str:
        calls[what, value] += 1
        return what

    def node(name: str) -> Any:
        async def call(state: State) -> State:
            return {"log": [await act(name, state.get("value"))]}

        return call

    return chain(*((name, node(name)) for name in "abc"))


async def checkpoints(app: AgentFlow, run_id: str) -> list[str]:
    """Return the ids of a run's checkpoints: that of its input first, then after each node."""
    found = app._saver.alist({"configurable": {"thread_id": run_id, "checkpoint_ns": ""}})
    return [each.checkpoint["id"] async for each in found][::-1]


@pytest.mark.parametrize("position", [1, 2, 3])
async def test_fork_does_not_repeat_the_effects_of_its_parent(
    app: AgentFlow, position: int
) -> None:
    calls: Counter[Any] = Counter()
    app.register(line(calls), name="g", retry=ONCE)
    await app.submit("g", {"log": []}, run_id="r")
    await app.drive("r")
    place = (await checkpoints(app, "r"))[position]
    first = await app.fork("r", place, by="ada")
    assert (await app.drive(first.id)).output == {"log": ["a", "b", "c"]}
    grandchild = await app.fork(first.id, (await checkpoints(app, first.id))[-2])
    assert (await app.drive(grandchild.id)).output == {"log": ["a", "b", "c"]}
    assert set(calls.values()) == {1}
    again = await app.fork("r", place, repeat_effects=True)
    assert (await app.drive(again.id)).output == {"log": ["a", "b", "c"]}
    assert sum(calls.values()) == 3 + (4 - position)
    assert (await app.list_events(first.id))[0].data["forked_from"] == "r"


async def test_fork_with_other_values_calls_what_they_change(app: AgentFlow) -> None:
    calls: Counter[Any] = Counter()
    app.register(line(calls), name="g", retry=ONCE)
    await app.submit("g", {"log": []}, run_id="r")
    await app.drive("r")
    place = (await checkpoints(app, "r"))[2]
    fork = await app.fork("r", place, values={"value": 7})
    assert (await app.drive(fork.id)).output == {"log": ["a", "b", "c"], "value": 7}
    assert calls == {("a", None): 1, ("b", None): 1, ("c", None): 1, ("b", 7): 1, ("c", 7): 1}
    with pytest.raises(NotFoundError):
        await app.fork("r", "nope")


async def test_requeue_from_an_earlier_checkpoint_does_not_repeat_effects(app: AgentFlow) -> None:
    calls: Counter[Any] = Counter()
    fails = [ValueError()]
    graph = line(calls)

    def fail(state: State) -> State:
        if fails:
            raise fails.pop()
        return {}

    graph.add_node("d", fail)
    graph.add_edge("c", "d")
    app.register(graph, name="g", retry=ONCE)
    await app.submit("g", {"log": []}, run_id="r")
    await app.drive("r")
    await app.dead_letters.requeue("r", checkpoint_id=(await checkpoints(app, "r"))[1])
    assert (await app.drive("r")).output == {"log": ["a", "b", "c"]}
    assert set(calls.values()) == {1}


async def test_records_of_ended_runs_go_with_retention_and_those_in_use_stay(
    app: AgentFlow,
) -> None:
    calls: Counter[Any] = Counter()
    app.register(line(calls), name="g", retry=ONCE)
    for run_id in ("r", "forked"):
        await app.submit("g", {"log": []}, run_id=run_id)
        await app.drive(run_id)
    fork = await app.fork("forked", (await checkpoints(app, "forked"))[2])
    await app.sweep(Retention(ttl=timedelta(days=1)))
    assert len((await app.effects.list()).items) == 6
    await app.sweep(Retention(ttl=timedelta(microseconds=1)))
    assert {each.run_id for each in (await app.effects.list()).items} == {"forked"}
    assert (await app.drive(fork.id)).output == {"log": ["a", "b", "c"]}
    assert set(calls.values()) == {2}
    await app.sweep(Retention(ttl=timedelta(microseconds=1)))
    assert (await app.effects.list()).items == ()


async def test_answer_is_not_given_to_another_question(app: AgentFlow) -> None:
    order = ["pay", "ship"]

    def node(state: State) -> State:
        answers = [request_approval({"of": key}, key=key).value for key in order]
        return {"log": answers}

    app.register(chain(("a", node)), name="g", retry=RetryPolicy(initial_interval=0))
    await app.submit("g", {"log": []}, run_id="r")
    await app.drive("r")
    (asked,) = (await app.approvals.list()).items
    await app.approvals.decide(asked.id, "approve", by="ada")
    order.reverse()
    run = await app.drive("r")
    assert run.error is not None
    assert (run.status, run.attempt) == ("failed", 1)
    assert "NonDeterministicNodeError" in run.error.type
    order.reverse()
    await app.dead_letters.requeue("r")
    await app.drive("r")
    (second,) = (await app.approvals.list()).items
    assert second.request.proposal == {"of": "ship"}


def approval(title: str, key: str | None = None) -> Any:
    return lambda: request_approval({"of": title}, title=title, key=key).value


ASKED_INSTEAD: dict[str, tuple[Any, Any]] = {
    "interrupt": (approval("pay", "pay"), lambda: interrupt("pay")),
    "approval": (lambda: interrupt("pay"), approval("pay", "pay")),
    "another text": (lambda: interrupt("pay"), lambda: interrupt("ship")),
    "other names": (lambda: interrupt({"pay": 1}), lambda: interrupt({"ship": 1})),
    "another key of a mapping": (
        lambda: interrupt({"key": "pay", "of": 1}),
        lambda: interrupt({"key": "ship", "of": 1}),
    ),
    "no key": (approval("pay", "pay"), approval("pay")),
    "another title": (approval("pay"), approval("ship")),
}
"""What stands where: first one question, and when it is answered, another one."""


@pytest.mark.parametrize("case", ASKED_INSTEAD)
@pytest.mark.parametrize("is_nested", [False, True], ids=["node", "subgraph"])
async def test_answer_is_not_given_to_a_question_of_another_kind(
    app: AgentFlow, case: str, is_nested: bool
) -> None:
    first, second = ASKED_INSTEAD[case]
    asked = [first]
    given: list[Any] = []

    async def node(state: State) -> State:
        given.append(await asyncio.to_thread(asked[0]) if "key" in case else asked[0]())
        return {"log": ["answered"]}

    inner = chain(("a", node))
    graph = chain(("sub", inner.compile())) if is_nested else inner
    app.register(graph, name="g", retry=RetryPolicy(initial_interval=0))
    await app.submit("g", {"log": []}, run_id="r")
    await app.drive("r")
    (wait,) = (await app.approvals.list()).items
    how = "approve" if "approve" in wait.request.allowed else {"type": "respond", "value": 1}
    await app.approvals.decide(wait.id, how, by="ada")
    asked[0] = second
    run = await app.drive("r")
    assert run.error is not None
    assert (run.status, run.attempt, given) == ("failed", 1, [])
    assert "NonDeterministicNodeError" in run.error.type
    assert "ship" not in run.error.message, "what is asked is payload"
    asked[0] = first
    await app.dead_letters.requeue("r")
    assert (await app.drive("r")).status == "succeeded"
    assert len(given) == 1


async def test_question_whose_proposal_has_changed_gets_its_answer(app: AgentFlow) -> None:
    times: list[int] = []

    def node(state: State) -> State:
        times.append(len(times))
        one = interrupt({"draft": len(times)})
        two = request_approval({"draft": len(times)}, title=f"Draft {len(times)}", key="b")
        return {"log": [one["type"], two.type]}

    app.register(chain(("a", node)), name="g", retry=ONCE)
    await app.submit("g", {"log": []}, run_id="r")
    for _ in range(2):
        await app.drive("r")
        (wait,) = (await app.approvals.list()).items
        await app.approvals.decide(wait.id, "approve", by="ada")
    assert (await app.drive("r")).output == {"log": ["approve", "approve"]}
