"""The future of what was handed to the writer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Future:
    """Ends once, with a value or an error; safe from any thread.

    Like `concurrent.futures.Future`, without what nobody needs here: an operation that was accepted
    is not cancelled. Two of these are made for each superstep of each graph, and making and ending
    one takes a sixth of the time. There is no lock, which a fork could leave taken: a callback is
    called by whoever takes it out of the list.
    """

    __slots__ = ("_callbacks", "_error", "_is_done", "_value")

    def __init__(self) -> None:
        """Start open."""
        self._callbacks: list[Callable[[Future], None]] = []
        self._value: Any = None
        self._error: Exception | None = None
        self._is_done = False

    def settle(self, value: Any = None, error: Exception | None = None) -> None:
        """End with a value, or with an error."""
        self._value, self._error = value, error
        self._is_done = True
        self._call()

    def done(self) -> bool:
        """Whether it has ended."""
        return self._is_done

    def add_done_callback(self, callback: Callable[[Future], None]) -> None:
        """Call `callback` in the thread that ends it, or at once if it has ended."""
        self._callbacks.append(callback)
        if self._is_done:
            self._call()

    def _call(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:
                return  # another thread took the last one
            try:
                callback(self)
            except Exception:
                logger.exception("a callback of a future failed")

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end.

        Raises:
            TimeoutError: It has not ended after so many seconds.
        """
        ended = threading.Event()
        self.add_done_callback(lambda _: ended.set())
        if not ended.wait(timeout):
            raise TimeoutError

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for the end and return its error, if it is one; see `wait`."""
        if not self._is_done:
            self.wait(timeout)
        return self._error

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return its value; see `wait`.

        Raises:
            Exception: The error with which it ended.
        """
        if not self._is_done:
            self.wait(timeout)
        if self._error is not None:
            raise self._error
        return self._value
