"""Budgets: what is counted, what is let through, and what follows when one is used up."""

from __future__ import annotations

import logging
import operator
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall
from langchain_core.messages.ai import UsageMetadata
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import tools_condition
from langgraph.types import Send

from agentflow import AgentFlow, RetryPolicy
from agentflow.budgets import Budget, Price, price_of, read_prices
from agentflow.errors import BudgetExceededError, InvalidInputError, UnknownPriceError
from agentflow.nodes import ToolPolicy, durable_model, llm_node, tool_node
from agentflow.testing import ScriptedChatModel
from agentflow.types import Run, RunStatus
from tests.integration.spans import recorded

GO = {"messages": [HumanMessage("go")]}


class Calls:
    """Counts calls, and lets those of a model tell themselves apart."""

    def __init__(self, turns: int) -> None:
        self.models = 0
        self.tools = 0
        self.turns = turns

    def script(self, messages: Sequence[AnyMessage]) -> AIMessage:
        self.models += 1
        if sum(isinstance(each, AIMessage) for each in messages) == self.turns:
            return AIMessage("done")
        call = ToolCall(name="look", args={}, id=f"call-{self.models}")
        usage = UsageMetadata(input_tokens=60, output_tokens=40, total_tokens=100)
        return AIMessage("", tool_calls=[call], usage_metadata=usage)


def agent(calls: Calls, own: BaseTool | None = None) -> StateGraph[Any, None, Any, Any]:
    @tool
    async def look() -> str:
        """Look."""
        calls.tools += 1
        return "seen"

    tools = [look if own is None else own]
    policy = ToolPolicy(idempotent=own is None)
    graph: StateGraph[Any, None, Any, Any] = StateGraph(MessagesState)
    graph.add_node("model", llm_node(ScriptedChatModel(script=calls.script), tools=tools))
    graph.add_node("tools", tool_node(tools, policy=policy))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition, {"tools": "tools", END: END})
    graph.add_edge("tools", "model")
    return graph


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


async def drive(app: AgentFlow, calls: Calls, *budgets: Budget, run_id: str = "r") -> Run:
    app.register(agent(calls), name="agent", budget=budgets)
    await app.submit("agent", GO, run_id=run_id)
    return await app.drive(run_id)


def exceeded(run: Run) -> str:
    assert run.status is RunStatus.FAILED
    assert run.error is not None
    assert run.error.type.endswith(BudgetExceededError.__name__)
    assert run.claims == 1, "it is not tried again"
    return run.error.message


CENT = {"scripted": Price(input=100.0, output=100.0)}
"""A call of 100 tokens costs a cent."""


@pytest.mark.parametrize(
    ("budget", "models", "tools", "said"),
    [
        (Budget(model_calls=2), 2, 2, "its run has used 2 of 2 model_calls"),
        (Budget(tool_calls=2), 3, 2, "its run has used 2 of 2 tool_calls"),
        (Budget(tokens=250), 3, 2, "its run has used 300 of 250 tokens"),
        (Budget(cost=0.015, prices=CENT), 2, 1, "its run has used 0.02 of 0.015 cost"),
    ],
)
async def test_call_after_what_is_used_up_is_not_made_and_the_run_fails(
    app: AgentFlow, budget: Budget, models: int, tools: int, said: str
) -> None:
    calls = Calls(9)
    run = await drive(app, calls, budget)
    assert said in exceeded(run)
    assert (calls.models, calls.tools) == (models, tools)
    assert (await app.dead_letters.list()).items[0].reason == "not_retryable"


async def test_run_that_stays_within_its_budget_is_left_alone(app: AgentFlow) -> None:
    budget = Budget(tokens=1000, model_calls=3, tool_calls=2, wall_time=timedelta(hours=1))
    run = await drive(app, Calls(2), budget)
    assert run.status is RunStatus.SUCCEEDED, run.error


