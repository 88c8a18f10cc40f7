"""Keys of encryption: a ring of named ones, of which the first seals and all of them open.

Values are sealed by XAES-256-GCM (https://c2sp.org/XAES-256-GCM): AES-256-GCM under a key that is
derived for each value from half of a random nonce of 192 bits. AES-GCM alone has nonces of 96 bits,
of which a key may use too few for a database that seals thousands of values a second.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from agentflow.errors import InvalidInputError, KeyUnavailableError, MissingDriverError

KEY_SIZE = 32
MAX_NAME = 64
"""Bytes of a key's name."""

NONCE_SIZE = 24

_BLOCK = 16
_HALF = 12
"""Bytes of a nonce from which a key is derived; the others are the nonce under that key."""
_POLYNOMIAL = 0x87  # of CMAC with a block of 128 bits (RFC 4493)


class Key:
    """One key: seals, opens and hashes. Each purpose has a key of its own, derived from it."""

    def __init__(self, name: str, secret: bytes) -> None:
        """Derive from 32 random bytes.

        Raises:
            InvalidInputError: The name or the length of the secret does not fit.
            MissingDriverError: The package `cryptography` is not installed.
        """
        if not name.isascii() or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            advice = f"a name must be 1 to {MAX_NAME} printable ASCII characters"
            raise InvalidInputError("key ring", (advice,))
        if len(secret) != KEY_SIZE:
            advice = f"{name}: has {len(secret)} bytes; a key is {KEY_SIZE} random bytes"
            raise InvalidInputError("key ring", (advice,))
        self.name = name
        self.id = name.encode()
        self.is_proven = False
        """Whether it has opened something that was stored before."""
        self._hashing = _derive(secret, b"agentflow hashes")
        self._cipher = Xaes(_derive(secret, b"agentflow encryption"))

    def __repr__(self) -> str:
        """Show the name only."""
        return f"Key({self.name!r})"

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        """Encrypt, and bind to a context that has to be given again to open it."""
        nonce = os.urandom(NONCE_SIZE)
        return nonce + self._cipher.encrypt(nonce, plaintext, context)

    def open(self, sealed: bytes, context: bytes) -> bytes | None:
        """Decrypt; `None` for what this key has not sealed in this context."""
        return self._cipher.decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], context)

    def digest(self, data: bytes) -> bytes:
        """Return a hash that nobody can compute without the key (HMAC-SHA256)."""
        return hmac.digest(self._hashing, data, "sha256")


class Xaes:
    """XAES-256-GCM."""

    def __init__(self, key: bytes) -> None:
        """Use a key of 256 bits.

        Raises:
            MissingDriverError: The package `cryptography` is not installed.
        """
        self._aes, self._gcm = _ciphers(key)
        self._k1 = _doubled(self._aes(bytes(_BLOCK)))

    def encrypt(self, nonce: bytes, plaintext: bytes, context: bytes) -> bytes:
        """Return the ciphertext and its tag."""
        gcm = self._gcm(self._derived(nonce))
        return bytes(gcm.encrypt(nonce[_HALF:], plaintext, context))

    def decrypt(self, nonce: bytes, ciphertext: bytes, context: bytes) -> bytes | None:
        """Return the plaintext; `None` if the tag does not fit."""
        from cryptography.exceptions import InvalidTag

        if len(nonce) < NONCE_SIZE:
            return None
        gcm = self._gcm(self._derived(nonce))
        try:
            return bytes(gcm.decrypt(nonce[_HALF:], ciphertext, context))
        except InvalidTag:
            return None

    def _derived(self, nonce: bytes) -> bytes:
        return self._aes(
            b"".join(
                _xor(bytes((0, counter)) + b"X\x00" + nonce[:_HALF], self._k1) for counter in (1, 2)
            )
        )


