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


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A worker that was killed, and the request that it was waiting for at that moment."""

    where: str
    exit_code: int
    caught: Request

    @property
    def run_id(self) -> str:
        """The run that was in the middle of the node."""
        if self.caught.key is not None:
            return self.caught.key.rpartition(":")[0]
        return str(self.caught.body["run"])

    @property
    def node(self) -> str:
        """The node that the run was in."""
        return str(self.caught.body.get("node", PAYMENT_NODE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A decision that was made through the command line, by a process that exited with 0."""

    run_id: str
    decision: str
    money: Money | None
    """The amount that was approved, as the command line showed or was told it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that the demo did and observed, except for what the ledger knows."""

    cases: Mapping[str, Case]
    """By run id."""
    kills: list[Kill]
    decided: list[Decided]
    statuses: Mapping[str, str]
    """By run id, as `agentflow run list` gave them at the end."""
    concurrency: int
    seconds: float


def problems(outcome: Outcome, ledger: Ledger) -> list[str]:
    """Return everything that does not add up."""
    return [
        *_run_problems(outcome, ledger),
        *_kill_problems(outcome, ledger),
        *_approval_problems(outcome, ledger),
        *_payment_problems(outcome, ledger),
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
        "E-mails sent (one ends each run)": str(counts.emails_applied),
        "Approvals by decision": _tally(decided.decision for decided in outcome.decided),
        "Kills survived": f"{len(outcome.kills)}",
        **{f"  worker {number}": kill.where for number, kill in enumerate(outcome.kills, 1)},
        "Nodes executed again after a kill": str(executed_again(outcome, ledger)),
        "Payments requested": str(counts.payments_requested),
        "Payments applied": f"{len(paid)}: {_totals(payment.money for payment in paid)}",
        "Payments expected": f"{len(expected)}: {_totals(expected)}",
        "Time": f"{outcome.seconds:.1f} s",
    }
    result = Table(title="Refunds", show_header=False, title_justify="left")
    result.add_column(style="bold", no_wrap=True)
    result.add_column()
    for name, value in rows.items():
        result.add_row(name, value)
    return result


def _run_problems(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    emails = ledger.emails()
    for run_id in outcome.cases:
        status = outcome.statuses.get(run_id, "lost")
        if status != "succeeded":
            yield f"run {run_id} is {status}"
        if (sent := emails[f"{run_id}:email"]) != 1:
            yield f"run {run_id} sent {sent} e-mails instead of one"


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
    again, most = executed_again(outcome, ledger), len(outcome.kills) * outcome.concurrency
    if again > most:
        yield f"{again} nodes were executed again; the killed workers held {most} runs at most"


def _interrupted_payment_problems(kill: Kill, ledger: Ledger) -> Iterator[str]:
    requests = ledger.payment_requests(f"{kill.run_id}:payment")
    before = {outcome for seq, outcome in requests if seq <= kill.caught.seq}
    after = {outcome for seq, outcome in requests if seq > kill.caught.seq}
    # Either the payment request itself was held, or what follows its reply.
    if kill.caught.key is None and "replied" not in before:
        yield f"{kill.where}: the payment had no reply when the worker was killed"
    if "replied" not in after:
        yield f"{kill.where}: the payment was not requested again"


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
    for run_id, actual in paid.items():
        yield f"{_amounts(actual)} was paid for {run_id}, which is none of the runs"


def _needed(outcome: Outcome, run_id: str, node: str) -> int:
    """How often an uninterrupted run executes a node."""
    case = outcome.cases.get(run_id)
    # A node that waits for a person is executed once to ask and once to take the answer.
    return 2 if node == APPROVAL_NODE and case is not None and case.review else 1


def _by_run(payments: Iterable[AppliedPayment]) -> dict[str, list[Money]]:
    found: dict[str, list[Money]] = {}
    for payment in payments:
        run_id = payment.idempotency_key.rpartition(":")[0]
        found.setdefault(run_id, []).append(payment.money)
    return found


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
