"""Subgraphs of every kind, on every backend and beside `InMemorySaver`."""

from __future__ import annotations

from typing import Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, StateSnapshot

from tests.integration.graphs import State, asks, chain, fan, logs
from tests.integration.test_graphs_interrupts import sends
from tests.integration.twins import Player, Twins


def child(checkpointer: Any, question: str | None = "ok?", **options: Any) -> Any:
    """Compile a subgraph that logs and, if it is given one, asks a question."""
    asking = [("ask", asks(question))] if question else []
    graph = chain(("in", logs("in")), *asking, ("out", logs("out")))
    return graph.compile(checkpointer=checkpointer, **options)


def inside(state: StateSnapshot) -> RunnableConfig:
    """Name the subgraph in which a state is."""
    found = state.tasks[0].state
    assert isinstance(found, StateSnapshot)
    return found.config


class Log(TypedDict):
    """What several calls of one subgraph may all return."""

    log: list[Any]


def sent(*nodes: tuple[str, Any]) -> StateGraph[Any, None, Any, Any]:
    """Build a chain that returns its log alone."""
    graph: StateGraph[Any, None, Any, Any] = StateGraph(State, output_schema=Log)
    graph.add_sequence(nodes)
    graph.add_edge(START, nodes[0][0])
    return graph


def parent(play: Player, *nodes: tuple[str, Any]) -> Any:
    """Compile a chain around a subgraph."""
    return chain(*nodes, ("end", logs("end"))).compile(checkpointer=play.saver)


@pytest.mark.parametrize("checkpointer", [None, True])
async def test_subgraph_asks_in_two_turns(twins: Twins, checkpointer: Any) -> None:
    async def scenario(play: Player) -> Any:
        graph = parent(play, ("a", logs("a")), ("child", child(checkpointer)))
        for turn in range(2):
            await play.run(graph, {"log": [turn]})
            await play.state(graph, subgraphs=True)
            result = await play.answer(graph, {"ok?": turn})
        await play.history(graph)
        if checkpointer:
            assert await play.history(graph, ns="child")
        return result

    await twins.agree(scenario)


async def test_subgraph_without_a_checkpointer(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = parent(play, ("child", child(False, None)), ("ask", asks("parent?")))
        # With "sync", LangGraph itself fails: see test_langgraph_issues_engine.py.
        durability = "async" if play.durability == "sync" else play.durability
        await play.run(graph, {"log": []}, durability=durability)
        result = await play.answer(graph, {"parent?": "yes"})
        await play.history(graph)
        return result

    await twins.agree(scenario)


@pytest.mark.parametrize(("middle", "inner"), [(None, None), (True, True)])
async def test_nested_subgraphs(twins: Twins, middle: Any, inner: Any) -> None:
    async def scenario(play: Player) -> Any:
        nested = chain(("m", logs("m")), ("inner", child(inner))).compile(checkpointer=middle)
        graph = parent(play, ("middle", nested))
        for turn in range(2 if middle else 1):
            await play.run(graph, {"log": [turn]})
            result = await play.answer(graph, {"ok?": turn})
        await play.history(graph)
        return result

    await twins.agree(scenario)


@pytest.mark.parametrize("checkpointer", [None, True])
async def test_parallel_subgraphs_are_answered_in_parts(twins: Twins, checkpointer: Any) -> None:
    async def scenario(play: Player) -> Any:
        nodes = [(name, child(checkpointer, f"{name}?")) for name in "abc"]
        graph = fan(*nodes, then=logs("end")).compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {"b?": 2})
        await play.answer(graph, {"a?": 1, "c?": 3})
        await play.history(graph)
        return (await play.state(graph)).values

    await twins.agree(scenario)


