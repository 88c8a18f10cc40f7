"""The envelope around every stored payload: version, serializer, length and hash.

Layout, big-endian: `version` (1 byte), `flags` (1 byte), `serializer` (1 byte), `key id` (1 byte),
`length` of the body (8 bytes), SHA-256 over those twelve bytes and the body (32 bytes), body. Flags
and key id are zero in version 1; compression and encryption will use them. A value is trusted only
after its length and hash were checked.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from typing import Any, Literal

from agentflow.errors import HashMismatchError, UnknownVersionError
from agentflow.serializer import AllowList, Serializer

VERSION = 1
_HEADER = struct.Struct(">BBBBQ")
_DIGEST_SIZE = 32
_PREFIX = _HEADER.size + _DIGEST_SIZE
_MSGPACK = 1


class Codec:
    """Values to stored bytes and back."""

    def __init__(
        self, *, allow: AllowList = "imported", unknown: Literal["refuse", "plain"] = "refuse"
    ) -> None:
        """Set which classes may be stored and built; see `Serializer`."""
        self._serializer = Serializer(allow=allow, unknown=unknown)

    def with_allowed(self, extra: Collection[type | str]) -> Codec:
        """Return a codec that allows `extra` as well."""
        clone = Codec.__new__(Codec)
        clone._serializer = self._serializer.with_allowed(extra)
        return clone

    def readable_anywhere(self) -> Codec:
        """Return a codec that shows classes not known here as typed plain data."""
        return Codec(allow=self._serializer.allow, unknown="plain")

    def dumps(self, value: Any, *, where: str = "") -> bytes:
        """Encode a value into an envelope.

        Args:
            value: What to store.
            where: The place of the value, for messages: a channel or a column, never content.

        Raises:
            SerializationError: Some part of it could not be loaded back.
        """
        return seal(self._serializer.dumps(value, where=where))

    def loads(self, data: bytes, *, where: str = "") -> Any:
        """Verify an envelope and decode its value.

        Raises:
            HashMismatchError: The bytes are not what was stored.
            UnknownVersionError: A newer program stored it.
            BlockedTypeError: It holds a class that may not be built here.
        """
        return self._serializer.loads(unseal(data, where=where), where=where)


def seal(body: bytes) -> bytes:
    """Put serialized bytes into an envelope."""
    header = _HEADER.pack(VERSION, 0, _MSGPACK, 0, len(body))
    return b"".join((header, _digest(header, body), body))


def unseal(data: bytes, *, where: str = "") -> bytes:
    """Verify an envelope and return the serialized bytes in it."""
    if len(data) < _PREFIX:
        raise HashMismatchError(where, "it is cut short")
    version, flags, serializer, key_id, length = _HEADER.unpack_from(data)
    if version > VERSION:
        raise UnknownVersionError(version, VERSION, where)
    body = data[_PREFIX:]
    if len(body) != length:
        raise HashMismatchError(where, "its length does not match")
    if _digest(data[: _HEADER.size], body) != data[_HEADER.size : _PREFIX]:
        raise HashMismatchError(where)
    if (version, flags, serializer, key_id) != (VERSION, 0, _MSGPACK, 0):
        raise HashMismatchError(where, "its header is not one that version 1 writes")
    return body


def digest(data: bytes) -> str:
    """Return the SHA-256 of stored bytes as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def _digest(header: bytes, body: bytes) -> bytes:
    sha = hashlib.sha256(header)
    sha.update(body)
    return sha.digest()
