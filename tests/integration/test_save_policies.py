"""Which checkpoints are stored under each policy, and what a crash would lose."""

from __future__ import annotations

import asyncio
import operator
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from agentflow.checkpoint import Save, Saver, open_checkpointer
from agentflow.checkpoint.holding import HeldBack
from agentflow.database.writer import Call
from agentflow.errors import ConflictError, InvalidInputError, SerializationError
from tests.integration.graphs import State, chain, logs

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}
NODES = "abcdef"


def line(saver: Saver, **special: Any) -> Any:
    """Make a graph of six nodes in a row, some of them special."""
    steps = [(name, special.get(name) or logs(name)) for name in NODES]
    return chain(*steps).compile(checkpointer=saver)


def stored_steps(url: str) -> list[int]:
    """Return the steps of the checkpoints that another process would find, in their order."""
    with open_checkpointer(url) as other:
        found = list(other.list(CONFIG))
    parents = [each.parent_config for each in found]
    ids = [each.config["configurable"]["checkpoint_id"] for each in found]
    linked = [parent["configurable"]["checkpoint_id"] if parent else None for parent in parents]
    assert linked == [*ids[1:], None], "each stored checkpoint follows the last stored one"
    return [each.metadata["step"] for each in reversed(found)]


def stored_log(url: str) -> Any:
    """Return the log that another process would go on with."""
    with open_checkpointer(url) as other:
        found = other.get_tuple(CONFIG)
        return found and found.checkpoint["channel_values"].get("log")


async def run(
    graph: Any, interface: Literal["sync", "async"], value: Any, config: RunnableConfig = CONFIG
) -> Any:
    """Invoke a graph through one of the two interfaces."""
    if interface == "sync":
        return graph.invoke(value, config, durability="sync")
    return await graph.ainvoke(value, config, durability="sync")


@pytest.mark.parametrize("interface", ["sync", "async"])
@pytest.mark.parametrize(
    ("save", "steps"),
    [
        ("every_step", [-1, 0, 1, 2, 3, 4, 5, 6]),
        ("exit", [6]),
        (["c"], [2, 3, 6]),
        (["a", "f"], [0, 1, 5, 6]),
        ([], [6]),
    ],
)
async def test_what_the_policy_says_is_stored(
    database_url: str, interface: Literal["sync", "async"], save: Save, steps: list[int]
) -> None:
    with open_checkpointer(database_url, save=save) as saver:
        output = await run(line(saver), interface, {"log": ["0"]})
        assert stored_steps(database_url) == steps
        assert stored_log(database_url) == output["log"] == ["0", *NODES]


@pytest.mark.parametrize("save", ["exit", ["b"]])
async def test_interrupt_is_always_stored_and_can_be_answered_elsewhere(
    database_url: str, save: Save
) -> None:
    def asks(state: State) -> State:
        return {"log": [interrupt("?")]}

    with open_checkpointer(database_url, save=save) as saver:
        asked = await line(saver, d=asks).ainvoke({"log": []}, CONFIG, durability="sync")
        assert [each.value for each in asked["__interrupt__"]] == ["?"]
        assert stored_steps(database_url)[-1] == 3
    with open_checkpointer(database_url, save=save) as other:
        graph = line(other, d=asks)
        assert graph.get_state(CONFIG).interrupts[0].value == "?"
        output = graph.invoke(Command(resume="yes"), CONFIG)
        assert output["log"] == ["a", "b", "c", "yes", "e", "f"]


@pytest.mark.parametrize("interface", ["sync", "async"])
async def test_failure_is_stored_with_what_its_siblings_wrote(
    database_url: str, interface: Literal["sync", "async"]
) -> None:
    def fails(state: State) -> State:
        if not repaired:
            raise RuntimeError("no")
        return {"log": ["bad"]}

    def works(state: State) -> State:
        ran.append("good")
        return {"log": ["good"]}

    def fan_out(_: State) -> list[Send]:
        return [Send("good", {}), Send("bad", {})]

    repaired: list[int] = []
    ran: list[str] = []
    builder = StateGraph(State)
    builder.add_node("a", logs("a"))
    builder.add_node("good", works)
    builder.add_node("bad", fails)
    builder.add_edge(START, "a")
    builder.add_conditional_edges("a", fan_out, ["good", "bad"])
    with open_checkpointer(database_url, save="exit") as saver:
        with pytest.raises(RuntimeError, match="no"):
            await run(builder.compile(checkpointer=saver), interface, {"log": []})
        assert stored_steps(database_url) == [1]
    repaired.append(1)
    with open_checkpointer(database_url, save="exit") as other:
        output = await run(builder.compile(checkpointer=other), interface, None)
    assert output["log"] == ["a", "good", "bad"]
    assert len(ran) in {1, 2}, "a sibling that was still running when the other failed runs again"


