"""Effects in graphs that are driven: called once, whatever runs again."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy as NodeRetry
from langgraph.types import Send, interrupt

from agentflow import AgentFlow, RetryPolicy, effect, effect_context
from agentflow.effects import Happened, run_effect
from agentflow.errors import ConflictError, InvalidDecisionError, InvalidInputError, RunError
from agentflow.journal import EffectStatus
from agentflow.types import Run, RunStatus
from tests.integration.graphs import State, chain, fan
from tests.integration.sealed import ring

AGAIN = RetryPolicy(initial_interval=0, jitter=False, max_attempts=4)


class Outside:
    """The outside world: counts what is done to it."""

    def __init__(self) -> None:
        self.calls: Counter[Any] = Counter()

    def call(self, what: Any) -> Any:
        self.calls[what] += 1
        return what


@dataclass(frozen=True)
class Receipt:
    """An outcome of a class."""

    amount: int


class DeclinedError(Exception):
    """What a bank says, with a code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"declined: {code}")
        self.code = code


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


@pytest.fixture
def outside() -> Outside:
    return Outside()


async def drive(app: AgentFlow, graph: Any, *, run_id: str = "r", **options: Any) -> Run:
    """Drive a new run of a graph whose attempts follow one another at once."""
    app.register(graph, name="g", retry=AGAIN, **options)
    await app.submit("g", {"log": []}, run_id=run_id)
    return await app.drive(run_id)


def failing(times: int) -> Any:
    """Return a function that raises so many times."""
    left = [times]

    def fail() -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("no")

    return fail


async def types(app: AgentFlow, run_id: str = "r") -> Counter[str]:
    return Counter(event.type for event in await app.list_events(run_id))


@pytest.mark.parametrize("kind", ["async", "sync", "sync in async"])
async def test_outcome_is_returned_when_the_node_runs_again(
    app: AgentFlow, outside: Outside, kind: str
) -> None:
    fail = failing(2)

    @effect
    async def pay(amount: int) -> Receipt:
        return Receipt(outside.call(amount))

    @effect
    def pay_now(amount: int) -> Receipt:
        return Receipt(outside.call(amount))

    async def node(state: State) -> State:
        receipt = await pay(7) if kind == "async" else pay_now(7)
        fail()
        return {"log": [receipt.amount]}

    def sync_node(state: State) -> State:
        receipt = pay_now(7)
        fail()
        return {"log": [receipt.amount]}

    run = await drive(app, chain(("a", sync_node if kind == "sync" else node)))
    assert (run.status, run.output, outside.calls) == ("succeeded", {"log": [7]}, {7: 1})
    assert (await types(app))["effect.succeeded"] == 1


async def test_each_call_of_a_node_is_an_effect_of_its_own(
    app: AgentFlow, outside: Outside
) -> None:
    """In a loop, in branches, under `gather`, in subgraphs, and twice with the same arguments."""
    fails = [failing(1) for _ in range(3)]

    @effect
    async def act(what: str) -> str:
        await asyncio.sleep(0)
        return str(outside.call(what))

    async def twice(state: State) -> State:
        made = await asyncio.gather(act("same"), act("same"), act("other"))
        fails[0]()
        return {"log": [*made]}

    async def branch(state: State) -> State:
        made = await act("branch")
        fails[1]()
        return {"log": [made]}

    async def inner(state: State) -> State:
        made = await act("inner")
        fails[2]()
        return {"log": [made]}

    sub = chain(("x", inner), ("y", inner)).compile()
    graph = chain(("twice", twice), ("sub", sub), ("again", twice))
    graph.add_node("branch", branch)
    graph.add_conditional_edges("again", lambda _: [Send("branch", {}), Send("branch", {})])
    run = await drive(app, graph)
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert outside.calls == {"same": 4, "other": 2, "inner": 2, "branch": 2}


