"""Every error that agentflow raises, and what each means outside Python.

The tree::

    AgentflowError
    ├── ConfigError
    │   ├── UnsupportedUrlError
    │   ├── MissingDriverError
    │   ├── AppReferenceError
    │   ├── UnknownGraphError
    │   ├── UnknownPriceError
    │   └── MigrationRequiredError
    │       └── JournalMissingError
    ├── StoreError
    │   ├── NotFoundError
    │   ├── ConflictError
    │   │   ├── ThreadBusyError
    │   │   ├── AlreadyResolvedError
    │   │   ├── IdempotencyConflictError
    │   │   ├── EffectConflictError
    │   │   └── VersionChangedError
    │   ├── FencedError
    │   │   └── LeaseLostError
    │   ├── PausedError
    │   ├── ObjectStoreError
    │   └── StoreUnavailableError
    │       └── StoreDamagedError
    ├── CodecError
    │   ├── UnknownVersionError
    │   ├── UnknownKeyError
    │   ├── UnencryptedValueError
    │   ├── HashMismatchError
    │   ├── MissingBlobError
    │   ├── SerializationError
    │   ├── PayloadTooLargeError
    │   └── BlockedTypeError
    ├── InputError
    │   ├── ApprovalMismatchError
    │   ├── InvalidInputError
    │   ├── InvalidDecisionError
    │   ├── MissingContextError
    │   └── SupersededError
    └── RunError
        ├── RunFailedError
        ├── RunCancelledError
        ├── AttemptsExhaustedError
        ├── BudgetExceededError
        ├── DeadlineExceededError
        ├── IncompatibleGraphError
        ├── MigrationError
        ├── IllegalTransitionError
        │   └── NotDeadLetterError
        ├── EffectFailedError
        ├── EffectInDoubtError
        ├── OutcomeUnknownError
        ├── NonDeterministicNodeError
        └── ProposalUnstableError

A message says what happened, to which id, and what to do about it. It never holds a payload or a
secret: those stay in the store, behind the codec. Constructors take facts, keep them as attributes
and build the message, so that a caller can act on the facts without parsing text.

None of these derives from LangGraph's `GraphBubbleUp`: its executor drops such exceptions, and a
write that was refused must stop the run.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Outcome = Literal["not_written", "unreachable", "contended", "unknown"]
ChangeKind = Literal[
    "code_changed",
    "node_removed",
    "node_added",
    "edge_changed",
    "channel_added",
    "channel_removed",
    "channel_retyped",
    "default_changed",
    "reducer_changed",
    "context_changed",
]
"""How a graph may differ from what it was; a node that was renamed is removed."""


class AgentflowError(Exception):
    """The base of all errors raised by agentflow."""

    def __init__(self, *facts: object, **named: object) -> None:
        """Keep the facts for pickling; subclasses build the message."""
        self._facts = facts
        self._named = named
        super().__init__(*facts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the facts, so that an error survives a process boundary."""
        return _rebuild, (type(self), self._facts, self._named)


def _rebuild(
    cls: type[AgentflowError], facts: tuple[object, ...], named: dict[str, object]
) -> AgentflowError:
    return cls(*facts, **named)


class ConfigError(AgentflowError):
    """Something about the set-up is wrong; no run was touched."""


class UnsupportedUrlError(ConfigError):
    """A storage URL that agentflow does not know."""

    def __init__(self, scheme: str, supported: tuple[str, ...]) -> None:
        """Name the scheme, or as much of the URL as cannot hold a password."""
        super().__init__(scheme, supported)
        self.scheme = scheme
        self.supported = supported

    def __str__(self) -> str:
        """Say what was given and what is possible."""
        what = "URL" if ":" in self.scheme else "URL scheme"
        known = ", ".join(self.supported)
        return f"unsupported storage {what} {self.scheme!r}; use one of: {known}"


class MissingDriverError(ConfigError):
    """A Python package that a storage URL or a model name needs is not installed."""

    def __init__(self, package: str, extra: str | None) -> None:
        """Name the package and the extra that brings it, if one does."""
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        """Say how to install it."""
        wanted = f'"agentflow[{self.extra}]"' if self.extra else self.package
        return f"the package {self.package!r} is not installed; install it: pip install {wanted}"


