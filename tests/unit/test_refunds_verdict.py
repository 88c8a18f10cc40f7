"""The demo's verdict: each thing that can go wrong is noticed, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from examples.refunds.holds import Request
from examples.refunds.ledger import Ledger
from examples.refunds.shop import Case, Money, Review, Ticket
from examples.refunds.verdict import (
    Decided,
    Kill,
    Outcome,
    Settled,
    executed_again,
    problems,
    table,
)

Reply = Literal["replied", "dropped"]
SMALL, LARGE = Money(amount=1250, currency="EUR"), Money(amount=20000, currency="EUR")


def case(refund: Money | None, review: Review | None = None) -> Case:
    ticket = Ticket(id="T-1", received_at="", customer="C-1", email="", subject="", text="")
    return Case(ticket=ticket, refund=refund, review=review)


CASES = {
    "auto": case(SMALL),
    "held": case(LARGE, Review(decision="approve")),
    "refused": case(None, Review(decision="reject")),
}


class Story:
    """Writes down what happens when all goes well, and lets a test change it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.outcome = Outcome(
            cases=CASES,
            kills=[],
            decided=[
                Decided(run_id="held", decision="approve", money=LARGE),
                Decided(run_id="refused", decision="reject", money=None),
            ],
            settled=[],
            statuses=dict.fromkeys(CASES, "succeeded"),
            concurrency=10,
            seconds=1.0,
        )
        # The payment's reply never arrived, so its node was executed again.
        first = self.execute("auto", "pay")
        caught = self.request_payment("auto", "dropped")
        self.kill("before the reply", caught)
        self.execute("auto", "pay")
        self.request_payment("auto", "replied")
        self.request_payment("held", "replied")
        for run_id in ("held", "refused"):
            self.execute(run_id, "approve")
            self.execute(run_id, "approve")
        assert first.seq == 1

    def kill(self, where: str, caught: Request, worker: str = "worker 1") -> None:
        self.outcome.kills.append(Kill(worker=worker, where=where, exit_code=-9, caught=caught))

    def execute(self, run_id: str, node: str) -> Request:
        fact = {"run": run_id, "node": node, "event": "started"}
        seq = self.ledger.record_request("/executions", None, fact)
        return Request(seq=seq, path="/executions", key=None, body=fact)

    def request_payment(self, run_id: str, outcome: Reply, *, key: str = "k") -> Request:
        body = {"reference": run_id}
        seq = self.ledger.record_request("/payments", f"{key}-{run_id}", body)
        self.ledger.record_outcome(seq, outcome)
        return Request(seq=seq, path="/payments", key=f"{key}-{run_id}", body=body)

    def pay(self, run_id: str, money: Money) -> None:
        self.ledger.add_payment(f"k-{run_id}", run_id, "R-1", money)

    def request_email(self, run_id: str, *, times: int = 1, outcome: Reply = "replied") -> Request:
        """Have an e-mail requested once, and sent so many times."""
        body = {"reference": run_id}
        seq = self.ledger.record_request("/emails", None, body)
        for _ in range(times):
            self.ledger.add_email(seq, run_id, "someone@example.com", "Re: mugs")
        self.ledger.record_outcome(seq, outcome)
        return Request(seq=seq, path="/emails", key=None, body=body)

    def interrupt_email(self, run_id: str, *, was_sent: bool, told: bool | None) -> None:
        """Kill a worker at a run's e-mail; then a person is asked, and says something."""
        self.execute(run_id, "email")
        caught = self.request_email(run_id, times=int(was_sent), outcome="dropped")
        self.kill("in the e-mail", caught, "worker 2")
        if told is not None:
            self.execute(run_id, "email")
            self.outcome.settled.append(Settled(run_id=run_id, was_sent=told))
        self.execute(run_id, "email")
        if told is False:
            self.request_email(run_id)

    def end(self, *, without: str = "", unsent: str = "") -> None:
        for run_id, story in CASES.items():
            if story.refund and run_id != without:
                self.pay(run_id, story.refund)
            if run_id != unsent:
                self.request_email(run_id)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield Story(ledger)
    ledger.close()


