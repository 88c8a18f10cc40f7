"""The graph of `fingerprint-v1.json`, which no process and no version of Python reads otherwise.

`write` has written the file, once.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send
from pydantic import BaseModel
from typing_extensions import TypedDict

from agentflow.versions import fingerprint_of

FILE = Path(__file__).with_name("fingerprint-v1.json")


class Level(Enum):
    """An enumeration."""

    LOW = 1
    HIGH = 2


class Order(BaseModel):
    """A model."""

    level: Level = Level.LOW
    parts: dict[str, int | None] = {}


def longer(before: list[str], after: list[str]) -> list[str]:
    """Reduce by the user's own rule."""
    return max(before or [], after, key=len)


class State(TypedDict, total=False):
    """Channels of all kinds."""

    messages: Annotated[list[Any], add_messages]
    total: Annotated[int, operator.add]
    best: Annotated[list[str], longer]
    order: Order
    path: Path | None
    step: Literal["a", "b"]
    names: Sequence[str]


class Context(TypedDict):
    """What is not stored."""

    user: str


def priced(state: State, *, rate: float = 1.5) -> str:
    """Format in ways that versions of Python parse differently."""
    amount, width = state["total"] * rate, 8
    return f"{amount:>{width}.2f} {'€' if rate > 1 else '$'} {amount!r:}"


def plan(state: State) -> State:
    """Call a function of the project."""
    match state.get("step"):
        case "a" | "b":
            return {"best": [priced(state)]}
        case _:
            return {"best": [text for _, text in [(1, "x")] if text]}


async def ask(state: State) -> Command[Literal["fan", "plan"]]:
    """Lead elsewhere by a command."""
    return Command(goto="fan" if state["total"] else "plan")


def spread(state: State) -> list[Send]:
    """Send, nobody knows where."""
    return [Send("leaf", {"total": n}) for n in range(state["total"])]


def graph() -> Any:
    """Build the graph."""
    inner = StateGraph(State)
    inner.add_node("leaf_in", lambda state: {"total": state["total"] + 1})
    inner.add_edge(START, "leaf_in")
    outer = StateGraph(State, context_schema=Context)
    outer.add_node("plan", plan)
    outer.add_node("ask", ask)
    outer.add_node("fan", lambda _: {}, metadata={"version": "7"})
    outer.add_node("leaf", inner.compile())
    outer.add_node("join", lambda _: {}, defer=True)
    outer.add_edge(START, "plan")
    outer.add_edge("plan", "ask")
    outer.add_conditional_edges("fan", spread)
    outer.add_edge(["leaf", "plan"], "join")
    outer.add_edge("join", END)
    return outer.compile()


def write() -> None:
    """Print the fingerprint."""
    sys.stdout.write(fingerprint_of(graph()).text + "\n")
