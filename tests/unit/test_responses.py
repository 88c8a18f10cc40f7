"""What the errors of HTTP clients say about trying again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import httpx
import pytest

from agentflow import RetryPolicy
from agentflow.responses import is_refused, retry_after
from agentflow.retry import GiveUp, Retry, decide

STEADY = RetryPolicy(jitter=False)
SENT = "Wed, 25 Nov 2026 10:00:00 GMT"


def refused(status: int, headers: Mapping[str, str] | None = None) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://models")
    response = httpx.Response(status, headers=headers, request=request)
    return httpx.HTTPStatusError("refused", request=request, response=response)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "30"}, 30),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        ({"Retry-After": "Wed, 25 Nov 2026 10:02:00 GMT", "Date": SENT}, 120),
        ({"Retry-After": "Wed, 25 Nov 2026 09:00:00 GMT", "Date": SENT}, 0),
        ({"Retry-After": "86400"}, 3600),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 25 Nov 2026 10:02:00 GMT"}, None),
        ({}, None),
    ],
)
def test_server_says_how_long_it_wants_to_be_left_alone(
    headers: Mapping[str, str], seconds: float | None
) -> None:
    expected = None if seconds is None else timedelta(seconds=seconds)
    assert retry_after(refused(429, headers)) == expected


def test_cause_and_attribute_are_looked_at_too() -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = refused(503, {"Retry-After": "5"})
    assert retry_after(wrapped) == timedelta(seconds=5)
    marked = RuntimeError("mine")
    marked.retry_after = 7  # type: ignore[attr-defined]  # as some clients do
    assert retry_after(marked) == timedelta(seconds=7)


def test_next_attempt_is_not_before_the_server_wants_it() -> None:
    assert decide(STEADY, 1, refused(429, {"Retry-After": "90"})) == Retry(timedelta(seconds=90))
    assert decide(STEADY, 3, refused(429, {"Retry-After": "1"})) == Retry(timedelta(seconds=4))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_request_that_is_wrong_in_itself_is_not_sent_again(status: int) -> None:
    assert is_refused(refused(status))
    assert decide(STEADY, 1, refused(status)) == GiveUp("not_retryable")


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_other_statuses_are_worth_another_attempt(status: int) -> None:
    assert not is_refused(refused(status))
    assert isinstance(decide(STEADY, 1, refused(status)), Retry)