class KeyRing:
    """Named keys: the current one seals, all of them open.

    To change the key, put a new one in front and keep the old ones until
    `agentflow keys rotate` says that nothing is sealed by them any more.
    """

    def __init__(
        self,
        keys: Mapping[str, bytes] | Sequence[tuple[str, bytes]],
        *,
        current: str | None = None,
        lookup: Callable[[str], bytes | None] | None = None,
        accept_plaintext: bool = False,
    ) -> None:
        """Hold keys.

        Args:
            keys: 32 random bytes for each name.
            current: The one that seals; by default the first.
            lookup: Asked for keys that are not in `keys`, for instance a key management service;
                its answers are kept in memory. `None` says that it has no such key. What it raises
                is `KeyUnavailableError` for whoever needs that key now. It is to answer quickly.
            accept_plaintext: Whether values that were stored without encryption are still read,
                which is needed until `agentflow keys rotate` has encrypted all of them.

        Raises:
            InvalidInputError: There is no key, two have the same name, the current one is not
                there, or one is not 32 bytes.
            MissingDriverError: The package `cryptography` is not installed.
        """
        pairs = list(keys.items() if isinstance(keys, Mapping) else keys)
        self._keys: dict[str, Key] = {}
        for name, secret in pairs:
            if name in self._keys:
                raise InvalidInputError("key ring", (f"{name}: there are two keys of this name",))
            self._keys[name] = Key(name, secret)
        self._lookup = lookup
        self.accept_plaintext = accept_plaintext
        wanted = current or next(iter(self._keys), None)
        found = self.find(wanted) if wanted is not None else None
        if found is None:
            raise InvalidInputError("key ring", (f"{wanted or 'current'}: there is no such key",))
        self.current = found

    @classmethod
    def from_text(cls, text: str, *, accept_plaintext: bool = False) -> Self:
        """Read `name=base64` pairs, separated by commas; the first one is current.

        Raises:
            InvalidInputError: The text is not that, or as for `KeyRing`; no part of a key is shown.
        """
        pairs = []
        for number, part in enumerate(text.split(","), 1):
            name, _, encoded = part.strip().partition("=")
            try:
                secret = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError):
                secret = b""
            if not name or len(secret) != KEY_SIZE:
                # By its number: where the name is missing, the key itself stands in its place.
                advice = f"key {number}: must be name=base64 of {KEY_SIZE} random bytes"
                raise InvalidInputError("key ring", (advice,))
            pairs.append((name, secret))
        return cls(pairs, accept_plaintext=accept_plaintext)

    def __repr__(self) -> str:
        """Show the names only."""
        return f"KeyRing({', '.join(self._keys)})"

    def known(self) -> list[Key]:
        """Return the keys that are here, the current one first."""
        others = [key for key in self._keys.values() if key is not self.current]
        return [self.current, *others]

    def find(self, name: str) -> Key | None:
        """Return the key of a name, if it is here or the lookup has it.

        Raises:
            KeyUnavailableError: The lookup has failed.
        """
        key = self._keys.get(name)
        if key is None and self._lookup is not None:
            try:
                secret = self._lookup(name)
            except Exception as exc:
                # Its text may hold anything.
                raise KeyUnavailableError(name, type(exc).__name__) from exc
            if secret is not None:
                key = self._keys[name] = Key(name, secret)
        return key


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret, purpose, hashlib.sha256)


def _ciphers(key: bytes) -> tuple[Callable[[bytes], bytes], Callable[[bytes], Any]]:
    """Return AES itself for whole blocks, and the constructor of AES-GCM."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as exc:
        raise MissingDriverError("cryptography", "encryption") from exc
    cipher = Cipher(algorithms.AES256(key), modes.ECB())  # noqa: S305 -- single blocks, as XAES has it

    def encrypt(blocks: bytes) -> bytes:
        return bytes(cipher.encryptor().update(blocks))

    return encrypt, AESGCM


def _doubled(block: bytes) -> bytes:
    """Double a block in the field of CMAC (RFC 4493, 2.3)."""
    number = int.from_bytes(block, "big")
    doubled = (number << 1) & ((1 << 128) - 1)
    return (doubled ^ (_POLYNOMIAL if number >> 127 else 0)).to_bytes(_BLOCK, "big")


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(_BLOCK, "big")
