"""Errors of what callers send."""

from __future__ import annotations

from agentflow.errors.base import AgentflowError


class InputError(AgentflowError):
    """What the caller sent cannot be accepted; nothing was written."""


class InvalidInputError(InputError):
    """A run's input or options do not fit."""

    def __init__(self, subject: str, problems: tuple[str, ...]) -> None:
        """Name the subject and each problem as `path: what is wrong`, without the values."""
        super().__init__(subject, problems)
        self.subject = subject
        self.problems = problems

    def __str__(self) -> str:
        """List the problems."""
        return f"invalid {self.subject}: {'; '.join(self.problems)}"


class InvalidDecisionError(InputError):
    """A decision does not fit the request that it answers."""

    def __init__(self, approval_id: str, problems: tuple[str, ...]) -> None:
        """Name the approval and each problem as `path: what is wrong`."""
        super().__init__(approval_id, problems)
        self.approval_id = approval_id
        self.problems = problems

    def __str__(self) -> str:
        """List the problems."""
        return (
            f"invalid decision for approval {self.approval_id!r}: {'; '.join(self.problems)}; "
            "nothing was recorded, decide again"
        )


class ApprovalMismatchError(InputError):
    """A tool call is not the one that was approved; it was not made."""

    def __init__(self, tool: str, call_id: str) -> None:
        """Name the tool and the call; not its arguments."""
        super().__init__(tool, call_id)
        self.tool = tool
        self.call_id = call_id

    def __str__(self) -> str:
        """Say what may have changed it."""
        return (
            f"the call {self.call_id!r} of tool {self.tool!r} is not what was approved, and was "
            "not made; ask a model in another node than the one that runs its tools, so that what "
            "it has said is stored before anybody is asked"
        )


class MissingContextError(InputError):
    """A task needs something that its runner was not given."""

    def __init__(self, task: str, key: str) -> None:
        """Name the task and the key."""
        super().__init__(task, key)
        self.task = task
        self.key = key

    def __str__(self) -> str:
        """Say where to give it."""
        return (
            f"task {self.task!r} needs {self.key!r} in its context, which is not stored with a "
            f"run; give it to execute(context={{{self.key!r}: ...}})"
        )


class SupersededError(InputError):
    """The request is gone: its run was cancelled or has moved past it."""

    def __init__(self, approval_id: str, status: str) -> None:
        """Name the approval and what became of it."""
        super().__init__(approval_id, status)
        self.approval_id = approval_id
        self.status = status

    def __str__(self) -> str:
        """Say that there is nothing left to decide."""
        return f"approval {self.approval_id!r} is {self.status}; there is nothing left to decide"
