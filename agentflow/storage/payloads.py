"""Payloads of the run store: what stands sealed in its columns, and where each of them belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, cast

import sqlalchemy as sa

from agentflow.codec import Codec, context_of
from agentflow.database.tables import (
    dead_letters,
    effects,
    events,
    fingerprints,
    pauses,
    runs,
    waits,
)
from agentflow.errors import CodecError, HashMismatchError, PayloadTooLargeError
from agentflow.types import Clock

KEYS: Mapping[str, tuple[str, ...]] = {
    runs.name: ("tenant", "run_id"),
    waits.name: ("tenant", "wait_id"),
    events.name: ("tenant", "run_id", "seq"),
    dead_letters.name: ("tenant", "run_id"),
    pauses.name: ("tenant", "scope", "name"),
    effects.name: ("tenant", "effect_id"),
    fingerprints.name: ("tenant", "digest"),
}
"""By table, the columns that say whose a payload is; it opens nowhere else."""

M = TypeVar("M", bound=StrEnum)
Column = sa.Column[Any]

Keyed = sa.Row[Any] | Mapping[str, Any]
"""A row, or one that is being made, with at least the columns of its key."""

MAX_PAYLOAD = 32 * 1024 * 1024
"""How many bytes a payload may have before it is compressed, unless a store says otherwise."""


@dataclass(frozen=True, slots=True)
class Payloads:
    """How a store encodes: two codecs, one to run with and one to look with; and its clock."""

    strict: Codec
    """For what a graph gets: every class must be known here."""
    lenient: Codec
    """For what is shown: classes that are not known here come as typed plain data."""
    limit: int = MAX_PAYLOAD
    clock: Clock | None = None
    """Judges times of starting, backoff and deadlines; by default the database's clock does."""

    def time(self, now: datetime) -> datetime:
        """Return the time that timers go by when the database's clock shows `now`."""
        return now if self.clock is None else self.clock.now()

    def dump(self, value: Any, column: Column, row: Keyed) -> bytes:
        """Encode a payload for its column of a row."""
        return self.seal(self.body(value, column, row), column, row)

    def body(self, value: Any, column: Column, row: Keyed) -> bytes:
        """Encode a payload that is not too large, without its envelope."""
        body = self.serialize(self.redacted(value, column), column, row)
        if len(body) > self.limit:
            raise PayloadTooLargeError(len(body), self.limit, place_of(column, row))
        return body

    def load(self, column: Column, row: Keyed, *, strict: bool = False) -> Any:
        """Decode the payload in a column of a row; `None` stays `None`."""
        data = mapping_of(row)[column.name]
        if data is None:
            return None
        codec, context = self.strict if strict else self.lenient, context_in(column, row)
        try:
            return codec.loads(data, context=context)
        except CodecError:
            # To name the place takes longer than all the rest: only if there is something to say.
            return codec.loads(data, context=context, where=place_of(column, row))

    def redacted(self, value: Any, column: Column) -> Any:
        """Return what is to be stored of a payload."""
        redact = self.strict.redact
        return value if redact is None else redact(_name(column), value)

    def serialize(self, value: Any, column: Column, row: Keyed) -> bytes:
        """Encode a payload without its envelope."""
        return self.strict.serialize(value, where=place_of(column, row))

    def seal(self, body: bytes, column: Column, row: Keyed) -> bytes:
        """Put what was encoded into an envelope that opens only in this column of this row."""
        return self.strict.seal(body, context_in(column, row))

    def unseal(self, column: Column, row: Keyed) -> bytes:
        """Open the envelope in a column of a row."""
        data = mapping_of(row)[column.name]
        return self.strict.unseal(data, context_in(column, row), where=place_of(column, row))


def context_in(column: Column, row: Keyed) -> bytes:
    """Return the context of a payload: its table and column, and the key of its row."""
    return context_of(_name(column), *_key(column, row))


def _key(column: Column, row: Keyed) -> list[Any]:
    found = row._mapping if isinstance(row, sa.Row) else row
    return [found[name] for name in _columns_of_key(column)]


def mapping_of(row: Keyed) -> Mapping[str, Any]:
    """Return the columns of a row by name."""
    return cast("Mapping[str, Any]", row._mapping) if isinstance(row, sa.Row) else row


@cache
def _columns_of_key(column: Column) -> tuple[str, ...]:
    return KEYS[column.table.name]


@cache
def _name(column: Column) -> str:
    return f"{column.table.name.removeprefix('agentflow_')}.{column.name}"


def place_of(column: Column, row: Keyed) -> str:
    """Name a payload in messages."""
    tenant, *names = _key(column, row)
    of_tenant = f" of tenant {tenant!r}" if tenant else ""
    return f"{_name(column)} of {', '.join(map(repr, names))}{of_tenant}"


def member_of(kind: type[M], column: Column, row: Keyed) -> M:
    """Return what stands in a column of a closed set.

    Raises:
        HashMismatchError: It is none of the set.
    """
    try:
        return kind(mapping_of(row)[column.name])
    except ValueError as exc:
        raise HashMismatchError(place_of(column, row), f"it is no {kind.__name__}") from exc
