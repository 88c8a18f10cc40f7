"""The usual way of the two verbs of each effect, on the bare driver.

They run with every effect of every run, and SQLAlchemy's overhead of a statement is several times
what it takes to run it (ADR 7). What is not usual (a known key, a lease that does not hold, an
outcome that comes too late) changes nothing here and is left to `effects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

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

_RUN = (
    "SELECT status, token, lease_expires_at, event_seq, event_hash, thread_id, graph, {now} "
    "FROM agentflow_runs WHERE tenant = ? AND run_id = ?{lock}"
)
_READ_RUN = {
    "sqlite": _RUN.format(
        now="CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)", lock=""
    ),
    "postgresql": _RUN.format(
        now="CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)", lock=" FOR UPDATE"
    ),
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
_MARKED = tuple(column.name for column in effects.c if column.name not in UNMARKED[effects])
_TOLD = ("name", "node", "attempt")
_FINISH = (
    "UPDATE agentflow_effects "  # noqa: S608 -- names of its own
    "SET status = ?, outcome = ?, ended_at = ?, ended_seq = ? "
    "WHERE tenant = ? AND effect_id = ? AND status = 'intended' AND run_id = ? AND token = ? "
    f"AND kind = 'effect' RETURNING {', '.join(_MARKED)}"
)
_LOG = (
    "INSERT INTO agentflow_events (tenant, run_id, seq, type, at, data, prev_hash, hash) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_ADVANCE = "UPDATE agentflow_runs SET event_seq = ?, event_hash = ? WHERE tenant = ? AND run_id = ?"


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
    run = _held(session, lease)
    if run is None:
        return None
    timeout = row["timeout"]
    plain = {**row, "timeout": None if timeout is None else timeout // _MICROSECOND}
    values = [plain[name] for name in _COLUMNS]
    mine = (lease.token, lease.worker, run.now, lease.run_id, run.thread_id, run.graph)
    if session.execute(_INSERT, [*values, *mine]) != 1:
        return None
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
    _append(session, payloads, lease, run, at, "intended", whole)
    return whole


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
    run = _held(session, lease)
    if run is None:
        return False
    key = (lease.tenant, effect_id, lease.run_id, lease.token)
    found = session.fetch(_FINISH, (status.value, sealed, run.now, run.seq + 1, *key))
    if not found:
        return False
    at = _EPOCH + run.now * _MICROSECOND
    whole = dict(zip(_MARKED, found[0], strict=True))
    _append(session, payloads, lease, run, at, status.value, whole)
    return True


def _held(session: Session, lease: Lease) -> _Held | None:
    found = session.fetch(_READ_RUN[session.dialect], (lease.tenant, lease.run_id))
    if not found:
        return None
    status, token, expires_at, *rest = found[0]
    seq, event_hash, thread_id, graph, now = rest
    is_held = (
        status == RunStatus.RUNNING.value
        and token == lease.token
        and expires_at is not None
        and expires_at > now
    )
    return _Held(seq, event_hash, thread_id, graph, now) if is_held else None


def _append(
    session: Session,
    payloads: Payloads,
    lease: Lease,
    run: _Held,
    at: datetime,
    what: str,
    row: Mapping[str, Any],
) -> None:
    """Append the event about an effect that has become what `row` says."""
    end = {"tenant": lease.tenant, "event_seq": run.seq, "event_hash": run.hash}
    facts = {"effect": row["effect_id"], **{name: row[name] for name in _TOLD}}
    event = NewEvent(type=f"effect.{what}", data=facts, marks=effect_marks(payloads, row))
    (entry,), _ = chain_events(payloads, end, lease.run_id, [event], at)
    head = (entry["tenant"], entry["run_id"], entry["seq"], entry["type"], run.now)
    session.execute(_LOG, (*head, entry["data"], entry["prev_hash"], entry["hash"]))
    session.execute(_ADVANCE, (entry["seq"], entry["hash"], lease.tenant, lease.run_id))
