"""What a tool returns, in a form that the journal can keep, and back.

Messages are kept as they are. LangGraph's `Command` is not a value that is ever stored, so it is
taken apart.
"""

from __future__ import annotations

from typing import Any

from langgraph.types import Command

_COMMAND = "__command__"


def to_stored(result: Any) -> Any:
    """Return a tool's result, or a list of them, without commands in it."""
    if isinstance(result, list):
        return [to_stored(each) for each in result]
    if isinstance(result, Command):
        parts = {"graph": result.graph, "update": result.update, "goto": result.goto}
        return {_COMMAND: parts}
    return result


def from_stored(stored: Any) -> Any:
    """Return what was given to `to_stored`."""
    if isinstance(stored, list):
        return [from_stored(each) for each in stored]
    if isinstance(stored, dict) and _COMMAND in stored:
        return Command(**stored[_COMMAND])
    return stored
