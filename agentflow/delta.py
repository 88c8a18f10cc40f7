"""Lists that grow: what is new about them since they were stored.

Most lists of an agent's state only ever grow at their end. What was stored is then kept, and only
the rest is written. A stored element is recognised by identity; since its content may have been
edited in place, the last few are compared by their bytes each time, and all of them whenever the
list has doubled. Pure: nothing here knows where values are stored.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ormsgpack

Dumps = Callable[[Any], bytes]
Hasher = Any
"""SHA-256 over the bytes of elements, one after the other; `hashlib` names no type."""

TAIL = 8
"""How many of the last stored elements are compared by their bytes each time."""
MAX_PARTS = 8
"""How often a list may be cut back and grown again before it is written whole."""
_FIRST_CHECK = 64
_IMMUTABLE = (str, int, float, bool, bytes, type(None))
# Equal ones of these have equal bytes. Floats do not: 0.0 equals -0.0.
_COMPARABLE = (str, int, bytes)


@dataclass(slots=True)
class KnownList:
    """A list as it was stored last."""

    items: list[Any]
    """The elements themselves, in a list of our own."""
    tail: list[bytes | None]
    """The bytes of the last elements, `None` for those that cannot change."""
    hasher: Hasher
    """Over the bytes of all elements."""
    checked: int
    """How long the list was when all of it was compared last."""
    parts: int
    """Of how many stretches it is stored."""
    size: int
    """Bytes of its elements, serialized."""


@dataclass(frozen=True, slots=True)
class Grown:
    """A list as the first elements of its predecessor and some more."""

    kept: int
    """How many elements of the stored list begin it."""
    block: bytes
    """The further elements, serialized as one list."""
    count: int
    """How long the list is now."""
    digest: bytes
    """Of the bytes of all its elements."""


def whole(items: list[Any], block: bytes, dumps: Dumps) -> KnownList:
    """Remember a list of which `block` is the serialized form."""
    hasher = new_hasher()
    hash_block(hasher, block, len(items))
    return loaded(items, hasher, 1, len(block), dumps)


def loaded(items: list[Any], hasher: Hasher, parts: int, size: int, dumps: Dumps) -> KnownList:
    """Remember a list that was read from `parts` stretches.

    Args:
        items: The list.
        hasher: Has gone over its bytes.
        parts: How many stretches there were.
        size: How many bytes.
        dumps: Serializes.
    """
    return KnownList(
        items=list(items),
        tail=_tail(items, len(items), dumps),
        hasher=hasher,
        checked=max(len(items), _FIRST_CHECK // 2),
        parts=parts,
        size=size,
    )


def new_hasher() -> Hasher:
    """Begin to hash a list, which does not depend on how it is cut into stretches."""
    return hashlib.sha256()


def hash_block(hasher: Hasher, block: bytes, count: int) -> None:
    """Go on hashing with a stretch of `count` elements."""
    hasher.update(memoryview(block)[_header_size(count) :])


def grown(
    known: KnownList, items: list[Any], dumps: Dumps, *, verify: bool
) -> tuple[Grown, KnownList] | None:
    """Say how a list has grown since it was known; `None` if it has to be written whole."""
    length, old = len(items), len(known.items)
    kept = _unedited(known, items, _common(known.items, items), dumps)
    if kept * 2 < old or (kept == 0 and old):
        return None
    is_cut = kept < old
    if is_cut and known.parts >= MAX_PARTS:
        return None
    checked = known.checked
    if is_cut or verify or length >= 2 * checked:
        if not _is_unchanged(known, dumps):
            return None
        checked = max(checked, length)
    block = dumps(items[kept:])
    if is_cut:
        hasher = new_hasher()
        start = dumps(items[:kept])
        size = len(start)
        hash_block(hasher, start, kept)
    else:
        hasher = known.hasher.copy()
        size = known.size
    hash_block(hasher, block, length - kept)
    after = KnownList(
        items=list(items),
        tail=_next_tail(known, items, kept, block, dumps),
        hasher=hasher,
        checked=checked,
        parts=known.parts + is_cut,
        size=size + len(block),
    )
    return Grown(kept, block, length, hasher.digest()), after


def joined(blocks: list[bytes], lengths: list[int]) -> bytes:
    """Put serialized lists of known lengths together into one."""
    bodies = [block[_header_size(n) :] for block, n in zip(blocks, lengths, strict=True)]
    return b"".join((_header(sum(lengths)), *bodies))


def cut_block(block: bytes, length: int) -> bytes | None:
    """Cut a serialized list to its first elements; `None` if it is no list, or no longer anyway."""
    if not is_list(block):
        return None
    elements = ormsgpack.unpackb(block, ext_hook=ormsgpack.Ext)
    return ormsgpack.packb(elements[:length]) if len(elements) > length else None


def is_list(block: bytes) -> bool:
    """Whether a serialized value is a list."""
    return block[0] & 0xF0 == 0x90 or block[0] in {0xDC, 0xDD}  # noqa: PLR2004 -- as below


def count_block(block: bytes) -> int:
    """Return how many elements a serialized list has."""
    first = block[0]
    if first & 0xF0 == 0x90:  # noqa: PLR2004 -- the three forms of an array in MessagePack
        return first & 0x0F
    return int.from_bytes(block[1 : 3 if first == 0xDC else 5], "big")  # noqa: PLR2004


def slice_block(block: bytes, begin: int, length: int) -> bytes:
    """Return some elements of a serialized list as one."""
    elements = ormsgpack.unpackb(block, ext_hook=ormsgpack.Ext)
    return ormsgpack.packb(elements[begin : begin + length])


def _common(old: list[Any], new: list[Any]) -> int:
    """Count how many elements the lists have in common at their start."""
    if len(new) >= len(old) and all(map(operator.is_, old, new)):
        return len(old)
    for i, (left, right) in enumerate(zip(old, new, strict=False)):
        if left is right:
            continue
        if type(left) is not type(right) or type(left) not in _COMPARABLE or left != right:
            return i
    return min(len(old), len(new))


def _unedited(known: KnownList, items: list[Any], common: int, dumps: Dumps) -> int:
    """Count how many of the common elements have kept their bytes, as far as `TAIL` reaches."""
    begin = len(known.items) - len(known.tail)
    for i in range(begin, common):
        before = known.tail[i - begin]
        if before is not None and dumps(items[i]) != before:
            return i
    return common


def _is_unchanged(known: KnownList, dumps: Dumps) -> bool:
    hasher = new_hasher()
    hash_block(hasher, dumps(known.items), len(known.items))
    return bool(hasher.digest() == known.hasher.digest())


def _next_tail(
    known: KnownList, items: list[Any], kept: int, block: bytes, dumps: Dumps
) -> list[bytes | None]:
    added = len(items) - kept
    if added == 1 and kept == len(known.items):
        last = None if isinstance(items[-1], _IMMUTABLE) else block[1:]
        return [*known.tail[-(TAIL - 1) :], last]
    if added == 0 and kept == len(known.items):
        return known.tail
    return _tail(items, len(items), dumps)


def _tail(items: list[Any], end: int, dumps: Dumps) -> list[bytes | None]:
    return [
        None if isinstance(item, _IMMUTABLE) else dumps(item)
        for item in items[max(0, end - TAIL) : end]
    ]


def _header_size(count: int) -> int:
    """Return how many bytes MessagePack puts before the elements of a list."""
    if count < 16:  # noqa: PLR2004 -- the three forms of an array in MessagePack
        return 1
    return 3 if count < 65536 else 5  # noqa: PLR2004


def _header(count: int) -> bytes:
    if count < 16:  # noqa: PLR2004
        return bytes((0x90 | count,))
    if count < 65536:  # noqa: PLR2004
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")
