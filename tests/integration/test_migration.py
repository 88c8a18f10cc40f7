"""Migrations of waiting runs: what is carried over, and what is refused and left as it is."""

from __future__ import annotations

import asyncio
import operator
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.channels import DeltaChannel
from langgraph.graph import START, StateGraph
from langgraph.types import Send, interrupt
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from agentflow import AgentFlow, effect
from agentflow.checkpoint import Saver
from agentflow.errors import InvalidInputError, MigrationError, ThreadBusyError
from agentflow.failpoints import arm
from agentflow.types import RunStatus, WaitStatus
from tests.integration.versions import Shape

TO_CENTS = {"amount": "cents"}
called: list[str] = []
"""Nodes that have finished, in order."""


class Old(TypedDict, total=False):
    """The state of version 1."""

    log: Annotated[list[str], operator.add]
    amount: float


class New(TypedDict, total=False):
    """The state of versions 2 and 3."""

    log: Annotated[list[str], operator.add]
    cents: int


class Reshaped(BaseModel):
    """The state of `Shape` with another type."""

    log: Annotated[list[str], operator.add] = []
    rounds: list[int] = []
    stop: str = ""
    note: str = ""


def graph(asker: str = "ask", schema: Any = Old, *, sends: bool = False) -> Any:
    """Build a graph: two that finish beside one that asks twice, then one that joins them."""

    def does(name: str) -> Any:
        def node(_: Any) -> Any:
            called.append(name)
            return {"log": [name]}

        return node

    def asks(state: Any) -> Any:
        first, second = interrupt("sure?"), interrupt("really?")
        called.append("ask")
        return {"log": [first["type"], second["type"], str(state.get("cents", "old"))]}

    builder: Any = StateGraph(schema)
    builder.add_node("left", does("left"))
    builder.add_node(asker, asks)
    builder.add_node("join", does("join"))
    if sends:
        fan = [Send("left", {}), Send(asker, {"cents": 7}), Send("left", {})]
        builder.add_conditional_edges(START, lambda _: fan, ["left", asker])
    else:
        builder.add_edge(START, "left")
        builder.add_edge(START, asker)
    builder.add_edge(["left", asker], "join")
    return builder.compile()


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    """An app with version 1, and version 2 with its migration."""
    called.clear()
    async with AgentFlow("memory://") as opened:
        opened.register(graph(), name="g")
        yield opened


def second(app: AgentFlow, function: Callable[[Any], Any] | None = None, **options: Any) -> None:
    """Register version 2 and a migration to it."""
    app.register(graph("manager", New), name="g", version="2")
    options = {"nodes": {"ask": "manager"}, "channels": {"amount": "cents"}, **options}
    app.migration("g", from_="1", to="2", **options)(function or to_cents)


def to_cents(values: dict[str, Any]) -> dict[str, Any]:
    """Migrate as it should be."""
    return {**values, "cents": int(values["cents"] * 100)}


async def waiting(app: AgentFlow, **options: Any) -> str:
    """Drive a run to its first question."""
    handle = await app.submit("g", {"log": [], "amount": 5.0}, **{"version": "1"} | options)
    assert (await app.drive(handle.id)).status is RunStatus.WAITING
    return handle.id


async def answer(app: AgentFlow, run_id: str) -> str:
    """Answer what the run asks, and return the approval's id."""
    [approval] = await app.handle(run_id).approvals()
    await app.approvals.decide(approval.id, {"type": "approve"}, by="ann")
    return approval.id


async def finish(app: AgentFlow, run_id: str) -> list[str]:
    """Answer everything, and return the log of the run at its end."""
    while (run := await app.drive(run_id)).status is RunStatus.WAITING:
        await answer(app, run_id)
    assert run.status is RunStatus.SUCCEEDED
    log: list[str] = run.output["log"]
    return log


