"""Reading a state, whichever type the graph has given it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read(state: Any, key: str) -> Any:
    """Return a value of a state that is a mapping or has attributes."""
    return state[key] if isinstance(state, Mapping) else getattr(state, key)


def find(state: Any, key: str) -> Any:
    """Return a value of a state, or `None` if it is not there."""
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)
