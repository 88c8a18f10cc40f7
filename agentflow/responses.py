"""What the errors of HTTP clients say about trying again, whichever client it is. Pure.

The clients of model providers, and `httpx` below them, agree on two attributes: `status_code`, on
the error or on its response, and `response.headers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

_REFUSED = frozenset({400, 401, 403, 404, 405, 410, 413, 415, 422})
"""Statuses of requests that are wrong in themselves."""
_LONGEST = timedelta(hours=1)
"""A server that names a later time is asked again then: it may have meant something else."""
_DEEPEST = 5


def is_refused(error: BaseException) -> bool:
    """Whether a server has refused a request that it will refuse again."""
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", getattr(response, "status_code", None))
    return status in _REFUSED


def retry_after(error: BaseException) -> timedelta | None:
    """Return how long a server wants to be left alone, if it or the error says so."""
    for each in _causes(error):
        headers = getattr(getattr(each, "response", None), "headers", None)
        wait = _seconds(getattr(each, "retry_after", None))
        if wait is None and headers is not None:
            wait = _from_headers(headers)
        if wait is not None:
            return min(wait, _LONGEST)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    for _ in range(_DEEPEST):
        if each is None:
            return
        yield each
        each = each.__cause__


def _from_headers(headers: Any) -> timedelta | None:
    try:
        exact = headers.get("retry-after-ms")
        text = headers.get("retry-after")
        now = headers.get("date")
    except (AttributeError, TypeError):
        return None  # not the headers of a response
    if (wait := _seconds(exact)) is not None:
        return wait / 1000
    if (wait := _seconds(text)) is not None:
        return wait
    # A time; how far off it is, only the server's own clock can say.
    then, sent = _time(text), _time(now)
    return None if then is None or sent is None else max(then - sent, timedelta(0))


def _seconds(value: Any) -> timedelta | None:
    if value is None or isinstance(value, bool):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return timedelta(seconds=min(seconds, 1e9)) if seconds >= 0 else None


def _time(text: Any) -> datetime | None:
    try:
        return parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
