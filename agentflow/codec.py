"""The envelope around every stored payload: version, serializer, compression, length and hash.

Layout, big-endian: `version` (1 byte), `flags` (1 byte), `serializer` (1 byte), `key id` (1 byte),
`length` of the serialized bytes (8 bytes), SHA-256 over those twelve bytes and all that follows (32
bytes), then the serialized bytes, compressed with Zstandard where the flag says so. The hash covers
what is stored, since not every bit of a compressed value changes what comes out of it. A value is
trusted, and decompressed, only after its hash was checked. Version 1 had no compression; key ids
are zero in both.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Collection
from typing import Any, Literal

import zstandard

from agentflow.errors import HashMismatchError, UnknownVersionError
from agentflow.serializer import AllowList, Serializer

VERSION = 2
DIGEST_SIZE = 32
COMPRESS_FROM = 512
"""Bytes below which compression saves less than it costs.

It lets other threads run meanwhile, and has to wait for them afterwards.
"""
MAX_EXPANSION = 100_000
"""How many times its stored size a value may have; Zstandard itself reaches no more."""

_HEADER = struct.Struct(">BBBBQ")
_PREFIX = _HEADER.size + DIGEST_SIZE
_MSGPACK = 1
_COMPRESSED = 1
_KNOWN_FLAGS = {1: 0, 2: _COMPRESSED}
_LEVEL, _FAST_LEVEL = 3, 1
_WINDOW = 22
"""How far back repetitions of large values are found, as a power of two.

An input stands beside the writes that are made of it, which often repeat it.
"""
_FAST_FROM = 64 * 1024


class _Zstd(threading.local):
    """Compression contexts, which only one thread at a time may use."""

    def __init__(self) -> None:
        self._careful, self._fast = (
            zstandard.ZstdCompressor(
                compression_params=zstandard.ZstdCompressionParameters.from_level(
                    level, write_content_size=False, write_checksum=False, **options
                )
            )
            for level, options in ((_LEVEL, {}), (_FAST_LEVEL, {"window_log": _WINDOW}))
        )
        self.decompress = zstandard.ZstdDecompressor().decompress

    def compress(self, body: bytes) -> bytes:
        """Compress, large values less thoroughly, since someone waits for it."""
        return (self._fast if len(body) >= _FAST_FROM else self._careful).compress(body)


_zstd = _Zstd()


class Codec:
    """Values to stored bytes and back."""

    def __init__(
        self,
        *,
        allow: AllowList = "imported",
        unknown: Literal["refuse", "plain"] = "refuse",
        compress: bool = True,
    ) -> None:
        """Set which classes may be stored and built (see `Serializer`), and whether to compress."""
        self._serializer = Serializer(allow=allow, unknown=unknown)
        self._compress = compress

    def with_allowed(self, extra: Collection[type | str]) -> Codec:
        """Return a codec that allows `extra` as well."""
        clone = Codec.__new__(Codec)
        clone._serializer = self._serializer.with_allowed(extra)
        clone._compress = self._compress
        return clone

    def readable_anywhere(self) -> Codec:
        """Return a codec that shows classes not known here as typed plain data."""
        return Codec(allow=self._serializer.allow, unknown="plain", compress=self._compress)

    def dumps(self, value: Any, *, where: str = "") -> bytes:
        """Encode a value into an envelope.

        Args:
            value: What to store.
            where: The place of the value, for messages: a channel or a column, never content.

        Raises:
            SerializationError: Some part of it could not be loaded back.
        """
        return self.seal(self._serializer.dumps(value, where=where))

    def loads(self, data: bytes, *, where: str = "") -> Any:
        """Verify an envelope and decode its value.

        Raises:
            HashMismatchError: The bytes are not what was stored.
            UnknownVersionError: A newer program stored it.
            BlockedTypeError: It holds a class that may not be built here.
        """
        return self._serializer.loads(unseal(data, where=where), where=where)

    def serialize(self, value: Any, *, where: str = "") -> bytes:
        """Encode a value without an envelope, as a part of what will be sealed as a whole."""
        return self._serializer.dumps(value, where=where)

    def deserialize(self, data: bytes, *, where: str = "") -> Any:
        """Decode a part of what was in an envelope."""
        return self._serializer.loads(data, where=where)

    def seal(self, body: bytes) -> bytes:
        """Put serialized bytes into an envelope."""
        return seal(body, compress=self._compress)


def seal(body: bytes, *, compress: bool = True) -> bytes:
    """Put serialized bytes into an envelope."""
    flags, stored = 0, body
    if compress and len(body) >= COMPRESS_FROM:
        smaller = _zstd.compress(body)
        if len(smaller) < len(body):
            flags, stored = _COMPRESSED, smaller
    header = _HEADER.pack(VERSION, flags, _MSGPACK, 0, len(body))
    return b"".join((header, _digest(header, stored), stored))


def unseal(data: bytes, *, where: str = "") -> bytes:
    """Verify an envelope and return the serialized bytes in it."""
    if len(data) < _PREFIX:
        raise HashMismatchError(where, "it is cut short")
    version, flags, serializer, key_id, length = _HEADER.unpack_from(data)
    if version > VERSION:
        raise UnknownVersionError(version, VERSION, where)
    if flags & ~_KNOWN_FLAGS.get(version, 0) or (serializer, key_id) != (_MSGPACK, 0):
        raise HashMismatchError(where, f"its header is not one that version {version} writes")
    body = data[_PREFIX:]
    if _digest(data[: _HEADER.size], body) != data[_HEADER.size : _PREFIX]:
        raise HashMismatchError(where)
    if flags & _COMPRESSED:
        body = _decompressed(body, length, where)
    if len(body) != length:
        raise HashMismatchError(where, "its length does not match")
    return body


def digest_of(sealed: bytes) -> bytes:
    """Return the hash in an envelope's header."""
    return sealed[_HEADER.size : _PREFIX]


def _decompressed(stored: bytes, length: int, where: str) -> bytes:
    if length > len(stored) * MAX_EXPANSION:
        raise HashMismatchError(where, "its length does not match")
    try:
        return _zstd.decompress(stored, max_output_size=length)
    except zstandard.ZstdError as exc:
        raise HashMismatchError(where, "it cannot be decompressed") from exc


def _digest(header: bytes, body: bytes) -> bytes:
    sha = hashlib.sha256(header)
    sha.update(body)
    return sha.digest()
