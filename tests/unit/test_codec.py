"""What the envelope refuses whatever its hash says, since anybody can compute one without a key."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc

import pytest
import zstandard

from agentflow import codec
from agentflow.codec import Codec
from agentflow.errors import HashMismatchError, SerializationError


def envelope(length: int, stored: bytes) -> bytes:
    """Make an envelope of version 2 around compressed bytes, with the hash that it must have."""
    header = struct.pack(">BBBBQ", 2, 1, 1, 0, length)
    return header + hashlib.sha256(header + bytes(8) + stored).digest() + stored


def frame(size: int) -> bytes:
    """Make a frame that says to be of this size, and has three zeros."""
    return bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", size) + b"\x1b\x00\x00\x00"


def test_envelope_of_the_test_is_one_that_is_read() -> None:
    body = Codec(compress=False).serialize("text " * 30)
    written = zstandard.ZstdCompressor(write_content_size=False).compress(body)
    assert Codec().loads(envelope(len(body), written)) == "text " * 30


@pytest.mark.parametrize(
    ("length", "stored"),
    [
        (100, frame(1 << 50)),
        (100, frame((1 << 63) - 1)),
        (100, zstandard.compress(bytes(64 << 20))),
        (100, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))),
        (1 << 40, bytes(64 << 20)),
        ((1 << 64) - 1, frame(3)),
        (0, b""),
    ],
    ids=["frame", "largest frame", "says so", "does not", "header", "largest header", "nothing"],
)
def test_bomb_is_refused_before_it_takes_memory(length: int, stored: bytes) -> None:
    data = envelope(length, stored)
    tracemalloc.start()
    try:
        with pytest.raises(HashMismatchError):
            Codec().unseal(data)
        # As large as what was stored, since it is hashed without its header.
        assert tracemalloc.get_traced_memory()[1] < len(stored) + 1_000_000
    finally:
        tracemalloc.stop()


def test_value_too_large_to_be_read_is_refused_when_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec, "MAX_SIZE", 1000)
    assert Codec().loads(Codec().dumps(b"x" * 990)) == b"x" * 990
    with pytest.raises(SerializationError, match="larger than 1,000 bytes"):
        Codec().dumps(b"x" * 1000)
    with pytest.raises(SerializationError, match="larger than 1,000 bytes"):
        Codec().compress(b"x" * 1001)
