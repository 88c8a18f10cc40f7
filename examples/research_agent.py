"""A research agent with a budget: it stops before its next call, asks for more, and goes on.

    python -m examples.research_agent

The model is scripted, so that it runs offline; `llm_node("openai:gpt-4o-mini")` asks a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import tools_condition

from agentflow import AgentFlow
from agentflow.budgets import Budget, Price
from agentflow.nodes import ToolPolicy, llm_node, tool_node
from agentflow.testing import ScriptedChatModel

QUESTIONS = ("origin", "taste", "water", "time")
SOURCES = {
    "origin": "Tea comes from the border of China, India and Myanmar.",
    "taste": "Tannins make tea bitter.",
    "water": "Green tea wants water of 80 degrees.",
    "time": "Three minutes are enough.",
}
BUDGET = Budget(
    cost=0.01,
    tool_calls=20,
    on_exceeded="ask",
    prices={"scripted": Price(input=10.0, output=30.0)},
)
"""A cent: two calls of the model."""


@tool
async def search(topic: str) -> str:
    """Search the library."""
    return SOURCES[topic]


def script(messages: Sequence[AnyMessage]) -> AIMessage:
    """Search for one topic after another, then sum up; each call costs half a cent."""
    found = [each.text for each in messages if isinstance(each, ToolMessage)]
    usage = UsageMetadata(input_tokens=350, output_tokens=50, total_tokens=400)
    if len(found) == len(QUESTIONS):
        return AIMessage(" ".join(found), usage_metadata=usage)
    topic = QUESTIONS[len(found)]
    call = ToolCall(name="search", args={"topic": topic}, id=f"search-{topic}")
    return AIMessage("", tool_calls=[call], usage_metadata=usage)


def build_graph() -> StateGraph[Any, None, Any, Any]:
    """Return the agent: a model and its tools, in turns."""
    graph: StateGraph[Any, None, Any, Any] = StateGraph(MessagesState)
    graph.add_node("model", llm_node(ScriptedChatModel(script=script), tools=[search]))
    # It only reads, so it may be called again when nobody knows whether it was.
    graph.add_node("tools", tool_node([search], policy=ToolPolicy(idempotent=True)))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition, {"tools": "tools", END: END})
    graph.add_edge("tools", "model")
    return graph


async def main(url: str = "memory://") -> None:
    """Research, and grant the agent two cents more when it asks."""
    async with AgentFlow(url) as app:
        app.register(build_graph(), name="research", budget=BUDGET)
        handle = await app.submit("research", {"messages": [HumanMessage("Tell me about tea.")]})
        run = await app.drive(handle.id)
        for approval in await handle.approvals():
            asked = approval.request.proposal
            print(f"{run.status}: {asked['limit']} {asked['used']:.3f} of {asked['allowed']:.3f}")
            more = {"type": "respond", "value": {"more": 0.02}}
            await app.approvals.decide(approval.id, more, by="ann")
        run = await app.drive(handle.id)
        answers = [each for each in run.output["messages"] if isinstance(each, AIMessage)]
        cost = sum(each.response_metadata["agentflow"]["cost"] for each in answers)
        print(f"{run.status}: {len(answers)} calls of the model for {cost:.3f}")
        print(answers[-1].text)


if __name__ == "__main__":
    asyncio.run(main())
