"""Claims, and all that a worker asks again and again, find what they want by an index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import Codec
from agentflow.config import Settings
from agentflow.database import migrate
from agentflow.database.engine import make_engine, parse_url
from agentflow.database.prepared import Prepared
from agentflow.database.session import Session
from agentflow.storage import claims, due, endings
from agentflow.storage.payloads import Payloads
from agentflow.storage.tokens import take_for_new_run

WAITING = 20_000
SMALL = (
    "agentflow_runs_due",
    "agentflow_runs_lease",
    "agentflow_runs_deadline",
    "agentflow_runs_start_deadline",
    "agentflow_runs_thread",
    "agentflow_runs_id",
    "sqlite_autoindex_agentflow_runs_1 (tenant=? AND run_id=?)",
    "agentflow_runs_rollback",
    "agentflow_events_pkey",
    "sqlite_autoindex_agentflow_events_1 (tenant=? AND run_id=? AND seq=?)",
)
"""Indexes that do not hold the runs that wait, and those that lead to the runs of one thread, to
one run or to one event."""
_NO_TABLE = r"(?: \d+)? CONSTANT| \(subquery| anon_1|(?: on)? agentflow_(?:pauses|epochs)"
"""What else they go through: what SQLite makes up, and few rows: pauses, and restored backups."""
_COLUMNS = (
    "tenant, run_id, thread_id, graph, version, queue, status, priority, available_at, "
    "wake_reason, attempt, claims, is_dead_letter, created_at, event_seq, event_hash, "
    "input, config, metadata"
)
_VALUES = (
    "'', 'r' || i, 't' || i, 'g', '1', 'default', 'waiting', 0, 1, "
    "'start', 0, 1, {false}, 1, 0, '', {blob}, {blob}, {blob}"
)


@pytest.fixture
def crowded(database_url: str) -> Iterator[Connection]:
    """A connection to a database with many runs that wait, of which the planner knows nothing."""
    migrate.up(database_url)
    engine = make_engine(parse_url(database_url), Settings())
    is_sqlite = engine.dialect.name == "sqlite"
    numbers = (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {WAITING})"
        if is_sqlite
        else f"WITH n(i) AS (SELECT generate_series(1, {WAITING}))"
    )
    values = _VALUES.format(
        false="0" if is_sqlite else "false", blob="x''" if is_sqlite else "''::bytea"
    )
    with engine.begin() as connection:
        insert = f"INSERT INTO agentflow_runs ({_COLUMNS}) {numbers} SELECT {values} FROM n"
        if is_sqlite:
            insert = f"{numbers} INSERT INTO agentflow_runs ({_COLUMNS}) SELECT {values} FROM n"
        connection.exec_driver_sql(insert)
        # One that has expired, of a graph that nobody wants: or else nobody looks for those.
        connection.exec_driver_sql(
            "UPDATE agentflow_runs SET status = 'running', graph = 'x', lease_expires_at = 1 "
            "WHERE run_id = 'r1'"
        )
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_what_workers_ask_again_and_again_is_found_by_an_index(
    crowded: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(crowded, "before_cursor_execute")
    def _note(_connection: Any, _cursor: Any, sql: str, values: Any, *_: Any) -> None:
        asked.append((sql, values))

    execute = Prepared.execute

    def noted(statement: Prepared, on: Connection, parameters: Any) -> Any:
        compiled = statement.compiled(on)
        asked.append((compiled.text, compiled.bind(parameters)))
        return execute(statement, on, parameters)

    monkeypatch.setattr(Prepared, "execute", noted)
    codec = Codec()
    payloads = Payloads(strict=codec, lenient=codec)
    wanted: dict[str, Any] = {"queues": ["default", "mail"], "graphs": [("g", "1"), ("h", "2")]}
    lease = timedelta(seconds=10)
    assert not endings.has_due(crowded, payloads, "")
    assert not due.next_due(crowded, payloads, "", **wanted).is_claimable
    limit: dict[str, Any] = {"limit": 10, "lease": lease}
    assert not claims.claim_runs(
        crowded, payloads, "", worker="w", instance=None, opening=None, **limit, **wanted
    )
    asked_for = {"run_id": "new", "graph": "g", "queue": "default"}
    for times in (1, 2):
        _, look = take_for_new_run(crowded, "", "t5", due.OFFERED_NEW, asked_for)
        assert look.is_behind, f"a run of the thread waits, which is locked {times} times"
    sa.event.remove(crowded, "before_cursor_execute", _note)
    monkeypatch.undo()
    plans = {
        sql: _plan(crowded, sql, values) for sql, values in asked if "FROM agentflow_runs" in sql
    }
    # On PostgreSQL a new thread is looked at in the statement that locks it.
    count = 7 if crowded.dialect.name == "sqlite" else 8
    assert len(plans) == count, "two claims, two looks ahead, two kinds of deadlines, submissions"
    for sql, plan in plans.items():
        used = re.findall(rf"(?:SCAN|SEARCH|Scan)(?!{_NO_TABLE}).*", "\n".join(plan))
        assert used, plan
        for line in used:
            assert any(name in line for name in SMALL), (sql, line)


def test_first_of_many_queued_runs_is_found_without_sorting_them(crowded: Connection) -> None:
    """However many queues a worker asks for: their order is that of the index."""
    crowded.exec_driver_sql("UPDATE agentflow_runs SET status = 'queued' WHERE status = 'waiting'")
    crowded.commit()
    if crowded.dialect.name == "postgresql":
        crowded.exec_driver_sql("ANALYZE agentflow_runs")
    statement = due.asking(2, 1).lock_queued.compiled(crowded)
    graph = due.named((), [("g", "1")])
    place = {"priority": 2**31 - 1, "after": -1, "room": 2}
    at = datetime(2026, 1, 1, tzinfo=UTC)
    values = statement.bind({"tenant": "", "queue": "default", "at": at, **graph, **place})
    plan = "\n".join(_plan(crowded, statement.text, values))
    assert "agentflow_runs_due" in plan
    assert not re.search(r"Sort|TEMP B-TREE", plan), plan


def _plan(connection: Connection, sql: str, values: Any) -> list[str]:
    explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    if isinstance(values, list) and connection.dialect.name == "postgresql":
        # As it is planned once it has come often enough: whatever the values.
        session = Session.inside(connection)
        session.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        session.execute(f"PREPARE asked AS {sql}")
        rows = session.fetch(f"{explain} EXECUTE asked({', '.join('NULL' for _ in values)})")
        session.execute("DEALLOCATE asked")
    elif isinstance(values, list):
        rows = Session.inside(connection).fetch(f"{explain} {sql}", values)
    else:
        rows = [tuple(row) for row in connection.exec_driver_sql(f"{explain} {sql}", values)]
    return [str(row[-1]) for row in rows]
