"""When a failed attempt is tried again: pure decisions."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.types import RetryPolicy as LangGraphPolicy

from agentflow import RetryPolicy
from agentflow.errors import (
    AttemptsExhaustedError,
    ConfigError,
    InvalidInputError,
    SerializationError,
)
from agentflow.retry import GiveUp, Retry, RetryPolicies, backoff, decide

STEADY = RetryPolicy(jitter=False)


def seconds(policy: RetryPolicy, attempt: int, rand: float = 0.0) -> float:
    """Return the wait after an attempt."""
    return backoff(policy, attempt, rand=lambda: rand).total_seconds()


def test_waits_double_up_to_a_minute() -> None:
    assert [seconds(STEADY, n) for n in range(1, 10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_attempt_one_thousand_waits_a_minute() -> None:
    assert seconds(STEADY, 1000) == 60
    assert seconds(RetryPolicy(jitter=False, backoff_factor=1e300), 1000) == 60


@pytest.mark.parametrize("longest", [600.0, timedelta(hours=1)])
def test_no_setting_waits_longer_than_a_minute(longest: timedelta | float) -> None:
    policy = RetryPolicy(initial_interval=500, max_interval=longest, jitter=False)
    assert [seconds(policy, n) for n in (1, 2, 50)] == [60, 60, 60]


def test_shorter_limit_and_constant_waits_hold() -> None:
    assert seconds(RetryPolicy(max_interval=5, jitter=False), 9) == 5
    steady = RetryPolicy(initial_interval=timedelta(seconds=3), backoff_factor=1, jitter=False)
    assert [seconds(steady, n) for n in (1, 2, 1000)] == [3, 3, 3]
    assert seconds(RetryPolicy(initial_interval=0), 7) == 0


@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_jitter_shortens_by_at_most_a_half(attempt: int, rand: float) -> None:
    whole = seconds(STEADY, attempt)
    shortened = seconds(RetryPolicy(), attempt, rand)
    # Durations are kept in microseconds.
    assert whole / 2 - 1e-6 <= shortened <= whole


def test_jitter_varies_with_the_random_number() -> None:
    assert [seconds(RetryPolicy(), 3, rand) for rand in (0.0, 0.5, 0.99)] == [4, 3, 2.02]


def test_attempts_end_with_the_last_that_is_allowed() -> None:
    policy = RetryPolicy(max_attempts=3, jitter=False)
    error = ConnectionError()
    assert decide(policy, 1, error) == Retry(timedelta(seconds=1))
    assert decide(policy, 2, error) == Retry(timedelta(seconds=2))
    assert decide(policy, 3, error) == GiveUp("exhausted")
    assert decide(policy, 4, error) == GiveUp("exhausted")
    assert decide(RetryPolicy(max_attempts=1), 1, error) == GiveUp("exhausted")


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        AttributeError(),
        NameError(),
        NotImplementedError(),
        ConfigError(),
        InvalidInputError("x", ()),
        SerializationError("t", "p", "h"),
        AttemptsExhaustedError("r", 3),
    ],
)
def test_what_cannot_become_better_is_not_retried(error: Exception) -> None:
    assert decide(STEADY, 1, error) == GiveUp("not_retryable")


@pytest.mark.parametrize("error", [ConnectionError(), ValueError(), RuntimeError(), OSError()])
def test_everything_else_is_retried(error: Exception) -> None:
    assert isinstance(decide(STEADY, 1, error), Retry)


@pytest.mark.parametrize(
    "retry_on", [KeyError, [OSError, KeyError], lambda error: isinstance(error, KeyError)]
)
def test_policy_says_what_is_retried(retry_on: object) -> None:
    policy = RetryPolicy(retry_on=retry_on)  # type: ignore[arg-type]  # the forms are the point
    assert isinstance(decide(policy, 1, KeyError()), Retry)
    assert decide(policy, 1, ValueError()) == GiveUp("not_retryable")


def test_listed_exception_ends_the_run_whatever_else_is_said() -> None:
    policy = RetryPolicy(retry_on=Exception, non_retryable=(KeyError,))
    assert decide(policy, 1, KeyError()) == GiveUp("not_retryable")
    assert isinstance(decide(policy, 1, TypeError()), Retry)


def test_langgraphs_policy_is_taken_as_it_is() -> None:
    theirs = LangGraphPolicy(
        initial_interval=3.0, backoff_factor=3.0, max_attempts=2, jitter=False, retry_on=KeyError
    )
    ours = RetryPolicy.of(theirs)
    assert decide(ours, 1, KeyError()) == Retry(timedelta(seconds=3))
    assert decide(ours, 2, KeyError()) == GiveUp("exhausted")
    assert decide(ours, 1, ConnectionError()) == GiveUp("not_retryable")
    assert RetryPolicy.of(None) == RetryPolicy()
    assert RetryPolicy.of(ours) is ours
    default = RetryPolicy.of(LangGraphPolicy())
    assert isinstance(decide(default, 1, ConnectionError()), Retry)
    assert decide(default, 1, ValueError()) == GiveUp("not_retryable")


def test_predicate_that_raises_is_not_the_failure_to_report() -> None:
    def broken(_: Exception) -> bool:
        raise ZeroDivisionError

    assert decide(RetryPolicy(retry_on=broken), 1, ValueError()) == GiveUp("not_retryable")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initial_interval", -1),
        ("max_interval", timedelta(seconds=-1)),
        ("backoff_factor", 0),
        ("backoff_factor", float("nan")),
        ("initial_interval", float("inf")),
        ("max_interval", "1"),
        ("backoff_factor", float("inf")),
        ("max_attempts", 0),
        ("max_attempts", 1.5),
        ("on_exhausted", "explode"),
    ],
)
def test_impossible_policy_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=field):
        RetryPolicy(**{field: value})  # type: ignore[arg-type]  # the point


def test_numbers_of_a_policy_are_stored_and_its_exceptions_are_the_codes() -> None:
    then = RetryPolicies(
        graph=RetryPolicy(max_attempts=2, initial_interval=timedelta(seconds=3), jitter=False),
        nodes={"pay": RetryPolicy(max_attempts=9, on_exhausted="pause")},
    )
    later = RetryPolicies(graph=RetryPolicy(non_retryable=(KeyError,), max_interval=1))
    stored = json.loads(json.dumps(then.to_plain()))
    found = later.as_stored(stored)
    assert decide(found.graph, 1, ValueError()) == Retry(timedelta(seconds=3))
    assert decide(found.graph, 2, ValueError()) == GiveUp("exhausted")
    assert decide(found.graph, 1, KeyError()) == GiveUp("not_retryable")
    assert (found.of("pay").max_attempts, found.of("pay").on_exhausted) == (9, "pause")
    assert found.of("other") is found.of(None) is found.graph
    assert found.most_attempts(["other"]) == found.most_attempts([]) == 2
    assert found.most_attempts(["other", "pay"]) == 9
    assert later.as_stored(None) is later
