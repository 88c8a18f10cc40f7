"""Named points in production code at which a fault test can stop, kill or delay the process.

A failpoint that is not armed costs one truth test. Nothing arms them in production: `arm` is called
by test code inside the process that is going to be the victim.
"""

from __future__ import annotations

from collections.abc import Callable

_armed: dict[str, Callable[[], None]] = {}


def failpoint(name: str) -> None:
    """Run what a test has armed under this name, if anything."""
    if _armed and (action := _armed.get(name)) is not None:
        action()


def arm(name: str, action: Callable[[], None]) -> None:
    """Run `action` whenever this process passes the failpoint `name`."""
    _armed[name] = action


def disarm() -> None:
    """Forget all armed failpoints."""
    _armed.clear()
