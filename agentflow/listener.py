"""Waits in an event loop for what another thread, or another process, tells of."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Self


class Listener:
    """Waits for the next change, or for the next look at the database; use as a context manager."""

    def __init__(self, subscribe: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Listen from the running event loop to what `subscribe` subscribes to."""
        self._subscribe = subscribe
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._unsubscribe: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        """Start listening."""
        self._unsubscribe = self._subscribe(self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        if self._unsubscribe is not None:
            self._unsubscribe()

    async def wait(self, timeout: float) -> bool:
        """Return at the next change, at the latest after about `timeout` seconds.

        Says whether there was one. The time is up to a fifth longer, so that many processes do not
        look at the same moment.
        """
        jittered = timeout * (1 + random.random() / 5)  # noqa: S311 -- not a secret
        with suppress(TimeoutError):
            async with asyncio.timeout(jittered):
                await self._event.wait()
        was_told = self._event.is_set()
        self._event.clear()
        return was_told

    def wake(self) -> None:
        """End the current wait, from this event loop."""
        self._event.set()

    def _wake(self) -> None:
        # A loop that was closed has nobody left who waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)
