"""The graphs of the third golden database; `database_v3` writes with them.

Whoever continues what is in that database does it with these graphs. What is stored names the
functions, nodes and channels of this module, and what they say: it is not edited.
"""

from __future__ import annotations

import asyncio
import operator
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph

from agentflow import AgentFlow, RetryPolicy, effect, request_approval

Graph = StateGraph[Any, Any, Any, Any]


@dataclass
class Outside:
    """The world that effects touch: what they have done in it, and what does not come back."""

    calls: list[str] = field(default_factory=list)
    hangs: str = ""
    """A call that is never answered."""
    kills: str = ""
    """A call that kills its process."""
    is_up: bool = True


class Old(TypedDict, total=False):
    """An order, as of version 1."""

    log: Annotated[list[str], operator.add]
    amount: float


class New(TypedDict, total=False):
    """An order, as of version 2."""

    log: Annotated[list[str], operator.add]
    cents: int


class Nested(TypedDict, total=False):
    """An order that somebody looks at inside of a subgraph."""

    log: Annotated[list[str], operator.add]


def order(outside: Outside, asker: str, schema: Any, *, last: str = "pay") -> Graph:
    """Build a graph that reserves, asks, and pays."""

    async def release(outcome: str) -> None:
        outside.calls.append(f"release {outcome}")

    @effect(name="golden:reserve", compensate=release)
    async def reserve(what: str) -> str:
        outside.calls.append(f"reserve {what}")
        return f"place of {what}"

    @effect(name="golden:pay", key=lambda what: f"pay-{what}", timeout=0.05)
    async def pay(what: str) -> str:
        if outside.kills == "pay":
            os.kill(os.getpid(), 9)
        if outside.hangs == "pay":
            await asyncio.Event().wait()
        outside.calls.append(f"pay {what}")
        if not outside.is_up:
            raise ConnectionError("the bank is down")
        return f"receipt of {what}"

    async def reserves(state: Any) -> Any:
        return {"log": [await reserve(state["log"][0])]}

    async def asks(state: Any) -> Any:
        answer = request_approval({"order": state["log"][0]}, title="Pay?")
        return {"log": [f"{answer.type} by {answer.by}"]}

    async def pays(state: Any) -> Any:
        amount = state.get("cents", state.get("amount"))
        return {"log": [f"{await pay(state['log'][0])}: {amount}"]}

    graph: Graph = StateGraph(schema)
    graph.add_node("reserve", reserves)
    graph.add_node(asker, asks)
    graph.add_node(last, pays)
    graph.add_edge(START, "reserve")
    graph.add_edge("reserve", asker)
    graph.add_edge(asker, last)
    graph.add_edge(last, END)
    return graph


def nested() -> Graph:
    """Build a graph around one that asks."""

    def looks(state: Nested) -> Nested:
        return {"log": [request_approval({"seen": state["log"][0]}).type]}

    inner: Graph = StateGraph(Nested)
    inner.add_node("look", looks)
    inner.add_edge(START, "look")
    outer: Graph = StateGraph(Nested)
    outer.add_node("under", inner.compile())
    outer.add_node("end", lambda _: {"log": ["end"]})
    outer.add_edge(START, "under")
    outer.add_edge("under", "end")
    return outer


def in_cents(values: dict[str, Any]) -> dict[str, Any]:
    """Bring an order of version 1 to version 2."""
    return {**values, "cents": round(values["cents"] * 100)}


def register(app: AgentFlow, outside: Outside) -> None:
    """Register all versions of all graphs, and the way between them."""
    policy = RetryPolicy(non_retryable=(ConnectionError,))
    app.register(order(outside, "approve", Old), name="order", version="1", retry=policy)
    app.register(order(outside, "confirm", New), name="order", version="2", retry=policy)
    app.register(nested(), name="nested")
    app.migration(
        "order", from_="1", to="2", nodes={"approve": "confirm"}, channels={"amount": "cents"}
    )(in_cents)
