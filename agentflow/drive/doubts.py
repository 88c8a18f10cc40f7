"""What is asked about effects in doubt: whether they happened, with all that is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from agentflow.effects import find_definition
from agentflow.interrupts import proposal_hash
from agentflow.interrupts.plain import to_plain
from agentflow.journal import Effect, question_id
from agentflow.processes import has_ended
from agentflow.storage import RunStore
from agentflow.types import ApprovalRequest, Lease, NewWait, WorkerRecord, new_id

_SHAPE = "effect"
_EVENTS = 1000
_HAPPENED = {"type": "boolean", "description": "Whether the call has happened."}
_OUTCOME = {"description": "What it returned, if it has happened."}
_ERRORS = ("InDoubt(", "OverBudget(")
"""How the text begins that a checkpoint has of the exceptions that stop an attempt."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What is known of the worker that was at a call."""

    seen_at: datetime | None = None
    """When it gave its last sign of life."""
    is_gone: bool = False
    """Its process has ended; as long as that is not known, it may be stopped or cut off."""


def to_wait(
    effect: Effect, lease: Lease, workers: Mapping[str, Worker], *, is_undoing: bool
) -> NewWait:
    """Return the question whether a call has happened, asked by the attempt under `lease`.

    Args:
        effect: The call in doubt.
        lease: Who asks.
        workers: What is known of the workers, by the ids of effects.
        is_undoing: Whether the effects of the run are being undone.
    """
    worker = workers.get(effect.id, Worker())
    request = _request(effect, worker, is_over=effect.token == lease.token, is_undoing=is_undoing)
    return NewWait(
        wait_id=new_id(),
        kind="effect",
        ns=effect.ns,
        task_id=effect.task_id,
        interrupt_id=question_id(effect.id, effect.attempt, is_undoing=is_undoing),
        checkpoint_id="",
        answers_recorded=0,
        request=request,
        proposal_hash=proposal_hash(request),
    )


def is_doubt(error: Any) -> bool:
    """Whether what a checkpoint has as the error of a task is no failure but a wait."""
    return str(error).startswith(_ERRORS)


async def look_for_workers(
    store: RunStore, tenant: str, doubts: Iterable[Effect]
) -> Mapping[str, Worker]:
    """Return what is known of the workers that were at effects in doubt, by the effects' ids."""
    records = await store.list_workers(tenant)
    return {each.id: await _worker_of(store, each, records) for each in doubts}


async def _worker_of(store: RunStore, effect: Effect, records: Sequence[WorkerRecord]) -> Worker:
    named = [each for each in records if each.report.name == effect.worker]
    seen_at = max((each.beat_at for each in named), default=None)
    # A name may have been another worker's too; that it was this start of it, its claim says.
    instance = await _instance_of(store, effect)
    own = [each.report for each in named if each.report.instance == instance]
    is_gone = any(each.process is not None and has_ended(each.process) for each in own)
    return Worker(seen_at, is_gone)


async def _instance_of(store: RunStore, effect: Effect) -> str | None:
    """Return which start of which worker had claimed the run when it intended an effect."""
    after = 0
    while events := await store.list_events(
        effect.tenant, effect.run_id, after=after, limit=_EVENTS
    ):
        for event in events:
            if event.type == "run.claimed" and event.data.get("token") == effect.token:
                return cast("str | None", event.data.get("instance"))
        after = events[-1].seq
    return None


def _request(effect: Effect, worker: Worker, *, is_over: bool, is_undoing: bool) -> ApprovalRequest:
    # Of what is over, a time that has passed: when exactly it ended, nobody has seen.
    safe_at = effect.intended_at if is_over or worker.is_gone else effect.safe_at
    facts = {
        "effect": effect.id,
        "name": effect.name,
        "key": effect.key,
        "arguments": effect.arguments,
        "node": effect.node,
        "attempt": effect.attempt,
        "worker": effect.worker,
        "worker_seen_at": worker.seen_at,
        "worker_is_gone": worker.is_gone,
        "intended_at": effect.intended_at,
        "safe_at": safe_at,
    }
    if effect.failure is not None:
        facts["raised"] = {"type": effect.failure.type, "message": effect.failure.message}
    return ApprovalRequest(
        shape=_SHAPE,
        title=f"Did {effect.name} happen?",
        proposal=to_plain(facts, lenient=True),
        allowed=("respond", "reject"),
        response_schema=_schema(effect),
        description=_advice(effect, worker, is_over=is_over, is_undoing=is_undoing),
    )


def _schema(effect: Effect) -> dict[str, Any]:
    """Return the form of an answer; with an outcome that the function's type can be built from."""
    definition = find_definition(effect.name)
    outcome = None if definition is None else definition.outcome_schema()
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"happened": _HAPPENED, "outcome": _OUTCOME},
        "required": ["happened"],
        "additionalProperties": False,
    }
    if outcome is None:
        return schema
    shared = {key: outcome.pop(key) for key in ("$defs",) if key in outcome}
    happened = {"properties": {"happened": {"const": True}}}
    fits = {"properties": {"outcome": outcome}, "required": ["outcome"]}
    return {**schema, **shared, "if": happened, "then": fits}


def _advice(effect: Effect, worker: Worker, *, is_over: bool, is_undoing: bool) -> str:
    """Say how to find out, and from when on the answer holds."""
    known = (
        "It was about to be called, and nothing is known of what came of it."
        if effect.failure is None
        else "It was called, and raised what leaves open whether it has happened."
    )
    denied = (
        '{"happened": false}. The run is being undone; with a reject it goes on with that, and '
        "leaves this call as it is."
        if is_undoing
        else '{"happened": false} to have it called. A reject cancels the run.'
    )
    how = (
        f"{known} Look into the system "
        f'that it calls; then respond with {{"happened": true, "outcome": ...}}, or with {denied}'
    )
    if is_over:
        return how
    if worker.is_gone:
        return f"{how} Worker {effect.worker!r}, which was at it, is gone: its process has ended."
    # Silence is no death: a worker that is stopped, or cut off, goes on with the call later.
    silent = (
        ""
        if worker.seen_at is None
        else f" Its last sign of life came at {worker.seen_at.isoformat()}."
    )
    if effect.safe_at is None:
        return (
            f"{how} It has no timeout: make sure first that worker {effect.worker!r} is gone, or "
            f"the call may still be under way.{silent}"
        )
    return (
        f"{how} Do not answer before {effect.safe_at.isoformat()}: until then worker "
        f"{effect.worker!r} may still be at it, unless you know that it is gone.{silent}"
    )