async def test_wall_time_is_that_of_the_run_with_all_that_it_waited_for(app: AgentFlow) -> None:
    calls = Calls(9)
    await drive(app, calls, Budget(wall_time=0.000_001))
    assert "wall_time" in exceeded(await app.get_run("r"))
    assert calls.models == 0


async def test_run_asks_for_more_and_goes_on_with_what_it_is_given(app: AgentFlow) -> None:
    calls = Calls(6)
    run = await drive(app, calls, Budget(model_calls=2, on_exceeded="ask"))
    decisions: list[tuple[dict[str, Any], int]] = [
        ({"type": "approve"}, 4),
        ({"type": "respond", "value": {"more": 1}}, 5),
    ]
    for decision, models in decisions:
        assert run.status is RunStatus.WAITING, run.error
        (asked,) = (await app.approvals.list()).items
        assert (asked.kind, asked.request.proposal["limit"]) == ("budget", "model_calls")
        await app.approvals.decide(asked.id, decision, by="ada")
        run = await app.drive("r")
        assert calls.models == models
    (last,) = (await app.approvals.list()).items
    assert (last.request.proposal["used"], last.request.proposal["allowed"]) == (5, 5)
    await app.approvals.decide(last.id, "reject", by="ada")
    assert (await app.drive("r")).status is RunStatus.FAILED
    assert calls.models == 5


async def test_tool_that_calls_a_model_starts_again_when_it_was_given_more(app: AgentFlow) -> None:
    """Its own call has not happened, and nobody is asked about it."""
    calls, expert = Calls(1), Calls(0)

    @tool
    async def look() -> str:
        """Ask somebody who knows."""
        calls.tools += 1
        return (await durable_model(ScriptedChatModel(script=expert.script)).ainvoke("?")).text

    app.register(agent(calls, look), name="agent", budget=Budget(model_calls=1, on_exceeded="ask"))
    await app.submit("agent", GO, run_id="r")
    run = await app.drive("r")
    assert run.status is RunStatus.WAITING, run.error
    (asked,) = (await app.approvals.list(run_id="r")).items
    await app.approvals.decide(asked.id, {"type": "respond", "value": {"more": 5}}, by="ada")
    run = await app.drive("r")
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert (calls.models, expert.models, calls.tools) == (2, 1, 2)


async def test_thread_is_held_to_its_budget_over_all_of_its_runs(app: AgentFlow) -> None:
    calls = Calls(1)
    app.register(agent(calls), name="agent", budget=Budget(model_calls=3, scope="thread"))
    for run_id, status in (("a", "succeeded"), ("b", "succeeded"), ("c", "failed")):
        # The first one has two calls; those behind it find the model's answer in their thread.
        await app.submit("agent", GO, run_id=run_id, thread_id="t")
        run = await app.drive(run_id)
        assert run.status == status, run.error
        calls.turns += 1
    assert run.error is not None
    assert "its thread has used 3 of 3 model_calls" in run.error.message
    assert calls.models == 3


async def test_what_was_used_is_known_to_the_next_attempt_in_another_process(
    database_url: str,
) -> None:
    first, second = Calls(9), Calls(9)
    async with AgentFlow(database_url) as app:
        await drive(app, first, Budget(model_calls=2))
    async with AgentFlow(database_url) as app:
        app.register(agent(second), name="agent", budget=Budget(model_calls=5))
        await app.dead_letters.requeue("r")
        await app.drive("r")
    assert (first.models, second.models) == (2, 3)


async def test_warning_is_logged_and_noted_on_the_span_at_a_share(
    app: AgentFlow, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), recorded() as spans:
        run = await drive(app, Calls(3), Budget(model_calls=4, warn_at=0.5))
        (segment,) = spans.named("invoke_workflow")
    assert run.status is RunStatus.SUCCEEDED
    warned = [each for each in caplog.records if "budget" in each.message]
    assert [each.limit for each in warned] == ["model_calls"]  # type: ignore[attr-defined]
    (event,) = segment.events
    assert (event.attributes or {})["agentflow.budget.share"] == 0.5


