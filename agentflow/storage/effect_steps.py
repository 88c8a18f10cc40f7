"""The usual way of the two verbs of each effect, on the bare driver.

They run with every effect of every run, and SQLAlchemy's overhead of a statement is several times
what it takes to run it (ADR 7). What is not usual (a known key, a lease that does not hold, an
outcome that comes too late) changes nothing here and is left to `effects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import LargeBinary
from sqlalchemy.engine import Connection

from agentflow.database.session import Session
from agentflow.database.tables import effects
from agentflow.journal import EffectStatus
from agentflow.storage.effect_rows import effect_marks
from agentflow.storage.events import chain_events
from agentflow.storage.marks import UNMARKED
from agentflow.storage.payloads import Payloads
from agentflow.types import Lease, NewEvent, RunStatus

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_NOW = {
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)",
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)",
}
# Of both rows: what is read of one that is not locked may be older than the lock of the other.
_LOCK = {"sqlite": "", "postgresql": " FOR UPDATE"}
_HELD = "r.status, r.token, r.lease_expires_at, r.event_seq, r.event_hash, r.thread_id, r.graph"
_WIDTH = 8
"""How many columns tell of the run: these, and the time."""
_READ_RUN = {
    dialect: f"SELECT {_HELD}, {now} FROM agentflow_runs r "  # noqa: S608 -- names of its own
    f"WHERE r.tenant = ? AND r.run_id = ?{_LOCK[dialect]}"
    for dialect, now in _NOW.items()
}
_COLUMNS = (
    *("tenant", "effect_id", "scope", "key_hash", "kind", "name", "compensate", "ns", "task_id"),
    *("node", "on_in_doubt", "timeout", "status", "attempt", "request"),
)
"""Those that `effects.new_row` fills."""
_INSERT = (
    f"INSERT INTO agentflow_effects ({', '.join(_COLUMNS)}, "  # noqa: S608 -- names of its own
    "token, worker, intended_at, run_id, thread_id, graph) "
    f"VALUES ({', '.join('?' * (len(_COLUMNS) + 6))}) ON CONFLICT DO NOTHING"
)
_MARKED = tuple(column for column in effects.c if column.name not in UNMARKED[effects])
# A mark says whether a payload is there, and not what it is.
_OF_EFFECT = ", ".join(
    f"CASE WHEN e.{column.name} IS NOT NULL THEN 1 END"
    if isinstance(column.type, LargeBinary)
    else f"e.{column.name}"
    for column in _MARKED
)
_READ_BOTH = {
    dialect: f"SELECT {_HELD}, {now}, {_OF_EFFECT} "  # noqa: S608 -- names of its own
    "FROM agentflow_runs r JOIN agentflow_effects e ON e.tenant = r.tenant "
    "AND e.run_id = r.run_id AND e.token = r.token "
    "WHERE r.tenant = ? AND r.run_id = ? AND e.effect_id = ? "
    f"AND e.status = 'intended' AND e.kind = 'effect'{_LOCK[dialect]}"
    for dialect, now in _NOW.items()
}
_TOLD = ("name", "node", "attempt")
_FINISH = (
    "UPDATE agentflow_effects SET status = ?, outcome = ?, ended_at = ?, ended_seq = ? "
    "WHERE tenant = ? AND effect_id = ?"
)
_LOG = "INSERT INTO agentflow_events (tenant, run_id, seq, type, at, data, prev_hash, hash)"
_EVENT = "?, ?, ?, ?, ?, ?, ?, ?"
_ADVANCE = "UPDATE agentflow_runs SET event_seq = ?, event_hash = ? WHERE tenant = ? AND run_id = ?"
_TOGETHER = (
    "WITH changed AS ({change} RETURNING tenant), "  # noqa: S608 -- names of its own
    f"logged AS ({_LOG} SELECT {_EVENT} FROM changed) "
    f"{_ADVANCE} AND EXISTS (SELECT FROM changed)"
)


class _Held(NamedTuple):
    """A run that is held under the lease of the caller."""

    seq: int
    hash: str
    thread_id: str
    graph: str
    now: int


def begin(
    connection: Connection, payloads: Payloads, lease: Lease, row: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Insert an intent and return its columns; `None` if that is not all there is to it."""
    session = Session.inside(connection)
    found = session.fetch(_READ_RUN[session.dialect], (lease.tenant, lease.run_id))
    run = _held(found, lease)
    if run is None:
        return None
    timeout = row["timeout"]
    plain = {**row, "timeout": None if timeout is None else timeout // _MICROSECOND}
    values = [plain[name] for name in _COLUMNS]
    mine = (lease.token, lease.worker, run.now, lease.run_id, run.thread_id, run.graph)
    at = _EPOCH + run.now * _MICROSECOND
    whole = {
        **row,
        "token": lease.token,
        "worker": lease.worker,
        "intended_at": at,
        "run_id": lease.run_id,
        "thread_id": run.thread_id,
        "graph": run.graph,
    }
    entry = _entry(payloads, lease, run, at, "intended", whole)
    return whole if _write(session, _INSERT, [*values, *mine], run, entry) else None


def finish(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    effect_id: str,
    status: EffectStatus,
    sealed: bytes,
) -> bool:
    """Record an outcome; `False` if that is not all there is to it."""
    session = Session.inside(connection)
    key = (lease.tenant, lease.run_id, effect_id)
    found = session.fetch(_READ_BOTH[session.dialect], key)
    run = _held(found, lease)
    if run is None:
        return False
    row = {column.name: value for column, value in zip(_MARKED, found[0][_WIDTH:], strict=True)}
    ended = {"status": status.value, "outcome": sealed, "ended_at": run.now}
    ended["ended_seq"] = run.seq + 1
    at = _EPOCH + run.now * _MICROSECOND
    entry = _entry(payloads, lease, run, at, status.value, {**row, **ended})
    return _write(session, _FINISH, [*ended.values(), lease.tenant, effect_id], run, entry)


def _held(found: Sequence[Sequence[Any]], lease: Lease) -> _Held | None:
    if not found:
        return None
    status, token, expires_at, seq, event_hash, thread_id, graph, now, *_ = found[0]
    is_held = (
        status == RunStatus.RUNNING.value
        and token == lease.token
        and expires_at is not None
        and expires_at > now
    )
    return _Held(seq, event_hash, thread_id, graph, now) if is_held else None


def _entry(
    payloads: Payloads,
    lease: Lease,
    run: _Held,
    at: datetime,
    what: str,
    row: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Return the event about an effect that becomes what `row` says."""
    end = {"tenant": lease.tenant, "event_seq": run.seq, "event_hash": run.hash}
    facts = {"effect": row["effect_id"], **{name: row[name] for name in _TOLD}}
    event = NewEvent(type=f"effect.{what}", data=facts, marks=effect_marks(payloads, row))
    (entry,), _ = chain_events(payloads, end, lease.run_id, [event], at)
    return entry


def _write(
    session: Session, change: str, values: Sequence[Any], run: _Held, entry: Mapping[str, Any]
) -> bool:
    """Change an effect, and only then append the event about it; say whether that was done."""
    head = (entry["tenant"], entry["run_id"], entry["seq"], entry["type"], run.now)
    event = (*head, entry["data"], entry["prev_hash"], entry["hash"])
    end = (entry["seq"], entry["hash"], entry["tenant"], entry["run_id"])
    if session.dialect != "sqlite":
        # A way to a server and back takes longer than any of the three.
        return session.execute(_together(change), [*values, *event, *end]) == 1
    if session.execute(change, values) != 1:
        return False
    session.execute(f"{_LOG} VALUES ({_EVENT})", event)
    session.execute(_ADVANCE, end)
    return True


@cache
def _together(change: str) -> str:
    return _TOGETHER.format(change=change)
