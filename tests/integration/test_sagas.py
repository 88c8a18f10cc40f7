"""Sagas: what a run has done is undone in the reverse order when it fails or is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from langgraph.types import interrupt

from agentflow import AgentFlow, RetryPolicy, effect, request_approval
from agentflow.errors import ConflictError
from agentflow.journal import EffectStatus
from agentflow.types import Run, RunStatus
from tests.integration.graphs import State, chain, fan

ONCE = RetryPolicy(max_attempts=1)


@dataclass(frozen=True)
class Order:
    """An argument of a class."""

    id: int


class Shop:
    """The outside world, with what was done and undone in it."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.undone: list[Any] = []
        self.refuses: set[str] = set()
        self.book = effect(compensate=self.unbook, name="tests:book")(self._book)
        self.order = effect(compensate=self.cancel_order, name="tests:order")(self._order)

    async def _book(self, what: str) -> str:
        self.done.append(what)
        return f"booked {what}"

    def unbook(self, outcome: str, what: str) -> None:
        assert outcome == f"booked {what}"
        if what in self.refuses:
            raise ValueError(what)
        self.undone.append(what)

    async def _order(self, order: Order, note: str) -> Order:
        self.done.append(note)
        return order

    async def cancel_order(self, outcome: Order, order: Order) -> None:
        self.undone.append((outcome, order))


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def drive(app: AgentFlow, graph: Any) -> Run:
    app.register(graph, name="g", retry=ONCE)
    await app.submit("g", {"log": []}, run_id="r")
    return await app.drive("r")


def books(shop: Shop, what: str, *, fails: bool = False) -> Any:
    async def node(state: State) -> State:
        made = await shop.book(what)
        if fails:
            raise ValueError(what)
        return {"log": [made]}

    return node


@pytest.mark.parametrize("failing", range(5))
async def test_failure_at_any_step_undoes_what_came_before_it_the_last_first(
    app: AgentFlow, shop: Shop, failing: int
) -> None:
    steps = [(f"s{i}", books(shop, str(i), fails=i == failing)) for i in range(5)]
    run = await drive(app, chain(*steps))
    assert (run.status, run.saga) == ("failed", "compensated")
    assert run.error is not None
    assert (run.error.type, run.error.node) == ("builtins.ValueError", f"s{failing}")
    assert (await app.dead_letters.get("r")).cause == run.error
    done = [str(i) for i in range(failing + 1)]
    assert (shop.done, shop.undone) == (done, done[::-1])
    events = [e.type for e in await app.list_events("r")]
    assert events.index("run.compensating") < events.index("run.failed")
    assert events.count("effect.succeeded") == 2 * len(done)


async def test_branches_are_undone_in_the_reverse_order_of_their_outcomes(
    app: AgentFlow, shop: Shop
) -> None:
    turns = [asyncio.Event() for _ in range(4)]
    turns[0].set()

    def in_turn(number: int) -> Any:
        async def node(state: State) -> State:
            await turns[number].wait()
            await shop.book(str(number))
            turns[number + 1].set()
            return {}

        return node

    async def fails(state: State) -> State:
        raise ValueError

    graph = fan(*((f"n{i}", in_turn(i)) for i in (2, 0, 1)), then=fails)
    run = await drive(app, graph)
    assert (run.status, run.saga, shop.undone) == ("failed", "compensated", ["2", "1", "0"])


async def test_compensation_gets_outcome_and_arguments_as_they_were(
    app: AgentFlow, shop: Shop
) -> None:
    async def node(state: State) -> State:
        await shop.order(Order(7), note="x")
        raise ValueError

    run = await drive(app, chain(("a", node)))
    assert (run.saga, shop.undone) == ("compensated", [(Order(7), Order(7))])


