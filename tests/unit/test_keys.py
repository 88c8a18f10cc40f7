"""Encryption of one value, the ring of keys, and how keys come from the environment."""

from __future__ import annotations

import base64

import pytest

from agentflow.config import load_settings
from agentflow.errors import InvalidInputError
from agentflow.keys import KEY_SIZE, Key, KeyRing, Xaes

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
PLAINTEXT = b"XAES-256-GCM"
SECRET = b"do not show this in any message!"
OTHER = bytes(range(KEY_SIZE))
ENCODED = base64.b64encode(SECRET).decode()


@pytest.mark.parametrize(
    ("key", "context", "expected"),
    [
        (b"\x01", b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (
            b"\x03",
            b"c2sp.org/XAES-256-GCM",
            "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d",
        ),
    ],
)
def test_cipher_is_xaes_as_specified(key: bytes, context: bytes, expected: str) -> None:
    """The test vectors of https://c2sp.org/XAES-256-GCM."""
    cipher = Xaes(key * KEY_SIZE)
    assert cipher.encrypt(NONCE, PLAINTEXT, context).hex() == expected
    assert cipher.decrypt(NONCE, bytes.fromhex(expected), context) == PLAINTEXT


def test_sealed_value_opens_under_its_key_in_its_context_only() -> None:
    key = Key("k", SECRET)
    sealed = key.seal(b"value", b"here")
    assert key.open(sealed, b"here") == b"value"
    assert key.open(sealed, b"there") is None
    assert Key("k", OTHER).open(sealed, b"here") is None
    for position in range(len(sealed)):
        flipped = bytearray(sealed)
        flipped[position] ^= 1
        assert key.open(bytes(flipped), b"here") is None
        assert key.open(sealed[:position], b"here") is None
    assert key.seal(b"value", b"here") != sealed


def test_hashes_differ_by_key() -> None:
    assert Key("k", SECRET).digest(b"value") == Key("other", SECRET).digest(b"value")
    assert Key("k", SECRET).digest(b"value") != Key("k", OTHER).digest(b"value")


def refused(message: str) -> pytest.RaisesExc[InvalidInputError]:
    """Expect an error that shows nothing of the secret."""

    def shows_nothing(error: InvalidInputError) -> bool:
        texts = (str(error), repr(error), str(error.__cause__), str(error.__context__))
        return not any(part in text for text in texts for part in (ENCODED[:-1], "do not show"))

    return pytest.RaisesExc(InvalidInputError, match=message, check=shows_nothing)


def test_ring_that_makes_no_sense_is_refused() -> None:
    with refused("two: has 31 bytes"):
        KeyRing({"one": OTHER, "two": SECRET[1:]})
    with refused("there are two keys of this name"):
        KeyRing([("one", SECRET), ("one", OTHER)])
    with refused("other: there is no such key"):
        KeyRing({"one": SECRET}, current="other")
    with refused("current: there is no such key"):
        KeyRing({})
    for name in ("", "ö", "a\n", "x" * 65):
        with refused("printable ASCII"):
            KeyRing({name: SECRET})


def test_text_that_is_no_ring_is_refused() -> None:
    """Also where the name is missing, so that the key stands where the name should."""
    for text in (
        "one",
        "one=",
        "=",
        f"one={ENCODED[:-2]}",
        f"one=!{ENCODED[1:]}",
        ENCODED,
        ENCODED.rstrip("="),
        f"={ENCODED}",
        f"one={ENCODED}{ENCODED}",
    ):
        with refused("key 2: must be name=base64"):
            KeyRing.from_text(f"zero={base64.b64encode(OTHER).decode()},{text}")
    with refused("two keys of this name"):
        KeyRing.from_text(f"one={ENCODED}, one={ENCODED}")


def test_first_key_seals_and_nothing_shows_a_secret() -> None:
    ring = KeyRing.from_text(f"new={ENCODED}, old={base64.b64encode(OTHER).decode()}")
    assert (ring.current.name, ring.find("none")) == ("new", None)
    old = ring.find("old")
    assert old is not None
    assert old.open(Key("old", OTHER).seal(b"value", b""), b"") == b"value"
    assert repr(ring) == "KeyRing(new, old)"
    assert repr(ring.current) == "Key('new')"


def test_lookup_is_asked_once_for_what_is_not_in_the_ring() -> None:
    asked = []

    def lookup(name: str) -> bytes | None:
        asked.append(name)
        return {"managed": SECRET, "short": b"x"}.get(name)

    ring = KeyRing({"one": OTHER}, lookup=lookup)
    assert ring.find("managed") is ring.find("managed")
    assert ring.find("none") is None
    assert asked == ["managed", "none"]
    with refused("short: has 1 bytes"):
        ring.find("short")
    assert KeyRing({}, current="managed", lookup=lookup).current.name == "managed"


def test_keys_come_from_the_environment() -> None:
    assert load_settings({}).keys is None
    assert load_settings({"AGENTFLOW_ACCEPT_PLAINTEXT": "1"}).keys is None
    settings = load_settings({"AGENTFLOW_KEYS": f"one={ENCODED}"})
    assert settings.keys is not None
    assert (settings.keys.current.name, settings.keys.accept_plaintext) == ("one", False)
    assert ENCODED not in repr(settings)
    accepting = load_settings(
        {"AGENTFLOW_KEYS": f"one={ENCODED}", "AGENTFLOW_ACCEPT_PLAINTEXT": "1"}
    )
    assert accepting.keys is not None
    assert accepting.keys.accept_plaintext
    with refused("AGENTFLOW_ACCEPT_PLAINTEXT: must be 0 or 1"):
        load_settings({"AGENTFLOW_ACCEPT_PLAINTEXT": "yes"})
    with refused("key 1: must be name=base64"):
        load_settings({"AGENTFLOW_KEYS": ENCODED})
