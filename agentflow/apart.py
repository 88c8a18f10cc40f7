"""Values that stand apart from their rows, as objects of the object tier.

What is put there is the sealed value: compressed, and encrypted if anything is. Its name is made of
its content, by a keyed hash that covers the tenant (a plain one without keys), so that what a
tenant stores twice is there once. The row has a reference in the place of the value, sealed for the
row's own place: the name of the object, the digest of the serialized value, and its length. So an
object that was exchanged for another one is not what the row names, even if it opens.

An object is durable before the row that refers to it is sent. Those that no row refers to are
collected with the checkpoints.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import ormsgpack

from agentflow.codec import Codec, Compressed, context_of, digest_of
from agentflow.errors import HashMismatchError, MissingBlobError
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


def is_large(codec: Codec, body: bytes) -> bool:
    """Whether a serialized value may have to go to the object tier, if there is one."""
    return codec.tier is not None and len(body) > codec.tier.offload_from


def put_apart(
    codec: Codec, tier: ObjectTier, space: str, tenant: str, body: bytes, context: bytes
) -> Sealed:
    """Put a large value into an object, unless it is there or small enough once compressed.

    Raises:
        ObjectStoreError: The object could not be stored.
    """
    stored = _store(codec, tier, space, tenant, body)
    if isinstance(stored, Reference):
        return Sealed(seal_reference(codec, stored, context), stored.name)
    return Sealed(codec.envelope(stored, context))


def seal_reference(codec: Codec, reference: Reference, context: bytes) -> bytes:
    """Seal a reference for the place of a row."""
    return codec.seal_reference(ormsgpack.packb(tuple(reference)), context)


def read_reference(codec: Codec, data: bytes, context: bytes, where: str) -> Reference:
    """Verify and open what a row has in the place of a value.

    Raises:
        HashMismatchError: It is not what was stored.
    """
    body = codec.unseal_reference(data, context, where=where)
    try:
        reference = Reference(*ormsgpack.unpackb(body))
        is_known = _NAME.fullmatch(reference.name) is not None
    except (TypeError, ValueError):
        is_known = False
    if not is_known:
        raise HashMismatchError(where, "it names no object")
    return reference


def fetch_apart(codec: Codec, tenant: str, reference: Reference, where: str) -> bytes:
    """Return the serialized value that a row refers to.

    Raises:
        MissingBlobError: Its object is not there.
        HashMismatchError: The object is not the one that was stored.
        ObjectStoreError: The object store could not be read.
    """
    name = reference.name
    if codec.tier is None:
        reason = "it is in an object store, and none was given (offload=, AGENTFLOW_OFFLOAD)"
        raise MissingBlobError(where, reason)
    data = codec.tier.store.get(name)
    if data is None:
        reason = f"the object {name} is not in {codec.tier.store.url}"
        raise MissingBlobError(where, reason)
    body = codec.unseal(data, context_of_object(tenant, name), where=where)
    if len(body) != reference.length or digest_of(body) != reference.digest:
        raise HashMismatchError(where, f"the object {name} is not the one that was stored")
    return body


def is_named(codec: Codec, tenant: str, reference: Reference) -> bool:
    """Whether an object would have the same name now; with another key it would not."""
    space = reference.name.partition("/")[0]
    return reference.name == _name(codec, space, tenant, reference.digest)


def context_of_object(tenant: str, name: str) -> bytes:
    """Return where an object belongs; stores and databases may be moved."""
    return context_of("object", tenant, name.rpartition("/")[2])


def _store(
    codec: Codec, tier: ObjectTier, space: str, tenant: str, body: bytes
) -> Reference | Compressed:
    """Store an object, unless it is there or small enough for a row."""
    digest = digest_of(body)
    reference = Reference(_name(codec, space, tenant, digest), digest, len(body))
    if not tier.store.touch(reference.name):
        compressed = codec.compress(body)
        if len(compressed.stored) <= tier.offload_from:
            return compressed
        context = context_of_object(tenant, reference.name)
        tier.store.put(reference.name, codec.envelope(compressed, context))
    failpoint("objects.stored")
    return reference


def _name(codec: Codec, space: str, tenant: str, digest: bytes) -> str:
    content = codec.hash(context_of("content", tenant, digest)).hex()
    return f"{space}/{content[:2]}/{content}"
