"""Values that are too large for rows, as objects that rows refer to.

What is offloaded is the sealed value: compressed, and encrypted if anything is. Its name is made
of its content, by a keyed hash that covers the tenant (a plain one without keys), so that what a
tenant stores twice is there once. The row has a reference in the place of the value, sealed for the
row's own place: the name of the object, the digest of the serialized value, and its length. So an
object that was exchanged for another one is not what the row names, even if it opens.

An object is durable before the row that refers to it is sent. `collection` removes those that no
row refers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import ormsgpack

from agentflow.checkpoint.records import Place
from agentflow.checkpoint.rows import ObjectRow, Rows, ThreadChange, ValueRow
from agentflow.codec import Codec, Compressed, context_of, digest_of, is_apart
from agentflow.errors import HashMismatchError, MissingBlobError, StoreUnavailableError
from agentflow.failpoints import failpoint
from agentflow.objects import ObjectTier

_NAME = re.compile(r"[0-9a-f-]{1,64}/[0-9a-f]{2}/([0-9a-f]{64})")


class Sealed(NamedTuple):
    """A value as its row has it."""

    data: bytes
    object: str = ""
    """The name of the object that the row refers to, if it is not in the row itself."""


class Reference(NamedTuple):
    """What stands in the place of a value."""

    name: str
    digest: bytes
    length: int


def seal_value(
    codec: Codec, rows: Rows, place: Place, series: int, start: int, body: bytes
) -> Sealed:
    """Seal a stretch of a value for its row, and put it into an object if it is too large.

    Raises:
        ObjectStoreError: The object could not be stored.
    """
    context = place.context_of_value(series, start)
    tier = codec.tier
    if tier is None or len(body) <= tier.offload_from:
        return Sealed(codec.seal(body, context))
    stored = _store(codec, tier, rows, place.tenant, body)
    if isinstance(stored, Reference):
        return Sealed(codec.seal_reference(ormsgpack.packb(tuple(stored)), context), stored.name)
    return Sealed(codec.envelope(stored, context))


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
    return _fetch(codec, place.tenant, read_reference(codec, place, row, where), where)


def read_reference(codec: Codec, place: Place, row: ValueRow, where: str) -> Reference:
    """Verify and open what a row has in the place of a value."""
    context = place.context_of_value(row.series, row.start)
    body = codec.unseal_reference(row.data, context, where=where)
    try:
        reference = Reference(*ormsgpack.unpackb(body))
        is_known = _NAME.fullmatch(reference.name) is not None
    except (TypeError, ValueError):
        is_known = False
    if not is_known:
        raise HashMismatchError(where, "it names no object")
    return reference


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
    if tier is None or not _is_named(codec, after.tenant, reference) or not tier.store.touch(name):
        body = _fetch(codec, before.tenant, reference, where)
        return seal_value(codec, rows, after, row.series, row.start, body)
    return Sealed(codec.seal_reference(ormsgpack.packb(tuple(reference)), new), name)


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


def _store(
    codec: Codec, tier: ObjectTier, rows: Rows, tenant: str, body: bytes
) -> Reference | Compressed:
    """Store an object, unless it is there or small enough for a row."""
    digest = digest_of(body)
    reference = Reference(_name(codec, _space(tier, rows), tenant, digest), digest, len(body))
    if not tier.store.touch(reference.name):
        compressed = codec.compress(body)
        if len(compressed.stored) <= tier.offload_from:
            return compressed
        context = _context(tenant, reference.name)
        tier.store.put(reference.name, codec.envelope(compressed, context))
    failpoint("objects.stored")
    return reference


def _fetch(codec: Codec, tenant: str, reference: Reference, where: str) -> bytes:
    name = reference.name
    if codec.tier is None:
        reason = "it is in an object store, and none was given (offload=, AGENTFLOW_OFFLOAD)"
        raise MissingBlobError(where, reason)
    data = codec.tier.store.get(name)
    if data is None:
        reason = f"the object {name} is not in {codec.tier.store.url}"
        raise MissingBlobError(where, reason)
    body = codec.unseal(data, _context(tenant, name), where=where)
    if len(body) != reference.length or digest_of(body) != reference.digest:
        raise HashMismatchError(where, f"the object {name} is not the one that was stored")
    return body


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


def _name(codec: Codec, space: str, tenant: str, digest: bytes) -> str:
    content = codec.hash(context_of("content", tenant, digest)).hex()
    return f"{space}/{content[:2]}/{content}"


def _is_named(codec: Codec, tenant: str, reference: Reference) -> bool:
    """Whether an object would have the same name now; with another key it would not."""
    space = reference.name.partition("/")[0]
    return reference.name == _name(codec, space, tenant, reference.digest)


def _context(tenant: str, name: str) -> bytes:
    """Return where an object belongs; stores and databases may be moved."""
    return context_of("object", tenant, name.rpartition("/")[2])