async def test_key_names_an_effect_in_its_run_or_in_the_tenant(
    app: AgentFlow, outside: Outside
) -> None:
    @effect(key="once")
    async def in_run(n: int) -> int:
        outside.calls.update([("run", n)])
        return n

    @effect(key="once", scope="global")
    async def in_tenant(n: int) -> int:
        outside.calls.update([("tenant", n)])
        return n

    async def node(state: State) -> State:
        both = await asyncio.gather(in_run(1), in_run(1), in_run(1))
        return {"log": [both, await in_tenant(1)]}

    run = await drive(app, chain(("a", node), ("b", node)))
    await app.submit("g", {"log": []}, run_id="second")
    second = await app.drive("second")
    assert run.output == second.output == {"log": [[1, 1, 1], 1, [1, 1, 1], 1]}
    assert outside.calls == {("run", 1): 2, ("tenant", 1): 1}


async def test_same_key_with_other_arguments_is_refused_and_shows_where_they_differ(
    app: AgentFlow, outside: Outside
) -> None:
    @effect(key="k")
    async def pay(order: dict[str, Any]) -> Any:
        return outside.call(order["id"])

    async def node(state: State) -> State:
        await pay({"id": 1, "secret": "s3cret"})
        await pay({"id": 2, "secret": "s3cret"})
        return {}

    run = await drive(app, chain(("a", node)))
    assert run.status is RunStatus.FAILED
    assert run.error is not None
    assert "EffectConflictError" in run.error.type
    assert "order.id" in run.error.message
    assert "s3cret" not in run.error.message
    assert (run.attempt, outside.calls) == (1, {1: 1})


async def test_exception_stands_and_is_raised_again_as_it_was(
    app: AgentFlow, outside: Outside
) -> None:
    fail, caught = failing(1), []

    @effect
    async def pay(n: int) -> None:
        outside.call(n)
        raise DeclinedError(51)

    async def node(state: State) -> State:
        try:
            await pay(1)
        except DeclinedError as error:
            caught.append((error.code, str(error)))
        fail()
        return {"log": ["declined"]}

    run = await drive(app, chain(("a", node)))
    assert (run.output, outside.calls) == ({"log": ["declined"]}, {1: 1})
    assert caught == [(51, "declined: 51")] * 2


async def test_exception_that_is_too_large_to_be_kept_leaves_no_doubt(
    app: AgentFlow, outside: Outside
) -> None:
    """It says that the call has ended, if not all that it said."""

    @effect
    async def pay(n: int) -> None:
        outside.call(n)
        raise DeclinedError("x" * app._settings.max_payload)  # type: ignore[arg-type]  # the point

    async def node(state: State) -> State:
        await pay(1)
        return {}

    run = await drive(app, chain(("a", node)))
    assert (run.status, outside.calls) == (RunStatus.FAILED, {1: 1})
    [kept] = (await app.effects.list()).items
    assert (kept.status, kept.failure and kept.failure.args) == (EffectStatus.FAILED, None)


async def test_retry_policy_says_which_exceptions_are_worth_another_call(
    app: AgentFlow, outside: Outside
) -> None:
    policy = RetryPolicy(initial_interval=0, max_attempts=3, retry_on=ConnectionError)
    seen: list[tuple[int, bool]] = []

    @effect(retry=policy)
    async def pay(n: int) -> int:
        context = effect_context()
        seen.append((context.call, context.may_have_run))
        if outside.calls[n] < 2:
            outside.call(n)
            raise ConnectionError
        return n

    @effect(on_in_doubt="retry")
    async def idempotent(n: int) -> int:
        outside.call("idempotent")
        if outside.calls["idempotent"] < 2:
            raise ConnectionError
        return n

    async def node(state: State) -> State:
        return {"log": [await pay(1), await idempotent(2)]}

    run = await drive(app, chain(("a", node)))
    assert (run.status, run.output) == ("succeeded", {"log": [1, 2]})
    assert seen == [(1, False), (2, True), (3, True)]
    assert outside.calls["idempotent"] == 2


