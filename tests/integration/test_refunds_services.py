"""The example's outside world: what the demo's verdict rests on must itself be right."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.refunds.ledger import Ledger
from examples.refunds.services import Fault, Server, Services
from examples.refunds.shop import Money

PAYMENT = {"reference": "run", "order_id": "R-1", "amount": 1250, "currency": "EUR"}
EMAIL = {"reference": "run", "to": "someone@example.com", "subject": "Re: mugs", "text": "Done."}
PAID = Money(amount=1250, currency="EUR")


class World:
    """Running services, and their ledger."""

    def __init__(self, ledger: Ledger, http: httpx.Client) -> None:
        self.ledger = ledger
        self.http = http

    def pay(self, key: str, **changes: Any) -> httpx.Response:
        return self.http.post(
            "/payments", json={**PAYMENT, **changes}, headers={"Idempotency-Key": key}
        )

    def write(self, **changes: Any) -> httpx.Response:
        return self.http.post("/emails", json={**EMAIL, **changes})

    def paid(self) -> list[Money]:
        return [payment.money for payment in self.ledger.payments()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:

        def start(fault: Fault | None = None) -> World:
            ledger = Ledger(tmp_path / "ledger.sqlite")
            stack.callback(ledger.close)
            server = stack.enter_context(Server(Services(ledger, fault=fault)).running())
            http = stack.enter_context(httpx.Client(base_url=server.url, trust_env=False))
            return World(ledger, http)

        yield start


def test_payment_is_applied_once_per_key(start: Callable[..., World]) -> None:
    world = start()
    first, again, other = world.pay("a"), world.pay("a"), world.pay("b")
    assert first.json() == again.json() == {"id": "P-1", **PAYMENT}
    assert other.json()["id"] == "P-2"
    assert world.paid() == [PAID, PAID]
    assert world.ledger.counts().payments_requested == 3


def test_email_is_sent_each_time(start: Callable[..., World]) -> None:
    world = start()
    for _ in range(2):
        assert world.write().status_code == 200
    assert world.ledger.emails() == world.ledger.email_requests() == {"run": 2}


def test_key_used_for_another_request_is_refused(start: Callable[..., World]) -> None:
    world = start()
    world.pay("a")
    assert world.pay("a", amount=99).status_code == 422
    assert world.paid() == [PAID]


@pytest.mark.parametrize(
    ("headers", "body"),
    [({}, PAYMENT), ({"Idempotency-Key": "a"}, {"order_id": "R-1"})],
    ids=["without key", "without amount"],
)
def test_request_that_cannot_be_meant_is_refused_and_on_record(
    start: Callable[..., World], headers: dict[str, str], body: dict[str, Any]
) -> None:
    world = start()
    assert world.http.post("/payments", json=body, headers=headers).status_code == 400
    assert world.paid() == []
    assert world.ledger.counts().payments_requested == 1


@pytest.mark.parametrize(
    ("fault", "paid"),
    [("double", [PAID, PAID]), ("drop", []), ("alter", [Money(amount=1350, currency="EUR")])],
)
def test_fault_spoils_the_first_payment_only(
    start: Callable[..., World], fault: Fault, paid: list[Money]
) -> None:
    world = start(fault)
    for _ in range(2):
        assert world.pay("a").status_code == 200, "the service does not admit to anything"
    assert world.paid() == paid
    world.pay("b", reference="other run")
    assert world.paid() == [*paid, PAID]


@pytest.mark.parametrize(("fault", "sent"), [("double-email", 2), ("drop-email", 0)])
def test_fault_spoils_the_first_email_only(
    start: Callable[..., World], fault: Fault, sent: int
) -> None:
    world = start(fault)
    for reference in ("first", "second"):
        assert world.write(reference=reference).status_code == 200
    assert world.ledger.emails()["first"] == sent
    assert world.ledger.emails()["second"] == 1


def test_held_request_is_applied_and_never_answered(start: Callable[..., World]) -> None:
    world = start()
    hold = world.http.post("/control/holds", json={"path": "/payments", "skip": 1}).json()["hold"]
    world.pay("let through")
    with pytest.raises(httpx.ReadTimeout):
        world.http.post(
            "/payments", json=PAYMENT, headers={"Idempotency-Key": "held"}, timeout=0.05
        )
    caught = world.http.get(f"/control/holds/{hold}?timeout=5").json()["caught"]
    assert caught["key"] == "held"
    assert world.paid() == [PAID, PAID]
    assert world.ledger.outcome(caught["seq"]) is None

    assert world.pay("held").json()["id"] == "P-2", "a hold catches one request"
    counts = world.http.get("/control/counts").json()
    world.http.delete(f"/control/holds/{hold}").raise_for_status()
    world.http.get(f"/control/counts?since={counts['changes']}&timeout=5")
    outcomes = [request.outcome for request in world.ledger.payment_requests("run")]
    assert outcomes == ["replied", "dropped", "replied"]


def test_request_held_at_its_arrival_is_on_record_and_not_acted_on(
    start: Callable[..., World],
) -> None:
    world = start()
    lost = {"path": "/emails", "moment": "arrival"}
    hold = world.http.post("/control/holds", json=lost).json()["hold"]
    with pytest.raises(httpx.ReadTimeout):
        world.http.post("/emails", json=EMAIL, timeout=0.05)
    caught = world.http.get(f"/control/holds/{hold}?timeout=5").json()["caught"]
    world.http.delete(f"/control/holds/{hold}").raise_for_status()
    assert world.ledger.email_requests() == {"run": 1}
    assert world.ledger.emails() == {}
    assert not world.ledger.has_sent(caught["seq"])


def test_request_of_a_sender_killed_in_the_middle_is_not_one(
    start: Callable[..., World], capfd: pytest.CaptureFixture[str]
) -> None:
    world = start()
    address = (world.http.base_url.host, world.http.base_url.port)
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"POST /payments HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert world.ledger.counts().payments_requested == 0
    assert capfd.readouterr().err == ""


def test_hold_that_is_not_reached_says_so(start: Callable[..., World]) -> None:
    world = start()
    hold = world.http.post("/control/holds", json={"path": "/payments"}).json()["hold"]
    assert world.http.get(f"/control/holds/{hold}?timeout=0").json() == {"caught": None}


def test_ledger_counts_node_executions_by_run(start: Callable[..., World]) -> None:
    world = start()
    for event in ("started", "started", "finished"):
        fact = {"run": "r1", "node": "pay", "event": event}
        world.http.post("/executions", json=fact).raise_for_status()
    assert world.ledger.executions("started") == {("r1", "pay"): 2}
    assert world.ledger.executions("finished") == {("r1", "pay"): 1}
