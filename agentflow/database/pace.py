"""Whether something short may be done in the thread of an event loop, instead of in another one.

A change of threads costs as much as a commit to a fast disk, and leaves both threads with cold
caches. But an event loop that waits for a slow disk, a lock or a server keeps everybody waiting.
"""

from __future__ import annotations

import time

_LIMIT = 0.005
"""Seconds that most of it must not take.

So long another thread may keep the interpreter from a loop anyway (`sys.getswitchinterval`).
"""
_SLOWNESS = 4
"""How much more often than not it may take longer for a while."""
_PAUSE = 1.0
"""Seconds after which what was too slow is tried again."""


class Pace:
    """Learns from what it took the last times."""

    def __init__(self, *, is_for_loop: bool = True) -> None:
        """Start with confidence; a thread without an event loop may be kept as long as it takes."""
        self._limit_applies = is_for_loop
        self._slowness = 0
        self._not_before = 0.0

    def is_quick(self) -> bool:
        """Whether to expect that it takes no longer than a loop may wait."""
        return time.monotonic() >= self._not_before

    def took(self, seconds: float, *, has_failed: bool = False) -> None:
        """Note how long a thread was kept, and whether in vain."""
        is_slow = self._limit_applies and seconds > _LIMIT
        self._slowness = max(0, self._slowness + (2 if is_slow else -1))
        if has_failed or self._slowness > _SLOWNESS:
            self._slowness = 0
            self._not_before = time.monotonic() + _PAUSE
