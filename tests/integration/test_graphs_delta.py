"""`DeltaChannel` graphs, on every backend and beside `InMemorySaver`.

Such a channel keeps its value out of most checkpoints: a state is the nearest snapshot and the
writes since. A saver that loses or reorders a write, or cuts a parent link, loses state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Overwrite, interrupt

from tests.integration.twins import Player, Twins


def extend(state: list[Any], writes: Sequence[list[Any]]) -> list[Any]:
    """Append every write."""
    return [*state, *(item for write in writes for item in write)]


def merge(state: list[AnyMessage], writes: Sequence[Any]) -> Any:
    """Merge messages by id."""
    for write in writes:
        state = add_messages(state, write)  # type: ignore[assignment,arg-type]  # lists of messages
    return state


class Delta(TypedDict, total=False):
    """A log that is never stored whole, and one that often is."""

    log: Annotated[list[Any], DeltaChannel(extend)]
    often: Annotated[list[Any], DeltaChannel(extend, snapshot_frequency=2)]
    messages: Annotated[list[AnyMessage], DeltaChannel(merge)]


def logs(entry: Any) -> Any:
    """Make a node that appends to both logs."""
    return lambda _: {"log": [entry], "often": [entry]}


def says(text: str) -> Any:
    """Make a node that writes one and the same message."""
    return lambda _: {"messages": [AIMessage(text, id="answer")]}


def asks(question: Any) -> Any:
    """Make a node that asks and appends the answer."""
    return lambda _: {"log": [interrupt(question)]}


def compiled(play: Player, *nodes: tuple[str, Any]) -> Any:
    """Compile a chain of nodes."""
    graph: StateGraph[Any, None, Any, Any] = StateGraph(Delta)
    graph.add_sequence(nodes)
    graph.add_edge(START, nodes[0][0])
    return graph.compile(checkpointer=play.saver)


async def test_delta_chain_in_several_turns(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = compiled(play, *((name, logs(name)) for name in "abcd"))
        for turn in range(3):
            await play.run(graph, {"log": [turn], "often": [turn]})
            await play.state(graph)
        history = await play.history(graph)
        expected = [entry for turn in range(3) for entry in (turn, *"abcd")]
        assert history[0].values["log"] == history[0].values["often"] == expected
        return history[0].values

    await twins.agree(scenario)


async def test_delta_with_a_question(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = compiled(play, ("a", logs("a")), ("ask", asks("ok?")), ("b", logs("b")))
        for turn in range(2):
            await play.run(graph, {"log": [turn]})
            result = await play.answer(graph, {"ok?": f"answer {turn}"})
        await play.history(graph)
        assert result["log"] == [0, "a", "answer 0", "b", 1, "a", "answer 1", "b"]
        return result

    # At the exit, such a channel is stored in a way of its own.
    await twins.agree(scenario, modes=(("async", "sync"), ("sync", "async"), ("async", "exit")))


async def test_delta_time_travel(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = compiled(play, *((name, logs(name)) for name in "abc"))
        for turn in range(2):
            await play.run(graph, {"log": [turn]})
        for old in (await play.history(graph))[2:-1:2]:
            again = await play.state(graph, old.config)
            assert again.values == old.values
            await play.run(graph, None, old.config)
            await play.state(graph)
        await play.history(graph)
        await play.run(graph, {"log": ["last"]})
        return (await play.state(graph)).values["log"][-4:]

    await twins.agree(scenario)


@pytest.mark.parametrize("as_node", ["a", "__copy__"])
async def test_delta_update_of_the_newest_and_of_an_old_checkpoint(
    twins: Twins, as_node: str
) -> None:
    async def scenario(play: Player) -> Any:
        graph = compiled(play, *((name, logs(name)) for name in "abc"))
        await play.run(graph, {"log": []})
        values = None if as_node == "__copy__" else {"log": ["by hand"]}
        history = await play.history(graph)
        for config in (None, history[len(history) // 2].config):
            await play.update(graph, values, as_node=as_node, config=config)
            await play.state(graph)
            await play.run(graph, None)
            await play.history(graph)

    await twins.agree(scenario)


async def test_delta_fan_out_with_answers_in_parts(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph: StateGraph[Any, None, Any, Any] = StateGraph(Delta)
        asking = ("a", asks("A")), ("b", asks("B"))
        for name, node in (*asking, *((name, logs(name)) for name in "cdefgh")):
            graph.add_node(name, node)
            graph.add_edge(START, name)
        graph.add_node("end", logs("end"))
        graph.add_edge([*"abcdefgh"], "end")
        chart = graph.compile(checkpointer=play.saver)
        await play.run(chart, {"log": []})
        await play.answer(chart, {"B": 2})
        result = await play.answer(chart, {"A": 1})
        await play.history(chart)
        assert result["log"] == [1, 2, *"cdefgh", "end"]
        return result

    await twins.agree(scenario)


async def test_delta_overwrite_starts_anew(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        reset = lambda _: {"log": Overwrite(["reset"])}  # noqa: E731 -- a node
        graph = compiled(play, ("a", logs("a")), ("reset", reset), ("b", logs("b")))
        for turn in range(2):
            result = await play.run(graph, {"log": [turn]})
        await play.history(graph)
        assert result["log"] == ["reset", "b"]
        return result

    await twins.agree(scenario)


async def test_delta_messages_are_merged_by_id(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = compiled(play, ("draft", says("draft")), ("final", says("final")))
        for turn in range(2):
            result = await play.run(graph, {"messages": [("user", f"turn {turn}")]})
        await play.history(graph)
        assert [each.text for each in result["messages"]] == ["turn 0", "final", "turn 1"]
        return result

    await twins.agree(scenario)


async def test_delta_in_a_subgraph(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        inner: StateGraph[Any, None, Any, Any] = StateGraph(Delta)
        inner.add_sequence([("in", logs("in")), ("ask", asks("ok?"))])
        inner.add_edge(START, "in")
        graph = compiled(play, ("a", logs("a")), ("inner", inner.compile(checkpointer=True)))
        for turn in range(2):
            await play.run(graph, {"log": [turn]})
            await play.state(graph, subgraphs=True)
            result = await play.answer(graph, {"ok?": turn})
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_failed_delta_node_is_run_again(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        calls: list[str] = []

        def flaky(_: Any) -> Any:
            calls.append("flaky")
            if len(calls) == 1:
                raise ConnectionError("try again")
            return {"log": ["flaky"]}

        graph = compiled(play, ("a", logs("a")), ("flaky", flaky), ("b", logs("b")))
        await play.run(graph, {"log": []})
        await play.state(graph)
        result = await play.run(graph, None)
        await play.history(graph)
        assert result["log"] == ["a", "flaky", "b"]
        return result

    await twins.agree(scenario)
