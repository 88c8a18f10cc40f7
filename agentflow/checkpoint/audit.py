"""Verification of everything that is stored: each row, each hash, each chain, each value.

Threads are read in groups, each group on one consistent snapshot and page by page. What is kept of
a thread meanwhile are hashes: of its checkpoints, and of its values as its checkpoints want them.
Each stretch of a value is read once, however many checkpoints share it. Neither values nor metadata
are decoded: what their seals and hashes cover is bytes.

What follows from damage that is reported is not reported again: of a checkpoint that cannot be
opened nothing is compared with its hash, and no digest with a list that has a damaged stretch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Final, Generic

import ormsgpack

from agentflow.checkpoint.audit_values import MALFORMED, Referrer, ValuesAudit
from agentflow.checkpoint.layout import Held
from agentflow.checkpoint.offload import open_value, read_reference
from agentflow.checkpoint.records import Place, cut_chain, hash_of
from agentflow.checkpoint.rows import (
    RETIRED,
    AnchorRow,
    AnyRow,
    CheckpointRow,
    ObjectRow,
    Rows,
    ThreadKey,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.codec import Codec, is_apart
from agentflow.errors import CodecError, HashMismatchError

_GROUP = 500
"""Threads that are verified on one snapshot, at most."""
_GROUP_ROWS = 20_000
"""About as many rows make a group full; a thread with more has a snapshot of its own."""
_FIRST_PAGE, _MAX_PAGE, _PAGE_BYTES = 100, 1000, 8_000_000
_END: Final = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that is not as it was stored."""

    error: str
    """The name of the error that a reader gets."""
    tenant: str
    thread_id: str
    ns: str
    checkpoint_id: str
    """Empty for what belongs to none."""
    channel: str
    """Empty for what belongs to none."""
    message: str


@dataclass(slots=True)
class Counts:
    """How much was verified."""

    threads: int = 0
    checkpoints: int = 0
    values: int = 0
    """Stretches of values that are kept apart from checkpoints."""
    writes: int = 0
    """Rows of the log."""
    anchors: int = 0

    def add(self, other: Counts) -> None:
        """Add what else was verified."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What to verify; `None` does not narrow."""

    tenant: str | None = None
    thread_id: str | None = None

    @property
    def is_everything(self) -> bool:
        """Whether it is the whole database."""
        return self.tenant is None and self.thread_id is None


@dataclass(slots=True)
class Audited:
    """What has come of one group of threads."""

    after: int | None
    """Where the next group begins; `None` after the last one."""
    counts: Counts = field(default_factory=Counts)
    damages: list[Damage] = field(default_factory=list)


Advance = Callable[[int], None]
"""Told of checkpoints as they are verified."""


def audit_group(rows: Rows, codec: Codec, scope: Scope, after: int, advance: Advance) -> Audited:
    """Verify the threads behind a number, as many as fit into one snapshot."""
    found = rows.list_threads(scope.tenant, scope.thread_id, after, _GROUP)
    taken: list[tuple[ThreadKey, ThreadState]] = []
    weight = 0
    for key, state in found:
        if taken and weight + state.seq > _GROUP_ROWS:
            break
        taken.append((key, state))
        weight += state.seq
    is_last = len(taken) == len(found) < _GROUP
    audited = Audited(None if is_last else taken[-1][1].number)
    if scope.is_everything:
        # Also what lies between the threads, and belongs to none.
        end = _END if is_last else taken[-1][1].number
        _audit_range(rows, codec, taken, (after, end), audited, advance)
    else:
        for each in taken:
            number = each[1].number
            _audit_range(rows, codec, [each], (number - 1, number), audited, advance)
    return audited


