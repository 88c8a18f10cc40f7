"""The run of `run-v1.json`, as the first version of that form exports it.

`write` has written the file, once. It waits for its second answer, and has a fingerprint.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Annotated, Any

from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from typing_extensions import TypedDict

from agentflow import AgentFlow

FILE = Path(__file__).with_name("run-v1.json")


class State(TypedDict, total=False):
    """A log."""

    log: Annotated[list[str], operator.add]


def ask(state: State) -> State:
    """Ask twice."""
    del state
    return {"log": [interrupt("first?")["type"], interrupt("second?")["type"]]}


def last(state: State) -> State:
    """Say how much there was before."""
    return {"log": [f"{len(state['log'])} before"]}


def register(app: AgentFlow) -> None:
    """Register the graph as it was."""
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_node("last", last)
    graph.add_edge(START, "ask")
    graph.add_edge("ask", "last")
    graph.add_edge("last", END)
    app.register(graph, name="golden", version="1")


async def answer(app: AgentFlow) -> Any:
    """Answer what the run asks, and drive it on."""
    [approval] = await app.handle("golden").approvals()
    await app.approvals.decide(approval.id, {"type": "approve"}, by="ann")
    return await app.drive("golden")


async def write() -> None:
    """Write the file."""
    async with AgentFlow("memory://") as app:
        register(app)
        await app.submit("golden", {"log": ["begun"]}, run_id="golden", metadata={"team": "a"})
        await app.drive("golden")
        await answer(app)
        exported = await app.export_run("golden")
    FILE.write_text(json.dumps(exported, indent=1, sort_keys=True) + "\n")
