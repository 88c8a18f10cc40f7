"""What is asked of agentflow about one run, in a process that may be killed meanwhile.

Each call may be made again by whoever does not know what became of the first one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentflow import AgentFlow

INPUTS: dict[str, dict[str, Any]] = {
    "linear": {"input": "x"},
    "single": {"input": "x"},
    "questions": {"wanted": 1},
    "flaky": {"input": "x"},
    "broken": {"input": "x"},
}


async def submit(app: AgentFlow, run_id: str) -> None:
    """Submit a run that nobody has submitted."""
    await app.submit("single", INPUTS["single"], run_id=run_id, queue=run_id)


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


async def delete_thread(app: AgentFlow, run_id: str) -> None:
    """Delete the checkpoints of a run's thread."""
    await app._saver.adelete_thread(run_id)


async def prune(app: AgentFlow, run_id: str) -> None:
    """Delete all checkpoints of a run's thread but the newest."""
    await app._saver.aprune([run_id])


CALLS: Mapping[str, Callable[[AgentFlow, str], Awaitable[None]]] = {
    call.__name__: call for call in (submit, drive, cancel, decide, delete_thread, prune)
}
