"""Sealing checkpoints by the current key, thread by thread.

A checkpoint's hash is keyed too and covers that of its parent, so that a thread is sealed anew as a
whole: in one transaction and under its lock, while others read it as it was. Its number is raised,
which makes every process read it again before it writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from agentflow.checkpoint.base import Saver
from agentflow.checkpoint.copying import Copier, pages
from agentflow.checkpoint.fencing import lock
from agentflow.checkpoint.key_check import check_keys
from agentflow.checkpoint.offload import reseal_value
from agentflow.checkpoint.records import Place
from agentflow.checkpoint.rows import (
    RETIRED,
    AnchorRow,
    AnyRow,
    CheckpointRow,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
    ValueRow,
    WritesRow,
)
from agentflow.checkpoint.sql import open_rows
from agentflow.codec import Codec, is_apart
from agentflow.database.session import Session
from agentflow.failpoints import failpoint

_THREADS_AT_ONCE = 100

_Row = CheckpointRow | AnchorRow | ValueRow | WritesRow


async def rotate_checkpoints(saver: Saver, tell: Callable[[int, int], None]) -> int:
    """Seal by the current key all checkpoints, of all tenants, that are not.

    Args:
        saver: Where they are; its keys open them.
        tell: Called after each thread with the rows that were looked through, and sealed, so far.

    Returns:
        How many rows were sealed.
    """
    # The classes in what is stored need not be known here.
    codec = saver._codec.readable_anywhere()
    await saver._database.read(partial(check_keys, codec))
    seen = sealed = number = 0
    while page := await saver._database.query(partial(_list_threads, number)):
        for thread, state in page:
            number = state.number
            if thread[0] == RETIRED:
                continue  # on its way to be deleted
            rows, is_current = await saver._database.query(partial(_look, codec, state))
            seen += rows
            if not is_current:
                # Objects first, without the lock: they may be large, and are found again below.
                await saver._database.query(partial(_renew_objects, codec, thread, state))
                verb = saver._intake.verb(thread, partial(_rotate, codec, thread))
                sealed += await saver._database.settled(verb)
            tell(seen, sealed)
    return sealed


def _list_threads(after: int, session: Session) -> list[tuple[ThreadKey, ThreadState]]:
    return open_rows(session).list_threads(None, None, after, _THREADS_AT_ONCE)


def _look(codec: Codec, thread: ThreadState, session: Session) -> tuple[int, bool]:
    """Count the rows of a thread, as far as all are sealed by the current key, and say if so."""
    rows = open_rows(session)
    count = 0
    kinds: tuple[Iterator[Sequence[_Row]], ...] = (
        pages(rows, thread, CheckpointRow),
        pages(rows, thread, AnchorRow),
        pages(rows, thread, ValueRow),
        pages(rows, thread, WritesRow),
    )
    for page in chain.from_iterable(kinds):
        count += len(page)
        if not all(_is_current(codec, row) for row in page):
            return count, False
    return count, True


def _is_current(codec: Codec, row: _Row) -> bool:
    payloads = [row.data]
    if isinstance(row, CheckpointRow):
        payloads += [each for each in (row.parent_writes, row.base) if each is not None]
    return all(map(codec.is_current, payloads))


def _renew_objects(codec: Codec, key: ThreadKey, thread: ThreadState, session: Session) -> None:
    """Seal the objects of a thread by the current key, under the names that they get by it."""
    rows, place = open_rows(session), Place(*key, "")
    if codec.tier is None or not rows.has_objects(thread.number):
        return
    for values in pages(rows, thread, ValueRow):
        for row in values:
            if is_apart(row.data) and not codec.is_current(row.data):
                reseal_value(codec, rows, place, place, row, place.of("a value"))
                failpoint("keys.rewritten")


def _rotate(codec: Codec, thread: ThreadKey, rows: Rows) -> int:
    before = lock(rows, thread)
    state = replace(before, seq=before.seq + 1)
    rows.apply([ThreadChange(before, state)])
    copier = Copier(codec, thread, thread, state.number)
    sealed = 0

    def store(made: list[AnyRow]) -> None:
        nonlocal sealed
        rows.rewrite(made)
        sealed += len(made)
        failpoint("keys.rewritten")

    # Anchors and checkpoints as a whole: the hash of each of them is part of the next one.
    for anchors in pages(rows, state, AnchorRow):
        store(list(map(copier.anchor, anchors)))
    for checkpoints in pages(rows, state, CheckpointRow):
        store(list(map(copier.checkpoint, checkpoints)))
    for values in pages(rows, state, ValueRow):
        change = ThreadChange(state, state)
        old = [row for row in values if not codec.is_current(row.data)]
        store([copier.value(rows, row, change) for row in old])
        if change.objects or change.released:
            rows.apply([change])
    for writes in pages(rows, state, WritesRow):
        store([copier.writes(row) for row in writes if not codec.is_current(row.data)])
    return sealed
