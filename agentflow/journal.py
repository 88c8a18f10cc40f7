"""The records of effects: what was intended, what came of it, and what is not known.

A record is made before a call and completed after it. In between it is an intent; an intent that
nobody works on any more is *in doubt*: whether the call happened, only somebody outside can say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

logger = logging.getLogger(__name__)

OnInDoubt = Literal["ask", "check", "retry", "fail"]
"""What becomes of an effect in doubt: a person is asked, a function is asked, it is called again
(it is idempotent), or the run fails."""
Scope = Literal["run", "global"]
"""Where a key is unique: in a run and its forks, or in the whole tenant."""
EffectKind = Literal["effect", "transaction", "compensation"]
GLOBAL = ""
"""The scope of keys that are unique in the whole tenant, as it is stored."""


class EffectStatus(StrEnum):
    """What is known of an effect."""

    INTENDED = "intended"
    """The call was about to be made: it is under way, or in doubt."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The call raised."""
    NOT_HAPPENED = "not_happened"
    """Somebody who looked outside says so; it may be called."""
    NOT_CALLED = "not_called"
    """The attempt was stopped before the call; it may be called."""
    COMPENSATED = "compensated"
    """It was undone; it may be called."""


CALLABLE = {EffectStatus.NOT_HAPPENED, EffectStatus.NOT_CALLED, EffectStatus.COMPENSATED}
"""Statuses after which a call may be made without asking anybody."""

CHECK = "check"
"""Who resolves what the effect's own function has found out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectFailure:
    """What a call raised."""

    type: str
    """The exception's class, as `module:qualname`."""
    message: str
    args: tuple[Any, ...] | None = None
    """The exception's arguments, if they can be stored."""
    state: Mapping[str, Any] | None = None
    """Its attributes, if they can be stored."""
    is_final: bool = False
    """Whether the call must not be made again although it raised: it has happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEffect:
    """An effect that is about to be called."""

    id: str
    scope: str
    """`GLOBAL`, or the run at the root of those that share keys."""
    key: str
    name: str
    """The function, as `module:qualname`."""
    arguments: Mapping[str, Any]
    """What it is called with, as plain data."""
    ns: str
    task_id: str
    """The task that calls it; of a compensation, the effect that it undoes."""
    node: str
    on_in_doubt: OnInDoubt
    timeout: timedelta | None = None
    kind: EffectKind = "effect"
    compensate: str | None = None
    """The function that undoes it, as `module:qualname`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """An effect as it stood when it was read."""

    id: str
    scope: str
    run_id: str
    thread_id: str
    tenant: str
    graph: str
    kind: EffectKind
    name: str
    key: str
    arguments: Mapping[str, Any]
    ns: str
    task_id: str
    node: str
    status: EffectStatus
    attempt: int
    """How often it was intended."""
    worker: str
    token: int
    """The fencing token of the lease under which it was last intended."""
    on_in_doubt: OnInDoubt
    intended_at: datetime
    timeout: timedelta | None = None
    ended_at: datetime | None = None
    order: int | None = None
    """Grows, within a run, with each effect that ends."""
    compensate: str | None = None
    outcome: Any = None
    failure: EffectFailure | None = None
    resolved_by: str | None = None
    """Who said what came of it, when that was in doubt; the outcome is plain data then."""
    comment: str | None = None
    late: tuple[Mapping[str, Any], ...] = ()
    """Outcomes that arrived when something else had been decided."""

    @property
    def safe_at(self) -> datetime | None:
        """From when on the call cannot be under way any more; `None` if nobody can say."""
        return None if self.timeout is None else self.intended_at + self.timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What the store says to somebody who wants to call an effect."""

    effect: Effect
    is_due: bool
    """The caller is to make the call: the intent is durable, and his."""
    is_held: bool = False
    """A living attempt, under another lease, is at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a call."""

    status: Literal[EffectStatus.SUCCEEDED, EffectStatus.FAILED, EffectStatus.NOT_CALLED]
    value: Any = None
    failure: EffectFailure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What somebody who looked says about an effect in doubt."""

    happened: bool
    by: str
    outcome: Any = None
    """What the call returned, as plain data."""
    comment: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the audit event."""


def differences(stored: Any, given: Any, path: str) -> list[str]:
    """Return the paths at which two plain values differ, without what stands there."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        names = sorted({*stored, *given})
        return [
            found
            for name in names
            for found in (
                differences(stored[name], given[name], f"{path}.{name}" if path else str(name))
                if name in stored and name in given
                else [f"{path}.{name}" if path else str(name)]
            )
        ]
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        return [
            found
            for i, (one, other) in enumerate(zip(stored, given, strict=True))
            for found in differences(one, other, f"{path}[{i}]")
        ]
    is_same = stored == given and isinstance(stored, bool) == isinstance(given, bool)
    return [] if is_same else [path or "arguments"]


def warn_if_early(effect_id: str, safe_at: datetime | None, now: datetime) -> bool:
    """Log that an effect is decided about while its call may still be under way; say whether."""
    is_early = safe_at is None or now < safe_at
    if is_early:
        at = "unknown" if safe_at is None else safe_at.isoformat()
        logger.warning(
            "effect is decided about before it is safe",
            extra={"effect": effect_id, "safe_at": at},
        )
    return is_early


def safe_at_of(facts: Mapping[str, Any]) -> datetime | None:
    """Return from when on it is safe to say what came of an effect, as its question shows it."""
    at = facts.get("safe_at")
    return None if at is None else datetime.fromisoformat(at)


def question_id(effect_id: str, attempt: int, *, is_undoing: bool) -> str:
    """Name the question whether this call of an effect happened.

    It is another one when the run is being undone: whoever had the run cancelled instead of
    answering the first has not answered it.
    """
    return f"{effect_id}:{attempt}{'!' if is_undoing else ''}"


def question_ids(effect_id: str, attempt: int) -> tuple[str, str]:
    """Name both questions whether this call of an effect happened."""
    return (
        question_id(effect_id, attempt, is_undoing=False),
        question_id(effect_id, attempt, is_undoing=True),
    )
