"""Errors of stores: what is not there, is held by others, or cannot be reached."""

from __future__ import annotations

from typing import Literal

from agentflow.errors.base import AgentflowError

Outcome = Literal["not_written", "unreachable", "contended", "unknown"]


class StoreError(AgentflowError):
    """A store refused, or could not do, what was asked."""


class NotFoundError(StoreError):
    """No record with that id (a store that is down is `StoreUnavailableError` instead)."""

    def __init__(self, kind: str, record_id: str) -> None:
        """Name the kind of record and its id."""
        super().__init__(kind, record_id)
        self.kind = kind
        self.record_id = record_id

    def __str__(self) -> str:
        """Say what was not found and where to look."""
        return f"no {self.kind} {self.record_id!r}; check the id, the tenant and the database URL"


class ConflictError(StoreError):
    """Somebody else was first, and the two outcomes cannot both hold."""

    def __init__(self, message: str) -> None:
        """Take the whole message, for conflicts without a class of their own."""
        super().__init__(message)


class ThreadBusyError(ConflictError):
    """Another run, or another holder of this run's lease, has the thread."""

    def __init__(self, thread_id: str, run_id: str | None = None) -> None:
        """Name the thread and, if known, the run that holds it."""
        AgentflowError.__init__(self, thread_id, run_id)
        self.thread_id = thread_id
        self.run_id = run_id

    def __str__(self) -> str:
        """Say who holds the thread."""
        holder = f" by run {self.run_id!r}" if self.run_id else ""
        return f"thread {self.thread_id!r} is held{holder}; wait for it to park or end"


class AlreadyResolvedError(ConflictError):
    """The approval was decided before; the first decision stands."""

    def __init__(self, approval_id: str, status: str, decision: str | None, by: str | None) -> None:
        """Name the approval and the winning decision."""
        AgentflowError.__init__(self, approval_id, status, decision, by)
        self.approval_id = approval_id
        self.status = status
        self.decision = decision
        self.by = by

    def __str__(self) -> str:
        """Say what was decided, and by whom."""
        outcome = f"{self.decision!r} by {self.by or 'unknown'!r}" if self.decision else "none"
        return (
            f"approval {self.approval_id!r} is already {self.status} (decision: {outcome}); "
            "the first decision stands"
        )


class IdempotencyConflictError(ConflictError):
    """A known id came again with different content."""

    def __init__(self, run_id: str, differs: str) -> None:
        """Name the run and what differs, never its content."""
        AgentflowError.__init__(self, run_id, differs)
        self.run_id = run_id
        self.differs = differs

    def __str__(self) -> str:
        """Say what differs."""
        return (
            f"run {self.run_id!r} exists with another {self.differs}; "
            "use a new run_id, or submit exactly what was submitted before"
        )


class EffectConflictError(ConflictError):
    """A key that names one effect was used for another one."""

    def __init__(self, name: str, scope: str, differs: tuple[str, ...]) -> None:
        """Name the effect, the scope of its key, and what differs by its path, not its value."""
        AgentflowError.__init__(self, name, scope, differs)
        self.name = name
        self.scope = scope
        self.differs = differs

    def __str__(self) -> str:
        """Say what differs."""
        return (
            f"the key of effect {self.name!r} was used before, in its {self.scope or 'tenant'}, "
            f"with another {', '.join(self.differs)}; nothing was called: let the key differ "
            "wherever the effect does, or call it with the same arguments"
        )


class VersionChangedError(ConflictError):
    """What the caller saw is no longer what is stored."""

    def __init__(self, approval_id: str, expected: int, current: int) -> None:
        """Name the approval and both versions."""
        AgentflowError.__init__(self, approval_id, expected, current)
        self.approval_id = approval_id
        self.expected = expected
        self.current = current

    def __str__(self) -> str:
        """Say that the caller must look again."""
        return (
            f"approval {self.approval_id!r} is at version {self.current}, not {self.expected}; "
            "read it again and decide on what it shows now"
        )