def test_nothing_is_wrong_when_all_went_well(story: Story) -> None:
    story.end()
    assert problems(story.outcome, story.ledger) == []
    assert executed_again(story.outcome, story.ledger) == 1
    assert table(story.outcome, story.ledger).row_count > 8


def test_payment_made_twice(story: Story) -> None:
    story.end()
    story.pay("auto", SMALL)
    assert problems(story.outcome, story.ledger) == [
        "run auto: 12.50 EUR and 12.50 EUR was paid instead of 12.50 EUR"
    ]


def test_payment_missing(story: Story) -> None:
    story.end(without="auto")
    assert problems(story.outcome, story.ledger) == [
        "run auto: nothing was paid instead of 12.50 EUR"
    ]


def test_approved_amount_is_not_the_paid_one(story: Story) -> None:
    story.end(without="held")
    story.pay("held", Money(amount=20100, currency="EUR"))
    assert problems(story.outcome, story.ledger) == [
        "run held: 200.00 EUR was approved, 201.00 EUR was paid",
        "run held: 201.00 EUR was paid instead of 200.00 EUR",
    ]


def test_rejected_refund_is_paid(story: Story) -> None:
    story.end()
    story.pay("refused", SMALL)
    assert problems(story.outcome, story.ledger) == [
        "run refused: 12.50 EUR was paid instead of nothing"
    ]


def test_payment_for_nobody(story: Story) -> None:
    story.end()
    story.pay("stranger", SMALL)
    assert problems(story.outcome, story.ledger) == [
        "12.50 EUR was paid for stranger, which is none of the runs"
    ]


@pytest.mark.parametrize(("status", "told"), [("failed", "failed"), (None, "lost")])
def test_run_that_did_not_succeed(story: Story, status: str | None, told: str) -> None:
    story.end()
    statuses = {**story.outcome.statuses, "auto": status}
    if status is None:
        del statuses["auto"]
    outcome = replace(story.outcome, statuses=statuses)  # type: ignore[arg-type]  # None is removed
    assert problems(outcome, story.ledger) == [f"run auto is {told}"]


def test_run_without_email(story: Story) -> None:
    story.pay("auto", SMALL)
    story.pay("held", LARGE)
    story.request_email("auto")
    story.request_email("held")
    assert problems(story.outcome, story.ledger) == ["run refused sent 0 e-mails instead of one"]


def test_email_sent_twice_by_one_request(story: Story) -> None:
    story.end(unsent="held")
    story.request_email("held", times=2)
    assert problems(story.outcome, story.ledger) == ["run held sent 2 e-mails instead of one"]


def test_email_requested_again_without_a_word_from_anybody(story: Story) -> None:
    story.end()
    story.request_email("held", times=0)
    assert problems(story.outcome, story.ledger) == [
        "run held requested its e-mail 2 times, and 0 times a person had said that it was not sent"
    ]


def test_email_for_nobody(story: Story) -> None:
    story.end()
    story.request_email("stranger")
    assert problems(story.outcome, story.ledger) == [
        "an e-mail was sent for stranger, which is none of the runs"
    ]


@pytest.mark.parametrize("was_sent", [True, False], ids=["sent", "lost"])
def test_email_in_doubt_is_settled(story: Story, was_sent: bool) -> None:
    story.end(unsent="held")
    story.interrupt_email("held", was_sent=was_sent, told=was_sent)
    assert problems(story.outcome, story.ledger) == []
    assert executed_again(story.outcome, story.ledger) == 2


def test_email_in_doubt_that_nobody_was_asked_about(story: Story) -> None:
    story.end(unsent="held")
    story.interrupt_email("held", was_sent=True, told=None)
    assert problems(story.outcome, story.ledger) == [
        "in the e-mail: nobody was asked whether run held had sent its e-mail"
    ]