@pytest.mark.parametrize("interface", ["sync", "async"])
async def test_state_before_an_update_that_cannot_be_stored_is_durable_when_that_is_told(
    database_url: str, interface: Literal["sync", "async"]
) -> None:
    def unstorable(_: State) -> State:
        return {"log": [object()]}

    with open_checkpointer(database_url, save="exit") as saver:
        with pytest.raises(SerializationError):
            await run(line(saver, c=unstorable), interface, {"log": []})
        assert stored_log(database_url) == ["a", "b"]


async def test_what_is_held_back_is_read_and_kept_by_closing(database_url: str) -> None:
    seen: list[Any] = []

    async def looks(_: State) -> State:
        seen.append(stored_log(database_url))
        return {"log": ["d"]}

    async def stays(_: State) -> State:
        entered.set()
        await asyncio.Event().wait()
        return {}

    entered = asyncio.Event()
    saver = open_checkpointer(database_url, save="exit")
    graph = line(saver, d=looks, e=stays)
    running = asyncio.create_task(graph.ainvoke({"log": []}, CONFIG, durability="sync"))
    await entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert seen == [None], "a crash at that moment would have lost all"
    assert line(saver).get_state(CONFIG).values["log"] == ["a", "b", "c", "d"]
    await saver.aclose()
    assert stored_log(database_url) == ["a", "b", "c", "d"]