@pytest.mark.parametrize("answers", [0, 1])
async def test_question_stays_and_what_has_finished_is_not_done_again(
    app: AgentFlow, answers: int
) -> None:
    run_id = await waiting(app)
    for _ in range(answers):
        await answer(app, run_id)
        await app.drive(run_id)
    before = (await app.handle(run_id).approvals())[0]
    second(app)
    run = await app.migrate_run(run_id, by="ann")
    assert (run.version, run.status) == ("2", RunStatus.WAITING)
    [after] = await app.handle(run_id).approvals()
    assert (after.id, after.request) == (before.id, before.request)
    assert await finish(app, run_id) == ["left", "approve", "approve", "500", "join"]
    assert called == ["left", "ask", "join"]


async def test_decision_that_nobody_has_delivered_is_delivered_to_the_new_version(
    app: AgentFlow,
) -> None:
    run_id = await waiting(app)
    await answer(app, run_id)
    second(app)
    run = await app.migrate_run(run_id)
    assert run.status is RunStatus.QUEUED
    assert await finish(app, run_id) == ["left", "approve", "approve", "500", "join"]


async def test_question_is_superseded_if_the_migration_says_so(app: AgentFlow) -> None:
    run_id = await waiting(app)
    [before] = await app.handle(run_id).approvals()
    second(app, ask_again=True)
    assert (await app.migrate_run(run_id)).status is RunStatus.QUEUED
    assert (await app.approvals.get(before.id)).status is WaitStatus.SUPERSEDED
    assert await finish(app, run_id) == ["left", "approve", "approve", "500", "join"]
    assert called == ["left", "ask", "join"]


async def test_what_was_sent_is_carried_over(app: AgentFlow) -> None:
    app._registry.graphs.clear()
    app.register(graph(sends=True), name="g")
    run_id = await waiting(app)
    app.register(graph("manager", New, sends=True), name="g", version="2")
    app.migration("g", from_="1", to="2", nodes={"ask": "manager"}, channels={"amount": "cents"})(
        to_cents
    )
    await app.migrate_run(run_id)
    log = await finish(app, run_id)
    assert log == ["left", "approve", "approve", "7", "left", "join"]
    assert called == ["left", "left", "ask", "join"]


async def test_node_that_is_deferred_until_the_answer_is_carried_over(app: AgentFlow) -> None:
    def deferred(asker: str, schema: Any) -> Any:
        builder: Any = StateGraph(schema)
        for name in ("left", asker):
            builder.add_node(name, graph(asker, schema).builder.nodes[name].runnable)
            builder.add_edge(START, name)
            builder.add_edge(name, "late")
        builder.add_node("late", lambda _: {"log": ["late"]}, defer=True)
        return builder.compile()

    app._registry.graphs.clear()
    app.register(deferred("ask", Old), name="g")
    run_id = await waiting(app)
    app.register(deferred("manager", New), name="g", version="2")
    app.migration("g", from_="1", to="2", nodes={"ask": "manager"}, channels={"amount": "cents"})(
        to_cents
    )
    assert (await app.migrate_run(run_id)).status is RunStatus.WAITING
    assert (await finish(app, run_id))[-1] == "late"
    assert called == ["left", "ask"]


async def test_migrations_follow_each_other_and_the_old_checkpoint_stays(app: AgentFlow) -> None:
    run_id = await waiting(app)
    second(app)
    app.register(graph("boss", New), name="g", version="3")
    app.migration("g", from_="2", to="3", nodes={"manager": "boss"})(
        lambda values: {**values, "cents": values["cents"] + 1}
    )
    before = (await app.get_run(run_id)).checkpoint_id
    run = await app.migrate_run(run_id)
    assert run.version == "3"
    config: Any = {"configurable": {"thread_id": run.thread_id}}
    head, parent = [each async for each in app._saver.alist(config, limit=2)]
    assert parent.checkpoint["id"] == before
    assert parent.checkpoint["channel_values"]["amount"] == 5.0
    assert head.parent_config is not None
    assert head.parent_config["configurable"]["checkpoint_id"] == before
    assert "amount" not in head.checkpoint["channel_values"]
    assert "501" in await finish(app, run_id)


