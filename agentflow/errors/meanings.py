"""What errors mean outside of Python."""

from __future__ import annotations

from typing import NamedTuple

from agentflow.errors.base import AgentflowError
from agentflow.errors.codec import PayloadTooLargeError
from agentflow.errors.config import (
    AppReferenceError,
    ConfigError,
    MigrationRequiredError,
    UnknownGraphError,
    UnsupportedUrlError,
)
from agentflow.errors.inputs import (
    InputError,
    InvalidDecisionError,
    InvalidInputError,
    SupersededError,
)
from agentflow.errors.runs import IllegalTransitionError, NotDeadLetterError
from agentflow.errors.store import (
    AlreadyResolvedError,
    ConflictError,
    EffectConflictError,
    FencedError,
    IdempotencyConflictError,
    NotFoundError,
    ObjectStoreError,
    PausedError,
    StoreDamagedError,
    StoreUnavailableError,
    ThreadBusyError,
    VersionChangedError,
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
