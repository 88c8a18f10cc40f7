"""Real graphs on the saver: whatever LangGraph's own memory saver does, this one does as well.

Except for races: where two invocations of one thread both win on the memory saver, one of them gets
`ConflictError`.
"""

from __future__ import annotations

import asyncio
import importlib
import uuid
from typing import Any, Literal, get_args

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, Send, interrupt

from agentflow.errors import ConflictError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import AnySaver
from agentflow.testing.savers.graphs import (
    CONFIG,
    Graph,
    State,
    asks,
    chain,
    letters,
    logs,
    shape,
)

Durability = Literal["sync", "async", "exit"]


class Gate:
    """Holds both of two racing invocations until both are inside, or one has lost."""

    def __init__(self) -> None:
        """Start closed."""
        self.inside = 0
        self.opened = asyncio.Event()

    async def __call__(self, state: State) -> State:
        """Wait for the other one."""
        self.inside += 1
        if self.inside == 2:
            self.opened.set()
        await self.opened.wait()
        return {"log": ["raced"]}


class BranchesSuite(Suite):
    """Time travel, updates by hand, subgraphs, fan-out, and two hosts on one thread."""

    @pytest.mark.parametrize("durability", get_args(Durability))
    def test_history_is_that_of_the_memory_saver(
        self, saver: AnySaver, durability: Durability
    ) -> None:
        graphs = [letters("a", "b", "c").compile(checkpointer=s) for s in (saver, InMemorySaver())]
        for graph in graphs:
            for entry in ("1", "2"):
                asyncio.run(graph.ainvoke({"log": [entry]}, CONFIG, durability=durability))
        ours, theirs = [shape(graph) for graph in graphs]
        assert ours == theirs
        assert ours[0][0] == {"log": ["1", "a", "b", "c", "2", "a", "b", "c"]}
        assert len(ours) == (2 if durability == "exit" else 10)

    @pytest.mark.parametrize("durability", get_args(Durability))
    def test_questions_are_asked_and_answered_as_on_the_memory_saver(
        self, saver: AnySaver, durability: Durability
    ) -> None:
        histories = []
        for each in (saver, InMemorySaver()):
            graph: Graph = chain(
                ("a", logs("a")), ("first", asks("1?")), ("second", asks("2?"))
            ).compile(checkpointer=each)
            graph.invoke({"log": ["0"]}, CONFIG, durability=durability)
            for answer in ("yes", "no"):
                (asked,) = graph.get_state(CONFIG).interrupts
                graph.invoke(Command(resume={asked.id: answer}), CONFIG, durability=durability)
            histories.append(shape(graph))
        assert histories[0] == histories[1]
        assert histories[0][0][0]["log"] == ["0", "a", "1? yes", "2? no"]

    def test_any_checkpoint_can_be_continued_and_the_branch_is_the_latest(
        self, saver: AnySaver
    ) -> None:
        graph = letters("a", "b", "c").compile(checkpointer=saver)
        graph.invoke({"log": ["0"]}, CONFIG, durability="sync")
        history = list(graph.get_state_history(CONFIG))
        known = {each.config["configurable"]["checkpoint_id"] for each in history}
        for old in history[1:-1]:
            assert graph.invoke(None, old.config) == {"log": ["0", "a", "b", "c"]}
            latest = graph.get_state(CONFIG)
            assert latest.config["configurable"]["checkpoint_id"] not in known
        for old in history:
            same = graph.get_state(old.config)
            assert (same.values, same.next) == (old.values, old.next), "the old line is untouched"

    @pytest.mark.parametrize("as_node", ["a", "__copy__"])
    def test_update_of_an_old_checkpoint_branches(self, saver: AnySaver, as_node: str) -> None:
        graph = letters("a", "b").compile(checkpointer=saver)
        graph.invoke({"log": []}, CONFIG, durability="sync")
        old = list(graph.get_state_history(CONFIG))[1]
        assert old.next == ("b",)
        values = None if as_node == "__copy__" else {"log": ["by hand"]}
        branch = graph.update_state(old.config, values, as_node=as_node)
        latest = graph.get_state(CONFIG).config["configurable"]
        assert latest["checkpoint_id"] == branch["configurable"]["checkpoint_id"]
        expected = ["a", "b"] if as_node == "__copy__" else ["a", "by hand", "b"]
        assert graph.invoke(None, CONFIG)["log"] == expected

    def test_updates_by_hand_follow_each_other(self, saver: AnySaver, another: AnySaver) -> None:
        histories = []
        for savers in ((saver, another), (memory := InMemorySaver(), memory)):
            graphs = [letters("a", "b").compile(checkpointer=each) for each in savers]
            for number in range(6):
                values = {"log": [number], "value": "long " * 100 if number == 2 else number}
                graphs[number % 2].update_state(CONFIG, values, as_node="ab"[number % 2])
            graphs[0].bulk_update_state(
                CONFIG, [[_update({"log": ["bulk 1"]})], [_update({"log": ["bulk 2"]})]]
            )
            histories.append(shape(graphs[1]))
        assert histories[0] == histories[1]
        assert histories[0][0][0]["log"] == [*range(6), "bulk 1", "bulk 2"]

    @pytest.mark.parametrize("checkpointer", [None, True])
    def test_subgraph_continues_in_its_own_namespace(
        self, saver: AnySaver, checkpointer: Any
    ) -> None:
        outputs = []
        for each in (saver, InMemorySaver()):
            child = chain(("in", logs("in")), ("ask", asks("ok?"))).compile(
                checkpointer=checkpointer
            )
            graph: Graph = chain(("child", child), ("end", logs("end"))).compile(checkpointer=each)
            for turn in range(2):
                graph.invoke({"log": [turn]}, CONFIG, durability="sync")
                (asked,) = graph.get_state(CONFIG, subgraphs=True).interrupts
                output = graph.invoke(Command(resume={asked.id: turn}), CONFIG, durability="sync")
            outputs.append((output, shape(graph)))
        assert outputs[0] == outputs[1]
        assert outputs[0][0]["log"].count("in") >= 2

    def test_parallel_calls_of_one_subgraph_share_its_namespace(self, saver: AnySaver) -> None:
        outputs = []
        for each in (saver, InMemorySaver()):
            child = chain(("in", lambda state: {"value": state["value"] + 1})).compile(
                checkpointer=True
            )
            graph = chain(("a", logs("a")))
            graph.add_node("child", child)
            graph.add_node("end", logs("end"))
            graph.add_conditional_edges("a", lambda _: [Send("child", {"value": 7})] * 4, ["child"])
            graph.add_edge("child", "end")
            compiled: Graph = graph.compile(checkpointer=each)
            try:
                output: Any = asyncio.run(compiled.ainvoke({"log": []}, CONFIG, durability="sync"))
            except Exception as error:  # noqa: BLE001 -- compared
                output = type(error)
            outputs.append(output)
        assert outputs[0] == outputs[1]

    def test_fan_out_with_parallel_questions_keeps_what_is_done(self, saver: AnySaver) -> None:
        calls: list[Any] = []

        def work(state: State) -> State:
            calls.append(state["value"])
            if state["value"] % 2:
                return {"log": [interrupt(state["value"])]}
            return {"log": [state["value"]]}

        graph = chain(("a", logs("a")))
        graph.add_node("work", work)
        graph.add_conditional_edges("a", lambda _: [Send("work", {"value": i}) for i in range(6)])
        compiled: Graph = graph.compile(checkpointer=saver)

        async def run() -> Any:
            result = await compiled.ainvoke({"log": []}, CONFIG, durability="sync")
            answers = {each.id: f"answer {each.value}" for each in result["__interrupt__"]}
            assert len(answers) == 3
            return await compiled.ainvoke(Command(resume=answers), CONFIG, durability="sync")

        assert asyncio.run(run())["log"] == ["a", 0, "answer 1", 2, "answer 3", 4, "answer 5"]
        assert [calls.count(i) for i in range(6)] == [1, 2, 1, 2, 1, 2]

    @pytest.mark.parametrize("before", [[], ["before"]])
    def test_of_two_racing_invocations_one_gets_a_conflict(
        self, saver: AnySaver, another: AnySaver, before: list[str]
    ) -> None:
        if before:
            letters("gate", "b").compile(checkpointer=saver).update_state(
                CONFIG, {"log": before}, as_node="b"
            )
        outcomes = asyncio.run(_race(saver, another))
        lost = [each for each in outcomes if isinstance(each, ConflictError)]
        (won,) = [each for each in outcomes if not isinstance(each, ConflictError)]
        assert len(lost) == 1
        graph = letters("gate", "b").compile(checkpointer=saver)
        assert graph.get_state(CONFIG).values == won
        # One line, without a fork in it.
        found = [(each.config, each.parent_config) for each in graph.get_state_history(CONFIG)]
        ids = [config["configurable"]["checkpoint_id"] for config, _ in found]
        parents = [parent and parent["configurable"]["checkpoint_id"] for _, parent in found]
        assert parents == [*ids[1:], None]

    @pytest.mark.parametrize("calls", [1, 2])
    def test_of_racing_invocations_one_moves_the_namespace_of_a_subgraph(
        self, saver: AnySaver, calls: int
    ) -> None:
        """Both have called the subgraph before either can lose: each puts when it ends."""

        def builds(node: Any) -> Graph:
            child = chain(("node", node)).compile(checkpointer=True)
            return chain(("child", child)).compile(checkpointer=saver)

        if calls == 2:
            builds(logs("before")).invoke({"log": []}, CONFIG, durability="exit")
        graph = builds(Gate())

        async def race() -> list[Any]:
            both = (graph.ainvoke({"log": [i]}, CONFIG, durability="exit") for i in range(2))
            return await asyncio.gather(*both, return_exceptions=True)

        assert any(isinstance(each, ConflictError) for each in asyncio.run(race()))
        place: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "child"}}
        assert len(list(saver.list(place))) == calls

    def test_update_that_found_nothing_loses_to_whoever_came_first(
        self, saver: AnySaver, another: AnySaver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        look = saver.get_tuple

        def overtaken(config: Any) -> Any:
            found = look(config)
            letters("a").compile(checkpointer=another).update_state(
                CONFIG, {"log": ["faster"]}, as_node="a"
            )
            return found

        graph = letters("a").compile(checkpointer=saver)
        with monkeypatch.context() as patch:
            patch.setattr(saver, "get_tuple", overtaken)
            with pytest.raises(ConflictError):
                graph.update_state(CONFIG, {"log": ["slower"]}, as_node="a")
        assert graph.get_state(CONFIG).values == {"log": ["faster"]}

    def test_host_whose_clock_is_a_minute_behind_continues_the_newest_checkpoint(
        self, saver: AnySaver, another: AnySaver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counted: list[str] = []

        def count(name: str) -> Any:
            def node(_: State) -> State:
                counted.append(name)
                return {"log": [name]}

            return node

        builder = chain(
            ("a", count("a")), ("ask", asks("ok?")), ("b", count("b")), ("ask2", asks("ok?"))
        )
        ahead: Graph = builder.compile(checkpointer=saver)
        behind: Graph = builder.compile(checkpointer=another)
        ahead.invoke({"log": []}, CONFIG, durability="sync")
        before = ahead.get_state(CONFIG)
        with monkeypatch.context() as patch:
            _turn_back_the_clock(patch)
            (first,) = before.interrupts
            behind.invoke(Command(resume={first.id: 1}), CONFIG, durability="sync")
        latest = ahead.get_state(CONFIG)
        new_id = latest.config["configurable"]["checkpoint_id"]
        assert new_id < before.config["configurable"]["checkpoint_id"], "the clock is behind"
        assert latest.next == ("ask2",)
        for graph in (ahead, behind):
            graph.invoke(None, CONFIG, durability="sync")
        (second,) = ahead.get_state(CONFIG).interrupts
        ahead.invoke(Command(resume={second.id: 2}), CONFIG, durability="sync")
        assert counted == ["a", "b"]
        steps = [step for _, _, _, step, _ in shape(behind)]
        assert steps == sorted(steps, reverse=True)


async def _race(*savers: AnySaver) -> list[Any]:
    gate = Gate()
    graphs: list[Graph] = [
        chain(("gate", gate), ("b", logs("b"))).compile(checkpointer=each) for each in savers
    ]

    async def run(place: int) -> Any:
        try:
            return await graphs[place].ainvoke({"log": [place]}, CONFIG, durability="sync")
        except ConflictError as error:
            gate.opened.set()
            return error

    return list(await asyncio.gather(run(0), run(1)))


def _update(values: dict[str, Any]) -> Any:
    from langgraph.types import StateUpdate

    return StateUpdate(values=values, as_node="b")


def _turn_back_the_clock(patch: pytest.MonkeyPatch) -> None:
    """Let LangGraph make ids as on a host whose clock is a minute behind."""
    module = importlib.import_module("langgraph.pregel._checkpoint")
    real = module.uuid6

    def behind(**options: Any) -> uuid.UUID:
        made = real(**options)
        # The first 48 bits of a version 6 UUID are the upper bits of a count of 100 ns.
        return uuid.UUID(int=made.int - ((60 * 10**7 >> 12) << 80))

    patch.setattr(module, "uuid6", behind)
