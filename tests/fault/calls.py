"""What is asked of agentflow about one run, in a process that may be killed meanwhile.

Each call may be made again by whoever does not know what became of the first one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from agentflow import AgentFlow
from agentflow.checkpoint import Retention
from agentflow.errors import NotDeadLetterError
from agentflow.journal import EffectStatus
from agentflow.types import WaitStatus

INPUTS: dict[str, dict[str, Any]] = {
    "linear": {"input": "x"},
    "single": {"input": "x"},
    "questions": {"wanted": 1},
    "flaky": {"input": "x"},
    "broken": {"input": "x"},
    "stubborn": {"input": "x"},
}


async def submit(app: AgentFlow, run_id: str) -> None:
    """Submit a run that nobody has submitted."""
    await app.submit("single", INPUTS["single"], run_id=run_id, queue=run_id)


async def submit_beside(app: AgentFlow, run_id: str) -> None:
    """Submit a run beside an idle worker, which takes it in the same transaction."""
    await _beside_worker(app, run_id, submit)


async def decide_beside(app: AgentFlow, run_id: str) -> None:
    """Approve what a run asks beside an idle worker, which goes on with it."""
    await _beside_worker(app, run_id, decide)


async def _beside_worker(
    app: AgentFlow, run_id: str, call: Callable[[AgentFlow, str], Awaitable[None]]
) -> None:
    worker = app.worker(queues=[run_id])
    async with worker:
        while worker._has_more:  # noqa: ASYNC110 -- it tells nobody
            await asyncio.sleep(0)
        await call(app, run_id)
        await app.wait(run_id, until="parked")


async def drive(app: AgentFlow, run_id: str) -> None:
    """Drive a run in the calling process."""
    await app.drive(run_id)


async def cancel(app: AgentFlow, run_id: str) -> None:
    """Cancel a run."""
    await app.cancel(run_id, reason="changed my mind", by="alice")


async def decide(app: AgentFlow, run_id: str) -> None:
    """Approve what a run asks."""
    for approval in (await app.approvals.list(run_id=run_id)).items:
        await app.approvals.decide(
            approval.id, "approve", by="alice", idempotency_key=f"{approval.id}-alice"
        )


async def resolve_effect(app: AgentFlow, run_id: str) -> None:
    """Say that a payment in doubt did not happen."""
    for effect in (await app.effects.list(run_id=run_id)).items:
        if effect.status is EffectStatus.INTENDED:
            await app.effects.resolve(effect.id, happened=False, by="alice")


async def reopen(app: AgentFlow, run_id: str) -> None:
    """Take back what was decided first about a run, unless somebody has."""
    first, *_ = (await app.approvals.list(run_id=run_id, status=None)).items
    if first.status is WaitStatus.RESOLVED:
        await app.approvals.reopen(first.id, by="alice")


async def prune_effects(app: AgentFlow, run_id: str) -> None:
    """Delete the records of effects of all runs that have ended."""
    await app.sweep(Retention(ttl=timedelta(microseconds=1)))


async def pause_run(app: AgentFlow, run_id: str) -> None:
    """Pause a run."""
    await app.pause_run(run_id, reason="a question", by="alice")


async def resume_run(app: AgentFlow, run_id: str) -> None:
    """Let a paused run go on."""
    await app.resume_run(run_id, by="alice")


async def pause_queue(app: AgentFlow, run_id: str) -> None:
    """Pause the queue that is named as the run is."""
    await app.pause(queue=run_id, reason="a question", by="alice")


async def resume_queue(app: AgentFlow, run_id: str) -> None:
    """Let a paused queue go on."""
    await app.resume(queue=run_id, by="alice")


async def route(app: AgentFlow, run_id: str) -> None:
    """Send new runs of a graph that there is not to its first version."""
    await app.route(run_id, "1", 0.5, by="alice")


async def fire_due(app: AgentFlow, run_id: str) -> None:
    """End the runs whose time is over."""
    await app._store.fire_due("", limit=100)


async def requeue(app: AgentFlow, run_id: str) -> None:
    """Requeue a failed run, unless somebody has."""
    with suppress(NotDeadLetterError):
        await app.dead_letters.requeue(run_id, by="alice")


async def discard(app: AgentFlow, run_id: str) -> None:
    """Discard the dead letter of a run, unless somebody has."""
    with suppress(NotDeadLetterError):
        await app.dead_letters.discard(run_id, reason="seen", by="alice")


async def restore(app: AgentFlow, run_id: str) -> None:
    """Mark the store as put back from a backup."""
    await app.restore(reason="a drill", by="alice")


async def delete_thread(app: AgentFlow, run_id: str) -> None:
    """Delete the checkpoints of a run's thread."""
    await app._saver.adelete_thread(run_id)


async def prune(app: AgentFlow, run_id: str) -> None:
    """Delete all checkpoints of a run's thread but the newest."""
    await app._saver.aprune([run_id])


CALLS: Mapping[str, Callable[[AgentFlow, str], Awaitable[None]]] = {
    call.__name__: call
    for call in (
        *(submit, drive, cancel, decide, reopen),
        *(submit_beside, decide_beside),
        *(resolve_effect, prune_effects),
        *(pause_run, resume_run, pause_queue, resume_queue),
        *(fire_due, requeue, discard, restore, route),
        *(delete_thread, prune),
    )
}
