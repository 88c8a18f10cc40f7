"""What LangGraph's engine does to the order of writes and to failures of its checkpointer.

In each pair the first test shows the defect on LangGraph's own checkpointer; if it fails, the
defect was mended there. The second one shows what agentflow's checkpointer makes of it.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphBubbleUp
from langgraph.graph import START, StateGraph
from langgraph.pregel._loop import AsyncPregelLoop, SyncPregelLoop

from agentflow import AgentFlow, errors
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.errors import ConflictError, SerializationError
from tests.integration.graphs import State, chain, fan, logs
from tests.integration.langgraph_savers import LateWrites, Through

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}


def counting(calls: list[str], *names: str) -> list[tuple[str, Any]]:
    """Make nodes that note that they were called, and log their names."""

    def node(name: str) -> Any:
        def run(_: State) -> State:
            calls.append(name)
            return {"log": [name]}

        return run

    return [(name, node(name)) for name in names]


class Witness(LateWrites):
    """Looks, as soon as a checkpoint is saved, for the writes that led to it."""

    def __init__(self, inner: BaseCheckpointSaver[Any], last_step: int) -> None:
        super().__init__(inner)
        self.last_step = last_step
        self.writes: list[int] = []
        """How many writes each parent had when its child was saved."""

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        saved = await self.inner.aput(config, checkpoint, metadata, new_versions)
        if "checkpoint_id" in config["configurable"]:
            parent = await self.inner.aget_tuple(config)
            assert parent is not None
            self.writes.append(len(parent.pending_writes or ()))
        if metadata["step"] == self.last_step:
            self.may_start.set()
        return saved


async def writes_at_each_save(inner: BaseCheckpointSaver[Any]) -> list[int]:
    """Run a chain whose writes start late."""
    saver = Witness(inner, last_step=3)
    graph = chain(*counting([], "a", "b", "c")).compile(checkpointer=saver)
    await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    return saver.writes


async def test_langgraph_saves_a_checkpoint_before_the_writes_that_led_to_it() -> None:
    # https://github.com/langchain-ai/langgraph/issues/8039
    # https://github.com/langchain-ai/langgraph/issues/8234
    assert await writes_at_each_save(InMemorySaver()) == [0, 0, 0, 0]


async def test_writes_are_saved_before_the_checkpoint_that_follows_from_them(saver: Saver) -> None:
    # Input and its trigger, then twice a log and a trigger, then a log.
    assert await writes_at_each_save(saver) == [2, 2, 2, 1]


class Crash(LateWrites):
    """Dies when it is to save the checkpoint of one step."""

    def __init__(self, inner: BaseCheckpointSaver[Any], at_step: int) -> None:
        super().__init__(inner)
        self.at_step = at_step

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        if metadata["step"] == self.at_step:
            self.is_dead = True
            self.may_start.set()
            raise OSError("crash")
        return await self.inner.aput(config, checkpoint, metadata, new_versions)


async def calls_of_a_crashed_run(inner: BaseCheckpointSaver[Any]) -> list[str]:
    """Crash when the checkpoint after `b` is due, and continue."""
    calls: list[str] = []
    nodes = chain(*counting(calls, "a", "b", "c"))
    with pytest.raises(OSError, match="crash"):
        await nodes.compile(checkpointer=Crash(inner, at_step=2)).ainvoke(
            {"log": []}, CONFIG, durability="sync"
        )
    result = await nodes.compile(checkpointer=inner).ainvoke(None, CONFIG, durability="sync")
    assert result == {"log": ["a", "b", "c"]}
    return calls


async def test_langgraph_runs_a_finished_node_again_after_a_crash() -> None:
    # https://github.com/langchain-ai/langgraph/issues/8039
    assert await calls_of_a_crashed_run(InMemorySaver()) == ["a", "b", "b", "c"]


async def test_finished_node_is_not_run_again_after_a_crash(saver: Saver) -> None:
    assert await calls_of_a_crashed_run(saver) == ["a", "b", "c"]


class _Watched(list[Any]):
    """Pending writes that say when some were added."""

    def __init__(self, items: list[Any], extended: threading.Event) -> None:
        super().__init__(items)
        self.extended = extended

    def extend(self, items: Any) -> None:
        super().extend(items)
        self.extended.set()


class LostUpdate:
    """Makes two worker threads of the synchronous engine store their pending writes at once.

    Both read the list, then one of them replaces it, and then the other one does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.both_have_read = threading.Barrier(2)
        self.first_is_done = threading.Event()
        self.turns: dict[int, int] = {}
        self.both_are_done = threading.Event()
        self.engine = threading.get_ident()
        monkeypatch.setattr(
            SyncPregelLoop, "checkpoint_pending_writes", property(self._get, self._set), False
        )

    def _get(self, loop: Any) -> Any:
        me = threading.get_ident()
        if me != self.engine and me not in self.turns and len(self.turns) < 2:
            self.turns[me] = -1
            self.turns[me] = self.both_have_read.wait()
        return loop.__dict__["pending writes"]

    def _set(self, loop: Any, value: list[Any]) -> None:
        turn = self.turns.get(threading.get_ident())
        if turn == 1:
            self.first_is_done.wait()
        extended = self.first_is_done if turn == 0 else self.both_are_done
        if turn is None:
            extended = threading.Event()
        loop.__dict__["pending writes"] = _Watched(value, extended)


