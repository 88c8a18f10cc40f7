"""The functional API and prebuilt agents, on every backend and beside `InMemorySaver`."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.func import entrypoint, task
from langgraph.types import Command, RetryPolicy, interrupt

from agentflow.testing import ScriptedChatModel
from tests.integration.twins import EVERY_MODE, Player, Twins


async def test_finished_tasks_are_not_run_again_after_an_answer(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        calls: list[int] = []

        @task
        def double(value: int) -> int:
            calls.append(value)
            return value * 2

        @entrypoint(checkpointer=play.saver)
        def flow(values: list[int]) -> dict[str, Any]:
            doubled = [double(value).result() for value in values]
            return {"doubled": doubled, "answer": interrupt("ok?")}

        await play.run(flow, [1, 2, 3])
        await play.history(flow)
        result = await play.answer(flow, {"ok?": "yes"})
        await play.history(flow)
        assert calls == [1, 2, 3]
        return result

    await twins.agree(scenario, modes=EVERY_MODE)


async def test_each_invocation_is_given_what_the_previous_one_saved(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        @entrypoint(checkpointer=play.saver)
        def flow(value: int, *, previous: Any = None) -> Any:
            seen = previous or []
            return entrypoint.final(value=len(seen), save=[*seen, value])

        results = [await play.run(flow, value) for value in (5, 6, 7)]
        await play.history(flow)
        assert results == [0, 1, 2]
        return results

    await twins.agree(scenario)


async def test_parallel_tasks_and_a_task_that_asks(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        @task
        def work(value: int) -> Any:
            return interrupt("two?") if value == 2 else value

        @entrypoint(checkpointer=play.saver)
        def flow(values: list[int]) -> list[Any]:
            started = [work(value) for value in values]
            return [each.result() for each in started]

        await play.run(flow, [1, 2, 3])
        result = await play.answer(flow, {"two?": "two"})
        assert result == [1, "two", 3]
        # Which of the parallel tasks had been saved when the one asked is left to chance.
        play.transcript[:] = [result]
        return result

    await twins.agree(scenario, has_same_rows=False)


async def test_failed_task_is_retried_and_then_run_again_by_the_next_invocation(
    twins: Twins,
) -> None:
    async def scenario(play: Player) -> Any:
        calls: list[str] = []
        patience = RetryPolicy(
            max_attempts=2, initial_interval=0, jitter=False, retry_on=ConnectionError
        )

        @task
        def first() -> str:
            calls.append("first")
            return "first"

        @task(retry_policy=patience)  # type: ignore[arg-type]  # its overloads infer no parameters
        def second(_: Any) -> str:
            calls.append("second")
            if calls.count("second") < 4:
                raise ConnectionError("try again")
            return "second"

        @entrypoint(checkpointer=play.saver)
        def flow(_: Any) -> list[str]:
            return [first().result(), second("go").result()]  # type: ignore[arg-type]  # as above

        await play.run(flow, "go")
        await play.state(flow)
        result = await play.run(flow, None)
        await play.history(flow)
        assert calls == ["first", *["second"] * 4]
        return result

    await twins.agree(scenario)


async def test_entrypoint_calls_a_graph_that_keeps_its_state(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        @entrypoint(checkpointer=True)  # type: ignore[arg-type]  # as subgraphs have it
        def inner(value: int, *, previous: Any = None) -> int:
            return (previous or 0) + value

        @entrypoint(checkpointer=play.saver)
        def outer(value: int) -> Any:
            return {"sum": inner.invoke(value)}

        results = [await play.run(outer, value) for value in (1, 2, 3)]
        await play.history(outer)
        assert results[-1] == {"sum": 6}
        return results

    await twins.agree(scenario)


@tool
def weather(city: str) -> str:
    """Look up the weather."""
    return f"sunny in {city}"


def script() -> ScriptedChatModel:
    """Make a model that looks up two cities at once, and then talks."""
    calls = [{"name": "weather", "args": {"city": city}, "id": city} for city in ("Rome", "Oslo")]
    replies = [AIMessage("", tool_calls=calls), AIMessage("Sunny."), AIMessage("Still sunny.")]
    return ScriptedChatModel(script=replies)


async def test_prebuilt_agent_in_two_turns(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        agent: Any = create_agent(script(), tools=[weather], checkpointer=play.saver)
        await play.run(agent, {"messages": [("user", "weather?")]})
        result = await play.run(agent, {"messages": [("user", "and now?")]})
        await play.history(agent)
        assert [message.text for message in result["messages"]] == [
            *("weather?", "", "sunny in Rome", "sunny in Oslo"),
            *("Sunny.", "and now?", "Still sunny."),
        ]
        assert (await play.state(agent)).values["messages"] == result["messages"]
        return result

    await twins.agree(scenario)


async def test_older_prebuilt_agent(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still in wide use
            from langgraph.prebuilt import create_react_agent

            agent: Any = create_react_agent(script(), tools=[weather], checkpointer=play.saver)
        for text in ("weather?", "and now?"):
            result = await play.run(agent, {"messages": [("user", text)]})
            await play.state(agent)
        return result

    # `add_messages` gives the messages of a write their ids in place, when the superstep ends. What
    # agentflow saves is the write as it was made; `InMemorySaver` may save it before or after.
    await twins.agree(scenario, has_same_rows=False)


async def test_prebuilt_agent_asks_before_its_tools_run(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        middleware = HumanInTheLoopMiddleware(interrupt_on={"weather": True})
        agent: Any = create_agent(
            script(), tools=[weather], middleware=[middleware], checkpointer=play.saver
        )
        await play.run(agent, {"messages": [("user", "weather?")]})
        (asked,) = (await play.state(agent)).interrupts
        decisions = [{"type": "approve"}, {"type": "reject", "message": "not Oslo"}]
        result = await play.run(agent, Command(resume={asked.id: {"decisions": decisions}}))
        await play.history(agent)
        tools = [each.text for each in result["messages"] if isinstance(each, ToolMessage)]
        assert len(tools) == 2
        assert "sunny in Rome" in tools
        return result

    await twins.agree(scenario)


async def test_agent_whose_nodes_are_coroutines(twins: Twins) -> None:
    async def scenario(play: Player) -> Any:
        @task
        async def slow(value: int) -> int:
            await asyncio.sleep(0)
            return value + 1

        @entrypoint(checkpointer=play.saver)
        async def flow(value: int) -> Any:
            first, second = await asyncio.gather(slow(value), slow(value * 10))
            return [first, second, interrupt("ok?")]

        await play.run(flow, 1)
        result = await play.answer(flow, {"ok?": "yes"})
        await play.history(flow)
        assert result == [2, 11, "yes"]
        return result

    await twins.agree(scenario, modes=(("async", "sync"),))
