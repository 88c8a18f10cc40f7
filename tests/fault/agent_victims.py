"""An agent whose model and tools tell the ledger of each call, and the process that drives it."""

from __future__ import annotations

import operator
import os
import signal
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import create_react_agent, tools_condition
from langgraph.types import Send

from agentflow import AgentFlow
from agentflow.budgets import Budget
from agentflow.failpoints import arm, instrument
from agentflow.nodes import ToolPolicy, durable_model, llm_node, tool_node
from agentflow.storage import RunStore
from agentflow.storage.sql import SqlRunStore
from agentflow.testing import ScriptedChatModel
from tests.fault.ledger import arecord, record

TURNS = 2
"""How often the model calls a tool before it has its answer."""
TOOLS = 3
"""How many tools the prebuilt agent has, and calls one after the other."""
BRANCHES = 50
MOST = 20
"""How many of them the budget allows at first."""


class Fan(MessagesState):
    """What the branches have made."""

    log: Annotated[list[int], operator.add]


def app_of(url: str, run_id: str, ledger: str) -> AgentFlow:
    """Return an app that knows the agent."""
    app = AgentFlow(url)
    app.register(agent(run_id, ledger), name="agent")
    app.register(prebuilt(run_id, ledger), name="prebuilt")
    app.register(
        branches(run_id, ledger),
        name="branches",
        budget=Budget(model_calls=MOST, on_exceeded="ask"),
    )
    return app


def branches(run_id: str, ledger: str) -> StateGraph[Any, None, Any, Any]:
    """Return branches that each ask a model, at the same time."""

    def script(messages: Sequence[AnyMessage]) -> AIMessage:
        record(ledger, event="model", run=run_id, turn=messages[-1].text)
        return AIMessage("done")

    node = llm_node(ScriptedChatModel(script=script))

    async def branch(state: Fan, config: RunnableConfig) -> dict[str, Any]:
        await node(state, config)
        return {"log": [1]}

    graph: StateGraph[Any, None, Any, Any] = StateGraph(Fan)
    graph.add_node("branch", branch)
    graph.add_conditional_edges(START, spread, ["branch"])
    return graph


def spread(state: Any) -> list[Send]:
    """Send each branch a message of its own."""
    texts = [f"branch {number}" for number in range(BRANCHES)]
    return [Send("branch", {"messages": [HumanMessage(text)]}) for text in texts]


def agent(run_id: str, ledger: str) -> StateGraph[Any, None, Any, Any]:
    """Return the agent."""

    @tool
    async def charge(amount: int) -> str:
        """Charge a card."""
        await arecord(ledger, event="tool", run=run_id, amount=amount)
        return f"charged {amount}"

    @tool
    async def look_up(amount: int) -> str:
        """Look at a card."""
        await arecord(ledger, event="look", run=run_id, amount=amount)
        return "fine"

    def script(messages: Sequence[AnyMessage]) -> AIMessage:
        turn = sum(isinstance(each, ToolMessage) for each in messages)
        record(ledger, event="model", run=run_id, turn=turn)
        if turn == TURNS:
            return AIMessage("done")
        name = "look_up" if run_id.startswith("idempotent") else "charge"
        # Always the same id, as some models give them.
        return AIMessage("", tool_calls=[ToolCall(name=name, args={"amount": turn}, id="call")])

    tools = [charge, look_up]
    graph: StateGraph[Any, None, Any, Any] = StateGraph(MessagesState)
    graph.add_node("model", llm_node(ScriptedChatModel(script=script), tools=tools))
    graph.add_node("tools", tool_node(tools, policies={"look_up": ToolPolicy(idempotent=True)}))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition, {"tools": "tools", END: END})
    graph.add_edge("tools", "model")
    return graph


def prebuilt(run_id: str, ledger: str) -> Any:
    """Return LangChain's own agent with three tools, none of which may be called twice."""

    @tool
    async def reserve(amount: int) -> str:
        """Reserve."""
        await arecord(ledger, event="tool", run=run_id, amount=amount)
        return "reserved"

    @tool
    async def pay(amount: int) -> str:
        """Pay."""
        await arecord(ledger, event="tool", run=run_id, amount=amount)
        return "paid"

    @tool
    async def ship(amount: int) -> str:
        """Ship."""
        await arecord(ledger, event="tool", run=run_id, amount=amount)
        return "shipped"

    tools = [reserve, pay, ship]

    def script(messages: Sequence[AnyMessage]) -> AIMessage:
        turn = sum(isinstance(each, ToolMessage) for each in messages)
        record(ledger, event="model", run=run_id, turn=turn)
        if turn == len(tools):
            return AIMessage("done")
        call = ToolCall(name=tools[turn].name, args={"amount": turn}, id="call")
        return AIMessage("", tool_calls=[call])

    model = durable_model(ScriptedChatModel(script=script))
    with warnings.catch_warnings():
        # `create_agent` follows it, which makes its tool node by itself.
        warnings.simplefilter("ignore")
        return create_react_agent(model, tool_node(tools))


async def drive(
    url: str, run_id: str, ledger: str, kill_after: int | None = None, graph: str = "agent"
) -> None:
    """Drive a run; if told so, be killed when that many outcomes are durable."""
    seen = [0]

    def count() -> None:
        seen[0] += 1
        if seen[0] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    instrument(SqlRunStore, RunStore, ["finish_effect"])
    arm("RunStore.finish_effect.after", count)
    async with app_of(url, run_id, ledger) as app:
        await app.submit(graph, {"messages": [HumanMessage("go")]}, run_id=run_id)
        await app.drive(run_id)