def calls_of_two_siblings(
    saver: BaseCheckpointSaver[Any], durability: Any, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Let two nodes finish at once and a third one fail after them, and run that one again."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        lost_update = LostUpdate(patch)
        all_are_started = threading.Event()

        def finishes(name: str) -> Any:
            def node(_: State) -> State:
                calls.append(name)
                # A node that is done before the engine knows of it is stored by its thread.
                all_are_started.wait()
                return {"log": [name]}

            return node

        def fails_once(_: State) -> State:
            calls.append("c")
            all_are_started.set()
            lost_update.both_are_done.wait()
            if calls.count("c") == 1:
                raise ConnectionError("try again")
            return {"log": ["c"]}

        nodes = fan(("a", finishes("a")), ("b", finishes("b")), ("c", fails_once))
        graph = nodes.compile(checkpointer=saver)
        with pytest.raises(ConnectionError):
            graph.invoke({"log": []}, CONFIG, durability=durability)
    assert graph.invoke(None, CONFIG)["log"] == ["a", "b", "c"]
    return sorted(calls)


def test_langgraph_forgets_a_finished_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    # https://github.com/langchain-ai/langgraph/issues/8115
    calls = calls_of_two_siblings(InMemorySaver(), "exit", monkeypatch)
    assert calls in (["a", "a", "b", "c", "c"], ["a", "b", "b", "c", "c"])


async def test_finished_siblings_are_saved_each_by_itself(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = await asyncio.to_thread(calls_of_two_siblings, saver, "sync", monkeypatch)
    assert calls == ["a", "b", "c", "c"]


class Terse(TypedDict, total=False):
    """A state that holds texts, whatever is written to it."""

    texts: Annotated[list[str], lambda texts, new: [*texts, *map(str, new)]]


class Unstorable:
    """Cannot be saved, and so the write that it is in cannot; the state holds its text only."""

    def __str__(self) -> str:
        return "unstorable"


def nodes_after_a_lost_write(calls: list[str], *, last_fails: bool = False) -> Any:
    """Build a chain whose first node makes a write that cannot be saved."""

    def last(_: Terse) -> Terse:
        calls.append("last")
        if last_fails:
            raise ValueError("something else")
        return {}

    nodes: list[tuple[str, Any]] = [
        ("first", lambda _: {"texts": [Unstorable()]}),
        ("next", lambda _: calls.append("next")),
        ("last", last),
    ]
    graph: StateGraph[Any, None, Any, Any] = StateGraph(Terse)
    graph.add_sequence(nodes)
    graph.add_edge(START, "first")
    return graph


async def test_langgraph_runs_to_the_end_after_a_write_was_lost() -> None:
    # https://github.com/langchain-ai/langgraph/issues/8234: the error comes when all is over,
    calls: list[str] = []
    saver = InMemorySaver()
    graph = nodes_after_a_lost_write(calls).compile(checkpointer=saver)
    with pytest.raises(TypeError, match="Unstorable"):
        await graph.ainvoke({"texts": []}, CONFIG, durability="sync")
    assert calls == ["next", "last"]
    assert (await graph.aget_state(CONFIG)).metadata["step"] == 3
    # or, if something else fails, it does not come at all.
    other = nodes_after_a_lost_write(calls, last_fails=True).compile(checkpointer=InMemorySaver())
    with pytest.raises(ValueError, match="something else"):
        await other.ainvoke({"texts": []}, CONFIG, durability="sync")


@pytest.mark.parametrize("last_fails", [False, True])
async def test_lost_write_stops_the_run_before_the_next_node(
    saver: Saver, last_fails: bool
) -> None:
    calls: list[str] = []
    graph = nodes_after_a_lost_write(calls, last_fails=last_fails).compile(checkpointer=saver)
    with pytest.raises(SerializationError, match="channel 'texts' of thread 't'"):
        await graph.ainvoke({"texts": []}, CONFIG, durability="sync")
    assert calls == []
    state = await graph.aget_state(CONFIG)
    assert (state.metadata["step"], state.next) == (0, ("first",))


class Dropped(InMemorySaver):
    """Fails to save writes with an error that LangGraph takes for one of its signals."""

    async def aput_writes(self, *args: Any, **options: Any) -> None:
        raise GraphBubbleUp("the disk is full")


async def test_langgraph_drops_an_error_that_looks_like_a_signal() -> None:
    saver = Dropped()
    graph = chain(*counting([], "a", "b")).compile(checkpointer=saver)
    assert await graph.ainvoke({"log": []}, CONFIG, durability="sync") == {"log": ["a", "b"]}
    assert not saver.writes


def test_no_error_of_agentflow_looks_like_a_signal() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass)]
    ours = [each for each in classes if issubclass(each, errors.AgentflowError)]
    assert len(ours) > 10
    assert not [each for each in ours if issubclass(each, GraphBubbleUp)]


