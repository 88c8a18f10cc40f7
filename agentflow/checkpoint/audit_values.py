"""Verification of values: what is kept of them, against what checkpoints and writes want.

A value is a series of stretches; a list may begin in one series and go on in another. Each stretch
is read once, however many checkpoints share it, and what is kept meanwhile are hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import ormsgpack

from agentflow.checkpoint.layout import WHOLE
from agentflow.checkpoint.records import Call, references
from agentflow.checkpoint.rows import ValueRow
from agentflow.codec import digest_of
from agentflow.delta import Hasher, count_block, hash_block, is_list, new_hasher
from agentflow.errors import CodecError, HashMismatchError, MissingBlobError

MALFORMED = (TypeError, ValueError, LookupError, AttributeError)
"""What comes of bytes that were sealed by something else than this program."""

Prefix = tuple[tuple[int, int], ...]
"""The parts of a list before its last one, as series and length."""


class Referrer(NamedTuple):
    """A channel of a checkpoint, or its writes if no channel is named."""

    ns: str = ""
    checkpoint_id: str = ""
    channel: str = ""


class ValuesAudit:
    """Verifies the values of one thread: what is wanted of them first, then they themselves."""

    def __init__(
        self,
        opened: Callable[[ValueRow], bytes],
        report: Callable[[CodecError, int, Referrer | None], None],
    ) -> None:
        """Open stretches by `opened`; `report` damage by the series, and one who needs it."""
        self.opened = opened
        self.report = report
        self._series: dict[int, _Series] = {}
        self._states: dict[Prefix, Hasher] = {}
        """Of lists that go on in another series."""
        self._reading: _Reading | None = None

    def want(self, stored: Sequence[Any], referrer: Referrer) -> None:
        """Note what a checkpoint wants of values, by digest and parts."""
        digest, *numbers = stored
        parts = list(zip(numbers[::3], numbers[1::3], strict=True))
        series = self._series.get(parts[0][0])
        if parts[0][1] == WHOLE:
            if series is None:
                series = self._series[parts[0][0]] = _Series()
            series.wholes.setdefault(digest, referrer)
            return
        prefix: Prefix = ()
        for number, length in parts:
            if number not in self._series:
                self._series[number] = _Series()
            lists = self._series[number].lists.setdefault(prefix, {})
            wanted = lists.get(length)
            if wanted is None:
                wanted = lists[length] = _Wanted(referrer)
            prefix = (*prefix, (number, length))
            if len(prefix) == len(parts):
                wanted.digests.setdefault(digest, referrer)
            else:
                wanted.goes_on = True

    def share(self, calls: Sequence[Call], referrer: Referrer) -> None:
        """Note what writes have in common with values."""
        for number, start, length in references(calls):
            if number not in self._series:
                self._series[number] = _Series()
            self._series[number].shared.setdefault((start, length), referrer)

    def add(self, row: ValueRow) -> None:
        """Verify the next stretch, and compare digests as far as it reaches."""
        reading = self._reading
        if reading is None or reading.number != row.series:
            if reading is not None:
                reading.end()
            wanted = self._series.pop(row.series, None) or _Series()
            reading = self._reading = _Reading(self, row.series, wanted)
        reading.add(row)

    def end(self) -> None:
        """Report the series of which there is nothing."""
        if self._reading is not None:
            self._reading.end()
        for number in sorted(self._series):
            _Reading(self, number, self._series[number]).end()
        self._series = {}

    def resumed(self, prefix: Prefix) -> Hasher | None:
        """Return the hash of the parts before a series; `None` if they are damaged."""
        if not prefix:
            return new_hasher()
        state = self._states.get(prefix)
        return state.copy() if state is not None else None

    def suspend(self, prefix: Prefix, hasher: Hasher) -> None:
        """Keep the hash of a list that goes on in another series."""
        self._states[prefix] = hasher.copy()


class _Series:
    """What checkpoints and writes want of one series of values."""

    __slots__ = ("lists", "shared", "wholes")

    def __init__(self) -> None:
        self.wholes: dict[bytes, Referrer] = {}
        """Digests of it as one value."""
        self.lists: dict[Prefix, dict[int, _Wanted]] = {}
        """By what comes before it in a list, and by how much of it belongs to the list."""
        self.shared: dict[tuple[int, int], Referrer] = {}
        """What writes have in common with it, as start and length."""


class _Wanted:
    """A list that ends here, or goes on in another series."""

    __slots__ = ("digests", "goes_on", "referrer")

    def __init__(self, referrer: Referrer) -> None:
        self.referrer = referrer
        self.digests: dict[bytes, Referrer] = {}
        self.goes_on = False


class _Reading:
    """One series of values, stretch by stretch."""

    def __init__(self, audit: ValuesAudit, number: int, wanted: _Series) -> None:
        self.number = number
        self._audit = audit
        self._wholes = wanted.wholes
        self._shared = sorted(wanted.shared.items(), reverse=True)
        self._lists = [_List(audit, number, *each) for each in wanted.lists.items()]
        ends = (start + length for (start, length), _ in self._shared)
        self._end = max((*(each.end for each in self._lists), *ends)) if self._lists else 0
        self._position = 0
        self._is_damaged = False
        self._is_empty = True

    def add(self, row: ValueRow) -> None:
        """Go on with the next stretch."""
        try:
            block = self._audit.opened(row)
            is_first, self._is_empty = self._is_empty, False
            if is_first and self._wholes:
                if row.start:
                    raise MissingBlobError
                self._compare(block)
            if self._lists or self._shared:
                self._go_on(row, block)
        except CodecError as error:
            self._fail(error, row.start)
        except MALFORMED:
            self._fail(HashMismatchError("", "it cannot be read"), row.start)

    def _go_on(self, row: ValueRow, block: bytes) -> None:
        if self._is_damaged:
            return
        count = count_block(block) if is_list(block) else WHOLE
        if not self._lists:
            self._count(row.start, count)
            return
        if row.start != self._position or self._position >= self._end:
            if self._position < self._end:
                raise MissingBlobError
            return
        if count == WHOLE:
            raise HashMismatchError("", "it is not a list")
        cuts = sorted({cut for each in self._lists for cut in each.within(row.start, count)})
        for part, length in _pieces(block, count, [cut - row.start for cut in cuts]):
            self._position += length
            for each in self._lists:
                each.update(part, length, self._position)
        self._count(row.start, count)

    def _count(self, start: int, count: int) -> None:
        """Check off what writes share with a stretch."""
        while self._shared:
            (begin, length), referrer = self._shared[-1]
            if begin < start:
                self._miss(referrer)
            elif length == WHOLE and begin == start:
                pass
            elif count == WHOLE or begin >= start + count:
                return
            elif length == WHOLE or begin + length > start + count:
                self._miss(referrer)
            self._shared.pop()

    def _compare(self, block: bytes) -> None:
        digest = digest_of(block)
        for wanted, referrer in self._wholes.items():
            if wanted != digest:
                self._audit.report(HashMismatchError(), self.number, referrer)

    def end(self) -> None:
        """Report what is wanted of this series beyond its end."""
        if self._is_damaged:
            return
        if self._is_empty:
            for referrer in self._wholes.values():
                self._miss(referrer)
        if self._position < self._end:
            self._miss(self._referrer(self._position))
        for _, referrer in self._shared:
            self._miss(referrer)

    def _miss(self, referrer: Referrer | None) -> None:
        self._audit.report(MissingBlobError(), self.number, referrer)

    def _fail(self, error: CodecError, start: int) -> None:
        """Report a stretch; no digest can be told from here on."""
        self._audit.report(error, self.number, self._referrer(start))
        self._is_damaged, self._is_empty = True, False

    def _referrer(self, start: int) -> Referrer | None:
        """Find one of those who need what begins here."""
        for each in self._lists:
            referrer = each.referrer(start)
            if referrer is not None:
                return referrer
        shared = (referrer for _, referrer in self._shared)
        return next(chain(self._wholes.values(), shared), None)


class _List:
    """The lists of one beginning that end in a series, or go on from it."""

    def __init__(
        self, audit: ValuesAudit, number: int, prefix: Prefix, wanted: dict[int, _Wanted]
    ) -> None:
        self._audit = audit
        self._number = number
        self._prefix = prefix
        self._wanted = wanted
        self._hasher = audit.resumed(prefix)
        self._lengths = sorted(wanted, reverse=True)
        self.end = self._lengths[0]

    def within(self, start: int, count: int) -> Iterator[int]:
        """Yield where lists end within a stretch."""
        if self._hasher is None:
            return
        for length in reversed(self._lengths):
            if length >= start + count:
                return
            yield length

    def update(self, block: bytes, count: int, position: int) -> None:
        """Go on with elements that end at a position, and compare what ends there as well."""
        if self._hasher is None or not self._lengths:
            return
        hash_block(self._hasher, block, count)
        if self._lengths[-1] != position:
            return
        wanted = self._wanted[self._lengths.pop()]
        if wanted.goes_on:
            self._audit.suspend((*self._prefix, (self._number, position)), self._hasher)
        if wanted.digests:
            digest = self._hasher.digest()
            for expected, referrer in wanted.digests.items():
                if expected != digest:
                    self._audit.report(HashMismatchError(), self._number, referrer)

    def referrer(self, start: int) -> Referrer | None:
        """Find one of those who need what begins at a position."""
        for length in reversed(self._lengths):
            if length > start:
                return self._wanted[length].referrer
        return None


def _pieces(block: bytes, count: int, cuts: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """Cut a serialized list; each piece comes with its length."""
    if not cuts:
        yield block, count
        return
    elements = ormsgpack.unpackb(block, ext_hook=ormsgpack.Ext)
    begin = 0
    for end in (*cuts, count):
        yield ormsgpack.packb(elements[begin:end]), end - begin
        begin = end
