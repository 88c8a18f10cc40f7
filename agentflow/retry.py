"""Decides whether and when a failed attempt is tried again; pure, without I/O or clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, Protocol, get_args

from agentflow.errors import (
    AttemptsExhaustedError,
    BudgetExceededError,
    CodecError,
    ConfigError,
    EffectConflictError,
    EffectInDoubtError,
    InputError,
    InvalidInputError,
    NonDeterministicNodeError,
)
from agentflow.responses import is_refused, retry_after
from agentflow.types import Duration, to_timedelta

RetryOn = type[Exception] | Sequence[type[Exception]] | Callable[[Exception], bool]

OnExhausted = Literal["dead_letter", "pause"]

_LIMIT = timedelta(seconds=60)
_SETTLED = (
    AttemptsExhaustedError,
    BudgetExceededError,
    EffectConflictError,
    EffectInDoubtError,
    NonDeterministicNodeError,
)
"""Errors that another attempt would only raise again."""


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
    (`TypeError`, `AttributeError`, `NameError`, `SyntaxError`, `NotImplementedError`), give up. So
    do errors of HTTP clients that have the `status_code` of a request which is wrong in itself.
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
    return not isinstance(error, hopeless) and not is_refused(error)


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
    on_exhausted: OnExhausted = "dead_letter"
    """What becomes of a run when its attempts are used up: it fails and has a dead letter, or it is
    paused until somebody resumes it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            InvalidInputError: Names each field that is out of range.
        """
        found = [
            f"{name}: must be a timedelta or seconds, and not negative"
            for name in ("initial_interval", "max_interval")
            if not _is_wait(getattr(self, name))
        ]
        if not 0 < self.backoff_factor < math.inf:
            found.append("backoff_factor: must be a number above 0")
        if not (isinstance(self.max_attempts, int) and self.max_attempts >= 1):  # type: ignore[redundant-expr]  # user code made it
            found.append("max_attempts: must be at least 1; the first attempt counts")
        if self.on_exhausted not in get_args(OnExhausted):
            found.append(f"on_exhausted: must be one of {', '.join(get_args(OnExhausted))}")
        if found:
            raise InvalidInputError("retry policy", tuple(found))

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
        if isinstance(error, (*_SETTLED, *self.non_retryable)):
            return False
        if isinstance(self.retry_on, type):
            return isinstance(error, self.retry_on)
        if callable(self.retry_on):
            try:
                return bool(self.retry_on(error))
            except Exception:  # noqa: BLE001 -- user code, which is not the failure to report
                return False
        return isinstance(error, tuple(self.retry_on))

    def to_plain(self) -> dict[str, Any]:
        """Return what is stored with a run: all but what only code can say.

        Which exceptions are worth another attempt is judged by the graph as it is registered.
        """
        return {
            "initial_interval": to_timedelta(self.initial_interval).total_seconds(),
            "backoff_factor": self.backoff_factor,
            "max_interval": to_timedelta(self.max_interval).total_seconds(),
            "max_attempts": self.max_attempts,
            "jitter": self.jitter,
            "on_exhausted": self.on_exhausted,
        }


def _is_wait(value: Duration) -> bool:
    try:
        return to_timedelta(value) >= timedelta(0)
    except (OverflowError, ValueError, TypeError):
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicies:
    """The retry policy of a graph, and those of its nodes that have one of their own."""

    graph: RetryPolicy
    nodes: Mapping[str, RetryPolicy] = field(default_factory=dict)

    def of(self, node: str | None) -> RetryPolicy:
        """Return the policy that holds where a node failed."""
        return self.graph if node is None else self.nodes.get(node, self.graph)

    def most_attempts(self, nodes: Collection[str]) -> int:
        """Return how many attempts there are at one of these nodes, whichever it is."""
        return max((self.of(node).max_attempts for node in nodes), default=self.graph.max_attempts)

    def to_plain(self) -> dict[str, Any]:
        """Return what is stored with a run; see `RetryPolicy.to_plain`."""
        nodes = {name: policy.to_plain() for name, policy in self.nodes.items()}
        return {**self.graph.to_plain(), "nodes": nodes}

    def as_stored(self, plain: Mapping[str, Any] | None) -> RetryPolicies:
        """Return the policies with the numbers that were stored with a run."""
        if plain is None:
            return self
        numbers = {name: value for name, value in plain.items() if name != "nodes"}
        stored: Mapping[str, Mapping[str, Any]] = plain.get("nodes", {})
        return RetryPolicies(
            graph=replace(self.graph, **numbers),
            nodes={name: replace(self.of(name), **each) for name, each in stored.items()},
        )


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after `delay`."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail for good."""

    reason: str
    """`not_retryable`, `exhausted` or `deadline`."""


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
    wait = backoff(policy, attempt, rand=rand)
    return Retry(max(wait, retry_after(error) or wait))


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