class AppReferenceError(ConfigError):
    """An app reference `module:attribute` that does not lead to an `AgentFlow`."""

    def __init__(self, reference: str, reason: str) -> None:
        """Name the reference and what went wrong."""
        super().__init__(reference, reason)
        self.reference = reference
        self.reason = reason

    def __str__(self) -> str:
        """Say what a reference looks like."""
        return (
            f"cannot load the app {self.reference!r}: {self.reason}; "
            "give --app module:attribute, where the attribute is an AgentFlow"
        )


class UnknownGraphError(ConfigError):
    """A graph name or version that is not registered in this process."""

    def __init__(self, name: str, version: str | None, registered: tuple[str, ...]) -> None:
        """Name what was asked for and what there is (`name@version`)."""
        super().__init__(name, version, registered)
        self.name = name
        self.version = version
        self.registered = registered

    def __str__(self) -> str:
        """Say what is registered."""
        asked = self.name if self.version is None else f"{self.name}@{self.version}"
        known = ", ".join(self.registered) or "none"
        return (
            f"no graph {asked!r} is registered here (registered: {known}); "
            "call app.register(graph, name=..., version=...) before using it"
        )


class UnknownPriceError(ConfigError):
    """What a run may cost is limited, and what a model costs is not known."""

    def __init__(self, model: str) -> None:
        """Name the model."""
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        """Say where to name the price."""
        return (
            f"there is no price of model {self.model!r}, which was not called; name it: "
            f"Budget(prices={{{self.model!r}: Price(input=..., output=...)}})"
        )