class DiskFull(InMemorySaver):
    """Can save nothing after the first step."""

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        if metadata["step"] > 0:
            raise OSError("disk full")
        return await super().aput(config, checkpoint, metadata, new_versions)


@pytest.mark.parametrize("durability", ["async", "exit"])
async def test_langgraph_runs_all_nodes_before_it_tells_of_a_failed_checkpoint(
    durability: Any,
) -> None:
    calls: list[str] = []
    graph = chain(*counting(calls, "a", "b", "c")).compile(checkpointer=DiskFull())
    with pytest.raises(OSError, match="disk full"):
        await graph.ainvoke({"log": []}, CONFIG, durability=durability)
    assert calls == ["a", "b", "c"]


async def test_refused_checkpoint_stops_the_run_after_its_superstep(saver: Saver) -> None:
    calls: list[str] = []
    by_hand = chain(("a", logs("by hand"))).compile(checkpointer=saver)

    async def overtaken(_: State) -> State:
        calls.append("a")
        await by_hand.aupdate_state(CONFIG, {"log": ["by hand"]}, as_node="a")
        return {"log": ["a"]}

    graph = chain(("a", overtaken), *counting(calls, "b", "c")).compile(checkpointer=saver)
    with pytest.raises(ConflictError, match="'t' has moved on"):
        await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    assert calls == ["a"]
    assert (await graph.aget_state(CONFIG)).values == {"log": ["by hand"]}


