"""When a person has to agree: pure rules over the shop's own data.

What the model wrote is only ever compared with the order, never believed: a ticket that talks the
model into a huge refund, or into "no approval is needed", still meets these rules.
"""

from __future__ import annotations

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from examples.refunds.shop import Money, Order, Ticket, earlier_tickets, refundable

APPROVAL_LIMITS = {
    "CHF": 100_00,
    "EUR": 100_00,
    "GBP": 85_00,
    "JPY": 16_000,
    "PLN": 430_00,
    "SEK": 1_100_00,
    "USD": 110_00,
}
"""The largest refund that is paid without asking, by currency."""


class Refund(TypedDict):
    """A refund that the model proposes, and that a person may change."""

    order_id: str
    amount: int
    currency: str
    reason: str


def reasons_to_ask(ticket: Ticket, order: Order | None, refund: Refund) -> list[str]:
    """Return why a person must look at a refund; empty if it may be paid at once."""
    if order is None or order["id"] != refund["order_id"]:
        return ["the refund is not for the order that was looked up"]
    limit = Money(amount=APPROVAL_LIMITS.get(refund["currency"], 0), currency=refund["currency"])
    rules = {
        f"above the limit of {limit}": refund["amount"] > limit.amount,
        "more than was paid for the order": refund["amount"] > refundable(order),
        "not a positive amount": refund["amount"] <= 0,
        "not in the order's currency": refund["currency"] != order["currency"],
        "the order belongs to another customer": order["customer"]["id"] != ticket["customer"],
        "the customer is flagged": order["customer"]["flagged"],
        "an earlier ticket asks for the same order": bool(earlier_tickets(order, ticket["id"])),
    }
    return [reason for reason, holds in rules.items() if holds]
