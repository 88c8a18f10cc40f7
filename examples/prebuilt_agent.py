"""LangGraph's prebuilt agent with a durable model and tool node: it asks before it sends.

A crash repeats neither what its model has answered nor what its tools have done.

python -m examples.prebuilt_agent
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.tools import tool
from langgraph.prebuilt import create_react_agent

from agentflow import AgentFlow
from agentflow.nodes import ToolPolicy, durable_model, tool_node
from agentflow.testing import ScriptedChatModel

OUTBOX: list[str] = []


@tool
async def look_up(name: str) -> str:
    """Look up an address."""
    return f"{name}@example.com"


@tool
async def send_mail(to: str, text: str) -> str:
    """Send a mail."""
    OUTBOX.append(f"{to}: {text}")
    return "sent"


TOOLS = tool_node(
    [look_up, send_mail],
    policies={
        "look_up": ToolPolicy(idempotent=True),
        "send_mail": ToolPolicy(approval="always", timeout=30),
    },
)


def script(messages: Sequence[AnyMessage]) -> AIMessage:
    """Look the address up, write to it, and say so."""
    results = [each.text for each in messages if isinstance(each, ToolMessage)]
    match results:
        case []:
            return AIMessage("", tool_calls=[ToolCall(name="look_up", args={"name": "bo"}, id="1")])
        case [address]:
            args = {"to": address, "text": "You are FIRED!"}
            return AIMessage("", tool_calls=[ToolCall(name="send_mail", args=args, id="2")])
        case _:
            return AIMessage("I have written to Bo.")


def build_agent() -> Any:
    """Return the agent."""
    with warnings.catch_warnings():
        # LangChain's `create_agent` follows it; that makes its tool node by itself.
        warnings.simplefilter("ignore")
        return create_react_agent(durable_model(ScriptedChatModel(script=script)), TOOLS)


async def main(url: str = "memory://") -> None:
    """Have the agent write a mail, and a person change it."""
    OUTBOX.clear()
    async with AgentFlow(url) as app:
        app.register(build_agent(), name="assistant")
        handle = await app.submit("assistant", {"messages": [HumanMessage("Write to Bo.")]})
        run = await app.drive(handle.id)
        (approval,) = await handle.approvals()
        proposal = approval.request.proposal
        print(f"{run.status}: {proposal['name']} {proposal['args']}")
        args = {**proposal["args"], "text": "Shall we talk?"}
        edited = {"type": "edit", "value": {**proposal, "args": args}}
        await app.approvals.decide(approval.id, edited, by="ann")
        run = await app.drive(handle.id)
    print(f"{run.status}: {run.output['messages'][-1].text}")
    print(*OUTBOX)


if __name__ == "__main__":
    asyncio.run(main())