class FencedError(StoreError):
    """A write came from somebody who does not hold the thread's lease."""

    def __init__(self, thread_id: str, token: int | None, current: int) -> None:
        """Name the thread, the token that was shown (`None`: no lease) and the current one."""
        super().__init__(thread_id, token, current)
        self.thread_id = thread_id
        self.token = token
        self.current = current

    def __str__(self) -> str:
        """Say whose thread it is now."""
        shown = "without a lease" if self.token is None else f"with fencing token {self.token}"
        return (
            f"write to thread {self.thread_id!r} {shown} was refused: it is held under "
            f"token {self.current}; stop this attempt, its work continues elsewhere"
        )


class LeaseLostError(FencedError):
    """The lease of a run expired or was taken over; this attempt must stop."""

    def __init__(self, run_id: str, token: int) -> None:
        """Name the run and the token that no longer holds."""
        AgentflowError.__init__(self, run_id, token)
        self.run_id = run_id
        self.token = token

    def __str__(self) -> str:
        """Say that nothing more may be written."""
        return (
            f"the lease of run {self.run_id!r} under token {self.token} is lost; "
            "nothing this attempt still does will be recorded"
        )


class PausedError(StoreError):
    """The run, its graph, its queue or everything is paused; nothing was done."""

    def __init__(self, run_id: str, scope: str, name: str = "") -> None:
        """Name the run and what is paused: `run`, `graph`, `queue`, `all` or `store`."""
        super().__init__(run_id, scope, name)
        self.run_id = run_id
        self.scope = scope
        self.name = name

    def __str__(self) -> str:
        """Say what to resume."""
        what, command = {
            "run": ("it is paused", f"agentflow run resume {self.run_id}"),
            "graph": (f"graph {self.name!r} is paused", f"agentflow resume --graph {self.name}"),
            "queue": (f"queue {self.name!r} is paused", f"agentflow resume --queue {self.name}"),
            "store": ("the store was restored", "agentflow restore --resume"),
        }.get(self.scope, ("everything is paused", "agentflow resume --all"))
        return f"run {self.run_id!r} is not driven, since {what}; resume by '{command}'"


class StoreUnavailableError(StoreError):
    """The store could not be reached within its deadline; it is the one error worth retrying."""

    def __init__(self, store: str, reason: str, outcome: Outcome = "not_written") -> None:
        """Name the store (without credentials), the driver's reason, and what is known.

        Args:
            store: The store's URL without its password.
            reason: What the driver says.
            outcome: Whether what was being written is certainly not there (`not_written`), the same
                because there was no connection (`unreachable`) or another transaction was in the
                way (`contended`), or may be there, because the connection broke (`unknown`).
        """
        super().__init__(store, reason, outcome)
        self.store = store
        self.reason = reason
        self.outcome: Outcome = outcome

    def __str__(self) -> str:
        """Say which store and why."""
        return (
            f"cannot reach {self.store}: {self.reason}; "
            "check that it runs and that the URL is right"
        )


class StoreDamagedError(StoreUnavailableError):
    """The database itself says that its file is damaged, or is none of its own."""

    def __str__(self) -> str:
        """Say that waiting does not help."""
        return (
            f"the database {self.store} is damaged: {self.reason}; nothing was executed, restore "
            "it from a backup, or see that the URL is right"
        )


class ObjectStoreError(StoreError):
    """An object store could not do what was asked: no folder, no room, no permission."""

    def __init__(self, store: str, reason: str) -> None:
        """Name the store and what the system says."""
        super().__init__(store, reason)
        self.store = store
        self.reason = reason

    def __str__(self) -> str:
        """Say which store and why."""
        return (
            f"cannot use the object store {self.store}: {self.reason}; nothing that needs it was "
            "stored or deleted: see that it is there, has room and may be read and written"
        )
