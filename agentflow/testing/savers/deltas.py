"""Graphs with LangGraph's `DeltaChannel`, whose values live in the writes of many checkpoints.

What a checkpoint shows of such a channel is made from the nearest stored value before it and the
writes since then. So whatever is deleted, the values of what is left must stay what they were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, Overwrite, Send

from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import AnySaver, after, at, checkpoint, dumped, load, put
from agentflow.testing.savers.graphs import CONFIG, DeltaState, Graph, asks, chain, logs, shape

CHANNELS = ["log", "notes", "value", "unknown"]
OTHER: RunnableConfig = {"configurable": {"thread_id": "u"}}


def notes(name: str) -> Any:
    """Make a node that adds to both delta channels."""
    return lambda _: {"log": [f"{name} " * 40], "notes": {name: [name]}}


def line(saver: AnySaver, **special: Any) -> Graph:
    """Make a graph of four nodes in a row, some of them special."""
    nodes = [(name, special.get(name) or notes(name)) for name in "abcd"]
    return chain(*nodes, state=DeltaState).compile(checkpointer=saver)


def of_run(run_id: str, config: RunnableConfig = CONFIG) -> RunnableConfig:
    """Name a thread and the run that drives it."""
    return {**config, "metadata": {"run_id": run_id}}


def run(graph: Graph, value: Any, config: RunnableConfig = CONFIG) -> Any:
    """Drive a graph as a worker does."""
    return asyncio.run(graph.ainvoke(value, config, durability="sync"))


def states(graph: Graph, config: RunnableConfig = CONFIG) -> dict[str, bytes]:
    """Return the values of all checkpoints of a thread, by their ids."""
    return {
        each.config["configurable"]["checkpoint_id"]: dumped(each.values)
        for each in graph.get_state_history(config)
    }


def histories(saver: AnySaver, thread: str = "t") -> Iterator[tuple[Any, Any]]:
    """Yield for each checkpoint what the saver collects, and what LangGraph's own walk does."""
    for found in saver.list({"configurable": {"thread_id": thread}}):
        ours = saver.get_delta_channel_history(config=found.config, channels=CHANNELS)
        theirs = BaseCheckpointSaver.get_delta_channel_history(
            saver, config=found.config, channels=CHANNELS
        )
        yield dumped(_plain(ours)), dumped(_plain(theirs))


def _plain(history: Any) -> dict[str, Any]:
    return {
        channel: {**entry, "writes": [list(write) for write in entry["writes"]]}
        for channel, entry in history.items()
    }


