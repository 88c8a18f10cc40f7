"""Errors of one run."""

from __future__ import annotations

from typing import Literal

from agentflow.errors.base import AgentflowError

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
