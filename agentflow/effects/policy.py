"""How an effect is called, and what a call can know; what follows from its record."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from agentflow.codec import Codec
from agentflow.control import AsksPerson
from agentflow.effects.failures import find_class, rebuild
from agentflow.effects.unknown import Classes, leaves_doubt
from agentflow.journal import CHECK, Effect
from agentflow.retry import Retry, RetryPolicy, decide


@dataclass(frozen=True, slots=True)
class Happened:
    """What the `check` function of an effect returns if the call has happened."""

    outcome: Any = None
    """What the call would have returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How an effect is called, and what follows if it fails or is in doubt."""

    retry: RetryPolicy | None = None
    """Which exceptions are worth another call; without it, an exception stands."""
    check: Callable[[], Awaitable[Happened | None]] | None = None
    """Asks the outside system whether the call has happened."""
    can_be_stopped: bool = True
    """Whether a call that takes too long can be cancelled; what is not async cannot."""
    admit: Callable[[], Awaitable[None]] | None = None
    """Raises if the call is not to be made; asked before each."""
    restore: Callable[[Any], Any] = field(default=lambda plain: plain)
    """Builds an outcome that a person gave as plain data."""
    in_doubt_on: Classes | None = None
    """The exceptions after which a call may have happened; by default `unknown.IN_DOUBT`."""
    handled: BaseException | None = None
    """What the caller was handling when it began; calls have nothing to do with it."""

    def leaves_doubt(self, error: BaseException) -> bool:
        """Whether a call that raised this may have happened."""
        return leaves_doubt(error, self.in_doubt_on, self.handled)


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectContext:
    """What a call can know about itself."""

    effect_id: str
    key: str
    idempotency_key: str
    """The same for each call of this effect and for no other: to send along."""
    attempt: int
    """How often the effect was intended, this time included."""
    call: int
    """Which call of this attempt it is; more than 1 after a failure that was worth another."""
    may_have_run: bool
    """Whether an earlier call may have happened."""


class InDoubt(AsksPerson):
    """Whether an effect happened is not known, and a person is to say so."""

    def __init__(self, effect: Effect) -> None:
        """Name the effect."""
        super().__init__(effect.id)
        self.effect = effect


def context_of_call(effect: Effect, number: int) -> EffectContext:
    """Return what call number `number` of an attempt can know."""
    return EffectContext(
        effect_id=effect.id,
        key=effect.key,
        idempotency_key=idempotency_key(effect),
        attempt=effect.attempt,
        call=number,
        may_have_run=effect.attempt > 1 or number > 1,
    )


def outcome_of(effect: Effect, policy: Policy) -> Any:
    """Return the outcome of an effect that has succeeded, as its function would."""
    is_plain = effect.resolved_by not in {None, CHECK}
    return policy.restore(effect.outcome) if is_plain else effect.outcome


def is_worth_another(effect: Effect, policy: Policy, codec: Codec) -> bool:
    """Whether an effect that failed in an earlier attempt may be called again."""
    failure = effect.failure
    if failure is None or failure.is_final:
        return False
    if effect.on_in_doubt == "retry":
        return True
    if policy.retry is None or (cls := find_class(failure, codec)) is None:
        return False
    error = rebuild(effect, codec)
    return isinstance(error, cls) and policy.retry.is_retryable(error)


def pause_after(policy: Policy, number: int, error: Exception) -> timedelta | None:
    """Return how long to wait until the next call; `None` if there is none."""
    if policy.retry is None:
        return None
    verdict = decide(policy.retry, number, error)
    return verdict.delay if isinstance(verdict, Retry) else None


def idempotency_key(effect: Effect) -> str:
    """Return what to send along with each call of an effect."""
    whole = f"{effect.tenant}\x1f{effect.scope}\x1f{effect.key}"
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
