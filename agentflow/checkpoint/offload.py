"""Values of checkpoints that are too large for rows, as objects that rows refer to.

See `agentflow.apart`. `collection` removes objects that no row refers to.
"""

from __future__ import annotations

from collections.abc import Iterable

from agentflow.apart import (
    Reference,
    Sealed,
    fetch_apart,
    is_large,
    is_named,
    put_apart,
    seal_reference,
)
from agentflow.apart import read_reference as read_apart
from agentflow.checkpoint.records import Place
from agentflow.checkpoint.rows import ObjectRow, Rows, ThreadChange, ValueRow
from agentflow.codec import Codec, is_apart
from agentflow.errors import StoreUnavailableError
from agentflow.objects import ObjectTier


def seal_value(
    codec: Codec, rows: Rows, place: Place, series: int, start: int, body: bytes
) -> Sealed:
    """Seal a stretch of a value for its row, and put it into an object if it is too large.

    Raises:
        ObjectStoreError: The object could not be stored.
    """
    context = place.context_of_value(series, start)
    tier = codec.tier
    if tier is None or not is_large(codec, body):
        return Sealed(codec.seal(body, context))
    return put_apart(codec, tier, _space(tier, rows), place.tenant, body, context)


def open_value(codec: Codec, place: Place, row: ValueRow, where: str) -> bytes:
    """Verify and open a stretch of a value, wherever it is.

    Raises:
        HashMismatchError: It is not what was stored.
        MissingBlobError: Its object is not there.
        ObjectStoreError: The object store could not be read.
    """
    context = place.context_of_value(row.series, row.start)
    if not is_apart(row.data):
        return codec.unseal(row.data, context, where=where)
    return fetch_apart(codec, place.tenant, read_reference(codec, place, row, where), where)


def read_reference(codec: Codec, place: Place, row: ValueRow, where: str) -> Reference:
    """Verify and open what a row has in the place of a value."""
    return read_apart(codec, row.data, place.context_of_value(row.series, row.start), where)


def reseal_value(
    codec: Codec, rows: Rows, before: Place, after: Place, row: ValueRow, where: str
) -> Sealed:
    """Seal a stretch of a value by the current key, for a place that may be another one.

    An object that is sealed as it would be now is referred to once more.
    """
    old = before.context_of_value(row.series, row.start)
    new = after.context_of_value(row.series, row.start)
    if not is_apart(row.data):
        return Sealed(codec.seal(codec.unseal(row.data, old, where=where), new))
    reference = read_reference(codec, before, row, where)
    tier = codec.tier
    name = reference.name
    if tier is None or not is_named(codec, after.tenant, reference) or not tier.store.touch(name):
        body = fetch_apart(codec, before.tenant, reference, where)
        return seal_value(codec, rows, after, row.series, row.start, body)
    return Sealed(seal_reference(codec, reference, new), name)


def note(change: ThreadChange, sealed: Sealed, row: ValueRow, tier: ObjectTier | None) -> None:
    """Have a change store what a row refers to, and commit only while that is there."""
    if sealed.object and tier is not None:
        change.objects.append(ObjectRow(row.thread, row.series, row.start, sealed.object))
        change.confirm = lambda: confirm(tier, (each.object for each in change.objects))


def confirm(tier: ObjectTier, names: Iterable[str]) -> None:
    """See that objects are still there.

    Raises:
        StoreUnavailableError: One was collected between its put and this; the same again stores it.
    """
    for name in names:
        if not tier.store.has(name):
            raise StoreUnavailableError(
                tier.store.url, "an object was collected before its row was stored", "unreachable"
            )


def _space(tier: ObjectTier, rows: Rows) -> str:
    if tier.space is not None:
        return tier.space
    found = rows.find_space(make=True)
    assert found is not None
    space, was_there = found
    if was_there:
        # One that was made just now may be gone again if the transaction fails.
        tier.space = space
    return space
