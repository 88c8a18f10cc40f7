"""The shop's own data: the tickets that came in, and the orders they are about.

Amounts are whole numbers of the currency's smallest unit: cents, pence, öre; yen have none smaller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

_HERE = Path(__file__).parent
_WITHOUT_DECIMALS = frozenset({"JPY"})


class Ticket(TypedDict):
    """A customer's message; the input of a run."""

    id: str
    received_at: str
    customer: str
    email: str
    subject: str
    text: str


class Customer(TypedDict):
    id: str
    name: str
    email: str
    flagged: bool
    """A person looks at every refund for this customer."""


class Line(TypedDict):
    item: str
    quantity: int
    price: int


class Order(TypedDict):
    id: str
    customer: Customer
    currency: str
    lines: list[Line]
    total: int
    refunded: int
    """What was paid back before."""
    delivered_on: str
    tickets: list[str]
    """The tickets filed under this order, in the order in which they came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    amount: int
    currency: str

    def __str__(self) -> str:
        """Write the amount as people do."""
        if self.currency in _WITHOUT_DECIMALS:
            return f"{self.amount} {self.currency}"
        return f"{self.amount // 100}.{self.amount % 100:02d} {self.currency}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What a person will decide when the agent asks about a ticket."""

    decision: Literal["approve", "edit", "reject"]
    amount: int | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A ticket, and what has to come of it. Only the ticket is shown to the agent."""

    ticket: Ticket
    refund: Money | None
    """What the customer must have been paid in the end; written down by hand."""
    review: Review | None
    """Set where a person has to be asked."""


def read_cases() -> list[Case]:
    """Return all tickets with their expected results, oldest first."""
    expected = {row["ticket"]: row for row in _read_lines("expected.jsonl")}
    return [_case(ticket, expected[ticket["id"]]) for ticket in _read_lines("tickets.jsonl")]


def read_orders() -> Mapping[str, Order]:
    """Return all orders by id."""
    orders: list[Order] = json.loads((_HERE / "orders.json").read_text(encoding="utf-8"))
    return {order["id"]: order for order in orders}


def refundable(order: Order) -> int:
    """Return what is left of the order's price to pay back."""
    return order["total"] - order["refunded"]


def earlier_tickets(order: Order, ticket_id: str) -> list[str]:
    """Return the tickets about this order that came before the given one."""
    filed = order["tickets"]
    return filed[: filed.index(ticket_id)] if ticket_id in filed else []


def _read_lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (_HERE / name).read_text(encoding="utf-8").splitlines()]


def _case(ticket: Ticket, expected: Mapping[str, Any]) -> Case:
    return Case(
        ticket=ticket,
        refund=Money(**expected["refund"]) if expected["refund"] else None,
        review=Review(**expected["review"]) if expected["review"] else None,
    )
