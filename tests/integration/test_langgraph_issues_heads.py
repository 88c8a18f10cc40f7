"""Which checkpoint is the newest, and who may put the next one: two writers, a late clock, a crash.

In each pair the first test shows the defect on LangGraph's own checkpointer; if it fails, the
defect was mended there. The second one shows what agentflow's checkpointer makes of it.
"""

from __future__ import annotations

import asyncio
import importlib
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    empty_checkpoint,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.types import RESUME
from langgraph.checkpoint.sqlite import SqliteSaver

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.errors import ConflictError
from tests.integration.graphs import State, chain, logs
from tests.integration.langgraph_savers import Through

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}


def at(checkpoint_id: str | None = None, *, thread: str = "t", ns: str = "") -> RunnableConfig:
    """Name a place."""
    named = {"checkpoint_id": checkpoint_id} if checkpoint_id else {}
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, **named}}


async def race(*savers: BaseCheckpointSaver[Any]) -> list[Any]:
    """Let two workers continue one thread, both inside a node before either of them leaves it."""
    inside = 0
    both_are_inside = asyncio.Event()

    async def meet(_: State) -> State:
        nonlocal inside
        inside += 1
        if inside == 2:
            both_are_inside.set()
        await both_are_inside.wait()
        return {"log": ["met"]}

    nodes = chain(("meet", meet), ("after", logs("after")))
    graphs = [nodes.compile(checkpointer=saver) for saver in savers]
    await graphs[0].aupdate_state(CONFIG, {"log": ["before"]}, as_node="after")

    async def work(position: int) -> Any:
        try:
            entry: Any = {"log": [position]}
            return await graphs[position].ainvoke(entry, CONFIG, durability="sync")
        except ConflictError as error:
            both_are_inside.set()
            return error

    return list(await asyncio.gather(work(0), work(1)))


async def line_of(saver: BaseCheckpointSaver[Any]) -> tuple[list[str], list[str]]:
    """Return the ids from the newest checkpoint to the first one, and all ids that there are."""
    everything = [each async for each in saver.alist(CONFIG)]
    parents = {each.checkpoint["id"]: each.parent_config for each in everything}
    newest = await saver.aget_tuple(CONFIG)
    assert newest is not None
    line = [newest.checkpoint["id"]]
    while (parent := parents[line[-1]]) is not None:
        line.append(parent["configurable"]["checkpoint_id"])
    return line, list(parents)


async def test_langgraph_lets_two_writers_of_one_thread_both_succeed() -> None:
    # https://github.com/langchain-ai/langgraph/issues/8796
    saver = InMemorySaver()
    first, second = await race(saver, saver)
    assert first == {"log": ["before", 0, "met", "after"]}
    assert second == {"log": ["before", 1, "met", "after"]}
    line, everything = await line_of(saver)
    assert len(everything) - len(line) == 4, "what one of them was told is saved cannot be reached"


@pytest.mark.parametrize("processes", [1, 2])
async def test_one_of_two_writers_of_a_thread_is_refused(database_url: str, processes: int) -> None:
    async with open_checkpointer(database_url) as one, open_checkpointer(database_url) as two:
        outcomes = await race(one, two if processes == 2 else one)
        (lost,) = [each for each in outcomes if isinstance(each, ConflictError)]
        (won,) = [each for each in outcomes if each is not lost]
        assert won["log"][-2:] == ["met", "after"]
        line, everything = await line_of(one)
        assert line == everything, "one line, and nothing beside it"
        newest = await one.aget_tuple(CONFIG)
        assert newest is not None
        assert newest.checkpoint["channel_values"]["log"] == won["log"]