async def test_nodes_and_channels_change_places(app: AgentFlow) -> None:
    class Pair(TypedDict, total=False):
        log: Annotated[list[str], operator.add]
        one: str
        two: str

    def pair(*names: str) -> Any:
        builder: Any = StateGraph(Pair)
        builder.add_node("set", lambda _: {"one": "1", "two": "2"})
        builder.add_node(names[0], lambda _: {"log": [interrupt("?")["type"]]})
        builder.add_node(names[1], lambda state: {"log": [state["one"], state["two"]]})
        builder.add_edge(START, "set")
        builder.add_edge("set", names[0])
        builder.add_edge(names[0], names[1])
        return builder.compile()

    app.register(pair("a", "b"), name="pair", version="1")
    await app.submit("pair", {"log": []}, run_id="r")
    await app.drive("r")
    app.register(pair("b", "a"), name="pair", version="2")
    nodes, channels = {"b": "a", "a": "b"}, {"one": "two", "two": "one"}
    app.migration("pair", from_="1", to="2", nodes=nodes, channels=channels)(lambda values: values)
    assert (await app.migrate_run("r")).status is RunStatus.WAITING
    assert await finish(app, "r") == ["approve", "2", "1"]


async def test_run_that_has_not_begun_only_gets_the_version(app: AgentFlow) -> None:
    handle = await app.submit("g", {"log": []}, version="1")
    second(app)
    assert (await app.migrate_run(handle.id)).version == "2"
    assert (await app.drive(handle.id)).status is RunStatus.WAITING


