"""What may be said of a tool: who is asked, how long it may take, what follows if it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

from agentflow.effects.unknown import are_exceptions
from agentflow.errors import InvalidInputError
from agentflow.interrupts.shapes import DECISION_TYPES
from agentflow.retry import LangGraphRetryPolicy, RetryPolicy
from agentflow.types import DecisionType, Duration, to_timedelta

Approval = Literal["always", "never"] | Callable[[Mapping[str, Any], Any], bool]
"""When a person is asked: or a function of the call's arguments and of the state."""

OnError = Literal["raise", "message"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPolicy:
    """How the calls of a tool are carried out.

    Example:
        ```python
        tool_node(
            [search, send_email],
            policies={"send_email": ToolPolicy(approval="always", timeout=30)},
        )
        ```
    """

    approval: Approval = "never"
    """Whether a person has to agree to a call before it is made."""
    allowed: Sequence[DecisionType] = ("approve", "edit", "reject")
    """The decisions that may be taken. `respond` answers the model in the tool's place."""
    reviewers: Mapping[str, Any] | None = None
    """Who may decide, and until when: the `policy` of `request_approval`."""
    timeout: Duration | None = None
    """How long a call may take; then it is not known whether it has happened. What is not async
    cannot be stopped, and goes on unheard."""
    idempotent: bool = False
    """Whether a call may be made again: when it is not known whether it has happened, and when it
    has raised. So it is for tools that only read, and for those whose own effects are each in the
    journal. For other tools a person is asked what has happened, and what was raised stands."""
    in_doubt_on: Sequence[type[Exception]] | None = None
    """The exceptions after which it is not known whether a call has happened, unless the tool is
    idempotent; see `effect`."""
    retry: RetryPolicy | LangGraphRetryPolicy | None = None
    """Which exceptions are worth another call, at once and in later attempts."""
    on_error: OnError = "raise"
    """Whether an exception of the tool fails the attempt, or is a message to the model."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            InvalidInputError: Names each field that is out of range.
        """
        found = []
        if not callable(self.approval) and self.approval not in {"always", "never"}:
            found.append("approval: must be always, never or a function of arguments and state")
        if not self.allowed or any(each not in DECISION_TYPES for each in self.allowed):
            found.append(f"allowed: must be a list with some of {', '.join(DECISION_TYPES)}")
        if self.timeout is not None and to_timedelta(self.timeout) <= timedelta(0):
            found.append("timeout: must be above 0")
        if self.in_doubt_on is not None and not are_exceptions(self.in_doubt_on):
            found.append("in_doubt_on: must be a list of classes of exceptions")
        if self.on_error not in get_args(OnError):
            found.append(f"on_error: must be one of {', '.join(get_args(OnError))}")
        if found:
            raise InvalidInputError("tool policy", tuple(found))

    def asks(self, args: Mapping[str, Any], state: Any) -> bool:
        """Whether a person has to agree to this call."""
        if callable(self.approval):
            return self.approval(args, state)
        return self.approval == "always"
