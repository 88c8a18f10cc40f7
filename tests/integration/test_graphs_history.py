"""Histories, time travel and updates by hand, on every backend and beside `InMemorySaver`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END
from langgraph.types import Command, StateUpdate

from agentflow.checkpoint import Saver
from tests.integration.graphs import State, asks, chain, fan, logs
from tests.integration.twins import EVERY_MODE, Player, Twins


def letters(play: Player, names: str = "abc", **options: Any) -> Any:
    """Compile a chain whose nodes log their names."""
    graph = chain(*((name, logs(name)) for name in names))
    return graph.compile(checkpointer=play.saver, **options)


async def test_two_invocations_of_a_chain(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play)
        for entry in ("1", "2"):
            await play.run(graph, {"log": [entry]})
            await play.history(graph)
        state = await play.state(graph)
        assert state.values == {"log": ["1", "a", "b", "c", "2", "a", "b", "c"]}
        return state.values

    await twins.agree(scenario, modes=EVERY_MODE)


async def test_stream_of_a_chain_with_a_question(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = ("a", logs("a")), ("ask", asks("ok?")), ("b", logs("b"))
        graph = chain(*nodes).compile(checkpointer=play.saver)
        kinds = ("values", "updates", "checkpoints", "tasks")
        assert await play.stream(graph, {"log": []}, kinds)
        (asked,) = (await play.state(graph)).interrupts
        assert await play.stream(graph, Command(resume={asked.id: "yes"}), kinds)
        return (await play.state(graph)).values

    await twins.agree(scenario)


async def test_every_old_checkpoint_is_continued_and_then_the_newest_branch(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play)
        await play.run(graph, {"log": ["0"]})
        for old in (await play.history(graph))[1:-1]:
            assert await play.run(graph, None, old.config) == {"log": ["0", "a", "b", "c"]}
            await play.state(graph)
            await play.history(graph)
        await play.run(graph, {"log": ["more"]})
        return (await play.history(graph))[0].values

    await twins.agree(scenario)


async def test_time_travel_to_before_a_question_asks_it_again(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = ("a", logs("a")), ("ask", asks("ok?")), ("b", logs("b"))
        graph = chain(*nodes).compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {"ok?": "yes"})
        for old in await play.history(graph):
            if old.next in {("a",), ("ask",)}:
                # As a client would name it: by its ids alone.
                chosen = old.config["configurable"]["checkpoint_id"]
                ids = {"thread_id": play.thread, "checkpoint_id": chosen}
                await play.run(graph, None, {"configurable": ids})
                await play.answer(graph, {"ok?": "no"})
        await play.history(graph)
        return None

    await twins.agree(scenario)


async def test_new_input_on_an_old_checkpoint_branches(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play)
        for turn in "12":
            await play.run(graph, {"log": [turn]})
        old = (await play.history(graph))[-1 if play.durability == "exit" else 5]
        await play.run(graph, {"log": ["branch"]}, old.config)
        await play.history(graph)
        await play.run(graph, {"log": ["last"]})
        return (await play.state(graph)).values["log"][-5:]

    await twins.agree(scenario)


@pytest.mark.parametrize("as_node", ["a", "b", "__input__", "__copy__", END, None])
async def test_update_of_the_newest_and_of_old_checkpoints(
    twins: Twins, as_node: str | None
) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play, interrupt_before=["b"])
        await play.run(graph, {"log": []})
        values = None if as_node in {"__copy__", END} else {"log": ["by hand"]}
        await play.update(graph, values, as_node=as_node)
        await play.run(graph, None)
        history = await play.history(graph)
        await play.update(graph, values, as_node=as_node, config=history[-1].config)
        await play.state(graph)
        await play.run(graph, None)
        await play.history(graph)
        return None

    await twins.agree(scenario)


async def test_update_of_a_thread_that_is_empty(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play)
        await play.state(graph)
        await play.update(graph, {"log": ["by hand"]}, as_node="a")
        assert await play.run(graph, None) == {"log": ["by hand", "b", "c"]}
        return (await play.history(graph))[0].values

    await twins.agree(scenario)


async def test_several_updates_at_once(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play)
        steps = [
            [StateUpdate({"log": ["0"]}, "__input__")],
            [StateUpdate({"log": ["1"]}, "a")],
            [StateUpdate({"log": ["2"]}, "b")],
        ]
        if play.api == "async":
            await graph.abulk_update_state(play.config, steps)
        else:
            graph.bulk_update_state(play.config, steps)
        await play.history(graph)
        return await play.run(graph, None)

    await twins.agree(scenario)


async def test_update_answers_nothing_and_finished_siblings_stay_finished(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = fan(("a", asks("A")), ("b", logs("b")), then=logs("end"))
        compiled = graph.compile(checkpointer=play.saver)
        await play.run(compiled, {"log": []})
        await play.update(compiled, {"log": ["by hand"]}, as_node="b")
        await play.state(compiled)
        await play.run(compiled, None)
        await play.history(compiled)
        return None

    await twins.agree(scenario)


async def test_breakpoints(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play, "abcd", interrupt_before=["b"], interrupt_after=["c"])
        result = await play.run(graph, {"log": []})
        while (await play.state(graph)).next:
            result = await play.run(graph, None)
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_failed_node_is_run_again_and_its_siblings_are_not(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        calls: list[str] = []

        def flaky(_: State) -> State:
            calls.append("flaky")
            if calls.count("flaky") == 1:
                raise ConnectionError("try again")
            return {"log": ["flaky"]}

        def steady(_: State) -> State:
            calls.append("a steady")
            return {"log": ["a steady"]}

        nodes = fan(("a steady", steady), ("flaky", flaky), then=logs("end"))
        graph = nodes.compile(checkpointer=play.saver)
        # One at a time, so that the first has finished when the second fails.
        config: RunnableConfig = {**play.config, "max_concurrency": 1}
        await play.run(graph, {"log": []}, config)
        await play.state(graph)
        result = await play.run(graph, None, config)
        await play.history(graph)
        assert calls == ["a steady", "flaky", "flaky"]
        return result

    await twins.agree(scenario)


async def test_node_that_goes_elsewhere_by_command(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        def hop(state: State) -> Command[Any]:
            again = len(state["log"]) < 5
            return Command(update={"log": ["hop"]}, goto="hop" if again else "end")

        graph = chain(("start", logs("start")))
        graph.add_node("hop", hop, destinations=("hop", "end"))
        graph.add_node("end", logs("end"))
        graph.add_conditional_edges("start", lambda _: "hop", ["hop"])
        compiled = graph.compile(checkpointer=play.saver)
        result = await play.run(compiled, {"log": []})
        await play.history(compiled)
        return result

    await twins.agree(scenario)


async def test_command_as_input_updates_and_goes(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = letters(play)
        await play.run(graph, {"log": []})
        result = await play.run(graph, Command(update={"log": ["by command"]}, goto="b"))
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_configurations_can_be_sent_to_a_client(saver: Saver) -> None:
    for checkpointer in (InMemorySaver(), saver):
        play = Player(checkpointer, ("async", "sync"))
        graph = letters(play)
        chunks = await play.stream(graph, {"log": []}, ["checkpoints", "debug"])
        state = await play.state(graph)
        updated = await play.update(graph, {"log": ["by hand"]}, as_node="a")
        assert json.loads(json.dumps([chunks, state.config, state.parent_config, updated]))
