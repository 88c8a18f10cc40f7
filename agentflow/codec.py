"""The envelope around every stored payload: version, compression, key, length and hash.

Layout of version 2, big-endian: `version` (1 byte), `flags` (1 byte), `serializer` (1 byte), the
length of the key's name (1 byte), the `length` of the serialized bytes (8 bytes), the key's name.
Without encryption follow SHA-256 over all of this, a *context* and all that comes after (32 bytes),
and the serialized bytes, compressed with Zstandard where the flag says so. With encryption follows
what `keys` makes of the compressed bytes, bound to the same header and context. Where another flag
says so, what is in the envelope is not the value but the name of the object that holds it.

The context says where the value belongs: what is moved to another place does not open there. The
hash covers what is stored, since not every bit of a compressed value changes what comes out of it.
A value is trusted, and decompressed, only after that. Version 1 had neither context, compression
nor encryption.
"""

from __future__ import annotations

import copy
import hashlib
import struct
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

import ormsgpack
import zstandard

from agentflow.errors import (
    CodecError,
    HashMismatchError,
    KeyUnavailableError,
    SerializationError,
    UnencryptedValueError,
    UnknownKeyError,
    UnknownVersionError,
)
from agentflow.keys import Key, KeyRing
from agentflow.objects import ObjectTier
from agentflow.serializer import AllowList, Serializer

VERSION = 2
DIGEST_SIZE = 32
COMPRESS_FROM = 512
"""Bytes below which compression saves less than it costs.

It lets other threads run meanwhile, and has to wait for them afterwards.
"""
MAX_EXPANSION = 100_000
"""How many times its stored size a value may have; Zstandard itself reaches no more."""
MAX_SIZE = 1 << 30
"""Bytes of the largest value; nobody who writes to the database makes a reader allocate more."""

_HEADER = struct.Struct(">BBBBQ")
_MSGPACK = 1
_COMPRESSED, _ENCRYPTED, _APART = 1, 2, 4
_KNOWN_FLAGS = {1: 0, 2: _COMPRESSED | _ENCRYPTED | _APART}
_LEVEL, _FAST_LEVEL = 3, 1
_WINDOW = 22
"""How far back repetitions of large values are found, as a power of two.

An input stands beside the writes that are made of it, which often repeat it.
"""
_FAST_FROM = 64 * 1024
_NOT_SAID = -1
"""What Zstandard says of frames without a length, such as those that are made here."""


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

Redact = Callable[[str, Any], Any]
"""Given a place, such as `runs.input` or `channel:messages`, and a value: what is stored of it."""


class Compressed(NamedTuple):
    """Serialized bytes, ready for an envelope."""

    flags: int
    stored: bytes
    length: int
    """Of what was compressed."""


