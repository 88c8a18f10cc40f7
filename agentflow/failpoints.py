"""Named points in production code at which a fault test can stop, kill or delay the process.

A failpoint that is not armed costs one truth test. Nothing arms them in production: `arm` is called
by test code inside the process that is going to be the victim.

Besides those that are written down in the code, each verb of a port by which something becomes
durable has one before it is called and one after it has returned. They are derived from the port:
a verb that is added has its points at once. They cost nothing until `instrument` puts them in.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

_READING = ("get_", "find_", "list_", "count_", "load_")
"""How the names of verbs begin that change nothing."""

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


def transitions(port: type, *, reads: Collection[str] = ()) -> tuple[str, ...]:
    """Return the verbs of a port by which something becomes durable, by name.

    Args:
        port: An abstract class.
        reads: Its verbs that change nothing although their names do not say so.
    """
    verbs: frozenset[str] = getattr(port, "__abstractmethods__", frozenset())
    return tuple(
        sorted(
            verb
            for verb in verbs
            if callable(getattr(port, verb))  # a property changes nothing
            and not verb.startswith(_READING)
            and verb not in reads
        )
    )


def points(port: type, verb: str) -> tuple[str, str]:
    """Return the names of a verb's points: before it is called, and after it has returned."""
    return f"{port.__name__}.{verb}.before", f"{port.__name__}.{verb}.after"


def instrument(implementation: type, port: type, verbs: Collection[str]) -> None:
    """Let this process pass the points of some verbs wherever `implementation` is used."""
    for verb in verbs:
        setattr(implementation, verb, _pointed(getattr(implementation, verb), *points(port, verb)))


def _pointed(method: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def awaited(*args: Any, **named: Any) -> Any:
            failpoint(before)
            returned = await method(*args, **named)
            failpoint(after)
            return returned

        return awaited

    @functools.wraps(method)
    def called(*args: Any, **named: Any) -> Any:
        failpoint(before)
        returned = method(*args, **named)
        failpoint(after)
        return returned

    return called