class DeltaChannelSuite(Suite):
    """`get_delta_channel_history`, and everything that could tear a value apart."""

    @pytest.mark.parametrize("durability", ["sync", "async", "exit"])
    def test_delta_history_is_that_of_the_memory_saver(
        self, saver: AnySaver, durability: Any
    ) -> None:
        found = []
        for each in (saver, InMemorySaver()):
            graph = line(each)
            for turn in range(4):
                value = {"log": [f"input {turn}"], "notes": {"turn": turn}}
                asyncio.run(graph.ainvoke(value, CONFIG, durability=durability))
            found.append(shape(graph))
        assert dumped(found[0]) == dumped(found[1])
        assert len(found[0][0][0]["log"]) == 20

    def test_questions_overwrites_and_fan_out_are_those_of_the_memory_saver(
        self, saver: AnySaver
    ) -> None:
        def overwrites(_: DeltaState) -> Any:
            return {"log": Overwrite(["anew"]), "notes": {"overwritten": True}}

        found = []
        for each in (saver, InMemorySaver()):
            builder = chain(("a", notes("a")), ("b", asks("ok?")), ("c", overwrites),
                            ("d", notes("d")), state=DeltaState)  # fmt: skip
            builder.add_node("many", lambda state: {"log": [state["value"]]})
            builder.add_conditional_edges(
                "d", lambda _: [Send("many", {"value": i}) for i in range(12)], ["many"]
            )
            graph: Graph = builder.compile(checkpointer=each)
            for turn in range(3):
                run(graph, {"log": [turn]})
                (asked,) = graph.get_state(CONFIG).interrupts
                run(graph, Command(resume={asked.id: turn}))
            found.append(shape(graph))
        assert dumped(found[0]) == dumped(found[1])

    def test_time_travel_and_updates_are_those_of_the_memory_saver(self, saver: AnySaver) -> None:
        found = []
        for each in (saver, InMemorySaver()):
            graph = line(each)
            for turn in range(2):
                run(graph, {"log": [turn]})
            for place in (1, 3, 5, 8):
                old = list(graph.get_state_history(CONFIG))[place]
                run(graph, None, old.config)
                old = list(graph.get_state_history(CONFIG))[place]
                graph.update_state(old.config, {"log": [f"by hand {place}"]}, as_node="b")
                graph.update_state(old.config, None, as_node="__copy__")
                run(graph, None)
            found.append(shape(graph))
        assert dumped(found[0]) == dumped(found[1])

    def test_subgraph_has_delta_channels_of_its_own(self, saver: AnySaver) -> None:
        found = []
        for each in (saver, InMemorySaver()):
            child = chain(("x", notes("x")), ("y", asks("ok?")), state=DeltaState).compile(
                checkpointer=True
            )
            graph = line(each, b=child)
            for turn in range(3):
                run(graph, {"log": [turn]})
                (asked,) = graph.get_state(CONFIG, subgraphs=True).interrupts
                run(graph, Command(resume={asked.id: turn}))
            found.append(shape(graph))
        assert dumped(found[0]) == dumped(found[1])
        if not isinstance(saver, InMemorySaver):
            assert all(ours == theirs for ours, theirs in histories(saver))

    def test_collected_history_is_what_langgraph_would_walk(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        graph = line(saver)
        for turn in range(4):
            run(graph, {"log": [f"input {turn}"]})
        for place in (2, 7, 12):
            old = list(graph.get_state_history(CONFIG))[place]
            run(graph, None, old.config)
            graph.update_state(old.config, {"log": ["by hand"]}, as_node="c")
        for reader in (saver, another):
            assert all(ours == theirs for ours, theirs in histories(reader))

    def test_history_of_what_is_not_there_is_empty(self, saver: AnySaver) -> None:
        nothing: Any = {"log": {"writes": []}}
        assert saver.get_delta_channel_history(config=at(), channels=["log"]) == nothing
        put(saver, "c1")
        for config in (at("none"), at(ns="child"), at("c1")):
            assert saver.get_delta_channel_history(config=config, channels=["log"]) == nothing
        assert saver.get_delta_channel_history(config=at("c1"), channels=[]) == {}

    def test_chain_that_is_longer_than_any_page(self, saver: AnySaver) -> None:
        """Only the first checkpoint has a value; all others have writes."""
        made = checkpoint("c000", {"log": 0}, log=["the seed"])
        last = saver.put(at(), made, {}, {"log": 0})

        async def grow(number: int, last: RunnableConfig) -> RunnableConfig:
            name = f"c{number:03}"
            await saver.aput_writes(last, [("log", [number]), ("other", number)], "task")
            counters: Any = {"counters_since_delta_snapshot": {"log": (number, number)}}
            await saver.aput(last, checkpoint(name, {"log": number}), counters, {"log": number})
            return after(last, name)

        async def grow_all(last: RunnableConfig) -> None:
            for number in range(1, 431):
                last = await grow(number, last)

        asyncio.run(grow_all(last))
        for number in (1, 199, 200, 201, 400, 430):
            found = saver.get_delta_channel_history(
                config=at(f"c{number:03}"), channels=["log", "nothing"]
            )
            assert found["nothing"] == {"writes": []}
            assert found["log"].get("seed") == ["the seed"]
            values = [value for _, _, value in found["log"]["writes"]]
            assert values == [[each] for each in range(1, number + 1)]

    @pytest.mark.parametrize("turns", [1, 2, 3, 4])
    def test_pruned_thread_keeps_its_values_and_goes_on(
        self, saver: AnySaver, another: AnySaver, turns: int
    ) -> None:
        graph, reference = line(saver), line(InMemorySaver())
        for turn in range(turns):
            for each in (graph, reference):
                run(each, {"log": [f"input {turn}"]})
        for turn in range(3):
            saver.prune(["t"])
            (left,) = graph.get_state_history(CONFIG)
            expected = reference.get_state(CONFIG)
            for reader in (graph, line(another)):
                found = reader.get_state(CONFIG)
                assert dumped(found.values) == dumped(left.values) == dumped(expected.values)
                assert found.next == expected.next
            for each in (line(another), reference):
                run(each, {"log": [f"after pruning {turn}"]})
            assert dumped(graph.get_state(CONFIG).values) == dumped(
                reference.get_state(CONFIG).values
            )

    def test_pruned_thread_that_waits_is_answered(self, saver: AnySaver) -> None:
        found = []
        for each in (saver, InMemorySaver()):
            graph = line(each, c=asks("ok?"))
            for turn in range(2):
                run(graph, {"log": [turn]})
                (asked,) = graph.get_state(CONFIG).interrupts
                if each is saver:
                    saver.prune(["t"])
                    assert len(states(graph)) == 1
                run(graph, Command(resume={asked.id: turn}))
            found.append(dumped(graph.get_state(CONFIG).values))
        assert found[0] == found[1]

    @pytest.mark.parametrize("as_node", ["b", "__copy__"])
    def test_pruned_thread_can_be_updated_by_hand(self, saver: AnySaver, as_node: str) -> None:
        found = []
        for each in (saver, InMemorySaver()):
            graph = line(each)
            run(graph, {"log": ["input"]})
            if each is saver:
                saver.prune(["t"])
            values = None if as_node == "__copy__" else {"log": ["by hand"]}
            latest = graph.get_state(CONFIG).config
            graph.update_state(latest, values, as_node=as_node)
            now = graph.get_state(CONFIG)
            run(graph, {"log": ["more"]})
            found.append(dumped([now.values, now.next, graph.get_state(CONFIG).values]))
        assert found[0] == found[1]

    @pytest.mark.parametrize(
        "doomed", [["r0"], ["r1"], ["r2"], ["r3"], ["r0", "r1"], ["r1", "r3"], ["r0", "r2"]]
    )
    def test_checkpoints_that_outlive_deleted_runs_keep_their_values(
        self, saver: AnySaver, another: AnySaver, doomed: list[str]
    ) -> None:
        graph = line(saver)
        for turn in range(4):
            run(graph, {"log": [f"input {turn}"]}, of_run(f"r{turn}"))
        before = states(graph)
        saver.delete_for_runs(doomed)
        for reader in (graph, line(another)):
            left = states(reader)
            assert left.keys() < before.keys()
            assert left == {name: before[name] for name in left}
        values = graph.get_state(CONFIG).values
        output = run(line(another), {"log": ["more"]}, of_run("r4"))
        assert output["log"][: len(values["log"]) + 1] == [*values["log"], "more"]
        # And once more, with a deletion between.
        saver.delete_for_runs(["r2"])
        run(graph, {"log": ["even more"]}, of_run("r5"))
        saver.delete_for_runs(["r4"])
        found = graph.get_state(CONFIG).values["log"]
        assert dumped(found[: len(output["log"])]) == dumped(output["log"])

    def test_branches_that_outlive_each_other_keep_their_values(self, saver: AnySaver) -> None:
        graph = line(saver)
        run(graph, {"log": ["input"]}, of_run("r0"))
        history = list(graph.get_state_history(CONFIG))
        for number, place in enumerate((1, 2, 3, 4), start=1):
            config = of_run(f"r{number}", history[place].config)
            run(graph, None, config)
        before = states(graph)
        for doomed in ("r2", "r4", "r0", "r1"):
            saver.delete_for_runs([doomed])
            left = states(graph)
            assert left == {name: before[name] for name in left}
        assert len(left) > 0
        run(graph, {"log": ["more"]})

    def test_copied_thread_has_the_same_values_and_goes_on(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        graph = line(saver, c=asks("ok?"))
        run(graph, {"log": ["0"]})
        (asked,) = graph.get_state(CONFIG).interrupts
        saver.copy_thread("t", "u")
        assert states(graph, OTHER) == states(graph)
        assert dumped(shape(graph, OTHER)) == dumped(shape(graph))
        elsewhere = line(another, c=asks("ok?"))
        outputs = [
            run(elsewhere, Command(resume={asked.id: 1}), OTHER),
            run(graph, Command(resume={asked.id: 1})),
        ]
        assert dumped(outputs[0]) == dumped(outputs[1])
        saver.delete_thread("t")
        assert dumped(elsewhere.get_state(OTHER).values) == dumped(outputs[0])

    def test_pruned_thread_is_copied_with_its_values(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        graph = line(saver)
        output = run(graph, {"log": ["0"]})
        saver.prune(["t"])
        saver.copy_thread("t", "u")
        for reader in (graph, line(another)):
            assert dumped(reader.get_state(OTHER).values) == dumped(output)
        again = [run(graph, {"log": ["1"]}, config) for config in (CONFIG, OTHER)]
        assert dumped(again[0]) == dumped(again[1])

    def test_thread_from_before_the_delta_channel_goes_on(self, saver: AnySaver) -> None:
        """A plain list is the seed of the channel that takes its place."""
        found = []
        for each in (saver, InMemorySaver()):
            before: Graph = chain(("a", logs("a")), ("b", logs("b"))).compile(checkpointer=each)
            for turn in range(2):
                run(before, {"log": [turn]})
            graph = line(each)
            for turn in range(2):
                run(graph, {"log": [f"new {turn}"]})
                if each is saver:
                    saver.prune(["t"])
            found.append(dumped(graph.get_state(CONFIG).values))
        assert found[0] == found[1]
        assert load(saver).checkpoint["channel_values"].keys() <= {"log", "notes", "value"}
