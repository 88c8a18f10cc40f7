"""Whether everything added up: the ledger against what was expected, and the closing table.

What is judged here comes from the services' ledger, from exit codes, and from the expected results
that stand beside the tickets. agentflow's word is taken for nothing but the status of its runs.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

from examples.refunds.holds import Request
from examples.refunds.ledger import AppliedPayment, Ledger
from examples.refunds.shop import Case, Money

APPROVAL_NODE = "approve"
PAYMENT_NODE = "pay"
EMAIL_NODE = "email"
_NODES = {"/payments": PAYMENT_NODE, "/emails": EMAIL_NODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A worker that was killed, and a request that it was waiting for at that moment."""

    worker: str
    where: str
    exit_code: int
    caught: Request

    @property
    def run_id(self) -> str:
        """The run that was in the middle of the node."""
        body = self.caught.body
        return str(body["reference"] if self.caught.path in _NODES else body["run"])

    @property
    def node(self) -> str:
        """The node that the run was in."""
        return str(_NODES.get(self.caught.path) or self.caught.body["node"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A decision that was made through the command line, by a process that exited with 0."""

    run_id: str
    decision: str
    money: Money | None
    """The amount that was approved, as the command line showed or was told it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a person said, through the command line, about an e-mail in doubt."""

    run_id: str
    was_sent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that the demo did and observed, except for what the ledger knows."""

    cases: Mapping[str, Case]
    """By run id."""
    kills: list[Kill]
    decided: list[Decided]
    settled: list[Settled]
    statuses: Mapping[str, str]
    """By run id, as `agentflow run list` gave them at the end."""
    concurrency: int
    seconds: float


def problems(outcome: Outcome, ledger: Ledger) -> list[str]:
    """Return everything that does not add up."""
    return [
        *_run_problems(outcome),
        *_kill_problems(outcome, ledger),
        *_approval_problems(outcome, ledger),
        *_payment_problems(outcome, ledger),
        *_email_problems(outcome, ledger),
    ]


def executed_again(outcome: Outcome, ledger: Ledger) -> int:
    """Count the node executions beyond those that an uninterrupted run needs."""
    executions = ledger.executions("started")
    return sum(max(0, count - _needed(outcome, *at)) for at, count in executions.items())


def table(outcome: Outcome, ledger: Ledger) -> Table:
    """Return the closing table."""
    counts = ledger.counts()
    paid = ledger.payments()
    expected = [case.refund for case in outcome.cases.values() if case.refund]
    rows = {
        "Runs by status": _tally(outcome.statuses.values()),
        "Approvals by decision": _tally(decided.decision for decided in outcome.decided),
        "Workers killed": str(len({kill.worker for kill in outcome.kills})),
        **{f"  {worker}": where for worker, where in _places(outcome)},
        "Nodes executed again after a kill": str(executed_again(outcome, ledger)),
        "Payments requested": f"{counts.payments_requested} "
        f"({counts.payments_requested - ledger.payment_keys()} again, under the same key)",
        "Payments made": f"{len(paid)}: {_totals(payment.money for payment in paid)}",
        "Payments expected": f"{len(expected)}: {_totals(expected)}",
        "E-mails in doubt (person asked)": _settled(outcome),
        "E-mails requested": f"{counts.emails_requested} "
        f"({counts.emails_requested - len(ledger.email_requests())} again)",
        "E-mails sent": f"{counts.emails_applied}, for {len(ledger.emails())} tickets",
        "Time": f"{outcome.seconds:.1f} s",
    }
    result = Table(title="Refunds", show_header=False, title_justify="left")
    result.add_column(style="bold", no_wrap=True)
    result.add_column()
    for name, value in rows.items():
        result.add_row(name, value)
    return result


def _run_problems(outcome: Outcome) -> Iterator[str]:
    for run_id in outcome.cases:
        status = outcome.statuses.get(run_id, "lost")
        if status != "succeeded":
            yield f"run {run_id} is {status}"


def _kill_problems(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    executions = ledger.executions("started")
    for kill in outcome.kills:
        if kill.exit_code != -signal.SIGKILL:
            yield f"{kill.where}: the worker ended with exit code {kill.exit_code} by itself"
        if ledger.outcome(kill.caught.seq) != "dropped":
            yield f"{kill.where}: the worker had its answer before it was killed"
        if executions[kill.run_id, kill.node] <= _needed(outcome, kill.run_id, kill.node):
            yield f"{kill.where}: node {kill.node} of run {kill.run_id} was not executed again"
        call = kill.caught.body.get("call")
        if call is not None and ledger.model_call_events(call) != ["started"]:
            yield f"{kill.where}: the model call was not cut short"
        if kill.node == PAYMENT_NODE:
            yield from _interrupted_payment_problems(kill, ledger)
        if kill.node == EMAIL_NODE:
            yield from _interrupted_email_problems(kill, outcome, ledger)
    again = executed_again(outcome, ledger)
    most = len({kill.worker for kill in outcome.kills}) * outcome.concurrency
    if again > most:
        yield f"{again} nodes were executed again; the killed workers held {most} runs at most"


def _interrupted_payment_problems(kill: Kill, ledger: Ledger) -> Iterator[str]:
    requests = ledger.payment_requests(kill.run_id)
    before = {request.outcome for request in requests if request.seq <= kill.caught.seq}
    after = {request.outcome for request in requests if request.seq > kill.caught.seq}
    if kill.caught.path == "/payments":
        # Nobody knows whether it was made, so it is requested again, under the same key.
        if "replied" not in after:
            yield f"{kill.where}: the payment was not requested again"
        return
    # What was held is what follows the reply: it is on record that the payment was made.
    if "replied" not in before:
        yield f"{kill.where}: the payment had no reply when the worker was killed"
    if after:
        yield f"{kill.where}: the payment was requested again, although its reply was on record"


def _interrupted_email_problems(kill: Kill, outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    said = [settled.was_sent for settled in outcome.settled if settled.run_id == kill.run_id]
    if not said:
        yield f"{kill.where}: nobody was asked whether run {kill.run_id} had sent its e-mail"
    elif said[0] != ledger.has_sent(kill.caught.seq):
        answer = "sent" if said[0] else "not sent"
        yield f"{kill.where}: run {kill.run_id} was told that its e-mail was {answer}, wrongly"


def _approval_problems(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    asked = {run_id for run_id, case in outcome.cases.items() if case.review}
    decided = Counter(decision.run_id for decision in outcome.decided)
    if decided != Counter(asked):
        yield f"{decided.total()} approvals were decided and {len(asked)} were expected"
    paid = _by_run(ledger.payments())
    for decision in outcome.decided:
        if decision.money not in {None, *paid.get(decision.run_id, [])}:
            amounts = _amounts(paid.get(decision.run_id, []))
            yield f"run {decision.run_id}: {decision.money} was approved, {amounts} was paid"


def _payment_problems(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    paid = _by_run(ledger.payments())
    for run_id, case in outcome.cases.items():
        expected = [case.refund] if case.refund else []
        if (actual := paid.pop(run_id, [])) != expected:
            yield f"run {run_id}: {_amounts(actual)} was paid instead of {_amounts(expected)}"
        keys = {request.idempotency_key for request in ledger.payment_requests(run_id)}
        if len(keys) > 1:
            yield f"run {run_id}: one payment was requested under {len(keys)} keys"
    for run_id, actual in paid.items():
        yield f"{_amounts(actual)} was paid for {run_id}, which is none of the runs"


def _email_problems(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    sent, requested = ledger.emails(), ledger.email_requests()
    denied = Counter(settled.run_id for settled in outcome.settled if not settled.was_sent)
    for run_id in outcome.cases:
        if sent[run_id] != 1:
            yield f"run {run_id} sent {sent[run_id]} e-mails instead of one"
        # The mail service sends whatever is requested: only a person's word allows another one.
        if requested[run_id] > 1 + denied[run_id]:
            yield (
                f"run {run_id} requested its e-mail {requested[run_id]} times, and "
                f"{denied[run_id]} times a person had said that it was not sent"
            )
    for run_id in sent.keys() - outcome.cases.keys():
        yield f"an e-mail was sent for {run_id}, which is none of the runs"


def _needed(outcome: Outcome, run_id: str, node: str) -> int:
    """How often an uninterrupted run executes a node."""
    case = outcome.cases.get(run_id)
    # A node that waits for a person is executed once to ask and once to take the answer.
    if node == APPROVAL_NODE:
        return 2 if case is not None and case.review else 1
    if node == EMAIL_NODE:
        return 1 + sum(settled.run_id == run_id for settled in outcome.settled)
    return 1


def _by_run(payments: Iterable[AppliedPayment]) -> dict[str, list[Money]]:
    found: dict[str, list[Money]] = {}
    for payment in payments:
        found.setdefault(payment.reference, []).append(payment.money)
    return found


def _places(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Return each worker that was killed, with all that it was in the middle of."""
    found: dict[str, list[str]] = {}
    for kill in outcome.kills:
        found.setdefault(kill.worker, []).append(kill.where)
    for worker, where in found.items():
        yield worker, "; ".join(where)


def _settled(outcome: Outcome) -> str:
    sent = sum(settled.was_sent for settled in outcome.settled)
    return f"{len(outcome.settled)}: {sent} had been sent, {len(outcome.settled) - sent} had not"


def _amounts(money: list[Money]) -> str:
    return " and ".join(str(one) for one in money) or "nothing"


def _tally(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(Counter(words).items()))


def _totals(money: Iterable[Money]) -> str:
    totals: Counter[str] = Counter()
    for one in money:
        totals[one.currency] += one.amount
    return ", ".join(
        str(Money(amount=amount, currency=currency)) for currency, amount in sorted(totals.items())
    )