class Clock:
    """The clock from which LangGraph makes checkpoint ids, set back by a minute on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("langgraph.pregel._checkpoint")
        self.is_late = False
        self._now = module.uuid6
        monkeypatch.setattr(module, "uuid6", self._make)

    def _make(self, **options: Any) -> uuid.UUID:
        made: uuid.UUID = self._now(**options)
        # The first 48 bits of a version 6 UUID are the upper bits of a count of 100 ns.
        return uuid.UUID(int=made.int - ((60 * 10**7 >> 12) << 80)) if self.is_late else made


async def calls_with_a_late_clock(saver: BaseCheckpointSaver[Any], clock: Clock) -> list[str]:
    """Continue a thread on a host whose clock is a minute behind, and then once more."""
    calls: list[str] = []

    def node(name: str) -> Any:
        def run(_: State) -> State:
            calls.append(name)
            return {"log": [name]}

        return run

    nodes = chain(*((name, node(name)) for name in "abcd"))
    graph = nodes.compile(checkpointer=saver, interrupt_before=["b"])
    await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    clock.is_late = True
    assert (await graph.ainvoke(None, CONFIG, durability="sync"))["log"] == [*"abcd"]
    assert (await graph.ainvoke(None, CONFIG, durability="sync"))["log"] == [*"abcd"]
    return calls


async def test_langgraph_runs_nodes_again_after_a_late_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # https://github.com/langchain-ai/langgraph/issues/7179
    # https://github.com/langchain-ai/langgraph/issues/6869
    saver = InMemorySaver()
    calls = await calls_with_a_late_clock(saver, Clock(monkeypatch))
    assert calls == [*"abcd", *"cd"]
    newest = await saver.aget_tuple(CONFIG)
    assert newest is not None
    assert newest.metadata["step"] == 1, "what the late host saved is not the newest"


async def test_late_clock_changes_nothing(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await calls_with_a_late_clock(saver, Clock(monkeypatch)) == [*"abcd"]
    steps = [each.metadata["step"] async for each in saver.alist(CONFIG)]
    assert steps == [4, 3, 2, 1, 0, -1]


def late_ids(saver: BaseCheckpointSaver[Any]) -> list[str]:
    """Put three checkpoints with ids made by hand, of clocks that disagree; list them."""
    parent = None
    for name in ("9", "1", "5"):
        made: Checkpoint = {**empty_checkpoint(), "id": name}
        saver.put(at(parent), made, {}, {})
        parent = name
    newest = saver.get_tuple(at())
    assert newest is not None
    return [newest.checkpoint["id"], *(each.checkpoint["id"] for each in saver.list(at()))]


def test_langgraph_takes_the_largest_id_for_the_newest_checkpoint() -> None:
    # https://github.com/langchain-ai/langgraph/issues/7179
    assert late_ids(InMemorySaver()) == ["9", "9", "5", "1"]


async def test_newest_checkpoint_is_the_one_that_was_put_last(saver: Saver) -> None:
    assert late_ids(saver) == ["5", "5", "1", "9"]


class ParentIsLate(Through):
    """Saves a subgraph's first checkpoint before those of its parent that led to it.

    With "async" durability the engine waits for neither, so either may come first.
    """

    def __init__(self, inner: BaseCheckpointSaver[Any]) -> None:
        super().__init__(inner)
        self.child_is_saved = asyncio.Event()

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        if not config["configurable"]["checkpoint_ns"]:
            await self.child_is_saved.wait()
        saved = await self.inner.aput(config, checkpoint, metadata, new_versions)
        self.child_is_saved.set()
        return saved


async def logs_of_a_run_and_its_replay(inner: BaseCheckpointSaver[Any]) -> list[Any]:
    """Run a graph with a subgraph that keeps its state, and travel to before it ever ran."""
    child = chain(("in", logs("in"))).compile(checkpointer=True)
    nodes = chain(("a", logs("a")), ("child", child))
    graph = nodes.compile(checkpointer=ParentIsLate(inner))
    first = await graph.ainvoke({"log": []}, CONFIG, durability="async")
    (before,) = [each async for each in graph.aget_state_history(CONFIG) if each.next == ("a",)]
    again = await graph.ainvoke(None, before.config, durability="async")
    return [first["log"], again["log"]]


async def test_replayed_subgraph_does_not_see_its_future(saver: Saver) -> None:
    """Ids, by which `InMemorySaver` goes, tell which of two namespaces' checkpoints was first."""
    expected = [["a", "a", "in"]] * 2
    assert await logs_of_a_run_and_its_replay(InMemorySaver()) == expected
    assert await logs_of_a_run_and_its_replay(saver) == expected


def answers_kept(saver: BaseCheckpointSaver[Any]) -> dict[str, Any]:
    """Save a resumed task's writes, as the engine does: first its answer, then answer and result.

    Then the node runs again, with one more answer.
    """
    saver.put(at(), {**empty_checkpoint(), "id": "1"}, {}, {})
    saver.put_writes(at("1"), [(RESUME, ["first"])], "task")
    saver.put_writes(at("1"), [(RESUME, ["first", "second"]), ("x", "done")], "task")
    found = saver.get_tuple(at())
    assert found is not None
    return {channel: value for _, channel, value in found.pending_writes or ()}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def langgraph_saver(
    request: pytest.FixtureRequest,
) -> Iterator[BaseCheckpointSaver[Any]]:
    """One of LangGraph's own checkpointers on a database."""
    if request.param == "postgres":
        with PostgresSaver.from_conn_string(request.getfixturevalue("postgres_url")) as saver:
            saver.setup()
            yield saver
        return
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        yield SqliteSaver(connection)


def test_langgraph_keeps_an_old_answer_beside_a_new_result(
    langgraph_saver: BaseCheckpointSaver[Any],
) -> None:
    assert answers_kept(langgraph_saver) == {RESUME: ["first"], "x": "done"}


async def test_answer_is_that_which_was_saved_last(saver: Saver) -> None:
    assert answers_kept(saver) == {RESUME: ["first", "second"], "x": "done"}


async def test_writes_without_their_checkpoint_are_seen_by_nobody(saver: Saver) -> None:
    saver.put(at(), {**empty_checkpoint(), "id": "1"}, {}, {})
    saver.put_writes(at("2"), [("x", "early")], "task")
    saver.put_writes(at("crashed"), [("x", "orphan")], "task")
    assert saver.get_tuple(at("2")) is None
    for each in [saver.get_tuple(at()), *saver.list(at()), *saver.list(None)]:
        assert each is not None
        assert (each.checkpoint["id"], each.pending_writes) == ("1", [])
    saver.put(at("1"), {**empty_checkpoint(), "id": "2"}, {}, {})
    found = saver.get_tuple(at())
    assert found is not None
    assert found.pending_writes == [("task", "x", "early")]
    saver.delete_thread("t")
    saver.put(at(), {**empty_checkpoint(), "id": "crashed"}, {}, {})
    again = saver.get_tuple(at())
    assert again is not None
    assert again.pending_writes == [], "they went with their thread"


async def test_thread_of_the_metadata_is_not_the_thread(saver: Saver) -> None:
    # https://github.com/langchain-ai/langgraph/issues/4799
    graph = chain(("a", logs("a"))).compile(checkpointer=saver)
    config: RunnableConfig = {**CONFIG, "metadata": {"thread_id": "other", "user": "ada"}}
    await graph.ainvoke({"log": []}, config, durability="sync")
    assert (await graph.aget_state(CONFIG)).values == {"log": ["a"]}
    other = await graph.aget_state({"configurable": {"thread_id": "other"}})
    assert other.values == {}
    for each in saver.list(None):
        assert each.config["configurable"]["thread_id"] == "t"
        assert "thread_id" not in each.metadata
        assert each.metadata.get("user") == "ada"
