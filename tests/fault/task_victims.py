"""Tasks of processes that are killed, and what continues them; what they do is recorded outside."""

from __future__ import annotations

import json
from typing import Any

from agentflow import effect
from agentflow.tasks import Task, TaskCall, TaskRunner
from tests.fault.ledger import arecord, record

DEPENDENCIES = {
    "fetch": [],
    "flaky": [],
    "parse": ["fetch"],
    "clean": ["fetch", "flaky"],
    "report": ["parse", "clean"],
    "refused": ["broken"],
    "broken": ["fetch"],
}
FAILS = {"flaky", "broken"}
"""`flaky` may be passed, `broken` may not."""


def tasks() -> list[Task]:
    """Return the tasks; the address of the ledger is in their context."""
    return [
        Task(
            name=name,
            run=_work,
            dependencies=dependencies,
            needs=["ledger"],
            continue_on_error=name == "flaky",
        )
        for name, dependencies in DEPENDENCIES.items()
    ]


def _work(call: TaskCall) -> dict[str, Any]:
    runner: TaskRunner = call.context["runner"]
    facts = {"task": call.name, "run": runner.run_id}
    record(call.context["ledger"], event="enter", moment=json.dumps(runner.snapshot()), **facts)
    if call.name in FAILS:
        raise RuntimeError(call.name)
    return {"made_from": {name: each.data for name, each in call.results.items()}}


async def execute(url: str, run_id: str, ledger: str, concurrency: int | None = None) -> None:
    """Begin the run or go on with it, and record its end."""
    runner = TaskRunner(tasks(), url=url, run_id=run_id, concurrency=concurrency)
    await runner.execute(context={"ledger": ledger, "runner": runner})
    record(ledger, event="end", run=run_id, snapshot=json.dumps(runner.snapshot()))


async def hydrate(moments: list[str], ledger: str) -> None:
    """Continue from snapshots alone, and record where each leads to."""
    for moment in moments:
        runner = TaskRunner(tasks(), snapshot=json.loads(moment))
        await runner.execute(context={"ledger": ledger, "runner": runner})
        record(ledger, event="end", run=runner.run_id, snapshot=json.dumps(runner.snapshot()))


async def charge_once(url: str, run_id: str, ledger: str) -> None:
    """Run a task that does something for good and then something else."""

    @effect(key="charge")
    async def charge() -> str:
        await arecord(ledger, event="charge", run=run_id)
        return "charged"

    async def work(call: TaskCall) -> str:
        receipt = await charge()
        await arecord(ledger, event="after", run=run_id)
        return receipt

    runner = TaskRunner([Task(name="pay", run=work)], url=url, run_id=run_id)
    await runner.execute()
    record(ledger, event="end", run=run_id, snapshot=json.dumps(runner.snapshot()))
