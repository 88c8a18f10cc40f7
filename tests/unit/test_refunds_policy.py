"""The example's rules and data: who is asked, and that the files fit together."""

from __future__ import annotations

from typing import Any

import pytest

from examples.refunds.policy import APPROVAL_LIMITS, Refund, reasons_to_ask
from examples.refunds.shop import (
    Money,
    Order,
    Ticket,
    earlier_tickets,
    read_cases,
    read_orders,
    refundable,
)

CASES, ORDERS = read_cases(), read_orders()


def ticket(**changes: Any) -> Ticket:
    return {**CASES[0].ticket, **changes}  # type: ignore[typeddict-item]  # keys of the same type


def order(**changes: Any) -> Order:
    return {**ORDERS["R-48101"], **changes}  # type: ignore[typeddict-item]  # as above


def refund(**changes: Any) -> Refund:
    usual = Refund(order_id="R-48101", amount=2980, currency="EUR", reason="broken")
    return {**usual, **changes}  # type: ignore[typeddict-item]  # as above


def test_small_refund_of_an_ordinary_order_needs_nobody() -> None:
    assert reasons_to_ask(ticket(), order(), refund()) == []


@pytest.mark.parametrize(
    ("proposal", "reason"),
    [
        ({"amount": 10001}, "above the limit of 100.00 EUR"),
        ({"amount": 6881}, "more than was paid for the order"),
        ({"amount": 0}, "not a positive amount"),
        ({"amount": -1}, "not a positive amount"),
        ({"currency": "USD"}, "not in the order's currency"),
        ({"currency": "XXX"}, "above the limit of 0.00 XXX"),
        ({"order_id": "R-48105"}, "the refund is not for the order that was looked up"),
    ],
)
def test_proposal_that_does_not_fit_the_order_is_held(
    proposal: dict[str, Any], reason: str
) -> None:
    assert reason in reasons_to_ask(ticket(), order(), refund(**proposal))


def test_refund_without_an_order_is_held() -> None:
    assert reasons_to_ask(ticket(), None, refund())


def test_refund_to_somebody_else_is_held() -> None:
    reasons = reasons_to_ask(ticket(customer="C-999"), order(), refund())
    assert reasons == ["the order belongs to another customer"]


def test_flagged_customer_is_held() -> None:
    customer = {**ORDERS["R-48101"]["customer"], "flagged": True}
    assert reasons_to_ask(ticket(), order(customer=customer), refund()) == [
        "the customer is flagged"
    ]


def test_second_ticket_about_an_order_is_held() -> None:
    assert reasons_to_ask(ticket(id="T-1013"), order(), refund()) == [
        "an earlier ticket asks for the same order"
    ]


def test_order_that_was_refunded_before_is_held() -> None:
    paid_back = order(refunded=6880 - 2979)
    assert reasons_to_ask(ticket(), paid_back, refund()) == ["more than was paid for the order"]


def test_money_is_written_as_people_do() -> None:
    assert str(Money(amount=1205, currency="EUR")) == "12.05 EUR"
    assert str(Money(amount=1205, currency="JPY")) == "1205 JPY"


def test_files_fit_together() -> None:
    ids = [case.ticket["id"] for case in CASES]
    assert len(ids) >= 40
    assert ids == sorted(set(ids))
    for found in ORDERS.values():
        assert found["total"] == sum(line["quantity"] * line["price"] for line in found["lines"])
        assert set(found["tickets"]) <= set(ids)
        assert found["tickets"] == sorted(found["tickets"])
        assert found["currency"] in APPROVAL_LIMITS


def test_expected_refunds_are_possible() -> None:
    by_ticket = {ticket_id: found for found in ORDERS.values() for ticket_id in found["tickets"]}
    for case in CASES:
        ticket_id = case.ticket["id"]
        if case.refund is not None:
            found = by_ticket[ticket_id]
            assert case.refund.currency == found["currency"]
            assert 0 < case.refund.amount <= refundable(found)
            assert earlier_tickets(found, ticket_id) == []
        if case.review is not None:
            assert (case.refund is None) == (case.review.decision == "reject")


def test_tickets_cover_what_support_gets() -> None:
    paid = {case.refund.currency for case in CASES if case.refund}
    assert len(paid) >= 5
    assert {case.review.decision for case in CASES if case.review} == {"approve", "edit", "reject"}
    filed = [len(found["tickets"]) for found in ORDERS.values()]
    assert max(filed) > 1, "a customer writes twice"
    about_orders = sum(filed)
    assert len(CASES) > about_orders, "a ticket has no order"