class Codec:
    """Values to stored bytes and back."""

    def __init__(
        self,
        *,
        allow: AllowList = "imported",
        unknown: Literal["refuse", "plain"] = "refuse",
        compress: bool = True,
        keys: KeyRing | None = None,
        redact: Redact | None = None,
        tier: ObjectTier | None = None,
    ) -> None:
        """Set how values are stored.

        Args:
            allow: Which classes may be stored and built; see `Serializer`.
            unknown: What becomes of other classes when they are read.
            compress: Whether values are compressed.
            keys: With them everything is encrypted.
            redact: Changes values before they are stored; called by those who know their place.
            tier: Takes what is too large for rows; used by those who know how to refer to it.
        """
        self.serializer = Serializer(allow=allow, unknown=unknown)
        self._compress = compress
        self._keys = keys
        self.redact = redact
        self.tier = tier

    @property
    def keys(self) -> KeyRing | None:
        """The keys, if what is stored is encrypted."""
        return self._keys

    def allows(self, name: str) -> bool:
        """Whether a class, as `module:qualname`, may be built from what is stored."""
        return self.serializer.allows(name)

    def with_allowed(self, extra: Collection[type | str]) -> Codec:
        """Return a codec that allows `extra` as well."""
        clone = copy.copy(self)
        clone.serializer = self.serializer.with_allowed(extra)
        return clone

    def readable_anywhere(self) -> Codec:
        """Return a codec that shows classes not known here as typed plain data."""
        clone = copy.copy(self)
        clone.serializer = Serializer(allow=self.serializer.allow, unknown="plain")
        return clone

    def dumps(self, value: Any, *, context: bytes = b"", where: str = "") -> bytes:
        """Encode a value into an envelope.

        Args:
            value: What to store.
            context: Where it belongs; see `context_of`.
            where: The place of the value, for messages: a channel or a column, never content.

        Raises:
            SerializationError: Some part of it could not be loaded back.
        """
        return self.seal(self.serializer.dumps(value, where=where), context)

    def loads(self, data: bytes, *, context: bytes = b"", where: str = "") -> Any:
        """Verify an envelope and decode its value.

        Raises:
            HashMismatchError: The bytes are not what was stored in this context.
            UnknownVersionError: A newer program stored it.
            UnknownKeyError: It is encrypted under a key that is not here.
            UnencryptedValueError: It is not encrypted, and has to be.
            BlockedTypeError: It holds a class that may not be built here.
        """
        return self.serializer.loads(self.unseal(data, context, where=where), where=where)

    def serialize(self, value: Any, *, where: str = "") -> bytes:
        """Encode a value without an envelope, as a part of what will be sealed as a whole."""
        return self.serializer.dumps(value, where=where)

    def deserialize(self, data: bytes, *, where: str = "") -> Any:
        """Decode a part of what was in an envelope."""
        return self.serializer.loads(data, where=where)

    def seal(self, body: bytes, context: bytes = b"") -> bytes:
        """Put serialized bytes into an envelope.

        Raises:
            SerializationError: There are too many of them.
        """
        flags, stored = self._compressed(body)
        return _enveloped(flags, stored, len(body), context, self._current)

    def seal_like(self, sealed: bytes, body: bytes, context: bytes) -> bytes:
        """Put serialized bytes into an envelope under the key of another one, or without, as that.

        What has a keyed hash beside it, which stays, has to stay under that key.
        """
        name = _read_header(sealed, "").key
        key = self._key(name, "") if name else None
        flags, stored = self._compressed(body)
        return _enveloped(flags, stored, len(body), context, key)

    def compress(self, body: bytes) -> Compressed:
        """Do the first half of `seal`, after which it is known how large it will be.

        Raises:
            SerializationError: There are too many bytes.
        """
        return Compressed(*self._compressed(body), len(body))

    def envelope(self, compressed: Compressed, context: bytes) -> bytes:
        """Do the second half of `seal`."""
        return _enveloped(*compressed, context, self._current)

    def seal_reference(self, body: bytes, context: bytes) -> bytes:
        """Put what says where a value is, instead of the value, into an envelope."""
        return _enveloped(_APART, body, len(body), context, self._current)

    def unseal_reference(self, data: bytes, context: bytes, *, where: str = "") -> bytes:
        """Verify an envelope that `is_apart`, and return what is in it."""
        return self._unsealed(data, _read_header(data, where), context, where)

    def unseal(self, data: bytes, context: bytes = b"", *, where: str = "") -> bytes:
        """Verify an envelope and return the serialized bytes in it; see `loads`."""
        header = _read_header(data, where)
        if header.flags & _APART:
            raise HashMismatchError(where, "it says where a value is, and should be one")
        return self._unsealed(data, header, context, where)

    def _compressed(self, body: bytes) -> tuple[int, bytes]:
        if len(body) > MAX_SIZE:
            raise SerializationError("bytes", "", f"it is larger than {MAX_SIZE:,} bytes; split it")
        if self._compress and len(body) >= COMPRESS_FROM:
            smaller = _zstd.compress(body)
            if len(smaller) < len(body):
                return _COMPRESSED, smaller
        return 0, body

    @property
    def _current(self) -> Key | None:
        return None if self._keys is None else self._keys.current

    def _unsealed(self, data: bytes, header: _Header, context: bytes, where: str) -> bytes:
        if not header.flags & _ENCRYPTED:
            if self._keys is not None and not self._keys.accept_plaintext:
                raise UnencryptedValueError(where)
            body = _verified(data, header, context, where)
        else:
            key = self._key(header.key, where)
            sealed = data[header.end :]
            opened = key.open(sealed, data[: header.end] + context)
            if opened is None:
                raise HashMismatchError(where, f"the key {key.name!r} has not sealed it here")
            body = opened
        if header.flags & _COMPRESSED:
            body = _decompressed(body, header.length, where)
        if len(body) != header.length:
            raise HashMismatchError(where, "its length does not match")
        return body

    def hash_like(self, sealed: bytes, data: bytes, *, where: str = "") -> bytes:
        """Hash plaintext as what goes with `sealed`: under its key, if it is encrypted.

        Without the key such a hash does not tell whether a guess at the plaintext is right.
        """
        name = _read_header(sealed, where).key
        return self._key(name, where).digest(data) if name else hashlib.sha256(data).digest()

    def hash(self, data: bytes) -> bytes:
        """Hash plaintext as what goes with what is sealed now."""
        if self._keys is None:
            return hashlib.sha256(data).digest()
        return self._keys.current.digest(data)

    def check_key(self, sealed: bytes, *, where: str = "") -> None:
        """See that what begins like this was sealed by a key that is here.

        Raises:
            UnknownKeyError: It was not.
            UnencryptedValueError: It was not sealed at all, and has to be.
        """
        name = _read_header(sealed, where).key
        if name:
            self._key(name, where)
        elif self._keys is not None and not self._keys.accept_plaintext:
            raise UnencryptedValueError(where)

    def check_keys(self, found: Iterable[tuple[bytes, bytes, str]]) -> None:
        """See that the keys are those by which something was sealed before.

        Args:
            found: Some of it, each with its context and its place.

        Raises:
            HashMismatchError: Of what a key of this name has sealed, nothing opens.
        """
        failed: dict[str, HashMismatchError] = {}
        for sealed, context, where in found:
            try:
                header = _read_header(sealed, where)
                key = self._keys.find(header.key) if self._keys is not None else None
                if key is None or key.is_proven:
                    continue
                if key.open(sealed[header.end :], sealed[: header.end] + context) is not None:
                    key.is_proven = True
            except CodecError:
                continue  # whoever reads it is told
            reason = (
                f"the key {key.name!r} has not sealed it here, nor anything else that was looked "
                "at; see whether it is another key of the same name"
            )
            failed[key.name] = HashMismatchError(where, reason)
        for name, error in failed.items():
            if not self._key(name, "").is_proven:
                raise error

    def is_current(self, sealed: bytes) -> bool:
        """Whether something is sealed as it would be now: by the current key, if there is one."""
        name = _read_header(sealed, "").key
        return name == (self._keys.current.name if self._keys is not None else "")

    def _key(self, name: str, where: str) -> Key:
        try:
            key = self._keys.find(name) if self._keys is not None else None
        except KeyUnavailableError as exc:
            raise KeyUnavailableError(name, exc.reason, where) from exc
        if key is None:
            raise UnknownKeyError(name, where)
        return key