@pytest.mark.parametrize("checkpointer", [None, True])
async def test_node_that_calls_subgraphs_itself(twins: Twins, checkpointer: Any) -> None:
    async def scenario(play: Player) -> Any:
        called = child(checkpointer, None)

        def node(state: State) -> State:
            first = called.invoke({"log": ["first"]})
            second = called.invoke({"log": ["second"]})
            return {"log": [*first["log"], *second["log"]]}

        graph = parent(play, ("node", node), ("ask", asks("ok?")))
        for turn in range(2):
            await play.run(graph, {"log": [turn]})
            result = await play.answer(graph, {"ok?": "yes"})
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_node_that_calls_a_subgraph_which_asks(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        called = child(None)

        def node(state: State) -> State:
            return {"log": called.invoke({"log": ["called"]})["log"]}

        graph = parent(play, ("node", node))
        await play.run(graph, {"log": []})
        result = await play.answer(graph, {"ok?": "yes"})
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_sends_to_a_subgraph_that_asks(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        asking = sent(("ask", lambda state: asks(state["value"])(state)), ("out", logs("out")))
        graph = sends(asking.compile(), 1, 2, 3).compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {2: "two"})
        await play.answer(graph, {1: "one", 3: "three"})
        await play.history(graph)
        return (await play.state(graph)).values

    await twins.agree(scenario)


async def test_three_sends_to_one_subgraph_that_keeps_its_state(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        keeping = sent(("in", lambda state: {"log": [state["value"]]}), ("out", logs("out")))
        graph = sends(keeping.compile(checkpointer=True), 1, 2, 3).compile(checkpointer=play.saver)
        # All three share a namespace. Which of them loads what another one saved there, and which
        # is the last, is left to chance, so there is nothing to compare but that none is lost.
        result = await play.run(graph, {"log": []})
        play.transcript.clear()
        assert (result["log"][0], result["log"][-1]) == ("start", "end")
        assert {1, 2, 3, "out"} < set(result["log"])
        space: RunnableConfig = {
            "configurable": {"thread_id": play.thread, "checkpoint_ns": "work"}
        }
        kept = await play.saver.aget_tuple(space)
        assert kept is not None
        assert kept.checkpoint["channel_values"]["log"][-1] == "out"

    await twins.agree(scenario, has_same_rows=False)


async def test_update_of_a_subgraph_that_asks(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = parent(play, ("child", child(None)))
        await play.run(graph, {"log": []})
        state = await play.state(graph, subgraphs=True)
        await play.update(graph, {"log": ["by hand"]}, config=inside(state), as_node="ask")
        await play.state(graph, subgraphs=True)
        result = await play.run(graph, None)
        await play.history(graph)
        return result

    await twins.agree(scenario)


@pytest.mark.parametrize("checkpointer", [None, True])
async def test_time_travel_around_and_into_a_subgraph(twins: Twins, checkpointer: Any) -> None:
    async def scenario(play: Player) -> Any:
        graph = parent(play, ("a", logs("a")), ("child", child(checkpointer)))
        await play.run(graph, {"log": []})
        asking = await play.state(graph, subgraphs=True)
        await play.answer(graph, {"ok?": "yes"})
        await play.run(graph, None, inside(asking))
        await play.answer(graph, {"ok?": "again"})
        for old in await play.history(graph):
            if old.next in {("a",), ("child",)}:
                await play.run(graph, None, old.config)
                await play.answer(graph, {"ok?": "no"})
        await play.history(graph)
        return None

    # Not with "async": there a subgraph's checkpoint may be saved before its parent's.
    await twins.agree(scenario, modes=(("async", "sync"),))


async def test_subgraph_jumps_in_its_parent(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        def leave(state: State) -> Command[Any]:
            return Command(update={"log": ["left"]}, goto="other", graph=Command.PARENT)

        graph: StateGraph[Any, None, Any, Any] = StateGraph(State)
        graph.add_node("child", chain(("in", logs("in")), ("leave", leave)).compile())
        graph.add_node("other", logs("other"))
        graph.add_edge(START, "child")
        compiled = graph.compile(checkpointer=play.saver)
        result = await play.run(compiled, {"log": []})
        await play.history(compiled)
        return result

    await twins.agree(scenario)


async def test_subgraph_that_fails_continues_where_it_failed(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        calls: list[str] = []

        def flaky(state: State) -> State:
            calls.append("flaky")
            if len(calls) == 1:
                raise ConnectionError("try again")
            return {"log": ["flaky"]}

        inner = chain(("in", logs("in")), ("flaky", flaky)).compile()
        graph = parent(play, ("child", inner))
        await play.run(graph, {"log": []})
        await play.state(graph, subgraphs=True)
        result = await play.run(graph, None)
        await play.history(graph)
        assert result["log"] == ["in", "flaky", "end"]
        return result

    await twins.agree(scenario)


async def test_map_of_sends_with_parent_state(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        inner = sends(lambda state: {"log": [state["value"] * 2]}, 1, 2).compile()
        graph = chain(("a", logs("a")))
        graph.add_node("inner", inner)
        graph.add_conditional_edges(
            "a", lambda _: [Send("inner", {"log": [f"sent {i}"]}) for i in range(2)], ["inner"]
        )
        compiled = graph.compile(checkpointer=play.saver)
        result = await play.run(compiled, {"log": []})
        await play.history(compiled)
        return result

    await twins.agree(scenario)