_numbers = count()
REFUSED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "impure": (lambda v: {**v, "cents": next(_numbers)}, {}, "not pure.* at cents"),
    "type": (lambda v: {**v, "cents": "many"}, {}, r"cents: Input should be a valid integer"),
    "path": (lambda v: {**v, "log": ["a", 1], "cents": 1}, {}, r"log\.1: Input should be a valid"),
    "channel": (lambda v: {**v, "cents": 1, "rate": 2}, {}, "rate: there is no such channel"),
    "raises": (lambda v: v["nothing"], {}, "raised KeyError"),
    "nothing": (lambda _: None, {}, "returned NoneType"),
    "node": (to_cents, {"nodes": {}}, "node 'ask' is due, and the new version has none"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_migration_that_cannot_be_right_is_refused_and_changes_nothing(
    app: AgentFlow, case: str
) -> None:
    function, options, reason = REFUSED[case]
    run_id = await waiting(app)
    second(app, function, **options)
    before = await app.get_run(run_id), await app.list_events(run_id), await app.state(run_id)
    with pytest.raises(MigrationError, match=reason):
        await app.migrate_run(run_id)
    report = await app.migrate_runs("g", dry_run=True)
    assert [run.outcome for run in report.runs] == ["refused"]
    after = await app.get_run(run_id), await app.list_events(run_id), await app.state(run_id)
    assert after == before
    assert "old" in await finish(app, run_id)


class Model(BaseModel):
    """A state that is checked whenever a node is called."""

    log: Annotated[list[str], operator.add] = []
    currency: str
    cents: int = Field(default=0, ge=0)


@dataclass
class Record:
    """The same as a record."""

    currency: str
    log: Annotated[list[str], operator.add]


@pytest.mark.parametrize(
    ("schema", "changes", "reason"),
    [
        (Model, {}, "currency: Field required"),
        (Model, {"currency": "secret", "cents": -1}, "cents: Input should be greater"),
        (Record, {}, "currency: Field required"),
    ],
    ids=str,
)
async def test_state_that_the_next_node_could_not_take_is_refused(
    app: AgentFlow, schema: Any, changes: dict[str, Any], reason: str
) -> None:
    run_id = await waiting(app)
    app.register(graph(schema=schema), name="g", version="2")
    app.migration("g", from_="1", to="2")(lambda values: {"log": values["log"], **changes})
    report = await app.migrate_runs("g")
    [found] = report.runs
    assert (found.outcome, (await app.get_run(run_id)).version) == ("refused", "1")
    assert found.reason is not None
    assert reason in found.reason
    assert "secret" not in found.reason


def nesting(
    outside: list[str], asker: str, schema: Any, *, sends: bool = False, calls: bool = False
) -> Any:
    """Build a graph around one in a graph, which pays, asks twice beside another one, and ships.

    Args:
        outside: What was done, in order.
        asker: The name of the node with the subgraph.
        schema: The outermost state.
        sends: Whether the subgraph is sent to, twice at once.
        calls: Whether a node calls it, and then asks itself.
    """

    @effect(name="migration:nested")
    async def call(what: str) -> str:
        outside.append(what)
        return what

    def does(name: str) -> Any:
        def node(_: Any) -> Any:
            outside.append(name)
            return {"log": [name]}

        return node

    async def asks(_: Any) -> Any:
        paid = await call("pay")
        answers = [interrupt("sure?")["type"], interrupt("really?")["type"]]
        return {"log": [paid, *answers, await call("ship")]}

    async def calls_it(_: Any) -> Any:
        done = await middle.ainvoke({"log": []})
        return {"log": [*done["log"], interrupt("own?")["type"]]}

    inner: Any = StateGraph(Old)
    inner.add_node("ask", asks)
    inner.add_node("left", does("left"))
    inner.add_node("join", does("join"))
    inner.add_edge(START, "ask")
    inner.add_edge(START, "left")
    inner.add_edge(["ask", "left"], "join")
    around: Any = StateGraph(Old)
    around.add_node("deep", inner.compile())
    around.add_edge(START, "deep")
    middle = around.compile()
    builder: Any = StateGraph(schema)
    builder.add_node("first", does("first"))
    builder.add_node(asker, calls_it if calls else middle)
    builder.add_node("beside", does("beside"))
    builder.add_node("end", does("end"))
    builder.add_edge(START, "first")
    builder.add_edge("first", "beside")
    if sends:
        sent = [Send(asker, {}), Send(asker, {})]
        builder.add_conditional_edges("first", lambda _: sent, [asker])
    else:
        builder.add_edge("first", asker)
    builder.add_edge([asker, "beside"], "end")
    return builder.compile()


@pytest.mark.parametrize("options", [{}, {"sends": True}, {"calls": True}], ids=str)
@pytest.mark.parametrize("answers", [0, 1, 2])
async def test_run_goes_on_inside_of_its_subgraph(answers: int, options: dict[str, Any]) -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as opened:
        opened.register(nesting(outside, "sub", Old, **options), name="n", version="1")
        await opened.submit("n", {"log": [], "amount": 5.0}, run_id="r", version="1")
        run = await opened.drive("r")
        for _ in range(answers):
            for asked in (await opened.handle("r").approvals())[:1]:
                await opened.approvals.decide(asked.id, {"type": "approve"}, by="ann")
            run = await opened.drive("r")
        before = [asked.id for asked in await opened.handle("r").approvals()]
        opened.register(nesting(outside, "under", New, **options), name="n", version="2")
        opened.register(nesting(outside, "below", New, **options), name="n", version="3")
        opened.migration("n", from_="1", to="2", nodes={"sub": "under"}, channels=TO_CENTS)(
            to_cents
        )
        opened.migration("n", from_="2", to="3", nodes={"under": "below"})(lambda values: values)
        for version in ("2", "3") if run.status is RunStatus.WAITING else ():
            run = await opened.migrate_run("r", to=version)
            assert (run.version, run.status) == (version, RunStatus.WAITING)
        assert [asked.id for asked in await opened.handle("r").approvals()] == before
        while (run := await opened.drive("r")).status is RunStatus.WAITING:
            for asked in await opened.handle("r").approvals():
                await opened.approvals.decide(asked.id, {"type": "approve"}, by="ann")
        assert run.status is RunStatus.SUCCEEDED
        times = 2 if "sends" in options else 1
        done = {"first": 1, "beside": 1, "end": 1}
        done |= dict.fromkeys(("left", "pay", "ship", "join"), times)
        assert Counter(outside) == done
        assert run.output["log"].count("approve") == (3 if "calls" in options else 2 * times)
        assert isinstance(opened.checkpointer, Saver)
        async for audited in opened.checkpointer.verify():
            assert audited.damages == []


async def test_question_inside_of_a_subgraph_is_asked_again_if_the_migration_says_so() -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as opened:
        opened.register(nesting(outside, "sub", Old), name="n", version="1")
        await opened.submit("n", {"log": []}, run_id="r")
        await opened.drive("r")
        [before] = await opened.handle("r").approvals()
        opened.register(nesting(outside, "sub", Old), name="n", version="2")
        opened.migration("n", from_="1", to="2", ask_again=True)(lambda values: values)
        # Killed once the subgraph is saved, and before anybody can see it.
        arm("migration.carried", stop_once())
        with pytest.raises(InterruptedError):
            await opened.migrate_run("r")
        assert (await opened.get_run("r")).version == "1"
        assert (await opened.migrate_run("r")).status is RunStatus.QUEUED
        assert (await opened.approvals.get(before.id)).status is WaitStatus.SUPERSEDED
        await opened.drive("r")
        [after] = await opened.handle("r").approvals()
        assert after.id != before.id
        assert isinstance(opened.checkpointer, Saver)
        async for audited in opened.checkpointer.verify():
            assert audited.damages == []
        # Each once; those beside each other come in any order.
        assert sorted(outside) == ["beside", "first", "left", "pay"]


def stop_once() -> Callable[[], None]:
    """Fail at a place once."""
    left = [1]

    def stop() -> None:
        if left:
            left.pop()
            raise InterruptedError

    return stop


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape(names={"second": "other"}), "at 'second', which the new version has not"),
        (Shape(flat=True), "which the new version has not"),
        (Shape(schema=Reshaped), r"where the migrated state is invalid: rounds: Input should"),
    ],
    ids=["renamed", "gone", "retyped"],
)
async def test_subgraph_that_cannot_go_on_is_refused(shape: Shape, reason: str) -> None:
    async with AgentFlow("memory://") as opened:
        opened.register(Shape().build(), name="nested", version="1")
        handle = await opened.submit("nested", {"stop": "second"})
        await opened.drive(handle.id)
        opened.register(shape.build(), name="nested", version="2")
        with pytest.raises(MigrationError, match="no migration leads there"):
            await opened.migrate_run(handle.id)
        rounds: Any = [] if shape.schema is Reshaped else 0
        opened.migration("nested", from_="1", to="2")(lambda values: {**values, "rounds": rounds})
        with pytest.raises(MigrationError, match=f"inside of the subgraph of node 'sub', {reason}"):
            await opened.migrate_run(handle.id)


