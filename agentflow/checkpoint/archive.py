"""Whole threads in an object store: archived, and restored to any database.

An archive is a number of parts and a manifest, which is put last: without it there is no archive.
A part has rows as they are stored, sealed for their thread, or the value of one object. It is
sealed as a whole, in the context of tenant, thread, archive and number, and its digest is in the
manifest. What was sealed by a key needs that key when it is restored.

Parts are read while the thread may go on; if it has, the archive is begun again. Rows are deleted
only behind the manifest, and only if the thread still is what was archived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple

import ormsgpack

from agentflow.checkpoint.fencing import fence, lock
from agentflow.checkpoint.offload import note, open_value, seal_value
from agentflow.checkpoint.pruning import check_leases, delete
from agentflow.checkpoint.records import Place
from agentflow.checkpoint.rows import (
    AnchorRow,
    CheckpointRow,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.checkpoint.steps import Change, Read, Steps
from agentflow.codec import Codec, context_of, digest_of, is_apart
from agentflow.database.writer import Rejected
from agentflow.errors import (
    ConflictError,
    HashMismatchError,
    MissingBlobError,
    NotFoundError,
    StoreError,
    UnknownVersionError,
)
from agentflow.failpoints import failpoint
from agentflow.objects import ObjectStore
from agentflow.types import Lease, new_id

VERSION = 1
_FIRST_PAGE, _MAX_PAGE, _PART_BYTES = 20, 1000, 4_000_000
_ATTEMPTS = 3
_LISTED = 1000
_MANIFEST: Final = "manifest"
_KINDS: tuple[type[Any], ...] = (AnchorRow, CheckpointRow, WritesRow, ValueRow)
_OBJECT = len(_KINDS)
"""What a part holds: rows of a kind by its number, or else one value that was in an object."""
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    """A thread in an archive."""

    thread_id: str
    archive_id: str
    checkpoints: int
    parts: int
    """Objects, beside the manifest."""
    size: int
    """Bytes of them."""


class _Manifest(NamedTuple):
    seq: int
    """The newest number given in the thread."""
    checkpoints: int
    size: int
    digests: list[bytes]
    """Of the parts, as they are stored."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an archive is."""

    codec: Codec
    store: ObjectStore
    thread: ThreadKey
    archive_id: str

    @property
    def folder(self) -> str:
        return f"{folder_of(self.thread)}/{self.archive_id}"

    def name(self, number: int) -> str:
        return f"{self.folder}/{number:08}"

    def context(self, part: int | None) -> bytes:
        return context_of("archive", *self.thread, self.archive_id, part)

    def where(self, what: str) -> str:
        return Place(*self.thread, "").of(f"{what} of the archive {self.archive_id!r}")

    def read_manifest(self) -> _Manifest:
        """Get, verify and open the manifest.

        Raises:
            NotFoundError: There is no such archive.
            UnknownVersionError: A newer program made it.
            HashMismatchError: It is not what was stored for this thread.
        """
        data = self.store.get(f"{self.folder}/{_MANIFEST}")
        if data is None:
            raise NotFoundError("archive", f"{self.thread[1]}/{self.archive_id}")
        where = self.where("the manifest")
        body = self.codec.unseal(data, self.context(None), where=where)
        try:
            version, *facts = ormsgpack.unpackb(body)
            if version > VERSION:
                raise UnknownVersionError(version, VERSION, where)
            return _Manifest(*facts)
        except _MALFORMED as exc:
            raise HashMismatchError(where, "it is no manifest") from exc

    def read_part(self, manifest: _Manifest, number: int) -> tuple[int, list[Any]]:
        """Get, verify and open a part; return its kind and what it has."""
        where, name = self.where(f"part {number}"), self.name(number)
        data = self.store.get(name)
        if data is None:
            raise MissingBlobError(where, f"the object {name} is not in {self.store.url}")
        if digest_of(data) != manifest.digests[number]:
            raise HashMismatchError(where)
        body = self.codec.unseal(data, self.context(number), where=where)
        try:
            kind, held = ormsgpack.unpackb(body)
            made = [_KINDS[kind](0, *each) for each in held] if kind < _OBJECT else held
        except _MALFORMED as exc:
            raise HashMismatchError(where, "it has no rows") from exc
        return kind, made


