"""Kill the refund agent again and again, and show that every customer is paid exactly once.

    python -m examples.refunds.demo [--db URL] [--fault double|drop|alter]

Workers are killed with SIGKILL at three exact moments, every process ends while people still have
to decide, the decisions come from fresh processes, and a new worker finishes. The exit code is 0
only if everything adds up.
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

KILLS = {
    "inside a model call": Hold(path="/model-calls", match={"event": "started"}, skip=12),
    "after a payment was requested, before the reply": Hold(path="/payments", skip=3),
    "after the reply, before the checkpoint": Hold(
        path="/executions", match={"event": "finished", "node": verdict.PAYMENT_NODE}, skip=3
    ),
}
"""Where workers are killed: each hold lets some requests pass, so that runs are under way."""

CONCURRENCY = 10
_DECISIONS_AT_A_TIME = 2
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
            "emails_applied": self.progress.add_task("runs ended", total=len(cases)),
            "payments_applied": self.progress.add_task("payments applied", total=paid),
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

        self._board.say("every process has ended; approvals are pending in the database")
        decided = await self._decide_all(cases)

        services = await self._stage.start_services()
        await self._while_following(services, self._finish(cases))
        statuses = await self._run_statuses(cases)
        await services.stop()
        return verdict.Outcome(
            cases=cases,
            kills=kills,
            decided=decided,
            statuses=statuses,
            concurrency=CONCURRENCY,
            seconds=time.monotonic() - begun,
        )

    async def _drive_and_kill(
        self, services: Services, cases: Mapping[str, Case]
    ) -> list[verdict.Kill]:
        """Submit everything, kill a worker at each hold point, then wait until all is at rest."""
        kills: list[verdict.Kill] = []
        for where, hold in KILLS.items():
            hold_id = await services.hold(hold)
            worker = await self._start_worker()
            if not kills:
                await self._submit(cases)
            caught = await worker.until(services.wait_caught(hold_id), what=f"a worker {where}")
            kill = verdict.Kill(where=where, exit_code=await worker.kill(), caught=caught)
            await services.end_hold(hold_id)
            self._board.say(f"killed {worker.name} (pid {worker.pid}) {where}, run {kill.run_id}")
            self._board.advance("kills")
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

    async def _decide_all(self, cases: Mapping[str, Case]) -> list[verdict.Decided]:
        """Decide what waits, a fresh process for each decision."""
        listed = await self._stage.agentflow("approval", "list", "--graph", "refund", *_ALL)
        pending = [approval for approval in listed if approval["run_id"] in cases]
        turn = asyncio.Semaphore(_DECISIONS_AT_A_TIME)

        async def decide(approval: Mapping[str, Any]) -> verdict.Decided:
            review = cases[approval["run_id"]].review
            if review is None:
                raise DemoError(f"run {approval['run_id']} asks for an approval that it needs not")
            async with turn:
                decided = await self._decide(approval, review)
            self._board.advance("decisions")
            return decided

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(decide(approval)) for approval in pending]
        return [task.result() for task in tasks]

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
    ledger = Ledger(stage.ledger)
    console.print(verdict.table(outcome, ledger))
    found = [f"does not add up: {problem}" for problem in verdict.problems(outcome, ledger)]
    ledger.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The refund agent, with kills and approvals.")
    parser.add_argument("--db", help="database URL; default: a new SQLite file")
    parser.add_argument("--fault", choices=get_args(Fault), help="make one payment go wrong")
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
