"""Kill the refund agent again and again: every customer is paid once, and written to once.

    python -m examples.refunds.demo [--db URL] [--fault FAULT]

Workers are killed with SIGKILL at exact moments, every process ends while people still have to
decide, the decisions come from fresh processes, and a new worker finishes. The payment service
makes a payment once per idempotency key. The mail service sends whatever it is asked to: about an
e-mail of which nobody knows, a person is asked, who looks into that service's log. The exit code is
0 only if everything adds up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from httpx import HTTPError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentflow.errors import AgentflowError
from examples.refunds import verdict
from examples.refunds.app import app as refund_app
from examples.refunds.holds import Hold
from examples.refunds.ledger import Ledger
from examples.refunds.processes import DemoError, Running, Services, Stage
from examples.refunds.services import Fault
from examples.refunds.shop import Case, Money, Review, read_cases

_PAID = {"event": "finished", "node": verdict.PAYMENT_NODE}
KILLS: tuple[Mapping[str, Hold], ...] = (
    {"inside a model call": Hold(path="/model-calls", match={"event": "started"}, skip=12)},
    {
        "payment made, no reply yet": Hold(path="/payments", skip=3),
        "payment replied, no checkpoint yet": Hold(path="/executions", match=_PAID, skip=3),
    },
    {
        "e-mail sent, no reply yet": Hold(path="/emails", skip=2),
        "e-mail lost on its way": Hold(path="/emails", skip=2, moment="arrival"),
    },
)
"""Where workers are killed, one after the other: each of them when all of its holds have caught a
request. A hold lets some pass first, so that runs are under way."""

CONCURRENCY = 10
_ANSWERS_AT_A_TIME = 2
_REVIEWER = "alice"
_ALL = ("--limit", "1000")


class Board:
    """Progress bars for people; nothing waits for them."""

    def __init__(self, console: Console, cases: Mapping[str, Case]) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        asked = sum(case.review is not None for case in cases.values())
        paid = sum(case.refund is not None for case in cases.values())
        self._bars = {
            "emails_applied": self.progress.add_task("e-mails sent", total=len(cases)),
            "payments_applied": self.progress.add_task("payments made", total=paid),
            "kills": self.progress.add_task("workers killed", total=len(KILLS)),
            "decisions": self.progress.add_task("approvals decided", total=asked),
        }

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def advance(self, bar: str) -> None:
        self.progress.advance(self._bars[bar])

    async def follow(self, services: Services) -> None:
        """Show the services' counts as they change."""
        counts: Mapping[str, int] = {"changes": -1}
        while True:
            counts = await services.wait_counts(counts["changes"])
            for name in ("emails_applied", "payments_applied"):
                self.progress.update(self._bars[name], completed=counts[name])


