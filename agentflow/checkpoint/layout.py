"""Where the values of a checkpoint are: in its row, or as stretches of series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

WHOLE = -1
"""The length of a part that is a value of its own and not a stretch of a list."""


class Part(NamedTuple):
    """A stretch of a stored value: the first `length` elements of a series, or all of it."""

    series: int
    length: int
    is_open: bool
    """Whether the list's next elements may be put behind it in the same series."""


Stored = bytes | tuple[Part, ...]
"""A value as its checkpoint's row has it: its serialized bytes, or where they are kept."""


class Held(NamedTuple):
    """The state of one channel in one checkpoint."""

    version: str | int | float
    stored: Stored | None
    """`None` if the channel has no value at that version."""
    digest: bytes | None = None
    """Of the serialized value, if it does not stand in the row: of the bytes of all elements of a
    list that is kept as stretches, else of all its bytes (SHA-256)."""


Layout = Mapping[str, Held]
"""Channel to its state, for all channels of a checkpoint."""


def cut(parts: Sequence[Part], count: int) -> list[Part]:
    """Return the parts that make up the first `count` elements of a list."""
    kept: list[Part] = []
    for part in parts:
        take = min(part.length, count)
        if take <= 0:
            break
        kept.append(Part(part.series, take, part.is_open and take == part.length))
        count -= take
    return kept


def closed(stored: Stored | None) -> Stored | None:
    """Return what a branch has of a stored value: nothing may be put behind it in place."""
    if stored is None or isinstance(stored, bytes):
        return stored
    return tuple(part._replace(is_open=False) for part in stored)
