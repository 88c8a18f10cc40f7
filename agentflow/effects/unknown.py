"""Exceptions after which nobody knows whether a call has happened. Pure.

A connection that broke, or a time that ran out, says nothing of what became of a request that was
sent. Where calls may not be repeated, such an exception is no outcome.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from agentflow.errors import OutcomeUnknownError

Classes = tuple[type[BaseException], ...]

IN_DOUBT: Classes = (
    TimeoutError,
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
)
"""What counts unless an effect says otherwise."""
_NUMBERS = frozenset({errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE})
"""The same, of errors of the system that a client has made its own."""
_NAMES = frozenset(
    {
        "aiohttp.client_exceptions:ServerDisconnectedError",
        *(
            f"{module}:{name}"
            for module in ("httpx", "httpcore")
            for name in (
                *("ReadTimeout", "WriteTimeout", "ReadError", "WriteError"),
                "RemoteProtocolError",
            )
        ),
    }
)
"""What clients say with none of Python's own errors behind it: those of a connection that was not
made are not among them."""
_DEEPEST = 20


def leaves_doubt(
    error: BaseException, classes: Classes | None, handled: BaseException | None = None
) -> bool:
    """Whether a call that raised this may have happened.

    What it was raised from, or while handling, counts as well: clients wrap the system's errors.

    Args:
        error: What was raised.
        classes: What counts, instead of `IN_DOUBT`.
        handled: What was being handled already when the call began, and has nothing to do with it.
    """
    return any(_is_doubtful(each, classes) for each in _line(error, handled))


def are_exceptions(given: object) -> bool:
    """Whether something is a list or tuple of classes of exceptions."""
    return isinstance(given, (list, tuple)) and all(
        isinstance(each, type) and issubclass(each, Exception) for each in given
    )


def _is_doubtful(error: BaseException, classes: Classes | None) -> bool:
    if isinstance(error, OutcomeUnknownError):
        return True
    if classes is not None:
        return isinstance(error, classes)
    if isinstance(error, IN_DOUBT):
        return True
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return True
    return any(f"{cls.__module__}:{cls.__qualname__}" in _NAMES for cls in type(error).__mro__)


def _line(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it, as a traceback shows them."""
    each: BaseException | None = error
    for _ in range(_DEEPEST):
        if each is None or each is handled:
            return
        yield each
        is_quiet = each.__suppress_context__
        each = each.__cause__ if each.__cause__ is not None or is_quiet else each.__context__