def _audit_range(
    rows: Rows,
    codec: Codec,
    found: Sequence[tuple[ThreadKey, ThreadState]],
    between: tuple[int, int],
    audited: Audited,
    advance: Advance,
) -> None:
    """Verify threads, and report rows between them."""
    anchors = _Sweep(rows, AnchorRow, between)
    checkpoints = _Sweep(rows, CheckpointRow, between, advance)
    values = _Sweep(rows, ValueRow, between)
    writes = _Sweep(rows, WritesRow, between)
    objects = _Sweep(rows, ObjectRow, between)
    sweeps: tuple[_Sweep[Any], ...] = (anchors, checkpoints, values, writes)
    for key, state in found:
        for sweep in sweeps:
            audited.damages += _strays(sweep, state.number)
        if key[0] == RETIRED:
            # On its way to be deleted, and no longer under the name that it was sealed for.
            for sweep in sweeps:
                deque(sweep.of(state.number), maxlen=0)
            continue
        audit = _ThreadAudit(codec, key, state, audited)
        for anchor in anchors.of(state.number):
            audit.anchor(anchor)
        for checkpoint in checkpoints.of(state.number):
            audit.checkpoint(checkpoint)
        audit.end_chains()
        for row in writes.of(state.number):
            audit.writes(row)
        audit.refer(objects.of(state.number))
        for value in values.of(state.number):
            audit.value(value)
        audit.end_values()
        audit.end()
    for sweep in sweeps:
        audited.damages += _strays(sweep, between[1] + 1)