class MigrationRequiredError(ConfigError):
    """The database's schema is not the one that this program speaks."""

    def __init__(self, found: str | None, expected: str) -> None:
        """Name both schema revisions."""
        super().__init__(found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        """Say which side to move."""
        return (
            f"the database has schema revision {self.found or 'none'!r}, this program needs "
            f"{self.expected!r}; run 'agentflow migrate up' with the newer of the two programs"
        )


class JournalMissingError(MigrationRequiredError):
    """A database of the user's has no table for the journal of transactions."""

    def __init__(self, database: str) -> None:
        """Name the database, without its password."""
        AgentflowError.__init__(self, database)
        self.database = database

    def __str__(self) -> str:
        """Say how to make it."""
        return (
            f"the database {self.database} has no table effect_journal; run "
            "'agentflow migrate journal --url <the database>' to make it"
        )


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


class CodecError(AgentflowError):
    """A stored value could not be written or read faithfully."""

    def __init__(self, message: str) -> None:
        """Take the whole message."""
        super().__init__(message)


class UnknownVersionError(CodecError):
    """A stored value was written by a newer program."""

    def __init__(self, version: int, supported: int, where: str = "") -> None:
        """Name both codec versions and the place of the value."""
        AgentflowError.__init__(self, version, supported, where)
        self.version = version
        self.supported = supported
        self.where = where

    def __str__(self) -> str:
        """Say which program can read it."""
        return (
            f"stored value{_at(self.where)} has codec version {self.version}, this program reads "
            f"up to {self.supported}; upgrade agentflow here"
        )


class HashMismatchError(CodecError):
    """A stored value is not what was saved: damaged, cut short or swapped."""

    def __init__(self, where: str = "", reason: str = "its hash does not match") -> None:
        """Name the place of the value and what is wrong with it."""
        AgentflowError.__init__(self, where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Say that it was not trusted."""
        return (
            f"stored value{_at(self.where)} is damaged: {self.reason}; nothing was executed, "
            "restore it from a backup"
        )


class MissingBlobError(CodecError):
    """What a stored value refers to is not there any more."""

    def __init__(self, where: str = "", reason: str = "a part of it was deleted") -> None:
        """Name the place of the value and what is missing."""
        AgentflowError.__init__(self, where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Say what to do about it."""
        return (
            f"stored value{_at(self.where)} is incomplete: {self.reason}; nothing was executed, "
            "restore it from a backup, or go on from a checkpoint that does not have it"
        )


class UnknownKeyError(CodecError):
    """A stored value is encrypted under a key that this program was not given."""

    def __init__(self, key: str, where: str = "") -> None:
        """Name the key and the place of the value."""
        AgentflowError.__init__(self, key, where)
        self.key = key
        self.where = where

    def __str__(self) -> str:
        """Say where it has to go."""
        return (
            f"stored value{_at(self.where)} is encrypted under the key {self.key!r}, which is not "
            "here; give it to the key ring (AGENTFLOW_KEYS)"
        )


class UnencryptedValueError(CodecError):
    """A stored value is not encrypted although everything has to be."""

    def __init__(self, where: str = "") -> None:
        """Name the place of the value."""
        AgentflowError.__init__(self, where)
        self.where = where

    def __str__(self) -> str:
        """Say how to go on if it is from before."""
        return (
            f"stored value{_at(self.where)} is not encrypted, and was refused; if it was stored "
            "before encryption was switched on, accept plaintext until `agentflow keys rotate` "
            "has encrypted everything"
        )


class SerializationError(CodecError):
    """A value cannot be stored so that it could be loaded back."""

    def __init__(self, type_name: str, path: str, hint: str, where: str = "") -> None:
        """Name the type, the path inside the value, what to do, and the place."""
        AgentflowError.__init__(self, type_name, path, hint, where)
        self.type_name = type_name
        self.path = path
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        """Say where the value sits and how to make it storable."""
        return (
            f"cannot store a value of type {self.type_name} at {self.path or 'the top'}"
            f"{_at(self.where)}: {self.hint}"
        )


class PayloadTooLargeError(CodecError):
    """A value is larger than anything may be that is stored of a run."""

    def __init__(self, size: int, limit: int, where: str = "") -> None:
        """Name both sizes in bytes, and the place."""
        AgentflowError.__init__(self, size, limit, where)
        self.size = size
        self.limit = limit
        self.where = where

    def __str__(self) -> str:
        """Say how large it is and what to do instead."""
        return (
            f"a value of {self.size} bytes is too large to be stored{_at(self.where)}: the limit "
            f"is {self.limit} bytes; store it elsewhere and keep a reference, or raise "
            "AGENTFLOW_MAX_PAYLOAD"
        )


class BlockedTypeError(CodecError):
    """A stored value is of a type that this process may not build."""

    def __init__(self, type_name: str, where: str = "", reason: str = "") -> None:
        """Name the type, the place and why it is blocked."""
        AgentflowError.__init__(self, type_name, where, reason)
        self.type_name = type_name
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Say how to allow it."""
        return (
            f"stored value{_at(self.where)} is of type {self.type_name}, which may not be loaded "
            f"here: {self.reason or 'it is not allowed'}; import its module before loading, or "
            f'allow it with allow=["{self.type_name}"]'
        )


def _at(where: str) -> str:
    return f" ({where})" if where else ""


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


class RunError(AgentflowError):
    """Something about one run."""


class RunFailedError(RunError):
    """The run ended as `failed`."""

    def __init__(self, run_id: str, error_type: str, node: str | None, attempt: int) -> None:
        """Name the run, the type of its error, the node and the attempt; not the message."""
        super().__init__(run_id, error_type, node, attempt)
        self.run_id = run_id
        self.error_type = error_type
        self.node = node
        self.attempt = attempt

    def __str__(self) -> str:
        """Say where to read more."""
        node = f" in node {self.node!r}" if self.node else ""
        return (
            f"run {self.run_id!r} failed with {self.error_type}{node} "
            f"(attempt {self.attempt}); run.error holds the details"
        )


class RunCancelledError(RunError):
    """The run ended as `cancelled`."""

    def __init__(self, run_id: str, reason: str | None = None) -> None:
        """Name the run and the reason that was given."""
        super().__init__(run_id, reason)
        self.run_id = run_id
        self.reason = reason

    def __str__(self) -> str:
        """Say that it was cancelled."""
        return f"run {self.run_id!r} was cancelled" + (f": {self.reason}" if self.reason else "")


class AttemptsExhaustedError(RunError):
    """A run was claimed too often without any durable progress in between."""

    def __init__(self, run_id: str, attempts: int) -> None:
        """Name the run and how many attempts made no progress."""
        super().__init__(run_id, attempts)
        self.run_id = run_id
        self.attempts = attempts

    def __str__(self) -> str:
        """Say what that usually means."""
        return (
            f"run {self.run_id!r} made no durable progress in {self.attempts} attempts; "
            "its worker probably dies in the same node each time"
        )


class BudgetExceededError(RunError):
    """A run, or its thread, has used what it may; the next call was not made."""

    def __init__(self, run_id: str, scope: str, limit: str, used: float, allowed: float) -> None:
        """Name the run, whose budget it is, what is limited, and how much of it was used."""
        super().__init__(run_id, scope, limit, used, allowed)
        self.run_id = run_id
        self.scope = scope
        self.limit = limit
        self.used = used
        self.allowed = allowed

    def __str__(self) -> str:
        """Say how much, and how to go on."""
        return (
            f"run {self.run_id!r} is stopped: its {self.scope} has used {self.used:g} of "
            f"{self.allowed:g} {self.limit}; raise the budget where the graph is registered and "
            'requeue the run, or let it ask for more with on_exceeded="ask"'
        )


class DeadlineExceededError(RunError):
    """A run did not end by its deadline."""

    def __init__(self, run_id: str, deadline: str) -> None:
        """Name the run and its deadline, as ISO text."""
        super().__init__(run_id, deadline)
        self.run_id = run_id
        self.deadline = deadline

    def __str__(self) -> str:
        """Say when it should have ended."""
        return (
            f"run {self.run_id!r} had not ended by its deadline, {self.deadline}; its state is "
            "kept, and a requeue gives it the same time again"
        )


class IncompatibleGraphError(RunError):
    """A graph that has changed where a run that has begun can still come to; nothing ran."""

    def __init__(
        self,
        run_id: str,
        graph: str,
        version: str,
        changes: tuple[tuple[ChangeKind, str], ...],
        main: tuple[str, ...] = (),
    ) -> None:
        """Name the run, the graph, each difference with its kind, and what stands in a notebook."""
        super().__init__(run_id, graph, version, changes, main)
        self.run_id = run_id
        self.graph = graph
        self.version = version
        self.changes = changes
        self.main = main

    def __str__(self) -> str:
        """Say what differs, and the ways forward."""
        listed = "; ".join(f"{text} ({kind})" for kind, text in self.changes)
        notebook = ""
        if self.main:
            names = ", ".join(self.main)
            notebook = f" (of __main__, a script or notebook, and changed: {names})"
        return (
            f"run {self.run_id!r} cannot go on with graph {self.graph!r} version "
            f"{self.version!r} as it is registered here: {listed}{notebook}. Nothing ran, nothing "
            "of its thread was changed, and the run is paused. Either register the code that it "
            "began with as well, and the changed code under a version of its own; or write an "
            "app.migration to that version and call 'agentflow run migrate'; or accept the "
            "change with register(..., on_change={...}). "
            f"Then call 'agentflow run resume {self.run_id}'"
        )


class MigrationError(RunError):
    """A run that cannot be brought to another version of its graph; it was left as it is."""

    def __init__(self, run_id: str, from_version: str, to_version: str, reason: str) -> None:
        """Name the run, both versions and what is in the way."""
        super().__init__(run_id, from_version, to_version, reason)
        self.run_id = run_id
        self.from_version = from_version
        self.to_version = to_version
        self.reason = reason

    def __str__(self) -> str:
        """Say what is in the way."""
        return (
            f"run {self.run_id!r} cannot be migrated from version {self.from_version!r} to "
            f"{self.to_version!r}: {self.reason}; it was left as it is"
        )


class IllegalTransitionError(RunError):
    """A status change that the table of statuses does not allow."""

    def __init__(self, run_id: str, from_status: str, to_status: str) -> None:
        """Name the run and both statuses."""
        super().__init__(run_id, from_status, to_status)
        self.run_id = run_id
        self.from_status = from_status
        self.to_status = to_status

    def __str__(self) -> str:
        """Say which change was refused."""
        return f"run {self.run_id!r} is {self.from_status}; it cannot become {self.to_status}"


class NotDeadLetterError(IllegalTransitionError):
    """A run without a dead letter was to be requeued, or its dead letter discarded."""

    def __init__(self, run_id: str, status: str) -> None:
        """Name the run and its status."""
        AgentflowError.__init__(self, run_id, status)
        self.run_id = run_id
        self.from_status = status
        self.to_status = "queued"

    def __str__(self) -> str:
        """Say what it is instead."""
        return (
            f"run {self.run_id!r} has no dead letter: it is {self.from_status}; "
            "'agentflow dead-letter list' shows those that have one"
        )


class EffectFailedError(RunError):
    """An effect failed in an earlier attempt, with an exception that cannot be raised again."""

    def __init__(self, effect_id: str, name: str, error_type: str) -> None:
        """Name the effect, and the type of the exception; not its message."""
        super().__init__(effect_id, name, error_type)
        self.effect_id = effect_id
        self.name = name
        self.error_type = error_type

    def __str__(self) -> str:
        """Say where to read more and how to have it called again."""
        return (
            f"effect {self.name!r} ({self.effect_id}) failed before with {self.error_type}, and is "
            f"not called again; see 'agentflow effect show {self.effect_id}', or let its retry "
            "policy name this exception"
        )


class EffectInDoubtError(RunError):
    """Whether an effect happened is not known, and it was declared to fail then."""

    def __init__(self, effect_id: str, name: str) -> None:
        """Name the effect."""
        super().__init__(effect_id, name)
        self.effect_id = effect_id
        self.name = name

    def __str__(self) -> str:
        """Say how to go on."""
        return (
            f"whether effect {self.name!r} ({self.effect_id}) happened is not known; find out, "
            f"run 'agentflow effect resolve {self.effect_id}' to say so, and requeue the run"
        )


class OutcomeUnknownError(RunError):
    """Raised by a function with an effect: whether its call has happened is not known to it.

    The effect is in doubt then, as after a crash, and `on_in_doubt` says what follows.
    """


class NonDeterministicNodeError(RunError):
    """A node asks other questions, or in another order, than it did before it was answered."""

    def __init__(self, asked: str | None, now: str | None) -> None:
        """Name the key of the question that was answered, and that of the one asked now."""
        super().__init__(asked, now)
        self.asked = asked
        self.now = now

    def __str__(self) -> str:
        """Say that nobody got the wrong answer, and what to change."""
        return (
            f"the node asks {self.now!r} where it had asked {self.asked!r}, whose answer is there; "
            "it was not given to the wrong question: give each question a key of its own (key=), "
            "let the node ask in the same order each time it runs, and requeue the run"
        )


class ProposalUnstableError(RunError):
    """A node keeps proposing something else each time it runs, so nothing can be approved."""

    def __init__(self, key_or_title: str, times: int) -> None:
        """Name the approval and how often it was asked again."""
        super().__init__(key_or_title, times)
        self.key_or_title = key_or_title
        self.times = times

    def __str__(self) -> str:
        """Say how to make it stable."""
        return (
            f"the proposal of approval {self.key_or_title!r} changed {self.times} times between "
            'asking and resuming; compute it in an earlier node, or use on_change="use_approved"'
        )


class Meaning(NamedTuple):
    """What an error means at the edges."""

    code: str
    """The stable name used in machine-readable output."""
    http_status: int
    exit_code: int


_MEANINGS: dict[type[AgentflowError], Meaning] = {
    AgentflowError: Meaning("error", 500, 1),
    ConfigError: Meaning("config", 500, 1),
    UnsupportedUrlError: Meaning("unsupported_url", 500, 2),
    AppReferenceError: Meaning("app_reference", 500, 2),
    UnknownGraphError: Meaning("unknown_graph", 404, 3),
    MigrationRequiredError: Meaning("migration_required", 503, 1),
    NotFoundError: Meaning("not_found", 404, 3),
    ConflictError: Meaning("conflict", 409, 4),
    ThreadBusyError: Meaning("thread_busy", 409, 4),
    AlreadyResolvedError: Meaning("already_resolved", 409, 4),
    IdempotencyConflictError: Meaning("key_reused", 422, 4),
    VersionChangedError: Meaning("version_changed", 412, 4),
    EffectConflictError: Meaning("effect_key_reused", 422, 4),
    FencedError: Meaning("fenced", 409, 4),
    PausedError: Meaning("paused", 409, 4),
    StoreUnavailableError: Meaning("store_unavailable", 503, 1),
    ObjectStoreError: Meaning("object_store", 503, 1),
    StoreDamagedError: Meaning("store_damaged", 500, 1),
    InputError: Meaning("invalid", 422, 1),
    InvalidInputError: Meaning("invalid_input", 422, 1),
    InvalidDecisionError: Meaning("invalid_answer", 422, 1),
    SupersededError: Meaning("superseded", 410, 5),
    IllegalTransitionError: Meaning("illegal_transition", 409, 4),
    NotDeadLetterError: Meaning("not_dead_letter", 409, 4),
    PayloadTooLargeError: Meaning("too_large", 413, 1),
}


def meaning(error: AgentflowError) -> Meaning:
    """Return the code, HTTP status and exit code of an error, by its nearest listed class."""
    for cls in type(error).__mro__:
        if cls in _MEANINGS:
            return _MEANINGS[cls]
    return _MEANINGS[AgentflowError]
