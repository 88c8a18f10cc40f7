"""What is asked about a budget that is used up: for more of it."""

from __future__ import annotations

from agentflow.budgets import WAIT, Ask
from agentflow.interrupts import proposal_hash
from agentflow.types import ApprovalRequest, NewWait, new_id

_SCHEMA = {
    "type": "object",
    "properties": {
        "more": {"type": "number", "exclusiveMinimum": 0, "description": "How much more."}
    },
    "required": ["more"],
    "additionalProperties": False,
}


def to_wait(ask: Ask) -> NewWait:
    """Return the question for more of something, asked when the attempt has stopped."""
    request = ApprovalRequest(
        shape=WAIT,
        title=f"May it use more? {ask.limit} of the {ask.scope}",
        proposal={
            "scope": ask.scope,
            "limit": ask.limit,
            "base": ask.base,
            "allowed": ask.allowed,
            "used": ask.used,
        },
        allowed=("approve", "respond", "reject"),
        response_schema=_SCHEMA,
        description=(
            "The run stands still before its next call. Approve to allow as much again as its "
            'budget says, respond with {"more": ...} to allow another amount, or reject to have '
            "it fail."
        ),
    )
    return NewWait(
        wait_id=new_id(),
        kind="budget",
        ns="",
        task_id="",
        interrupt_id=f"budget:{ask.scope}:{ask.limit}:{ask.number}",
        checkpoint_id="",
        answers_recorded=0,
        request=request,
        proposal_hash=proposal_hash(request),
    )
