"""What the suites of the run store share: specs, claims, and runs brought to a given status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from agentflow.codec import Codec
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.interrupts import proposal_hash
from agentflow.keys import KeyRing
from agentflow.storage import RunStore
from agentflow.storage.sql import SqlRunStore
from agentflow.types import (
    Approval,
    ApprovalRequest,
    ClaimedRun,
    Decision,
    Lease,
    NewWait,
    Run,
    RunFailure,
    RunSpec,
    RunStatus,
    new_id,
)

GRAPHS = [("g", "1")]
LEASE = timedelta(seconds=30)
EXPIRED = timedelta(seconds=-1)
"""The length of a lease that is over as soon as it is given."""
FAILURE = RunFailure(type="builtins.ValueError", message="no", node="a", attempt=1)
REQUEST = ApprovalRequest(
    shape="agentflow",
    title="Pay",
    proposal={"amount": 10},
    allowed=("approve", "edit", "reject"),
)


def open_store(url: str, *, keys: KeyRing | None = None, **options: Any) -> SqlRunStore:
    """Open a store with a writer of its own, as another process would."""
    codec = Codec(keys=keys)
    return SqlRunStore(Database(url, Settings()), codec=codec, owns_database=True, **options)


def spec(run_id: str | None = None, **changes: Any) -> RunSpec:
    """Make a submission."""
    chosen = run_id or new_id()
    fields: dict[str, Any] = {
        "run_id": chosen,
        "thread_id": chosen,
        "graph": "g",
        "version": "1",
        "queue": "default",
        "input": {"n": 1},
        "metadata": {},
        "config": {},
    }
    return RunSpec(**(fields | changes))


async def create(store: RunStore, run_id: str | None = None, **changes: Any) -> Run:
    """Store a run."""
    run, *_ = await store.create_run("", spec(run_id, **changes), on_existing="return")
    return run


async def claim_all(
    store: RunStore, *, limit: int = 100, lease: timedelta = LEASE, **changes: Any
) -> list[ClaimedRun]:
    """Claim whatever is due."""
    options: dict[str, Any] = {"worker": "w", "queues": ["default"], "graphs": GRAPHS} | changes
    return await store.claim_runs("", limit=limit, lease=lease, **options)


async def claim(store: RunStore, run_id: str, *, lease: timedelta = LEASE) -> Lease:
    """Claim one run, which must be due."""
    claimed = await store.claim_run("", run_id, worker="w", lease=lease)
    assert claimed is not None
    return claimed.lease


async def running(store: RunStore, run_id: str | None = None, **changes: Any) -> Lease:
    """Store a run and claim it."""
    run = await create(store, run_id, **changes)
    return await claim(store, run.id)


def question(position: int = 0, **changes: Any) -> NewWait:
    """Make a question, as a parked thread holds it."""
    fields: dict[str, Any] = {
        "wait_id": new_id(),
        "kind": "approval",
        "ns": "",
        "task_id": f"task-{position}",
        "interrupt_id": f"{position:032x}",
        "checkpoint_id": "c1",
        "answers_recorded": 0,
        "request": REQUEST,
        "proposal_hash": proposal_hash(REQUEST),
    }
    return NewWait(**(fields | changes))


async def park(store: RunStore, lease: Lease, *questions: NewWait) -> None:
    """Park a run on questions."""
    await store.park_run(lease, questions, checkpoint_id="c1", step=1)


async def resolve(
    store: RunStore, wait_id: str, decision: str | Decision = "approve", **changes: Any
) -> Approval:
    """Answer a question."""
    parsed = decision if isinstance(decision, Decision) else Decision(type=decision)  # type: ignore[arg-type]  # tests name types as text
    options: dict[str, Any] = {
        "by": "ada",
        "comment": None,
        "version": None,
        "idempotency_key": None,
        "request": REQUEST,
    }
    return (await store.resolve_wait("", wait_id, parsed, **(options | changes))).approval


async def finish(store: RunStore, lease: Lease, output: Any = None) -> None:
    """End a run well."""
    await store.finish_run(lease, output, checkpoint_id="c9", step=9)


async def parked(store: RunStore, run_id: str, *questions: NewWait) -> list[str]:
    """Store a run and park it; return the ids of its questions."""
    asked = questions or (question(),)
    await park(store, await running(store, run_id), *asked)
    return [each.wait_id for each in asked]


async def bring_to(store: RunStore, status: RunStatus, run_id: str) -> Lease:
    """Bring a new run to a status; return its last lease."""
    lease = await running(store, run_id)
    steps: dict[RunStatus, Callable[[], Awaitable[Any]]] = {
        RunStatus.QUEUED: lambda: store.release_run(lease, reason="drain", counts=False),
        RunStatus.WAITING: lambda: park(store, lease, question()),
        RunStatus.SUCCEEDED: lambda: finish(store, lease),
        RunStatus.FAILED: lambda: store.fail_run(
            lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None
        ),
        RunStatus.CANCELLED: lambda: store.finish_cancel(lease),
    }
    if status in steps:
        await steps[status]()
    assert (await store.get_run("", run_id)).status is status
    return lease


async def types_of_events(store: RunStore, run_id: str) -> list[str]:
    """List the types of a run's audit events."""
    return [event.type for event in await store.list_events("", run_id, after=0, limit=1000)]
