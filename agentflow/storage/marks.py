"""Marks: what rows are like after an audit event, so that both can be compared.

What stands in clear in a row (statuses, times, names) is not covered by the envelopes of its
payloads. So an event that changes rows holds, sealed beside its data, the hash of what stands in
clear in each of them afterwards, and which of its payloads are there. The newest mark of a row is
what the row has to fit. Whoever verifies a database compares them; nobody else reads marks.

A mark begins with what it covers, by the names of the columns: one that covers others, since it was
told by a program that knows others, is not compared. A row that a program without marks has changed
has none until it changes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import ormsgpack
import sqlalchemy as sa

from agentflow.database.tables import (
    Length,
    Timestamp,
    dead_letters,
    effects,
    epochs,
    pauses,
    routes,
    runs,
    waits,
)
from agentflow.types import NewEvent

RUN = "run"
LETTER = "dead_letter"
GONE = b""
"""The mark of a row that was deleted."""

UNMARKED: Mapping[sa.Table, frozenset[str]] = {
    # The ends of its chain are compared as such. The others change without an event: as often as a
    # worker's heart beats, or with a restored backup.
    runs: frozenset(
        {"seq", "event_seq", "event_hash", "token", "lease_expires_at", "is_isolated", "pardoned"}
        # An export leaves it out, and it says only how long a lost attempt may have lived.
        | {"claimed_at"}
        # Programs without marks set it without an event.
        | {"rollback"}
    ),
    # Hashes of payloads change with the key that these are sealed by.
    waits: frozenset({"seq", "proposal_hash"}),
    effects: frozenset({"seq", "key_hash"}),
    dead_letters: frozenset(),
    pauses: frozenset(),
    routes: frozenset(),
    epochs: frozenset(),
}
"""The tables whose rows are marked, and those of their columns that no mark covers."""

_SHAPE_SIZE, _SIZE = 4, 16
_FORMAT = 1
"""To be raised by a migration that writes what stands in marked columns anew."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY, _SECOND = 86_400, 1_000_000


def of_wait(wait_id: str) -> str:
    """Name the mark of a wait."""
    return f"wait:{wait_id}"


def of_effect(effect_id: str) -> str:
    """Name the mark of an effect."""
    return f"effect:{effect_id}"


def of_redacted_key(effect_id: str) -> str:
    """Name the note that the key of an effect is not stored, so that it has another hash."""
    return f"redacted:{effect_id}"


def of_pause(scope: str, name: str) -> str:
    """Name the mark of a pause."""
    return f"pause:{scope}:{name}"


def of_route(graph: str, version: str) -> str:
    """Name the mark of a route."""
    return f"route:{graph}:{version}"


def of_epoch(epoch: int) -> str:
    """Name the mark of an epoch."""
    return f"epoch:{epoch}"


def mark(table: sa.Table, row: Mapping[Any, Any]) -> bytes:
    """Return the mark of a row of a table."""
    found: list[Any] = []
    for name, kind in _columns(table):
        value = row.get(name)
        if value is None:
            continue
        if kind == "payload":
            value = True
        elif kind == "time":
            value = _plain(value)
        elif kind == "text":
            value = str(value)
        elif isinstance(value, bool):
            value = int(value)
        found += (name, value)
    return _shape(table) + hashlib.sha256(ormsgpack.packb(found)).digest()[:_SIZE]


def agree(told: object, found: bytes) -> bool:
    """Whether a row whose mark is `found` may be what an event has told of it."""
    if told == GONE or not isinstance(told, bytes):
        return False
    # One that covers other columns was told by a program that knows others.
    return told == found or told[:_SHAPE_SIZE] != found[:_SHAPE_SIZE]


def marked(event: NewEvent, name: str, table: sa.Table, row: Mapping[Any, Any]) -> NewEvent:
    """Return an event with one mark more."""
    return NewEvent(type=event.type, data=event.data, marks={**event.marks, name: mark(table, row)})


def wait_event(kind: str, row: Mapping[Any, Any], **facts: Any) -> NewEvent:
    """Return the event about a wait that has become what `row` says."""
    wait_id = row["wait_id"]
    marks = {of_wait(wait_id): mark(waits, row)}
    return NewEvent(type=f"approval.{kind}", data={"approval": wait_id, **facts}, marks=marks)