def _enveloped(flags: int, stored: bytes, length: int, context: bytes, key: Key | None) -> bytes:
    if key is None:
        header = _HEADER.pack(VERSION, flags, _MSGPACK, 0, length)
        return b"".join((header, _digest(header, context, stored), stored))
    header = _HEADER.pack(VERSION, flags | _ENCRYPTED, _MSGPACK, len(key.id), length)
    header += key.id
    return header + key.seal(stored, header + context)


def context_of(*parts: str | int | bool | bytes | None) -> bytes:
    """Write down where a value belongs, so that no two places are written alike."""
    return ormsgpack.packb(parts)


def is_apart(sealed: object) -> bool:
    """Whether an envelope has not a value but the name of the object that holds it."""
    return isinstance(sealed, bytes) and bool(sealed[1:2] and sealed[1] & _APART)


def digest_of(body: bytes) -> bytes:
    """Return the SHA-256 of serialized bytes."""
    return hashlib.sha256(body).digest()


def envelope_of_version_1(body: bytes) -> bytes:
    """Return the bytes that version 1 made of serialized ones, for what was hashed with them."""
    header = _HEADER.pack(1, 0, _MSGPACK, 0, len(body))
    return b"".join((header, digest_of(header + body), body))


class _Header(NamedTuple):
    version: int
    flags: int
    key: str
    length: int
    end: int
    """Where what it describes begins."""


def _read_header(data: bytes, where: str) -> _Header:
    if not isinstance(data, bytes):
        # SQLite keeps what it is given, whatever the column is declared as.
        raise HashMismatchError(where, "it is not binary")
    if len(data) < _HEADER.size:
        raise HashMismatchError(where, "it is cut short")
    version, flags, serializer, name_size, length = _HEADER.unpack_from(data)
    if version > VERSION:
        raise UnknownVersionError(version, VERSION, where)
    is_encrypted = bool(flags & _ENCRYPTED)
    known = not flags & ~_KNOWN_FLAGS.get(version, 0) and serializer == _MSGPACK
    if not known or is_encrypted != bool(name_size):
        raise HashMismatchError(where, f"its header is not one that version {version} writes")
    end = _HEADER.size + name_size
    try:
        name = data[_HEADER.size : end].decode("ascii")
    except UnicodeDecodeError:
        raise HashMismatchError(where, "its header names no key") from None
    return _Header(version, flags, name, length, end)


def _verified(data: bytes, header: _Header, context: bytes, where: str) -> bytes:
    digest, body = data[header.end : header.end + DIGEST_SIZE], data[header.end + DIGEST_SIZE :]
    head = data[: header.end]
    expected = (
        _digest(head, context, body) if header.version > 1 else hashlib.sha256(head + body).digest()
    )
    if digest != expected:
        raise HashMismatchError(where)
    return body


def _decompressed(stored: bytes, length: int, where: str) -> bytes:
    if length > min(len(stored) * MAX_EXPANSION, MAX_SIZE):
        raise HashMismatchError(where, "its length does not match")
    try:
        # A frame that says how long it is would be believed, whatever the limit.
        if zstandard.frame_content_size(stored) not in {_NOT_SAID, length}:
            raise HashMismatchError(where, "its length does not match")
        return _zstd.decompress(stored, max_output_size=length)
    except zstandard.ZstdError as exc:
        raise HashMismatchError(where, "it cannot be decompressed") from exc


def _digest(header: bytes, context: bytes, body: bytes) -> bytes:
    sha = hashlib.sha256(header + len(context).to_bytes(8, "big") + context)
    sha.update(body)
    return sha.digest()