async def test_migration_of_values_alone_follows_one_of_the_graph(app: AgentFlow) -> None:
    run_id = await waiting(app)
    second(app)
    await app.migrate_run(run_id)
    app.register(graph("manager", New), name="g", version="3")
    app.migration("g", from_="2", to="3")(lambda values: {**values, "cents": 7})
    assert (await app.migrate_run(run_id)).version == "3"
    assert (await app.state(run_id)).values["cents"] == 7


async def test_report_says_what_would_happen_and_a_driven_run_is_let_be(app: AgentFlow) -> None:
    idle, held = await waiting(app), await waiting(app)
    second(app)
    await answer(app, held)
    lease = app._settings.lease
    assert await app._store.claim_run("", held, worker="w", lease=lease) is not None
    dry = await app.migrate_runs("g", dry_run=True)
    assert {run.run_id: run.outcome for run in dry.runs} == {idle: "would_migrate", held: "busy"}
    assert (await app.get_run(idle)).version == "1"
    with pytest.raises(ThreadBusyError):
        await app.migrate_run(held)
    done = await app.migrate_runs("g", from_="1")
    assert {run.run_id: run.outcome for run in done.runs} == {idle: "migrated", held: "busy"}
    assert (await app.migrate_run(idle)).version == "2", "again it changes nothing"


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
async def test_what_a_migration_returns_is_the_state(url: str, tmp_path: Path) -> None:
    """Whatever there was before: a value that is left out is gone, and 5 is not 5.0."""

    class Order(TypedDict, total=False):
        log: Annotated[list[str], operator.add]
        kept: list[int]
        amount: Any
        left: str

    def order() -> Any:
        builder: Any = StateGraph(Order)
        builder.add_node("set", lambda _: {"log": ["set"], "kept": [1], "left": "out"})
        builder.add_node("ask", lambda _: {"log": [interrupt("?")["type"]]})
        builder.add_edge(START, "set")
        builder.add_edge("set", "ask")
        return builder.compile()

    async with AgentFlow(url.format(tmp_path)) as opened:
        opened.register(order(), name="g", version="1")
        await opened.submit("g", {"log": ["given"], "amount": 5}, run_id="r")
        await opened.drive("r")
        opened.register(order(), name="g", version="2")
        opened.migration("g", from_="1", to="2")(
            lambda values: {"kept": values["kept"], "amount": Decimal(values["amount"])}
        )
        await opened.migrate_run("r")
        values = (await opened.state("r")).values
        assert (values.get("log", []), values["kept"], "left" in values) == ([], [1], False)
        assert type(values["amount"]) is Decimal
        assert await finish(opened, "r") == ["approve"]