async def writes_seen_by_the_second_of_two(saver: BaseCheckpointSaver[Any]) -> list[Any]:
    """Run two nodes one at a time, and let the second look for what the first one wrote."""
    seen: list[Any] = []

    async def second(_: State) -> State:
        found = await saver.aget_tuple(CONFIG)
        assert found is not None
        seen.extend(value for _, channel, value in found.pending_writes or () if channel == "log")
        return {"log": ["second"]}

    graph = fan(("first", logs("first")), ("second", second)).compile(checkpointer=saver)
    config: RunnableConfig = {**CONFIG, "max_concurrency": 1}
    await graph.ainvoke({"log": []}, config, durability="sync")
    return seen


async def test_langgraph_lets_writes_queue_behind_nodes_that_wait_for_their_turn() -> None:
    assert await writes_seen_by_the_second_of_two(InMemorySaver()) == []


async def test_writes_do_not_queue_behind_nodes(saver: Saver) -> None:
    assert await writes_seen_by_the_second_of_two(saver) == [["first"]]


async def steps_saved_when_the_first_node_starts(
    saver: BaseCheckpointSaver[Any], other: BaseCheckpointSaver[Any], durability: Any
) -> list[int]:
    """Look from elsewhere, in the first node, for what a crash would leave of the run."""
    steps: list[int] = []

    async def first(_: State) -> State:
        steps.extend([each.metadata["step"] async for each in other.alist(CONFIG)])
        return {}

    graph = chain(("first", first)).compile(checkpointer=saver)
    await graph.ainvoke({"log": []}, CONFIG, durability=durability)
    return steps


class Slow(Through):
    """Saves no checkpoint before a node has looked."""

    def __init__(self, inner: BaseCheckpointSaver[Any]) -> None:
        super().__init__(inner)
        self.has_looked = asyncio.Event()

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        await self.has_looked.wait()
        return await self.inner.aput(config, checkpoint, metadata, new_versions)

    async def alist(self, config: RunnableConfig | None, **options: Any) -> Any:
        async for each in self.inner.alist(config, **options):
            yield each
        self.has_looked.set()


@pytest.mark.parametrize("durability", ["async", "exit"])
async def test_langgraph_leaves_no_trace_of_a_run_that_crashes_early(durability: Any) -> None:
    # https://github.com/langchain-ai/langgraph/issues/8764
    saver = Slow(InMemorySaver())
    assert await steps_saved_when_the_first_node_starts(saver, saver, durability) == []


async def test_input_is_saved_before_the_first_node_starts(database_url: str) -> None:
    async with open_checkpointer(database_url) as saver, open_checkpointer(database_url) as other:
        assert await steps_saved_when_the_first_node_starts(saver, other, "sync") == [0, -1]


def subgraph_without_a_checkpointer() -> Any:
    """Build a graph around a subgraph that is not to be saved."""
    inner = chain(("in", logs("in"))).compile(checkpointer=False)
    return chain(("inner", inner), ("end", logs("end")))


async def test_langgraph_cannot_run_an_unsaved_subgraph_and_save_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An agentflow app of another test may have mended it in this process.
    monkeypatch.delattr(AsyncPregelLoop, "_put_checkpoint_fut", raising=False)
    graph = subgraph_without_a_checkpointer().compile(checkpointer=InMemorySaver())
    assert await graph.ainvoke({"log": []}, CONFIG) == {"log": ["in", "end"]}
    with pytest.raises(AttributeError, match="_put_checkpoint_fut"):
        await graph.ainvoke({"log": []}, CONFIG, durability="sync")


async def test_run_with_an_unsaved_subgraph_succeeds(database_url: str) -> None:
    async with AgentFlow(database_url) as app:
        app.register(subgraph_without_a_checkpointer(), name="g")
        await app.submit("g", {"log": []}, run_id="r")
        run = await app.drive("r")
        assert (run.status, run.output) == ("succeeded", {"log": ["in", "end"]})