async def test_run_that_is_cancelled_while_it_waits_is_undone_first(
    app: AgentFlow, shop: Shop
) -> None:
    graph = chain(("a", books(shop, "a")), ("ask", lambda _: {"log": [interrupt("?")]}))
    await drive(app, graph)
    run = await app.cancel("r", reason="no", by="ada")
    assert (run.status, run.saga) == (RunStatus.QUEUED, "compensating")
    assert (await app.cancel("r")).saga == "compensating"
    run = await app.drive("r")
    assert (run.status, run.saga, run.cancel_reason) == ("cancelled", "compensated", "no")
    assert shop.undone == ["a"]


async def test_run_without_anything_to_undo_is_cancelled_at_once(app: AgentFlow) -> None:
    await drive(app, chain(("ask", lambda _: {"log": [interrupt("?")]})))
    run = await app.cancel("r")
    assert (run.status, run.saga) == ("cancelled", None)


@pytest.mark.parametrize("by_hand", [True, False])
async def test_compensation_that_fails_is_left_and_the_others_go_on(
    app: AgentFlow, shop: Shop, *, by_hand: bool
) -> None:
    """Somebody sees to it then: by hand, or by having it tried again."""
    shop.refuses.add("b")
    shop.unbook_once = effect(retry=ONCE)(shop.unbook)  # type: ignore[attr-defined]
    shop.book = effect(compensate=shop.unbook_once, name="tests:book once")(shop._book)  # type: ignore[attr-defined]
    steps = [(name, books(shop, name, fails=name == "c")) for name in "abc"]
    run = await drive(app, chain(*steps))
    assert (run.status, run.saga, shop.undone) == ("failed", "partially_compensated", ["c", "a"])
    left = [e for e in (await app.effects.list(run_id="r")).items if e.kind == "compensation"]
    (failed,) = [each for each in left if each.status is EffectStatus.FAILED]
    await app.effects.resolve(failed.id, happened=False, by="ada")
    run = await app.drive("r")  # it still fails
    assert (run.status, run.saga, run.dead_letter) == ("failed", "partially_compensated", True)
    if by_hand:
        await app.effects.resolve(failed.id, happened=True, by="ada")
    else:
        shop.refuses.clear()
        await app.effects.resolve(failed.id, happened=False, by="ada")
        await app.drive("r")
    run = await app.get_run("r")
    assert (run.status, run.saga, run.dead_letter) == ("failed", "compensated", True)
    assert shop.undone == (["c", "a"] if by_hand else ["c", "a", "b"])


async def test_effect_in_doubt_is_cleared_up_before_anything_is_undone(
    app: AgentFlow, shop: Shop
) -> None:
    async def hangs(what: str) -> None:
        await asyncio.Event().wait()

    hang = effect(compensate=shop.unbook, timeout=0.02, on_in_doubt="fail", name="tests:hang")(
        hangs
    )

    async def node(state: State) -> State:
        await hang("b")
        return {}

    run = await drive(app, chain(("a", books(shop, "a")), ("b", node)))
    assert (run.status, run.saga, shop.undone) == (RunStatus.WAITING, "compensating", [])
    (asked,) = (await app.approvals.list()).items
    said = {"happened": True, "outcome": "booked b"}
    await app.approvals.decide(asked.id, {"type": "respond", "value": said}, by="ada")
    run = await app.drive("r")
    assert (run.status, run.saga, shop.undone) == ("failed", "compensated", ["b", "a"])