class Demo:
    """The director: knows what must be true next, and waits until it is."""

    def __init__(self, *, db: str, queue: str, stage: Stage, board: Board) -> None:
        self._db = db
        self._queue = queue
        self._stage = stage
        self._board = board
        self._workers = 0

    async def perform(self, cases: Mapping[str, Case]) -> verdict.Outcome:
        """Run the whole story and return what was observed."""
        begun = time.monotonic()
        services = await self._stage.start_services()
        kills = await self._while_following(services, self._drive_and_kill(services, cases))
        await services.stop()

        self._board.say("every process has ended; what people have to say waits in the database")
        decided, settled = await self._answer_all(cases)

        services = await self._stage.start_services()
        await self._while_following(services, self._finish(cases))
        statuses = await self._run_statuses(cases)
        await services.stop()
        return verdict.Outcome(
            cases=cases,
            kills=kills,
            decided=decided,
            settled=settled,
            statuses=statuses,
            concurrency=CONCURRENCY,
            seconds=time.monotonic() - begun,
        )

    async def _drive_and_kill(
        self, services: Services, cases: Mapping[str, Case]
    ) -> list[verdict.Kill]:
        """Submit everything, kill a worker at each hold point, then wait until all is at rest."""
        kills: list[verdict.Kill] = []
        for holds in KILLS:
            armed = {where: await services.hold(hold) for where, hold in holds.items()}
            worker = await self._start_worker()
            if not kills:
                await self._submit(cases)
            caught = {
                where: await worker.until(services.wait_caught(hold_id), what=f"'{where}'")
                for where, hold_id in armed.items()
            }
            exit_code = await worker.kill()
            self._board.say(f"killed {worker.name} (pid {worker.pid})")
            self._board.advance("kills")
            for where, hold_id in armed.items():
                await services.end_hold(hold_id)
                kill = verdict.Kill(
                    worker=worker.name, where=where, exit_code=exit_code, caught=caught[where]
                )
                self._board.say(f"  run {kill.run_id}: {where}")
                kills.append(kill)
        worker = await self._start_worker()
        await worker.until(self._wait_runs(cases, until="parked"), what="runs to end or to wait")
        await worker.stop()
        return kills

    async def _finish(self, cases: Mapping[str, Case]) -> None:
        worker = await self._start_worker()
        await worker.until(self._wait_runs(cases, until="ended"), what="all runs to end")
        await worker.stop()

    async def _start_worker(self) -> Running:
        self._workers += 1
        worker = await self._stage.start_worker(self._workers, concurrency=CONCURRENCY)
        self._board.say(f"started {worker.name} (pid {worker.pid})")
        return worker

    async def _submit(self, cases: Mapping[str, Case]) -> None:
        async with refund_app.with_url(self._db) as app:
            for run_id, case in cases.items():
                await app.submit(
                    "refund", {"ticket": case.ticket}, run_id=run_id, queue=self._queue
                )
        self._board.say(f"submitted {len(cases)} tickets")

    async def _wait_runs(self, cases: Mapping[str, Case], *, until: Any) -> None:
        async with refund_app.with_url(self._db) as app:
            for run_id in cases:
                await app.wait(run_id, until=until)

    async def _while_following(self, services: Services, work: Coroutine[Any, Any, Any]) -> Any:
        """Do the work with the progress bars alive."""
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._board.follow(services))
            result = await work
            following.cancel()
        return result

    async def _answer_all(
        self, cases: Mapping[str, Case]
    ) -> tuple[list[verdict.Decided], list[verdict.Settled]]:
        """Answer what waits, a fresh process for each answer."""
        listed = await self._stage.agentflow("approval", "list", "--graph", "refund", *_ALL)
        pending = [approval for approval in listed if approval["run_id"] in cases]
        turn = asyncio.Semaphore(_ANSWERS_AT_A_TIME)
        mails = self._read_mail_log()
        decided: list[verdict.Decided] = []
        settled: list[verdict.Settled] = []

        async def answer(approval: Mapping[str, Any]) -> None:
            run_id = approval["run_id"]
            review = cases[run_id].review
            async with turn:
                if approval["kind"] == "effect":
                    settled.append(await self._settle(approval, was_sent=mails[run_id] > 0))
                elif review is None:
                    raise DemoError(f"run {run_id} asks for an approval that it needs not")
                else:
                    decided.append(await self._decide(approval, review))
                    self._board.advance("decisions")

        async with asyncio.TaskGroup() as group:
            for approval in pending:
                group.create_task(answer(approval))
        return decided, settled

    def _read_mail_log(self) -> Mapping[str, int]:
        """Count the e-mails that were sent for each run, by the mail service's own log."""
        with closing(Ledger(self._stage.ledger)) as ledger:
            return ledger.emails()

    async def _settle(self, approval: Mapping[str, Any], *, was_sent: bool) -> verdict.Settled:
        """Say what became of an e-mail in doubt; all workers are gone, so none is at it."""
        facts, run_id = approval["request"]["proposal"], approval["run_id"]
        if facts["node"] != verdict.EMAIL_NODE:
            raise DemoError(f"run {run_id} asks about {facts['name']}, which can be repeated")
        await self._stage.agentflow(
            *("effect", "resolve", facts["effect"], "--by", _REVIEWER),
            "--happened" if was_sent else "--did-not-happen",
            *("--comment", "by the mail service's log"),
        )
        found = "finds it, so it is not sent again" if was_sent else "finds nothing, so it is sent"
        self._board.say(
            f"e-mail of run {run_id} in doubt: {_REVIEWER} looks into the mail log and {found}"
        )
        return verdict.Settled(run_id=run_id, was_sent=was_sent)

    async def _decide(self, approval: Mapping[str, Any], review: Review) -> verdict.Decided:
        proposal: dict[str, Any] = approval["request"]["proposal"]
        options = ["--by", _REVIEWER, "--if-version", str(approval["version"])]
        if review.message is not None:
            options += ["--message", review.message]
        if review.decision == "edit":
            proposal = {**proposal, "amount": review.amount}
            options += ["--value", json.dumps(proposal)]
        await self._stage.agentflow("approval", review.decision, approval["id"], *options)
        approved = Money(amount=proposal["amount"], currency=proposal["currency"])
        return verdict.Decided(
            run_id=approval["run_id"],
            decision=review.decision,
            money=None if review.decision == "reject" else approved,
        )

    async def _run_statuses(self, cases: Mapping[str, Case]) -> dict[str, str]:
        runs = await self._stage.agentflow("run", "list", "--graph", "refund", *_ALL)
        return {run["id"]: run["status"] for run in runs if run["id"] in cases}


async def run_demo(*, db: str | None, fault: str | None, directory: Path) -> list[str]:
    """Run the demo, print its table, and return what went wrong."""
    console = Console()
    mark = secrets.token_hex(3)  # sets this demo's runs apart in a database that has others
    cases = {f"{case.ticket['id']}-{mark}": case for case in read_cases()}
    url = db or f"sqlite:///{directory / 'agentflow.sqlite'}"
    board = Board(console, cases)
    queue = f"refunds-{mark}"
    with board.progress:
        async with Stage(db=url, queue=queue, directory=directory, fault=fault) as stage:
            outcome = await Demo(db=url, queue=queue, stage=stage, board=board).perform(cases)
    with closing(Ledger(stage.ledger)) as ledger:
        console.print(verdict.table(outcome, ledger))
        found = [f"does not add up: {problem}" for problem in verdict.problems(outcome, ledger)]
    if not found:
        console.print(
            "Everything adds up: each payment and each e-mail once, by the services' ledger."
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The refund agent, with kills and approvals.")
    parser.add_argument("--db", help="database URL; default: a new SQLite file")
    parser.add_argument("--fault", choices=get_args(Fault), help="make one go wrong")
    options = parser.parse_args()

    directory = Path(tempfile.mkdtemp(prefix="refunds-"))
    found: list[str] = []
    try:
        found += asyncio.run(run_demo(db=options.db, fault=options.fault, directory=directory))
    except* (DemoError, AgentflowError, HTTPError) as group:
        found += [str(problem) for problem in _leaves(group)]
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        print(f"ledger and logs are kept in {directory}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(directory)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


if __name__ == "__main__":
    main()
