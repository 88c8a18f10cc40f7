"""What is asked about effects in doubt: whether they happened, with all that is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from agentflow.effects import find_definition
from agentflow.interrupts import proposal_hash
from agentflow.interrupts.plain import to_plain
from agentflow.journal import Effect, question_id
from agentflow.storage import RunStore
from agentflow.types import ApprovalRequest, Lease, NewWait, new_id

_SHAPE = "effect"
_HAPPENED = {"type": "boolean", "description": "Whether the call has happened."}
_OUTCOME = {"description": "What it returned, if it has happened."}
_ERRORS = ("InDoubt(", "OverBudget(")
"""How the text begins that a checkpoint has of the exceptions that stop an attempt."""


def to_wait(effect: Effect, lease: Lease, seen: Mapping[str, datetime]) -> NewWait:
    """Return the question whether a call has happened, asked by the attempt under `lease`.

    `seen` says when workers gave their last sign of life, by name.
    """
    is_over = effect.token == lease.token
    request = _request(effect, is_over=is_over, seen_at=seen.get(effect.worker))
    return NewWait(
        wait_id=new_id(),
        kind="effect",
        ns=effect.ns,
        task_id=effect.task_id,
        interrupt_id=question_id(effect.id, effect.attempt),
        checkpoint_id="",
        answers_recorded=0,
        request=request,
        proposal_hash=proposal_hash(request),
    )


def is_doubt(error: Any) -> bool:
    """Whether what a checkpoint has as the error of a task is no failure but a wait."""
    return str(error).startswith(_ERRORS)


async def last_seen(store: RunStore, tenant: str) -> Mapping[str, datetime]:
    """Return when workers gave their last sign of life, as far as it is on record, by name."""
    seen: dict[str, datetime] = {}
    for worker in await store.list_workers(tenant):
        name = worker.report.name
        seen[name] = max(worker.beat_at, seen.get(name, worker.beat_at))
    return seen


def _request(effect: Effect, *, is_over: bool, seen_at: datetime | None) -> ApprovalRequest:
    facts = {
        "effect": effect.id,
        "name": effect.name,
        "key": effect.key,
        "arguments": effect.arguments,
        "node": effect.node,
        "attempt": effect.attempt,
        "worker": effect.worker,
        "worker_seen_at": seen_at,
        "intended_at": effect.intended_at,
        "safe_at": effect.intended_at if is_over else effect.safe_at,
    }
    if effect.failure is not None:
        facts["raised"] = {"type": effect.failure.type, "message": effect.failure.message}
    return ApprovalRequest(
        shape=_SHAPE,
        title=f"Did {effect.name} happen?",
        proposal=to_plain(facts, lenient=True),
        allowed=("respond", "reject"),
        response_schema=_schema(effect),
        description=_advice(effect, is_over=is_over, seen_at=seen_at),
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


def _advice(effect: Effect, *, is_over: bool, seen_at: datetime | None) -> str:
    """Say how to find out, and from when on the answer holds."""
    known = (
        "It was about to be called, and nothing is known of what came of it."
        if effect.failure is None
        else "It was called, and raised what leaves open whether it has happened."
    )
    how = (
        f"{known} Look into the system "
        'that it calls; then respond with {"happened": true, "outcome": ...}, or with '
        '{"happened": false} to have it called. A reject cancels the run.'
    )
    if is_over:
        return how
    # Silence is no death: a worker that is stopped, or cut off, goes on with the call later.
    silent = "" if seen_at is None else f" Its last sign of life came at {seen_at.isoformat()}."
    if effect.safe_at is None:
        return (
            f"{how} It has no timeout: make sure first that worker {effect.worker!r} is gone, or "
            f"the call may still be under way.{silent}"
        )
    return (
        f"{how} Do not answer before {effect.safe_at.isoformat()}: until then worker "
        f"{effect.worker!r} may still be at it, unless you know that it is gone.{silent}"
    )