class _Sweep(Generic[AnyRow]):
    """The rows of one kind of a range of threads, in order, a page at a time."""

    def __init__(
        self,
        rows: Rows,
        kind: type[AnyRow],
        between: tuple[int, int],
        advance: Advance | None = None,
    ) -> None:
        self.kind: type[AnyRow] = kind
        self._rows = rows
        self._between = between
        self._advance = advance
        self._rest: Iterator[AnyRow] = chain.from_iterable(self._pages())
        self._next: AnyRow | None = next(self._rest, None)

    def of(self, number: int) -> Iterator[AnyRow]:
        """Yield what there is up to a thread of this number, and of it."""
        row, rest = self._next, self._rest
        while row is not None and row.thread <= number:
            yield row
            row = next(rest, None)
        self._next = row

    def _pages(self) -> Iterator[list[AnyRow]]:
        limit, last = _FIRST_PAGE, None
        while page := self._rows.sweep(self._between, self.kind, last, limit):
            yield page
            if self._advance is not None:
                self._advance(len(page))
            if len(page) < limit:
                return
            last = page[-1]
            size = sum(len(getattr(row, "data", b"")) for row in page)
            limit = max(1, min(4 * limit, _MAX_PAGE, limit * _PAGE_BYTES // max(1, size)))


def _strays(sweep: _Sweep[Any], number: int) -> Iterator[Damage]:
    """Report the rows of threads below a number; those of known threads were taken before."""
    for row in sweep.of(number - 1):
        error = HashMismatchError(f"a row of {sweep.kind.__name__}", "its thread does not exist")
        yield _damage(error, Place("", "", ""), Referrer(getattr(row, "ns", "")))


def _damage(error: CodecError, place: Place, referrer: Referrer) -> Damage:
    return Damage(
        error=type(error).__name__,
        tenant=place.tenant,
        thread_id=place.thread_id,
        ns=referrer.ns,
        checkpoint_id=referrer.checkpoint_id,
        channel=referrer.channel,
        message=str(error),
    )


class _ThreadAudit:
    """Verifies one thread: its anchors, checkpoints, writes and values, in this order."""

    def __init__(self, codec: Codec, key: ThreadKey, state: ThreadState, audited: Audited) -> None:
        self._codec = codec
        self._key = key
        self._seq = state.seq
        self._number = state.number
        self._newest = 0
        self._objects: set[tuple[int, int, str]] = set()
        self._audited = audited
        self._place = Place(*key, "")
        self._counts = audited.counts
        self._anchors: dict[tuple[str, str], bytes | None] = {}
        self._hashes: dict[str, bytes | None] = {}
        """Of the namespace's checkpoints so far; `None` for what is damaged."""
        self._later: list[tuple[str, str, bytes]] = []
        """Checkpoints whose parents have not come yet: id, parent and its hash."""
        self._before: dict[str, Any] = {}
        """Where the checkpoint before keeps its values."""
        self._values = ValuesAudit(self._opened, self._report_value)
        self._counts.threads += 1

    def anchor(self, row: AnchorRow) -> None:
        """Verify the hash of a deleted checkpoint."""
        self._counts.anchors += 1
        place = self._at(row.ns)
        context = place.context_of_anchor(row.checkpoint_id, row.seq)
        where = place.of(f"the anchor of checkpoint {row.checkpoint_id!r}")
        referrer = Referrer(row.ns, row.checkpoint_id)
        self._anchors[row.ns, row.checkpoint_id] = self._unsealed(
            row.data, context, where, referrer
        )

    def checkpoint(self, row: CheckpointRow) -> None:
        """Verify a checkpoint's row, and note what it wants of its parent and of values."""
        self._counts.checkpoints += 1
        if row.ns != self._place.ns:
            self.end_chains()
            self._at(row.ns)
        self._newest = max(self._newest, row.seq)
        self._hashes[row.checkpoint_id] = None
        try:
            self._open(row)
        except CodecError as error:
            self._report(_placed(error, _named(self._place, row)), _referrer(row))
        except MALFORMED:
            malformed = HashMismatchError(_named(self._place, row), "it is no record")
            self._report(malformed, _referrer(row))
        else:
            self._hashes[row.checkpoint_id] = row.hash
        if row.parent_writes is not None:
            context = self._place.context_of_carried(row.seq, row.checkpoint_id)
            self._calls(row.parent_writes, context, _referrer(row))
        if row.base is not None:
            context = self._place.context_of_base(row.checkpoint_id)
            where = self._place.of(f"the base of checkpoint {row.checkpoint_id!r}")
            self._unsealed(row.base, context, where, _referrer(row))

    def _open(self, row: CheckpointRow) -> None:
        codec, place = self._codec, self._place
        # Named only if it comes to that: to name it takes as long as to hash it.
        body = codec.unseal(row.data, place.context_of_row(row))
        head, channels, calls, parent_hash = _unpacked(codec, body)
        layout = {
            channel: Held("", stored) if isinstance(stored, bytes) else Held("", (), stored[0])
            for channel, stored in channels.items()
        }
        covered = hash_of(codec, place, row, head, layout, parent_hash)
        if codec.hash_like(row.data, covered) != row.hash:
            raise HashMismatchError
        before = self._before
        for channel, stored in channels.items():
            if not isinstance(stored, bytes) and before.get(channel) != stored:
                self._values.want(stored, Referrer(row.ns, row.checkpoint_id, channel))
        self._before = channels
        if calls:
            self._values.share(calls, _referrer(row))
        if row.parent_id is None or parent_hash is None:
            return
        if self._hashes.get(row.parent_id) != parent_hash:
            # Of parallel calls of a subgraph, one may have put the parent again behind it.
            self._later.append((row.checkpoint_id, row.parent_id, parent_hash))

    def _chain(self, checkpoint_id: str, parent_id: str, expected: bytes) -> None:
        """Compare the hash of a parent with the one that its child was stored with."""
        anchor = (self._place.ns, parent_id)
        known: list[bytes | None] = []
        if parent_id in self._hashes:
            known.append(self._hashes[parent_id])
        if anchor in self._anchors:
            known.append(self._anchors[anchor])
        if expected in known or None in known:
            return
        reason = (
            f"the hash of its parent {parent_id!r} is another one than when it was stored"
            if known
            else cut_chain(parent_id)
        )
        where = self._place.of(f"checkpoint {checkpoint_id!r}")
        self._report(HashMismatchError(where, reason), Referrer(self._place.ns, checkpoint_id))

    def end_chains(self) -> None:
        """Compare what is left of a namespace, all of whose checkpoints have come."""
        for link in self._later:
            self._chain(*link)
        self._later, self._hashes, self._before = [], {}, {}

    def _calls(self, sealed: bytes, context: bytes, referrer: Referrer) -> None:
        """Verify writes, and note what they have in common with values."""
        try:
            self._values.share(
                _unpacked(self._codec, self._codec.unseal(sealed, context)), referrer
            )
        except CodecError as error:
            where = self._place.of(f"writes of checkpoint {referrer.checkpoint_id!r}")
            self._report(_placed(error, where), referrer)
        except MALFORMED:
            where = self._place.of(f"writes of checkpoint {referrer.checkpoint_id!r}")
            self._report(HashMismatchError(where, "they are not writes"), referrer)

    def writes(self, row: WritesRow) -> None:
        """Verify a row of the log, and note what it has in common with values."""
        self._counts.writes += 1
        self._newest = max(self._newest, row.seq)
        place = self._at(row.ns)
        context = place.context_of_writes(row.checkpoint_id, row.seq)
        self._calls(row.data, context, Referrer(row.ns, row.checkpoint_id))

    def refer(self, rows: Iterator[ObjectRow]) -> None:
        """Take the references to objects, but for which these would be collected."""
        self._objects = {row[1:] for row in rows if row.thread == self._number}

    def value(self, row: ValueRow) -> None:
        """Verify a stretch, and compare digests as far as it reaches."""
        self._counts.values += 1
        self._newest = max(self._newest, row.series)
        self._values.add(row)

    def end_values(self) -> None:
        """Report the values of which there is nothing."""
        self._values.end()

    def end(self) -> None:
        """Compare the thread's number with those that were given in it."""
        if self._newest > self._seq:
            where = Place(*self._key, "").of("the number")
            error = HashMismatchError(where, f"it is {self._seq}, and {self._newest} is in use")
            self._report(error, Referrer())

    def _opened(self, row: ValueRow) -> bytes:
        """Verify the seal of a stretch, and of the object that it is in."""
        if not is_apart(row.data):
            context = self._place.context_of_value(row.series, row.start)
            return self._codec.unseal(row.data, context)
        name = read_reference(self._codec, self._place, row, "").name
        if (row.series, row.start, name) not in self._objects:
            raise HashMismatchError("", f"nothing keeps the object {name} from being collected")
        return open_value(self._codec, self._place, row, "")

    def _report_value(self, error: CodecError, number: int, referrer: Referrer | None) -> None:
        """Report damage of a value by the channel that has it."""
        if referrer is None:
            where = self._place.of(f"value {number}, to which nothing refers,")
            self._report(_placed(error, where), Referrer())
            return
        place = self._place._replace(ns=referrer.ns)
        what = f"channel {referrer.channel!r}" if referrer.channel else "writes"
        where = place.of(f"{what} of checkpoint {referrer.checkpoint_id!r}")
        self._report(_placed(error, where), referrer)

    def _unsealed(
        self, data: bytes, context: bytes, where: str, referrer: Referrer
    ) -> bytes | None:
        try:
            return self._codec.unseal(data, context, where=where)
        except CodecError as error:
            self._report(error, referrer)
        except MALFORMED:
            self._report(HashMismatchError(where, "it is no envelope"), referrer)
        return None

    def _at(self, ns: str) -> Place:
        if ns != self._place.ns:
            self._place = Place(*self._key, ns)
        return self._place

    def _report(self, error: CodecError, referrer: Referrer) -> None:
        self._audited.damages.append(_damage(error, self._place, referrer))


def _unpacked(codec: Codec, body: bytes) -> Any:
    try:
        return ormsgpack.unpackb(body)
    except ValueError:
        # Names that are not valid Unicode are kept in the serializer's own way.
        return codec.deserialize(body)


def _named(place: Place, row: CheckpointRow) -> str:
    return place.of(f"checkpoint {row.checkpoint_id!r}")


def _referrer(row: CheckpointRow) -> Referrer:
    return Referrer(row.ns, row.checkpoint_id)


def _placed(error: CodecError, where: str) -> CodecError:
    """Say of an error to which value it belongs."""
    error.where = where  # type: ignore[attr-defined]  # all that a codec raises have it
    return error
