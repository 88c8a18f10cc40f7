"""A clock that stands still until it is moved: months of waiting pass in no time.

It owns the time of timers, deadlines and backoff. Leases are judged by the database's clock, which
it does not touch.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime

from agentflow.types import Duration, SystemClock, to_timedelta


class VirtualClock:
    """A `Clock` for `AgentFlow(clock=…)`; safe to use from any thread.

    Example:
        ```python
        clock = VirtualClock()
        app = AgentFlow("memory://", clock=clock)
        ...
        clock.advance(timedelta(days=30))
        ```
    """

    def __init__(self, start: datetime | None = None) -> None:
        """Stand still at `start`, by default at the machine's present time."""
        if start is not None and start.tzinfo is None:
            raise ValueError("start: must be aware; give it a time zone, such as datetime.UTC")
        self._lock = threading.Lock()
        self._now = (start or SystemClock().now()).astimezone(UTC)

    def now(self) -> datetime:
        """Return the time at which the clock stands."""
        with self._lock:
            return self._now

    def advance(self, by: Duration) -> datetime:
        """Move the clock on and return its new time; it never goes back."""
        length = to_timedelta(by)
        if length.total_seconds() < 0:
            raise ValueError(f"by: must not be negative, and is {length}")
        with self._lock:
            self._now += length
            return self._now