@dataclass(slots=True)
class _Export:
    """An archive that is being made."""

    place: _Place
    state: ThreadState
    digests: list[bytes] = field(default_factory=list)
    size: int = 0
    checkpoints: int = 0

    def page(self, kind: int, last: Any, limit: int, rows: Rows) -> tuple[Any, int]:
        """Put the next rows of a kind; return the last of them and how many may come next."""
        between = (self.state.number - 1, self.state.number)
        page: list[Any] = rows.sweep(between, _KINDS[kind], last, limit)
        apart: list[Any] = []
        plain: list[Any] = []
        for row in page:
            (apart if _KINDS[kind] is ValueRow and is_apart(row.data) else plain).append(row)
        for some in _parts(plain):
            self._put(kind, [row[1:] for row in some])
        codec, place = self.place.codec, Place(*self.place.thread, "")
        for row in apart:
            body = open_value(codec, place, row, place.of("a value"))
            self._put(_OBJECT, [row.series, row.start, body])
        if _KINDS[kind] is CheckpointRow:
            self.checkpoints += len(page)
        if len(page) < limit:
            return None, 0
        size = sum(map(_size_of, page))
        return page[-1], max(1, min(2 * limit, _MAX_PAGE, limit * _PART_BYTES // max(1, size)))

    def _put(self, kind: int, held: list[Any]) -> None:
        number, place = len(self.digests), self.place
        data = place.codec.seal(ormsgpack.packb([kind, held]), place.context(number))
        place.store.put(place.name(number), data)
        self.digests.append(digest_of(data))
        self.size += len(data)

    def finish(self, rows: Rows) -> bool:
        """Put the manifest, unless the thread has changed since; say whether it is there."""
        found = rows.find_checkpoint((*self.place.thread, ""), None)
        before = (self.state.number, *self.state.version)
        if found is None or (found.thread.number, *found.thread.version) != before:
            return False
        body = [VERSION, self.state.seq, self.checkpoints, self.size, self.digests]
        place = self.place
        sealed = place.codec.seal(ormsgpack.packb(body), place.context(None))
        place.store.put(f"{place.folder}/{_MANIFEST}", sealed)
        return True

    def discard(self, _: Rows) -> None:
        """Remove what was put."""
        for number in range(len(self.digests)):
            self.place.store.remove(self.place.name(number))


def _parts(rows: Sequence[Any]) -> Iterator[list[Any]]:
    """Divide rows, which may be large before anybody knows, among parts."""
    part: list[Any] = []
    size = 0
    for row in rows:
        if part and size + _size_of(row) > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(row)
        size += _size_of(row)
    if part:
        yield part


def _size_of(row: Any) -> int:
    return sum(len(each) for each in row if isinstance(each, bytes))


def folder_of(thread: ThreadKey) -> str:
    """Return the folder of a thread's archives; ids may be long, and have any characters."""
    return f"archives/{digest_of(context_of(*thread)).hex()}"


def archive(
    codec: Codec,
    thread: ThreadKey,
    store: ObjectStore,
    lease: Lease | None,
    *,
    keep: bool,
    version: tuple[int, bool, int] | None = None,
    on_deleted: Callable[[], None] | None = None,
) -> Steps[Archived]:
    """Put a thread into an archive, and then delete it unless it is to be kept.

    Args:
        codec: How it is stored.
        thread: The thread.
        store: Where archives are.
        lease: Under which it is deleted.
        keep: Whether to let it be.
        version: What its state must still have.
        on_deleted: Called once it is gone.
    """
    if not keep:
        yield from check_leases([thread], lease)
    for _ in range(_ATTEMPTS):
        state: ThreadState = yield Read(partial(_begin, thread))
        if version is not None and state.version != version:
            break
        export = _Export(_Place(codec, store, thread, new_id()), state)
        for kind in range(len(_KINDS)):
            last, limit = None, _FIRST_PAGE
            while limit:
                last, limit = yield Read(partial(export.page, kind, last, limit))
        if (yield Read(export.finish)):
            failpoint("checkpoint.archived")
            if not keep:
                yield from _delete(thread, state, lease, on_deleted)
            return _archived(export.place, export)
        yield Read(export.discard)
    raise ConflictError(
        f"thread {thread[1]!r} is being written; archive it when nothing runs, nothing was deleted"
    )


def restore(
    codec: Codec,
    thread: ThreadKey,
    store: ObjectStore,
    lease: Lease | None,
    archive_id: str | None,
) -> Steps[Archived]:
    """Make a thread from an archive, by default the newest; all of it is verified before."""
    found = archive_id or (yield Read(lambda _: _newest(store, thread)))
    place = _Place(codec, store, thread, found)
    manifest: _Manifest = yield Read(lambda _: place.read_manifest())
    yield Change(partial(_refuse, thread, lease), thread)
    if codec.tier is not None:
        yield Change(lambda rows: rows.find_space(make=True))
    for number in range(len(manifest.digests)):
        yield Read(partial(_prepare, place, manifest, number))
    calls: Iterator[int] = count()
    made: list[ThreadState] = []

    def insert(rows: Rows) -> Rejected | None:
        return _insert(place, manifest, lease, made, rows, is_again=next(calls) > 0)

    yield Change(insert, thread)
    return _archived(place, manifest)


def _archived(place: _Place, facts: _Export | _Manifest) -> Archived:
    return Archived(
        thread_id=place.thread[1],
        archive_id=place.archive_id,
        checkpoints=facts.checkpoints,
        parts=len(facts.digests),
        size=facts.size,
    )


def _begin(thread: ThreadKey, rows: Rows) -> ThreadState:
    found = rows.find_checkpoint((*thread, ""), None)
    if found is None or not _is_there(rows, found.thread):
        raise NotFoundError("thread", thread[1])
    return found.thread


def _is_there(rows: Rows, state: ThreadState) -> bool:
    kinds: tuple[type[Any], ...] = (CheckpointRow, WritesRow, ValueRow)
    return any(rows.scan(state, kind, None) for kind in kinds)


def _delete(
    thread: ThreadKey,
    archived: ThreadState,
    lease: Lease | None,
    on_deleted: Callable[[], None] | None,
) -> Steps[None]:
    def guard(_: Rows, state: ThreadState) -> bool:
        return (state.number, *state.version) == (archived.number, *archived.version)

    if (yield from delete(thread, lease, on_deleted, guard)):
        return
    # It has gone on; or it is gone, and the reply to that commit was lost.
    found = yield Read(lambda rows: rows.find_checkpoint((*thread, ""), None))
    if found is not None and (yield Read(lambda rows: _is_there(rows, found.thread))):
        raise ConflictError(
            f"thread {thread[1]!r} went on after it was archived, and was not deleted; "
            "archive it again when nothing runs"
        )


def _newest(store: ObjectStore, thread: ThreadKey) -> str:
    """Return the id of a thread's newest archive."""
    folder, after, newest = folder_of(thread), "", ""
    while page := store.list(folder, after, _LISTED):
        after = page[-1].name
        for each in page:
            archive_id, _, last = each.name.removeprefix(f"{folder}/").partition("/")
            if last == _MANIFEST:
                newest = max(newest, archive_id)
        if len(page) < _LISTED:
            break
    if not newest:
        raise NotFoundError("archive", thread[1])
    return newest


def _refuse(thread: ThreadKey, lease: Lease | None, rows: Rows) -> Rejected | None:
    """Find out before the work is done whether a thread may be made."""
    state = lock(rows, thread)
    refused: StoreError | None = fence(thread[1], lease, state)
    if refused is None and _is_there(rows, state):
        refused = ConflictError(
            f"thread {thread[1]!r} is there already; nothing was restored: delete it first"
        )
    return None if refused is None else Rejected(refused)


def _prepare(place: _Place, manifest: _Manifest, number: int, rows: Rows) -> None:
    """Verify a part, and put its value where objects are."""
    kind, held = place.read_part(manifest, number)
    if kind == _OBJECT and place.codec.tier is not None:
        _sealed(place, held, rows)


def _sealed(place: _Place, held: Sequence[Any], rows: Rows) -> tuple[Any, ValueRow]:
    series, start, body = held
    sealed = seal_value(place.codec, rows, Place(*place.thread, ""), series, start, body)
    return sealed, ValueRow(0, series, start, sealed.data)


def _insert(
    place: _Place,
    manifest: _Manifest,
    lease: Lease | None,
    made: list[ThreadState],
    rows: Rows,
    *,
    is_again: bool,
) -> Rejected | None:
    """Insert all rows of a thread, in one transaction and part by part."""
    state = lock(rows, place.thread)
    if is_again and made and state == made[-1]:
        return None  # the reply to the commit was lost
    refused = _refuse(place.thread, lease, rows)
    if refused is not None:
        return refused
    after = replace(state, seq=max(state.seq + 1, manifest.seq))
    rows.apply([ThreadChange(state, after)])
    for number in range(len(manifest.digests)):
        change = ThreadChange(after, after)
        kind, held = place.read_part(manifest, number)
        if kind == _OBJECT:
            sealed, value = _sealed(place, held, rows)
            row = value._replace(thread=state.number)
            change.values.append(row)
            note(change, sealed, row, place.codec.tier)
        else:
            _of_kind(change, kind).extend(each._replace(thread=state.number) for each in held)
        rows.apply([change])
    made.append(after)
    return None


def _of_kind(change: ThreadChange, kind: int) -> list[Any]:
    lists: tuple[list[Any], ...] = (
        change.anchors,
        change.checkpoints,
        change.writes,
        change.values,
    )
    return lists[kind]