@cache
def _columns(table: sa.Table) -> tuple[tuple[str, str], ...]:
    return tuple(
        (column.name, _kind(column)) for column in table.c if column.name not in UNMARKED[table]
    )


def _kind(column: sa.Column[Any]) -> str:
    if isinstance(column.type, sa.LargeBinary):
        return "payload"
    if isinstance(column.type, sa.String):
        return "text"
    return "time" if isinstance(column.type, (Timestamp, Length)) else "plain"


@cache
def _shape(table: sa.Table) -> bytes:
    """Return what tells marks apart that do not cover the same columns."""
    names = [name for name, _ in _columns(table)]
    return hashlib.sha256(ormsgpack.packb([_FORMAT, *names])).digest()[:_SHAPE_SIZE]


def _plain(value: Any) -> Any:
    """Return the microseconds that stand in the database, which is what some have read."""
    if isinstance(value, datetime):
        value -= _EPOCH
    if isinstance(value, timedelta):
        return (value.days * _DAY + value.seconds) * _SECOND + value.microseconds
    return value


class Marks:
    """The newest marks of a chain of events."""

    def __init__(self) -> None:
        """Begin before the first event."""
        self._found: dict[str, bytes | None] = {}
        self.are_whole = False
        """Whether there were marks from the first event on."""
        self.token: int | None = None
        """The fencing token of the newest claim."""
        self.has_ended = False
        """Whether the run has ended once; it may have been started again since."""
        self._is_first = True

    def add(self, kind: str, data: Mapping[str, Any], marks: Mapping[str, bytes]) -> None:
        """Take the next event, of this kind."""
        if self._is_first:
            self._is_first = False
            self.are_whole = bool(marks)
        if kind == "run.claimed":
            token = data.get("token")
            self.token = token if isinstance(token, int) else None
        elif kind == "run.imported":
            self.token = None
        self.has_ended = self.has_ended or kind in _ENDS
        # What a program without marks has changed is not known any more.
        for name in _changed_by(kind, data):
            self._found[name] = None
        if not marks:
            for prefix in _CHANGES_OTHERS.get(kind, ()):
                self._found |= dict.fromkeys(self._of(prefix))
        self._found |= marks

    def says(self, name: str, mark: bytes) -> bool:
        """Whether a row that has this mark may be what it is."""
        if name in self._found:
            told = self._found[name]
            return told is None or agree(told, mark)
        return not self.are_whole

    def has(self, name: str) -> bool:
        """Whether there is a mark of this name."""
        return self._found.get(name) is not None

    def missing(self, seen: Iterable[str], prefix: str) -> list[str]:
        """Return the names, which begin so, of marks whose rows were not seen."""
        return sorted({name for name in self._of(prefix) if self._found[name]}.difference(seen))

    def _of(self, prefix: str) -> list[str]:
        return [name for name in self._found if name.startswith(prefix)]


_ENDS = frozenset({"run.succeeded", "run.failed", "run.cancelled"})
_CHANGES_OTHERS = {
    "run.migrated": ("wait:",),
    "run.imported": ("wait:", "effect:"),
    # The event of a compensation changes the effect that it has undone, too.
    "effect.succeeded": ("effect:",),
}
"""Events that change more rows than they name; without marks an older program has written them."""
_BESIDE_RUN = frozenset(
    {"effect.intended", "effect.succeeded", "effect.failed", "effect.not_called"}
)
"""Events that change nothing of their run."""


def _changed_by(kind: str, data: Mapping[str, Any]) -> list[str]:
    """Return the names of the rows that an event changes, whether it marks them or not."""
    subject, _, what = kind.partition(".")
    changed = [] if kind in _BESIDE_RUN else [RUN]
    if subject == "approval":
        changed.append(of_wait(str(data.get("approval"))))
    elif subject == "effect" and what != "in_doubt":
        changed.append(of_effect(str(data.get("effect"))))
    elif kind == "run.failed":
        changed.append(LETTER)
    elif what in {"paused", "unpaused"} and subject != "run":
        changed.append(of_pause(subject, str(data.get("name"))))
    elif kind == "store.restored":
        changed.append(of_epoch(data.get("epoch", 0)))
    elif kind == "graph.routed":
        changed.append(of_route(str(data.get("graph")), str(data.get("version"))))
    return changed
