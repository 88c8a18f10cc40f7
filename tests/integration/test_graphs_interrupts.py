"""Questions and fan-out in real graphs, on every backend and beside `InMemorySaver`."""

from __future__ import annotations

from typing import Any

from langgraph.types import Command, Send, interrupt

from tests.integration.graphs import State, ask_twice, asks, chain, fan, logs
from tests.integration.twins import EVERY_MODE, Player, Twins


def sends(node: Any, *values: Any, then: bool = True) -> Any:
    """Build a graph that calls one node with each of several values in one superstep."""
    graph = chain(("start", logs("start")))
    graph.add_node("work", node)
    graph.add_conditional_edges(
        "start", lambda _: [Send("work", {"value": value}) for value in values], ["work"]
    )
    if then:
        graph.add_node("end", logs("end"))
        graph.add_edge("work", "end")
    return graph


async def test_two_questions_of_one_node(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = chain(("ask", ask_twice), ("end", logs("end"))).compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {"refund $10?": "yes"})
        result = await play.answer(graph, {"wire $1M?": "no"})
        await play.history(graph)
        assert result["log"] == ["yes", "no", "end"]
        return result

    await twins.agree(scenario)


async def test_parallel_questions_are_answered_in_parts(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = fan(
            ("a", asks("A")), ("b", asks("B")), ("c", asks("C")), ("d", logs("d")), then=logs("end")
        )
        graph = nodes.compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {"B": 2})
        await play.history(graph)
        await play.answer(graph, {"A": 1, "C": 3})
        await play.history(graph)
        return (await play.state(graph)).values

    await twins.agree(scenario, modes=EVERY_MODE)


async def test_run_without_an_answer_asks_again(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = fan(("a", asks("A")), ("b", asks("B")), then=logs("end"))
        graph = nodes.compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {"A": 1})
        await play.run(graph, None)
        await play.run(graph, None)
        result = await play.answer(graph, {"B": 2})
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_new_input_drops_the_question(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = chain(("a", logs("a")), ("ask", asks("ok?"))).compile(checkpointer=play.saver)
        await play.run(graph, {"log": ["1"]})
        await play.run(graph, {"log": ["2"]})
        await play.history(graph)
        return await play.answer(graph, {"ok?": "yes"})

    await twins.agree(scenario)


async def test_answer_comes_with_an_update_and_a_jump(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = ("a", logs("a")), ("ask", asks("ok?")), ("b", logs("b"))
        graph = chain(*nodes).compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        (asked,) = (await play.state(graph)).interrupts
        update = Command(resume={asked.id: "yes"}, update={"log": ["updated"]}, goto="a")
        await play.run(graph, update)
        await play.history(graph)
        return (await play.state(graph)).values

    await twins.agree(scenario)


async def test_question_in_a_loop(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        graph = chain(("start", logs("start")))
        graph.add_node("ask", lambda state: {"log": [interrupt(f"{len(state['log'])}?")]})
        graph.add_edge("start", "ask")
        graph.add_conditional_edges("ask", lambda state: "ask" if len(state["log"]) < 5 else "end")
        graph.add_node("end", logs("end"))
        compiled = graph.compile(checkpointer=play.saver)
        await play.run(compiled, {"log": []})
        for turn in range(1, 5):
            result = await play.answer(compiled, {f"{turn}?": turn})
        await play.history(compiled)
        assert result["log"] == ["start", 1, 2, 3, 4, "end"]
        return result

    await twins.agree(scenario)


async def test_fan_out_by_send(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        def work(state: State) -> State:
            return {"log": [state["value"]]}

        graph = sends(work, *range(8)).compile(checkpointer=play.saver)
        result = await play.run(graph, {"log": []})
        await play.history(graph)
        assert result["log"] == ["start", *range(8), "end"]
        return result

    await twins.agree(scenario)


async def test_sent_tasks_ask_and_the_others_are_not_run_again(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        calls: list[Any] = []

        def work(state: State) -> State:
            calls.append(state["value"])
            if state["value"] % 2:
                return {"log": [interrupt(state["value"])]}
            return {"log": [state["value"]]}

        graph = sends(work, *range(6)).compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {1: "one", 5: "five"})
        result = await play.answer(graph, {3: "three"})
        await play.history(graph)
        assert result["log"] == ["start", 0, "one", 2, "three", 4, "five", "end"]
        assert [calls.count(value) for value in (0, 2, 4)] == [1, 1, 1]
        return result

    await twins.agree(scenario)


async def test_sends_of_sends(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        def split(state: State) -> Command[Any]:
            value = state["value"]
            goto = [Send("work", {"value": value * 10 + i}) for i in range(2)] if value < 10 else []
            return Command(update={"log": [value]}, goto=goto)

        graph = sends(split, 1, 2, then=False).compile(checkpointer=play.saver)
        result = await play.run(graph, {"log": []})
        await play.history(graph)
        assert sorted(map(str, result["log"])) == ["1", "10", "11", "2", "20", "21", "start"]
        return result

    await twins.agree(scenario)


async def test_time_travel_to_a_superstep_with_an_answered_question(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = fan(("a", asks("A")), ("b", asks("B")), then=logs("end"))
        graph = nodes.compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        await play.answer(graph, {"A": 1})
        waiting = await play.state(graph)
        await play.answer(graph, {"B": 2})
        await play.run(graph, None, waiting.config)
        await play.history(graph)
        result = await play.answer(graph, {"A": 3, "B": 4})
        await play.history(graph)
        return result

    await twins.agree(scenario)


async def test_addressed_answer_at_the_newest_checkpoint_resumes_it(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        nodes = fan(("a", asks("A")), ("b", logs("b")), then=logs("end"))
        graph = nodes.compile(checkpointer=play.saver)
        await play.run(graph, {"log": []})
        waiting = await play.state(graph)
        (asked,) = waiting.interrupts
        result = await play.run(graph, Command(resume={asked.id: 1}), waiting.config)
        await play.history(graph)
        return result

    await twins.agree(scenario)