class Fan(MessagesState):
    log: Annotated[list[str], operator.add]


def fan_out(
    script: Callable[..., Any], branches: int, times: int = 1
) -> StateGraph[Any, None, Any, Any]:
    node = llm_node(ScriptedChatModel(script=script))

    async def branch(state: Fan, config: RunnableConfig) -> dict[str, Any]:
        for _ in range(times):
            await node(state, config)
        return {"log": ["done"]}

    def spread(state: Fan) -> list[Send]:
        return [
            Send("branch", {"messages": [HumanMessage(f"branch {number}")]})
            for number in range(branches)
        ]

    graph: StateGraph[Any, None, Any, Any] = StateGraph(Fan)
    graph.add_node("branch", branch)
    graph.add_conditional_edges(START, spread, ["branch"])
    return graph


async def test_fifty_branches_together_make_no_more_calls_than_they_may(app: AgentFlow) -> None:
    called: list[str] = []

    def script(messages: Sequence[AnyMessage]) -> str:
        called.append(messages[-1].text)
        return "x"

    app.register(
        fan_out(script, 50),
        name="fan",
        budget=Budget(model_calls=20, on_exceeded="ask"),
        retry=RetryPolicy(max_attempts=1),
    )
    await app.submit("fan", GO, run_id="r")
    run = await app.drive("r")
    assert run.status is RunStatus.WAITING
    assert len(called) <= 20
    (asked,) = (await app.approvals.list()).items
    await app.approvals.decide(asked.id, {"type": "respond", "value": {"more": 30}}, by="ada")
    run = await app.drive("r")
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert len(run.output["log"]) == 50
    assert len(called) == len(set(called)) == 50


async def test_sum_is_exceeded_only_by_calls_that_were_under_way(app: AgentFlow) -> None:
    """All fifty begin before the first one ends; then no further one does."""
    usage = UsageMetadata(input_tokens=60, output_tokens=40, total_tokens=100)
    begun: list[str] = []

    def script(messages: Sequence[AnyMessage]) -> AIMessage:
        begun.append(messages[-1].text)
        return AIMessage("x", usage_metadata=usage)

    app.register(fan_out(script, 50, times=2), name="fan", budget=Budget(tokens=500))
    await app.submit("fan", GO, run_id="r")
    run = await app.drive("r")
    assert "of 500 tokens" in exceeded(run)
    assert 5 <= len(begun) <= 50


async def test_model_without_a_price_is_not_called_where_its_cost_is_limited(
    app: AgentFlow,
) -> None:
    calls = Calls(9)
    run = await drive(app, calls, Budget(cost=1.0))
    assert run.error is not None
    assert run.error.type.endswith(UnknownPriceError.__name__)
    assert calls.models == 0


async def test_answer_tells_what_it_has_cost(app: AgentFlow) -> None:
    run = await drive(app, Calls(1), Budget(cost=1.0, prices=CENT))
    answers = [each for each in run.output["messages"] if isinstance(each, AIMessage)]
    assert answers[0].response_metadata["agentflow"] == {"cost": 0.01}


def test_dated_version_of_a_model_costs_what_the_model_does() -> None:
    prices = read_prices()
    assert price_of("openai:gpt-4o-2024-08-06", prices) is prices["gpt-4o"]
    assert price_of("gpt-4o-mini", prices) is prices["gpt-4o-mini"]
    assert price_of("gpt-4o-audio", prices) is None
    cached = {"input_tokens": 1000, "output_tokens": 10, "input_token_details": {"cache_read": 400}}
    assert Price(input=10, output=100, cached_input=1).cost(cached) == pytest.approx(0.0074)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": 0},
        {"cost": -1.0},
        {"wall_time": 5, "scope": "thread"},
        {"tokens": 5, "warn_at": 2.0},
        {"tokens": 5, "on_exceeded": "stop"},
        {"tokens": 5, "scope": "world"},
    ],
)
def test_budget_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Budget(**options)