def joined(before: list[str], writes: Sequence[list[str]]) -> list[str]:
    """Reduce what is stored as changes."""
    return [*before, *(each for written in writes for each in written)]


def changes(channel: str, *, inside: bool, kind: Any = None) -> Any:
    """Build a graph that keeps a channel as changes, and waits, perhaps in a subgraph."""
    fields: Any = {channel: Annotated[list[str], kind or DeltaChannel(joined)]}
    schema: Any = TypedDict("Changes", fields, total=False)  # type: ignore[misc]  # by its name
    builder: Any = StateGraph(schema)
    for name in ("one", "two"):
        builder.add_node(name, lambda _, name=name: {channel: [name]})
    builder.add_node("ask", lambda _: {channel: [interrupt("?")["type"]]})
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    builder.add_edge("two", "ask")
    if not inside:
        return builder.compile()
    outer: Any = StateGraph(Old)

    def read(state: Any) -> Any:
        return {"log": state[channel]}

    outer.add_node("under", builder.compile() | read)
    outer.add_edge(START, "under")
    return outer.compile()


async def test_what_is_stored_as_changes_is_whole_for_the_migration() -> None:
    seen: list[Any] = []

    def note(values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values)
        return values

    async with AgentFlow("memory://") as opened:
        opened.register(changes("log", inside=False), name="g", version="1")
        opened.register(changes("items", inside=False), name="g", version="2")
        opened.register(changes("items", inside=False, kind=operator.add), name="g", version="3")
        opened.migration("g", from_="1", to="2", channels={"log": "items"})(note)
        opened.migration("g", from_="2", to="3")(lambda values: values)
        for run_id in ("a", "b"):
            await opened.submit("g", {"log": ["in"]}, run_id=run_id, version="1")
            await opened.drive(run_id)
        for run_id, version in (("a", "2"), ("b", "3")):
            await opened.migrate_run(run_id, to=version)
            assert seen[-1] == {"items": ["in", "one", "two"]}
            [asked] = await opened.handle(run_id).approvals()
            await opened.approvals.decide(asked.id, {"type": "approve"}, by="ann")
            run = await opened.drive(run_id)
            assert run.output == {"items": ["in", "one", "two", "approve"]}
        await opened.submit("g", {"log": []}, run_id="c", version="1")
        await opened.drive("c")
        del opened._registry.graphs["g", "1"]
        with pytest.raises(MigrationError, match="'log' is stored as changes, and only the old"):
            await opened.migrate_run("c", to="3")


async def test_what_a_subgraph_stores_as_changes_goes_with_it() -> None:
    async with AgentFlow("memory://") as opened:
        for version in ("1", "2"):
            opened.register(changes("items", inside=True), name="g", version=version)
        opened.migration("g", from_="1", to="2")(lambda values: values)
        await opened.submit("g", {"log": []}, run_id="r", version="1")
        await opened.drive("r")
        await opened.migrate_run("r")
        assert await finish(opened, "r") == ["one", "two", "approve"]


def test_migration_to_nowhere_or_twice_is_refused(app: AgentFlow) -> None:
    second(app)
    with pytest.raises(InvalidInputError, match="not async"):
        app.migration("g", from_="2", to="3")(asyncio.sleep)  # type: ignore[arg-type]  # that is it
    for way in (("1", "2"), ("2", "2")):
        with pytest.raises(InvalidInputError, match="migration"):
            app.migration("g", from_=way[0], to=way[1])