@pytest.mark.parametrize("answer", ["happened", "did not happen", "reject"])
@pytest.mark.parametrize("can_be_undone", [True, False])
async def test_whoever_cancels_a_run_in_doubt_is_asked_again_before_it_is_undone(
    app: AgentFlow, shop: Shop, answer: str, can_be_undone: bool
) -> None:
    async def hangs(what: str) -> None:
        await asyncio.Event().wait()

    undo: dict[str, Any] = {"compensate": shop.unbook} if can_be_undone else {}
    hang = effect(timeout=0.02, name=f"tests:doubt-{can_be_undone}", **undo)(hangs)

    async def node(state: State) -> State:
        await hang("b")
        return {}

    async def decide(decision: dict[str, Any]) -> Run:
        (asked,) = (await app.approvals.list()).items
        questions.append(asked.interrupt_id)
        await app.approvals.decide(asked.id, decision, by="ada")
        return await app.drive("r")

    questions: list[str] = []
    run = await drive(app, chain(("a", books(shop, "a")), ("b", node)))
    assert (run.status, run.saga) == (RunStatus.WAITING, None)
    run = await decide({"type": "reject"})
    assert (run.status, run.saga, shop.undone) == (RunStatus.WAITING, "compensating", [])
    said = {"happened": {"happened": True, "outcome": "booked b"}}.get(answer, {"happened": False})
    last = {"type": "reject"} if answer == "reject" else {"type": "respond", "value": said}
    run = await decide(last)
    assert run.status is RunStatus.CANCELLED
    assert len(set(questions)) == 2
    is_undone = can_be_undone and answer == "happened"
    assert shop.undone == (["b", "a"] if is_undone else ["a"])


async def test_what_was_undone_is_done_again_by_a_run_that_is_requeued(
    app: AgentFlow, shop: Shop
) -> None:
    fails = [ValueError()]

    async def node(state: State) -> State:
        made = await shop.book("a")
        if fails:
            raise fails.pop()
        return {"log": [made]}

    assert (await drive(app, chain(("a", node)))).saga == "compensated"
    await app.dead_letters.requeue("r")
    run = await app.drive("r")
    assert (run.status, run.saga, run.output) == ("succeeded", None, {"log": ["booked a"]})
    assert (shop.done, shop.undone) == (["a", "a"], ["a"])


@pytest.mark.parametrize("how", ["requeue", "submit"])
async def test_run_whose_effects_were_undone_is_executed_again_from_its_start(
    app: AgentFlow, shop: Shop, how: str
) -> None:
    """Or else it would end well although what its first nodes did is undone."""
    fails = [ValueError()]

    def fail(state: State) -> State:
        if fails:
            raise fails.pop()
        return {}

    await drive(app, chain(("a", books(shop, "a")), ("b", books(shop, "b")), ("c", fail)))
    assert shop.undone == ["b", "a"]
    if how == "requeue":
        await app.dead_letters.requeue("r")
    else:
        await app.submit("g", {"log": []}, run_id="r", on_existing="restart_if_failed")
    run = await app.drive("r")
    assert (run.status, run.saga) == ("succeeded", None)
    assert run.output == {"log": ["booked a", "booked b"]}
    assert shop.done == ["a", "b", "a", "b"]


async def test_decision_of_a_run_whose_effects_were_undone_stands(
    app: AgentFlow, shop: Shop
) -> None:
    def ask(state: State) -> State:
        request_approval("go on?")
        raise ValueError

    await drive(app, chain(("a", books(shop, "a")), ("b", ask)))
    (asked,) = (await app.approvals.list()).items
    await app.approvals.decide(asked.id, "approve", by="ada")
    assert (await app.drive("r")).saga == "compensated"
    with pytest.raises(ConflictError, match="compensated"):
        await app.approvals.reopen(asked.id, by="ada")


async def test_call_whose_outcome_cannot_be_stored_is_undone_with_one_that_somebody_gives(
    app: AgentFlow, shop: Shop
) -> None:
    async def lock(what: str) -> Any:
        shop.done.append(what)
        return threading.Lock()

    book = effect(compensate=shop.unbook, name="tests:lock")(lock)

    async def node(state: State) -> State:
        await book("a")
        return {}

    run = await drive(app, chain(("a", node)))
    assert (run.status, run.saga, shop.done) == ("waiting", "compensating", ["a"])
    (asked,) = (await app.approvals.list()).items
    said = {"happened": True, "outcome": "booked a"}
    await app.approvals.decide(asked.id, {"type": "respond", "value": said}, by="ada")
    run = await app.drive("r")
    assert (run.status, run.saga, shop.undone) == ("failed", "compensated", ["a"])
