"""Callers of effects that are not async: in threads, or on the event loop itself, which they block.

What an effect does besides its call happens on an event loop. The call is made by the caller's own
thread, which waits for the rest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Caller(Generic[T]):
    """A thread that waits for an effect, and makes its calls meanwhile."""

    def __init__(self, call: Callable[[T], Any]) -> None:
        """Make calls by `call`."""
        self._call = call
        self._changed = threading.Condition()
        self._asked: list[tuple[T, Future[Any]]] = []
        self._is_dismissed = False

    async def ask(self, context: T) -> Any:
        """Have the thread make a call, and return its outcome."""
        answer: Future[Any] = Future()
        with self._changed:
            self._asked.append((context, answer))
            self._changed.notify()
        return await asyncio.wrap_future(answer)

    def dismiss(self) -> None:
        """Let the thread go."""
        with self._changed:
            self._is_dismissed = True
            self._changed.notify()

    def serve(self) -> None:
        """Make calls until dismissed; in the thread itself."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._is_dismissed)
                if not self._asked:
                    return
                context, answer = self._asked.pop()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                outcome = self._call(context)
            except BaseException as exc:  # noqa: BLE001 -- handed to the one who asked
                answer.set_exception(exc)
            else:
                answer.set_result(outcome)


class Aside:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        """Start it."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="agentflow-effects", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def close(self) -> None:
        """End it."""
        self.loop.call_soon_threadsafe(self.loop.stop)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that the caller runs on, if it does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