def test_email_in_doubt_about_which_a_person_was_wrong(story: Story) -> None:
    story.end(unsent="held")
    story.interrupt_email("held", was_sent=True, told=False)
    assert problems(story.outcome, story.ledger) == [
        "in the e-mail: run held was told that its e-mail was not sent, wrongly",
        "run held sent 2 e-mails instead of one",
    ]


def test_decision_that_was_not_asked_for(story: Story) -> None:
    story.end()
    story.outcome.decided.pop()
    assert problems(story.outcome, story.ledger) == ["1 approvals were decided and 2 were expected"]


def test_worker_that_was_not_killed(story: Story) -> None:
    story.end()
    kills = [replace(kill, exit_code=1) for kill in story.outcome.kills]
    assert problems(replace(story.outcome, kills=kills), story.ledger) == [
        "before the reply: the worker ended with exit code 1 by itself"
    ]


def test_kill_that_came_too_late(story: Story) -> None:
    story.end()
    story.ledger.record_outcome(story.outcome.kills[0].caught.seq, "replied")
    assert problems(story.outcome, story.ledger) == [
        "before the reply: the worker had its answer before it was killed"
    ]


def test_payment_requested_under_two_keys(story: Story) -> None:
    story.end()
    story.request_payment("held", "replied", key="other")
    assert problems(story.outcome, story.ledger) == [
        "run held: one payment was requested under 2 keys"
    ]


def test_payment_in_doubt_that_is_not_requested_again(story: Story) -> None:
    story.end()
    story.execute("held", "pay")
    story.execute("held", "pay")
    story.kill("in the payment", story.request_payment("held", "dropped"))
    assert problems(story.outcome, story.ledger) == [
        "in the payment: the payment was not requested again"
    ]


def test_kill_between_reply_and_checkpoint(story: Story) -> None:
    story.end()
    story.execute("held", "pay")
    story.execute("held", "pay")
    finished = {"run": "held", "node": "pay", "event": "finished"}
    seq = story.ledger.record_request("/executions", None, finished)
    story.ledger.record_outcome(seq, "dropped")
    story.kill("after the reply", Request(seq=seq, path="/executions", key=None, body=finished))
    assert problems(story.outcome, story.ledger) == []
    story.request_payment("held", "replied")
    assert problems(story.outcome, story.ledger) == [
        "after the reply: the payment was requested again, although its reply was on record"
    ]


def test_kill_that_came_before_the_reply_it_should_follow(story: Story) -> None:
    story.end()
    finished = {"run": "auto", "node": "pay", "event": "finished"}
    caught = Request(seq=1, path="/executions", key=None, body=finished)
    kill = replace(story.outcome.kills[0], caught=caught)
    assert "before the reply: the payment had no reply when the worker was killed" in problems(
        replace(story.outcome, kills=[kill]), story.ledger
    )


def test_model_call_that_was_finished(story: Story) -> None:
    story.end()
    body = {"run": "auto", "node": "propose", "call": "1"}
    seqs = [
        story.ledger.record_request("/model-calls", None, {**body, "event": event})
        for event in ("started", "finished")
    ]
    story.ledger.record_outcome(seqs[0], "dropped")
    caught = Request(seq=seqs[0], path="/model-calls", key=None, body=body)
    story.kill("inside a call", caught)
    assert problems(story.outcome, story.ledger) == [
        "inside a call: node propose of run auto was not executed again",
        "inside a call: the model call was not cut short",
    ]


def test_more_executed_again_than_the_kill_explains(story: Story) -> None:
    story.end()
    for _ in range(10):
        story.execute("auto", "email")
    story.execute("auto", "email")
    assert problems(story.outcome, story.ledger) == [
        "11 nodes were executed again; the killed workers held 10 runs at most"
    ]
