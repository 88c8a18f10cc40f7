"""What a node has asked before, so that no answer reaches another question.

LangGraph hands out answers by their position in a task. A node that asks in another order when it
runs again would get the answer to something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentflow.codec import Redact
from agentflow.errors import AgentflowError, NonDeterministicNodeError
from agentflow.interrupts.shapes import OPAQUE, OWN, SCHEMA, to_request
from agentflow.types import Approval, ApprovalRequest, WaitStatus

_Place = tuple[str, int]
"""The task that asked, and how many answers it had then."""
_STORED = "waits.request"
"""What a redactor is told of the place in which requests are stored."""


class Asked:
    """The questions of a run that were answered, by task and position."""

    def __init__(self, redact: Redact | None) -> None:
        """Know of none; `redact` changes requests before they are stored."""
        self._redact = redact
        self._at: dict[_Place, ApprovalRequest] = {}

    def learn(self, waits: Iterable[Approval]) -> None:
        """Take in what the run store has, the oldest first."""
        for wait in waits:
            if wait.kind == "approval" and wait.status is WaitStatus.RESOLVED:
                self._at[wait.task_id, wait.answers_recorded] = wait.request

    def check(self, task_id: str, position: int, value: Any, response_schema: Any) -> None:
        """See that a node asks what was answered; called before it gets the answer.

        What is not on record is let through: other runs of the thread, and graphs that were driven
        by hand, have no rows.

        Raises:
            NonDeterministicNodeError: It asks something else.
        """
        stored = self._at.get((task_id, position))
        if stored is None:
            return
        try:
            now = to_request(value, response_schema)
            if self._redact is not None:
                now = self._redact(_STORED, now)
        except AgentflowError:
            # What cannot be asked is not what was.
            raise NonDeterministicNodeError(_described(stored), "what cannot be asked") from None
        if _identity(stored) != _identity(now):
            asked, other = _described(stored), _described(now)
            raise NonDeterministicNodeError(asked, other if other != asked else f"another {other}")


def _identity(request: ApprovalRequest) -> Any:
    """Return what makes a question this one and no other, whatever it proposes today.

    A key does. Without one a title does, or the tools that are asked about; of an interrupt of the
    user's own its text, or the names in its mapping.
    """
    shape = request.shape.partition("#")[0]
    if shape == OWN:
        return (shape, request.key, request.title if request.key is None else None)
    if request.actions:
        return (shape, tuple(action.name for action in request.actions))
    if shape not in {OPAQUE, SCHEMA}:
        return (shape,)
    proposal = request.proposal
    if isinstance(proposal, Mapping):
        # JSON tells no integer from a float, and nothing of order.
        return (shape, "mapping", tuple(sorted(map(str, proposal))), proposal.get("key"))
    if isinstance(proposal, str):
        return (shape, "text", proposal)
    return (shape, type(proposal).__name__)


def _described(request: ApprovalRequest) -> str:
    """Name a question without anything that it shows."""
    if request.key is not None:
        return request.key
    if request.shape.partition("#")[0] == OWN:
        return "approval without a key"
    if request.actions:
        return f"approval of {', '.join(action.name for action in request.actions)}"
    return "interrupt"
