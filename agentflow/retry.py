"""Decides whether and when a failed attempt is tried again; pure, without I/O or clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from agentflow.errors import AttemptsExhaustedError, CodecError, ConfigError, InputError
from agentflow.types import Duration, to_timedelta

RetryOn = type[Exception] | Sequence[type[Exception]] | Callable[[Exception], bool]

_LIMIT = timedelta(seconds=60)


class LangGraphRetryPolicy(Protocol):
    """The fields that LangGraph's `RetryPolicy` shares with ours."""

    @property
    def initial_interval(self) -> float:
        """Seconds before the second attempt."""
        ...

    @property
    def backoff_factor(self) -> float:
        """The factor between one interval and the next."""
        ...

    @property
    def max_interval(self) -> float:
        """The longest interval, in seconds."""
        ...

    @property
    def max_attempts(self) -> int:
        """All attempts, the first one included."""
        ...

    @property
    def jitter(self) -> bool:
        """Whether intervals vary at random."""
        ...

    @property
    def retry_on(self) -> RetryOn:
        """Which exceptions are worth another attempt."""
        ...


def retry_on_default(error: Exception) -> bool:
    """Retry everything but what cannot become better by itself.

    Errors of configuration, input and encoding, and those that point at a defect in the code
    (`TypeError`, `AttributeError`, `NameError`, `SyntaxError`, `NotImplementedError`), give up.
    """
    hopeless = (
        ConfigError,
        InputError,
        CodecError,
        TypeError,
        AttributeError,
        NameError,
        SyntaxError,
        NotImplementedError,
    )
    return not isinstance(error, hopeless)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and after how long a failed run is driven again.

    The field names are LangGraph's; its own policy is accepted wherever this one is. The waiting
    is durable: it is a time in the run's row, and no worker is occupied by it.
    """

    initial_interval: Duration = 1.0
    """The wait before the second attempt."""
    backoff_factor: float = 2.0
    """The factor between one wait and the next."""
    max_interval: Duration = 60.0
    """The longest wait; never more than 60 seconds."""
    max_attempts: int = 5
    """All attempts without progress in between, the first one included.

    An attempt whose worker was lost counts, as the first one at the node that comes next: with 1,
    such a run is not tried again.
    """
    jitter: bool = True
    """Whether a wait is shortened at random, by up to a half, so that crowds disperse."""
    retry_on: RetryOn = retry_on_default
    """Which exceptions are worth another attempt."""
    non_retryable: tuple[type[Exception], ...] = ()
    """Exceptions that end the run at once, whatever `retry_on` says."""

    @classmethod
    def of(cls, policy: RetryPolicy | LangGraphRetryPolicy | None) -> RetryPolicy:
        """Return `policy` as ours; `None` is the default policy."""
        if policy is None:
            return cls()
        if isinstance(policy, cls):
            return policy
        return cls(
            initial_interval=policy.initial_interval,
            backoff_factor=policy.backoff_factor,
            max_interval=policy.max_interval,
            max_attempts=policy.max_attempts,
            jitter=policy.jitter,
            retry_on=policy.retry_on,
        )

    def is_retryable(self, error: Exception) -> bool:
        """Whether another attempt may help against this error."""
        if isinstance(error, (AttemptsExhaustedError, *self.non_retryable)):
            return False
        if isinstance(self.retry_on, type):
            return isinstance(error, self.retry_on)
        if callable(self.retry_on):
            return bool(self.retry_on(error))
        return isinstance(error, tuple(self.retry_on))


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after `delay`."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail for good."""

    reason: str
    """`not_retryable` or `exhausted`."""


def decide(
    policy: RetryPolicy,
    attempt: int,
    error: Exception,
    *,
    rand: Callable[[], float] = random.random,
) -> Retry | GiveUp:
    """Decide what follows attempt number `attempt` (from 1), which failed with `error`."""
    if not policy.is_retryable(error):
        return GiveUp("not_retryable")
    if attempt >= policy.max_attempts:
        return GiveUp("exhausted")
    return Retry(backoff(policy, attempt, rand=rand))


def backoff(
    policy: RetryPolicy, attempt: int, *, rand: Callable[[], float] = random.random
) -> timedelta:
    """Return the wait after attempt number `attempt`: exponential, capped, with jitter."""
    ceiling = min(to_timedelta(policy.max_interval), _LIMIT)
    wait = to_timedelta(policy.initial_interval).total_seconds()
    for _ in range(attempt - 1):
        wait *= policy.backoff_factor
        # Left at the cap, so that attempt 1000 does not overflow.
        if wait >= ceiling.total_seconds():
            wait = ceiling.total_seconds()
            break
    wait = min(wait, ceiling.total_seconds())
    if policy.jitter:
        wait *= 1 - rand() / 2
    return timedelta(seconds=wait)
