"""Hold points: a request is acted on, but its answer is withheld until its sender is gone.

Or it is not even acted on, as if it had been lost on its way. Either way its sender cannot know.
That is how the demo knows *exactly* where a worker stands when it is killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from threading import Condition
from typing import Any, Literal, TypeAlias

Moment: TypeAlias = Literal["arrival", "reply"]
"""When a request is caught: before it is acted on, or after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it was recorded."""

    seq: int
    path: str
    key: str | None
    body: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Hold:
    """Catch one request to `path` whose body contains `match`, after `skip` others like it.

    One that is caught at its `arrival` is on record, and never acted on.
    """

    path: str
    match: Mapping[str, Any] = field(default_factory=dict)
    skip: int = 0
    moment: Moment = "reply"
    caught: Request | None = None
    is_over: bool = False

    def wants(self, request: Request, moment: Moment) -> bool:
        """Whether the hold waits for a request like this one."""
        return (
            self.caught is None
            and not self.is_over
            and moment == self.moment
            and request.path == self.path
            and self.match.items() <= request.body.items()
        )


class Holds:
    """All hold points of the services; safe to use from every thread."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._ids = count(1)
        self._holds: dict[int, Hold] = {}

    def add(self, hold: Hold) -> int:
        """Arm a hold and return its id."""
        with self._changed:
            hold_id = next(self._ids)
            self._holds[hold_id] = hold
            return hold_id

    def wait_caught(self, hold_id: int, timeout: float) -> Request | None:
        """Return the request that the hold caught; `None` if there is none within the time."""
        hold = self._holds[hold_id]
        with self._changed:
            self._changed.wait_for(lambda: hold.caught is not None, timeout)
            return hold.caught

    def end(self, hold_id: int) -> None:
        """Let go: the request that was caught is dropped without an answer."""
        with self._changed:
            self._holds.pop(hold_id).is_over = True
            self._changed.notify_all()

    def pass_by(self, request: Request, moment: Moment) -> bool:
        """Return whether a request may go on; if a hold catches it, only when that ends."""
        with self._changed:
            wanting = (hold for hold in self._holds.values() if hold.wants(request, moment))
            hold = next(wanting, None)
            if hold is None:
                return True
            if hold.skip > 0:
                hold.skip -= 1
                return True
            hold.caught = request
            self._changed.notify_all()
            self._changed.wait_for(lambda: hold.is_over)
            return False
