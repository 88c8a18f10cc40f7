"""The base of the tree: how an error keeps its facts."""

from __future__ import annotations

from typing import Any


class AgentflowError(Exception):
    """The base of all errors raised by agentflow."""

    def __init__(self, *facts: object, **named: object) -> None:
        """Keep the facts for pickling; subclasses build the message."""
        self._facts = facts
        self._named = named
        super().__init__(*facts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the facts, so that an error survives a process boundary."""
        return _rebuild, (type(self), self._facts, self._named)


def _rebuild(
    cls: type[AgentflowError], facts: tuple[object, ...], named: dict[str, object]
) -> AgentflowError:
    return cls(*facts, **named)