def paying(asker: str, outside: list[str], *, hangs: str = "", sends: bool = False) -> Any:
    """Build a graph that pays, asks, and ships, beside another one, and then packs."""

    @effect(
        timeout=0.02, name="migration:call", compensate=lambda done: outside.append(f"un{done}")
    )
    async def call(what: str) -> str:
        outside.append(what)
        if what == hangs:
            await asyncio.Event().wait()
        return what

    async def pays(_: Any) -> Any:
        return {"log": [await call("pay"), interrupt("ship?")["type"], await call("ship")]}

    async def packs(_: Any) -> Any:
        return {"log": [await call("pack")]}

    builder: Any = StateGraph(New)
    builder.add_node("first", lambda _: {"log": ["first"]})
    builder.add_node(asker, pays)
    builder.add_node("pack", packs)
    builder.add_edge(START, "first")
    if sends:
        builder.add_conditional_edges("first", lambda _: [Send(asker, {})], [asker])
    else:
        builder.add_edge("first", asker)
    builder.add_edge(asker, "pack")
    return builder.compile()


async def migrated(opened: AgentFlow, outside: list[str], *, sends: bool = False) -> None:
    """Migrate a run of `paying` twice, each time to another name of the node that is due."""
    for name, version in (("manager", "2"), ("boss", "3")):
        old = "ask" if name == "manager" else "manager"
        opened.register(paying(name, outside, sends=sends), name="pay", version=version)
        before = str(int(version) - 1)
        opened.migration("pay", from_=before, to=version, nodes={old: name})(lambda values: values)
        await opened.migrate_run("r")


@pytest.mark.parametrize("sends", [False, True])
async def test_effect_of_a_node_that_is_renamed_is_not_called_again(sends: bool) -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as opened:
        opened.register(paying("ask", outside, sends=sends), name="pay", version="1")
        await opened.submit("pay", {"log": []}, run_id="r")
        await opened.drive("r")
        await migrated(opened, outside, sends=sends)
        before = await opened.get_run("r")
        assert (await finish(opened, "r"))[1:] == ["pay", "approve", "ship", "pack"]
        assert outside == ["pay", "ship", "pack"]
        # From the migrated checkpoint once more, which a fork copies.
        assert before.checkpoint_id is not None
        fork = await opened.fork("r", before.checkpoint_id)
        assert (await finish(opened, fork.id))[1:] == ["pay", "approve", "ship", "pack"]
        assert outside == ["pay", "ship", "pack"]
        with pytest.raises(InvalidInputError, match="a migration has made"):
            await opened.fork("r", before.checkpoint_id, values={"cents": 1})


async def test_effect_in_doubt_stays_in_doubt_and_its_question_the_same() -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as opened:
        opened.register(paying("ask", outside, hangs="pay"), name="pay", version="1")
        await opened.submit("pay", {"log": []}, run_id="r")
        await opened.drive("r")
        [question] = await opened.handle("r").approvals()
        await migrated(opened, outside)
        assert (await opened.drive("r")).status is RunStatus.WAITING
        assert [each.id for each in await opened.handle("r").approvals()] == [question.id]
        said = {"happened": True, "outcome": "paid"}
        await opened.approvals.decide(question.id, {"type": "respond", "value": said}, by="ann")
        assert (await finish(opened, "r"))[1:] == ["paid", "approve", "ship", "pack"]
        assert outside == ["pay", "ship", "pack"]


async def test_run_that_is_being_undone_is_undone_by_the_new_version() -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as opened:
        opened.register(paying("ask", outside), name="pay", version="1")
        await opened.submit("pay", {"log": []}, run_id="r")
        await opened.drive("r")
        await opened.cancel("r")
        await migrated(opened, outside)
        run = await opened.drive("r")
        assert (run.version, run.status, run.saga) == ("3", RunStatus.CANCELLED, "compensated")
        assert outside == ["pay", "unpay"]