async def test_what_langgraph_tries_again_in_its_process_is_not_called_again(
    app: AgentFlow, outside: Outside
) -> None:
    fail = failing(2)

    @effect
    async def pay(n: int) -> int:
        return int(outside.call(n))

    async def node(state: State) -> State:
        made = [await pay(1), await pay(1)]
        fail()
        return {"log": made}

    graph = chain()
    graph.add_node(
        "a", node, retry_policy=NodeRetry(initial_interval=0, max_attempts=3, retry_on=OSError)
    )
    graph.add_edge("__start__", "a")
    run = await drive(app, graph)
    assert (run.output, outside.calls) == ({"log": [1, 1]}, {1: 2})


class Stuck:
    """A call that takes longer than its timeout, the first time."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside

    async def __call__(self, n: int) -> Receipt:
        self._outside.call(n)
        if self._outside.calls[n] == 1:
            await asyncio.Event().wait()
        return Receipt(n)


@pytest.mark.parametrize("happened", [True, False])
async def test_effect_in_doubt_is_asked_about_and_no_interrupt_gets_the_answer(
    app: AgentFlow, outside: Outside, happened: bool
) -> None:
    stuck = Stuck(outside)

    @effect(timeout=0.02)
    async def pay(n: int) -> Receipt:
        return await stuck(n)

    answers: list[Any] = []

    async def node(state: State) -> State:
        answers.append(interrupt("go on?"))
        receipt = await pay(5)
        return {"log": [receipt, interrupt("and now?")]}

    run = await drive(app, fan(("a", node), ("b", lambda _: {"log": ["b"]})))
    (first,) = (await app.approvals.list()).items
    await app.approvals.decide(first.id, {"type": "respond", "value": "yes"}, by="ada")
    run = await app.drive("r")
    assert run.status is RunStatus.WAITING
    (asked,) = (await app.approvals.list()).items
    assert (asked.kind, asked.request.proposal["arguments"]) == ("effect", {"n": 5})
    with pytest.raises(InvalidDecisionError):
        await app.approvals.decide(asked.id, {"type": "respond", "value": "yes"}, by="ada")
    said = {"happened": happened, "outcome": {"amount": 9}} if happened else {"happened": False}
    await app.approvals.decide(asked.id, {"type": "respond", "value": said}, by="ada")
    await app.drive("r")
    (last,) = (await app.approvals.list()).items
    await app.approvals.decide(last.id, {"type": "respond", "value": "done"}, by="ada")
    run = await app.drive("r")
    assert run.status is RunStatus.SUCCEEDED, run.error
    amount = 9 if happened else 5
    assert sorted(map(str, run.output["log"])) == sorted(map(str, [Receipt(amount), "done", "b"]))
    assert set(answers) == {"yes"}
    assert outside.calls == {5: 1 if happened else 2}
    assert (await types(app))["effect.resolved"] == 1


async def test_rejecting_an_effect_in_doubt_cancels_the_run(
    app: AgentFlow, outside: Outside
) -> None:
    pay = effect(timeout=0.02)(Stuck(outside).__call__)

    async def node(state: State) -> State:
        await pay(5)
        return {}

    await drive(app, chain(("a", node)))
    (asked,) = (await app.approvals.list()).items
    await app.approvals.decide(asked.id, "reject", by="ada")
    assert (await app.get_run("r")).status is RunStatus.CANCELLED


@pytest.mark.parametrize("found", [Happened(Receipt(3)), None])
async def test_function_is_asked_about_an_effect_in_doubt(
    app: AgentFlow, outside: Outside, found: Happened | None
) -> None:
    async def check(n: int) -> Happened | None:
        return found

    pay = effect(timeout=0.02, check=check)(Stuck(outside).__call__)

    async def node(state: State) -> State:
        return {"log": [(await pay(5)).amount]}

    run = await drive(app, chain(("a", node)))
    assert run.output == {"log": [3 if found else 5]}
    assert outside.calls == {5: 1 if found else 2}


async def test_effect_in_doubt_that_is_to_fail_can_be_resolved_and_requeued(
    app: AgentFlow, outside: Outside
) -> None:
    pay = effect(timeout=0.02, on_in_doubt="fail")(Stuck(outside).__call__)

    async def node(state: State) -> State:
        return {"log": [(await pay(5)).amount]}

    run = await drive(app, chain(("a", node)))
    assert run.status is RunStatus.FAILED
    assert run.attempt == 1
    (record,) = (await app.effects.list(run_id="r")).items
    resolved = await app.effects.resolve(
        record.id, happened=True, outcome={"amount": 2}, by="ada", comment="seen"
    )
    assert (resolved.status, resolved.comment) == (EffectStatus.SUCCEEDED, "seen")
    with pytest.raises(ConflictError, match="not in doubt"):
        await app.effects.resolve(record.id, happened=False, by="ada")
    await app.dead_letters.requeue("r")
    assert (await app.drive("r")).output == {"log": [2]}
    assert outside.calls == {5: 1}


async def test_call_under_way_is_waited_for_when_a_branch_fails(
    app: AgentFlow, outside: Outside
) -> None:
    """Also in a thread, which nothing can stop."""
    fail, let_go, begun = failing(1), threading.Event(), threading.Barrier(3)

    @effect
    async def pay(n: int) -> int:
        await asyncio.to_thread(begun.wait, 10)
        await asyncio.to_thread(let_go.wait, 10)
        return int(outside.call(n))

    @effect
    def pay_in_thread(n: int) -> int:
        begun.wait(10)
        let_go.wait(10)
        return int(outside.call(n))

    async def slow(state: State) -> State:
        return {"log": [await pay(1)]}

    def thread(state: State) -> State:
        return {"log": [pay_in_thread(2)]}

    async def fails(state: State) -> State:
        if not begun.broken and not let_go.is_set():
            await asyncio.to_thread(begun.wait, 10)
            asyncio.get_running_loop().call_later(0.05, let_go.set)
        fail()
        return {"log": [3]}

    run = await drive(app, fan(("slow", slow), ("thread", thread), ("fails", fails)))
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert sorted(run.output["log"]) == [1, 2, 3]
    assert outside.calls == {1: 1, 2: 1}


async def test_outcome_that_cannot_be_stored_fails_the_run_and_is_not_called_again(
    app: AgentFlow, outside: Outside
) -> None:
    @effect(on_in_doubt="retry")
    async def pay(n: int) -> Any:
        outside.call(n)
        return threading.Lock()

    async def node(state: State) -> State:
        await pay(1)
        return {}

    run = await drive(app, chain(("a", node)))
    assert run.status is RunStatus.FAILED
    await app.dead_letters.requeue("r")
    assert (await app.drive("r")).status is RunStatus.FAILED
    assert outside.calls == {1: 1}


async def test_nodes_of_our_own_call_without_a_decorated_function(
    app: AgentFlow, outside: Outside
) -> None:
    fail = failing(1)

    async def node(state: State) -> State:
        async def call(context: Any) -> Any:
            return outside.call(context.attempt)

        made = await run_effect(call, name="tests:ours", arguments={"n": 1}, on_in_doubt="retry")
        fail()
        return {"log": [made]}

    run = await drive(app, chain(("a", node)))
    assert (run.output, outside.calls) == ({"log": [1]}, {1: 1})


async def test_outside_of_a_run_it_is_called_and_warns_once() -> None:
    @effect
    async def pay(n: int) -> int:
        return n

    with pytest.warns(UserWarning, match="outside of a run") as warned:
        assert [await pay(1), await pay(2)] == [1, 2]
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert await pay(3) == 3
    with pytest.raises(RunError, match="no effect here"):
        effect_context()


def test_call_outside_of_a_run_has_a_key_to_send_along() -> None:
    @effect
    def pay() -> tuple[str, bool]:
        context = effect_context()
        return context.idempotency_key, context.may_have_run

    with pytest.warns(UserWarning, match="outside of a run"):
        first, second = pay(), pay()
    assert first[0]
    assert first[0] != second[0]
    assert not first[1]


@pytest.mark.parametrize(
    "options",
    [
        {"on_in_doubt": "guess"},
        {"on_in_doubt": "check"},
        {"scope": "galaxy"},
        {"timeout": 0},
        {"in_doubt_on": [OSError()]},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        effect(**options)


async def _streams() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("target", [_streams, Outside(), partial(Outside().call, 1)])
def test_what_is_no_function_is_refused(target: Any) -> None:
    with pytest.raises(InvalidInputError, match="invalid effect"):
        effect()(target)


async def test_arguments_that_do_not_name_a_call_need_a_key(
    app: AgentFlow, outside: Outside
) -> None:
    @effect
    async def pay(client: object) -> None:
        outside.call("never")

    async def node(state: State) -> State:
        await pay(object())
        return {}

    run = await drive(app, chain(("a", node)))
    assert run.error is not None
    assert "arguments.client" in run.error.message
    assert outside.calls == {}


async def test_key_is_found_when_keys_have_been_rotated(sqlite_url: str, outside: Outside) -> None:
    @effect(key="once", scope="global")
    async def pay(n: int) -> int:
        return int(outside.call(n))

    async def node(state: State) -> State:
        return {"log": [await pay(1)]}

    for names in (("old",), ("new", "old"), ("new",)):
        async with AgentFlow(sqlite_url, keys=ring(*names)) as app:
            run = await drive(app, chain(("a", node)), run_id="-".join(names))
            assert run.output == {"log": [1]}, run.error
            if len(names) > 1:
                await app.rotate_keys()
    assert outside.calls == {1: 1}


async def test_error_handler_of_a_node_hears_nothing_of_an_effect_in_doubt(app: AgentFlow) -> None:
    """Beside another branch, where LangGraph hands handlers whatever a node raises."""
    heard: list[str] = []
    calls: list[int] = []

    @effect(timeout=0.05)
    async def pay() -> str:
        calls.append(1)
        await asyncio.Event().wait()
        return "paid"

    async def node(state: State) -> State:
        return {"log": [await pay()]}

    async def beside(state: State) -> State:
        return {"log": ["beside"]}

    def handler(state: State) -> State:
        heard.append("handler")
        return {"log": ["handled"]}

    graph = StateGraph(State)
    graph.add_node("a", node, error_handler=handler)
    graph.add_node("b", beside)
    graph.add_edge(START, "a")
    graph.add_edge(START, "b")
    app.register(graph, name="g")
    await app.submit("g", {"log": []}, run_id="r")
    assert (await app.drive("r")).status == "waiting"
    assert heard == []
    (asked,) = (await app.approvals.list()).items
    said = {"happened": True, "outcome": "paid"}
    await app.approvals.decide(asked.id, {"type": "respond", "value": said}, by="ada")
    run = await app.drive("r")
    assert (run.status, sorted(run.output["log"])) == ("succeeded", ["beside", "paid"])
    assert (heard, calls) == ([], [1])


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_exception_on_record_is_built_only_if_the_allow_list_has_it(is_allowed: bool) -> None:
    raised: list[str] = []
    name = f"{DeclinedError.__module__}:{DeclinedError.__qualname__}"

    @effect(key="pay")
    async def pay() -> str:
        raise DeclinedError(51)

    async def node(state: State) -> State:
        try:
            await pay()
        except Exception as error:  # noqa: BLE001 -- whatever it is
            raised.append(type(error).__name__)
        if len(raised) == 1:
            raise OSError
        return {"log": ["ended"]}

    async with AgentFlow("memory://", allow=[name] if is_allowed else ["none:None"]) as app:
        app.register(chain(("a", node)), name="g", retry=AGAIN)
        await app.submit("g", {"log": []}, run_id="r")
        run = await app.drive("r")
    assert run.status == "succeeded", run.error
    assert raised == ["DeclinedError", "DeclinedError" if is_allowed else "EffectFailedError"]