class _Asked:
    """A lock that tells when another thread asks for it."""

    def __init__(self, lock: Any, came: threading.Event) -> None:
        self._lock, self._came, self._owner = lock, came, threading.get_ident()

    def __enter__(self) -> None:
        if threading.get_ident() != self._owner:
            self._came.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def test_reader_between_two_checkpoints_waits_for_the_second(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is not held any more then, and the second not yet."""
    found: list[Any] = []
    readers: list[threading.Thread] = []
    came = threading.Event()
    with open_checkpointer(database_url, save="exit") as saver:
        held, hold = saver._intake._held, HeldBack.hold
        monkeypatch.setattr(held, "lock", _Asked(held.lock, came))

        def read() -> None:
            found.append(saver.get_tuple(CONFIG))
            came.set()

        def watched(self: HeldBack, *args: Any) -> None:
            readers.append(threading.Thread(target=read))
            if len(readers) == 3:  # that of the input, of the first node, and now
                readers[-1].start()
                came.wait()
            hold(self, *args)

        monkeypatch.setattr(HeldBack, "hold", watched)
        await line(saver).ainvoke({"log": []}, CONFIG, durability="sync")
        readers[2].join()
    assert found[0] is not None, "what was accepted before is not there"


async def test_update_by_hand_is_stored_at_once(database_url: str) -> None:
    with open_checkpointer(database_url, save="exit") as saver:
        await line(saver).aupdate_state(CONFIG, {"log": ["by hand"]}, as_node="b")
        assert stored_log(database_url) == ["by hand"]


async def test_subgraphs_and_joins_end_as_without_a_policy(database_url: str) -> None:
    def build(saver: Saver) -> Any:
        inner = chain(("x", logs("x")), ("y", logs("y"))).compile()
        builder = StateGraph(State)
        builder.add_node("inner", inner)
        for name in "abc":
            builder.add_node(name, logs(name))
        builder.add_edge(START, "inner")
        builder.add_edge("inner", "a")
        builder.add_edge("inner", "b")
        builder.add_edge(["a", "b"], "c")
        builder.add_edge("c", END)
        return builder.compile(checkpointer=saver)

    with open_checkpointer(database_url, save=["c"]) as saver:
        output = await build(saver).ainvoke({"log": []}, CONFIG, durability="sync")
        assert stored_log(database_url) == output["log"]
    with open_checkpointer("memory://") as other:
        assert await build(other).ainvoke({"log": []}, CONFIG) == output


async def test_race_is_refused_when_the_held_checkpoint_is_stored(database_url: str) -> None:
    with open_checkpointer(database_url, save="exit") as saver:
        graph = line(saver)

        async def races(_: State) -> State:
            with open_checkpointer(database_url) as other:
                await line(other).aupdate_state(CONFIG, {"log": ["faster"]}, as_node="f")
            return {"log": ["c"]}

        with pytest.raises(ConflictError):
            await line(saver, c=races).ainvoke({"log": []}, CONFIG, durability="sync")
        assert stored_log(database_url) == ["faster"]
        assert (await graph.aget_state(CONFIG)).values["log"] == ["faster"]


async def test_closing_says_that_what_was_held_back_is_refused(database_url: str) -> None:
    entered = asyncio.Event()

    async def stays(_: State) -> State:
        entered.set()
        await asyncio.Event().wait()
        return {}

    saver = open_checkpointer(database_url, save="exit")
    invoking = line(saver, c=stays).ainvoke({"log": []}, CONFIG, durability="sync")
    running = asyncio.create_task(invoking)
    await entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with open_checkpointer(database_url) as other:
        await line(other).aupdate_state(CONFIG, {"log": ["faster"]}, as_node="f")
    with pytest.raises(ConflictError):
        await saver.aclose()
    assert stored_log(database_url) == ["faster"]


@pytest.mark.parametrize("save", ["exit", ["d"]])
async def test_racing_invocations_do_not_take_what_is_held_for_each_other(
    database_url: str, save: Save
) -> None:
    inside: list[Any] = []
    both = asyncio.Event()

    async def gate(state: State) -> State:
        inside.append(state["value"])
        if len(inside) == 2:
            both.set()
        await both.wait()
        return {"log": [state["value"]]}

    with open_checkpointer(database_url, save=save) as saver:
        graph = line(saver, b=gate)
        racing = (
            graph.ainvoke({"log": [], "value": i}, CONFIG, durability="sync") for i in range(2)
        )
        outcomes = await asyncio.gather(*racing, return_exceptions=True)
    assert len([each for each in outcomes if isinstance(each, ConflictError)]) == 1
    (won,) = [each for each in outcomes if isinstance(each, dict)]
    with open_checkpointer(database_url) as other:
        assert line(other).get_state(CONFIG).values == won


@pytest.mark.parametrize("save", ["exit", ["y"]])
async def test_parallel_calls_of_one_subgraph_keep_all_their_channels(
    database_url: str, save: Save
) -> None:
    class Log(TypedDict, total=False):
        log: Annotated[list[Any], operator.add]

    async def meet(state: State) -> State:
        # Whoever loads later would have in its log what a sibling has stored by then.
        await loaded.wait()
        return {"log": [state["value"]]}

    async def step(state: State) -> State:
        return {"log": [state["value"]]}

    loaded = asyncio.Barrier(3)
    inner = StateGraph(State, output_schema=Log)
    inner.add_sequence([("x", meet), ("y", step)])
    inner.add_edge(START, "x")
    builder = chain(("a", logs("a")))
    builder.add_node("inner", inner.compile(checkpointer=True))
    sends = [Send("inner", {"value": letter}) for letter in "pqr"]
    builder.add_conditional_edges("a", lambda _: sends, ["inner"])
    place: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": "inner"}}
    with open_checkpointer(database_url, save=save) as saver:
        graph = builder.compile(checkpointer=saver)
        for turn in (1, 2):
            await graph.ainvoke({"log": []}, CONFIG, durability="sync")
            with open_checkpointer(database_url) as other:
                found = other.get_tuple(place)
            assert found is not None
            values = found.checkpoint["channel_values"]
            assert len(values["log"]) == 2 * turn
            assert values["log"][-2:] == [values["value"]] * 2


def put(saver: Saver, thread: str, name: str, parent: str | None, **values: Any) -> None:
    """Put a checkpoint with which the graph goes on, and of which the last value has changed."""
    place: Any = {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": parent}
    made: Any = {
        **empty_checkpoint(),
        "id": name,
        "channel_values": values,
        "channel_versions": dict.fromkeys(values, 1),
        "updated_channels": ["branch:to:next"],
    }
    changed = list(values)[-1]
    saver.put({"configurable": place}, made, {"source": "loop", "step": 1}, {changed: 1})


@pytest.mark.parametrize("channel", [ERROR, INTERRUPT])
def test_writes_behind_a_stored_checkpoint_are_stored_when_the_run_stops_there(
    sqlite_url: str, channel: str
) -> None:
    def writers() -> set[str]:
        with open_checkpointer(sqlite_url) as other:
            found = other.get_tuple(CONFIG)
        assert found is not None
        return {task for task, _, _ in found.pending_writes or ()}

    behind: RunnableConfig = {
        "configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "c1"}
    }
    with open_checkpointer(sqlite_url, save=["marked"]) as saver:
        put(saver, "t", "c1", None, x=1)
        assert saver.get_tuple(CONFIG) is not None, "what is read is stored"
        saver.put_writes(behind, [("x", 2)], "first")
        assert writers() == set(), "the next checkpoint may not be due"
        saver.put_writes(behind, [(channel, "it stops")], "second")
        assert writers() == {"first", "second"}
        saver.put_writes(behind, [("x", 3)], "third")
        assert writers() == {"first", "second", "third"}


def test_several_may_follow_what_is_held_back(sqlite_url: str) -> None:
    with open_checkpointer(sqlite_url, save="exit") as saver:
        put(saver, "t", "c1", None, x=1)
        put(saver, "t", "c2", "c1", x=1, y=2)
        put(saver, "t", "c3", "c1", x=1, z=3)
        found = {each.checkpoint["id"]: each.checkpoint for each in saver.list(CONFIG)}
    values = {name: each["channel_values"] for name, each in found.items()}
    assert values == {"c2": {"x": 1, "y": 2}, "c3": {"x": 1, "z": 3}}


def test_others_do_not_make_forgotten_what_is_held_for_a_slow_node(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow.checkpoint.holding._CARRIED_LIMIT", 2)
    with open_checkpointer(sqlite_url, save="exit") as saver:
        put(saver, "t", "c1", None, x=1)
        for number in range(5):
            put(saver, "other", f"o{number + 1}", f"o{number}" if number else None, x=number)
        put(saver, "t", "c2", "c1", x=1, y=2)
        (found,) = saver.list(CONFIG)
    assert found.checkpoint["channel_values"] == {"x": 1, "y": 2}


async def test_end_of_a_marked_node_is_stored_by_who_did_not_see_it_begin(
    database_url: str,
) -> None:
    def asks(_: State) -> State:
        return {"log": [interrupt("?")]}

    def looks(_: State) -> State:
        seen.append(stored_log(database_url))
        return {}

    seen: list[Any] = []
    with open_checkpointer(database_url, save=["b"]) as saver:
        await line(saver, b=asks).ainvoke({"log": []}, CONFIG, durability="sync")
    with open_checkpointer(database_url, save=["b"]) as other:
        graph = line(other, b=asks, c=looks)
        await graph.ainvoke(Command(resume="yes"), CONFIG, durability="sync")
    assert seen == [["a", "yes"]]


@pytest.mark.parametrize("before", [[], ["0", "a"]])
@pytest.mark.parametrize("interface", ["sync", "async"])
async def test_graph_that_has_used_its_steps_is_stored(
    database_url: str, interface: Literal["sync", "async"], before: list[str]
) -> None:
    builder = chain(("a", logs("a")))
    builder.add_edge("a", "a")
    limited: RunnableConfig = {**CONFIG, "recursion_limit": 4}
    with open_checkpointer(database_url, save="exit") as saver:
        graph = builder.compile(checkpointer=saver)
        if before:
            graph.update_state(CONFIG, {"log": before}, as_node="a")
        with pytest.raises(GraphRecursionError):
            await run(graph, interface, {"log": ["0"]}, limited)
        assert stored_log(database_url) == [*before, "0", "a", "a", "a", "a"]


@pytest.mark.parametrize("how", ["flush", "list", "copy", "prune"])
async def test_what_breakpoints_leave_behind_is_stored_when_asked_for(
    database_url: str, how: str
) -> None:
    builder = chain(*((name, logs(name)) for name in NODES))
    with open_checkpointer(database_url, save="exit") as saver:
        graph = builder.compile(checkpointer=saver, interrupt_before=["c"])
        await graph.ainvoke({"log": []}, CONFIG, durability="sync")
        assert stored_log(database_url) is None
        if how == "flush":
            await saver.flush("t")
        elif how == "list":
            assert len(list(saver.list(None))) == 1
        elif how == "copy":
            saver.copy_thread("t", "copy")
        else:
            saver.prune(["t"])
        assert stored_log(database_url) == ["a", "b"]


@pytest.mark.parametrize("how", ["prune", "delete_for_runs", "archive"])
async def test_what_is_held_back_is_stored_before_it_is_looked_for(
    database_url: str, how: str, tmp_path: Path
) -> None:
    is_free = threading.Event()
    with open_checkpointer(database_url, save="exit") as saver:
        builder = chain(*((name, logs(name)) for name in NODES))
        graph = builder.compile(checkpointer=saver, interrupt_before=["c"])
        await graph.ainvoke({"log": []}, {**CONFIG, "metadata": {"run_id": "r"}}, durability="sync")
        saver._database.submit(Call(lambda _: is_free.wait(30)))
        work: asyncio.Task[Any]
        try:
            if how == "prune":
                work = asyncio.create_task(saver.aprune(["t"], strategy="delete"))
            elif how == "archive":
                work = asyncio.create_task(saver.aarchive("t", to=tmp_path.as_uri(), keep=True))
            else:
                work = asyncio.create_task(saver.adelete_for_runs(["r"]))
            for _ in range(3):
                await saver._database.query(lambda _: None)
            assert not work.done(), "it looked before anything was there"
        finally:
            is_free.set()
        await work
    assert stored_log(database_url) == (["a", "b"] if how == "archive" else None)


LEFT = """
import sys
from agentflow.checkpoint import open_checkpointer
from tests.integration.graphs import chain, logs
steps = [(name, logs(name)) for name in "abcd"]
saver = open_checkpointer(sys.argv[1], save="exit")
graph = chain(*steps).compile(checkpointer=saver, interrupt_before=["c"])
graph.invoke({"log": []}, {"configurable": {"thread_id": "t"}}, durability="sync")
"""
FORKS = """
import os
pid = os.fork()
if pid == 0:
    saver.get_tuple({"configurable": {"thread_id": "t"}})
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
with open_checkpointer(sys.argv[1]) as other:
    assert other.get_tuple({"configurable": {"thread_id": "t"}}) is None
"""


@pytest.mark.parametrize("forks", ["", FORKS])
def test_what_is_held_back_is_stored_by_its_process_at_its_end(sqlite_url: str, forks: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LEFT + forks, sqlite_url]
    subprocess.run(
        command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    assert stored_log(sqlite_url) == ["a", "b"]


def test_unknown_policies_and_delta_channels_are_refused(sqlite_url: str) -> None:
    with pytest.raises(InvalidInputError, match="'every_step', 'exit' or names of nodes"):
        open_checkpointer(sqlite_url, save="sometimes")

    class Letters(TypedDict):
        log: Annotated[list[str], DeltaChannel(_join)]

    builder = StateGraph(Letters)
    builder.add_node("a", lambda _: {"log": ["a"]})
    builder.add_edge(START, "a")
    with open_checkpointer(sqlite_url, save="exit") as saver:
        with pytest.raises(InvalidInputError, match="DeltaChannel needs save='every_step'"):
            builder.compile(checkpointer=saver).invoke({"log": ["0"]}, CONFIG, durability="sync")
        assert list(saver.list(CONFIG)) == []


def _join(left: list[str], right: Collection[list[str]]) -> list[str]:
    return left + [item for each in right for item in each]
