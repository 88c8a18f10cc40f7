"""An order as a saga: when its last step fails, what was done before is undone, in reverse.

python -m examples.order_saga
"""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated, Any, NotRequired, TypedDict

from langgraph.graph import START, StateGraph

from agentflow import AgentFlow, RetryPolicy, effect


class Order(TypedDict):
    """An order, and what was done for it."""

    item: str
    price: int
    log: Annotated[NotRequired[list[str]], operator.add]


class OutOfStockError(Exception):
    """There is nothing to ship."""


class Shop:
    """The services behind the order: each does one thing, and knows how to undo it."""

    def __init__(self) -> None:
        """Begin with nothing done."""
        self.journal: list[str] = []

    def note(self, line: str) -> str:
        """Write down what has happened."""
        self.journal.append(line)
        return line


def build_graph(shop: Shop) -> StateGraph[Any, None, Any, Any]:
    """Return an order in three steps, of which the last one fails."""

    async def release(_: str, item: str) -> None:
        shop.note(f"released {item}")

    async def refund(_: str, price: int) -> None:
        shop.note(f"refunded {price}")

    @effect(compensate=release)
    async def reserve(item: str) -> str:
        return shop.note(f"reserved {item}")

    @effect(compensate=refund)
    async def charge(price: int) -> str:
        return shop.note(f"charged {price}")

    async def reserve_node(state: Order) -> dict[str, Any]:
        return {"log": [await reserve(state["item"])]}

    async def charge_node(state: Order) -> dict[str, Any]:
        return {"log": [await charge(state["price"])]}

    async def ship_node(state: Order) -> dict[str, Any]:
        raise OutOfStockError(state["item"])

    graph: StateGraph[Any, None, Any, Any] = StateGraph(Order)
    graph.add_node("reserve", reserve_node)
    graph.add_node("charge", charge_node)
    graph.add_node("ship", ship_node)
    graph.add_edge(START, "reserve")
    graph.add_edge("reserve", "charge")
    graph.add_edge("charge", "ship")
    return graph


async def main(url: str = "memory://") -> None:
    """Place an order that cannot be shipped."""
    shop = Shop()
    async with AgentFlow(url) as app:
        policy = RetryPolicy(max_attempts=1)
        app.register(build_graph(shop), name="order", retry=policy)
        handle = await app.submit("order", {"item": "kettle", "price": 40})
        run = await app.drive(handle.id)
        print(f"{run.status}, {run.saga}")
    for line in shop.journal:
        print(line)


if __name__ == "__main__":
    asyncio.run(main())
