"""Refuses to measure unless every side waits for the disk before it calls a commit durable.

Looks at the connections that the savers really have, whoever made them: all live ones of this
process are found through the garbage collector.
"""

from __future__ import annotations

import gc
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

from agentflow.checkpoint import open_checkpointer
from benchmarks import graphs
from benchmarks.lab import Lab
from benchmarks.savers import open_pipeline_saver, open_pool_saver, open_sqlite_saver

_SERVER_SETTINGS = ("fsync", "synchronous_commit", "full_page_writes")
_SESSION_SETTING = "synchronous_commit"
_FULL = 2
"""SQLite's number for `synchronous=FULL`; more is stricter."""


class NotDurableError(Exception):
    """A side would win by not waiting for the disk."""


async def check_sqlite(lab: Lab) -> None:
    """Fail unless agentflow and `AsyncSqliteSaver` synchronise fully, with a write-ahead log.

    Raises:
        NotDurableError: One of them does not.
    """
    path = lab.sqlite_path()
    async with open_checkpointer(f"sqlite:///{path}") as saver:
        await graphs.run(graphs.counter(3).compile(checkpointer=saver), {"count": 0})
        modes = [_sqlite_mode(connection) for connection in _sqlite_connections(path)]
    async with open_sqlite_saver(lab.sqlite_path()) as peer:
        mode: list[Any] = []
        for name in ("synchronous", "journal_mode"):
            async with peer.conn.execute(f"PRAGMA {name}") as cursor:
                mode += await cursor.fetchone() or ()
    for synchronous, journal in [*modes, mode]:
        if synchronous < _FULL or journal != "wal":
            raise NotDurableError(f"synchronous={synchronous}, journal_mode={journal}")
    if not modes:
        raise NotDurableError("found no SQLite connection of agentflow's to look at")


async def check_postgres(lab: Lab) -> None:
    """Fail unless the server, and every session with it, waits for the disk.

    Raises:
        NotDurableError: One of them does not.
    """
    url = lab.postgres_url()
    with psycopg.connect(url, autocommit=True) as connection:
        _require_on(connection, *_SERVER_SETTINGS)
    async with open_checkpointer(url) as ours:
        await graphs.run(graphs.counter(3).compile(checkpointer=ours), {"count": 0})
        if not _check_sessions():
            raise NotDurableError("found no PostgreSQL connection of agentflow's to look at")
    async with open_pool_saver(lab.postgres_url()):
        _check_sessions()
    async with open_pipeline_saver(lab.postgres_url()) as saver:
        # In pipeline mode only the saver's own interface can ask.
        assert isinstance(saver.conn, psycopg.AsyncConnection)
        shown = await saver.conn.execute(f"SHOW {_SESSION_SETTING}")
        if await shown.fetchone() != {_SESSION_SETTING: "on"}:
            raise NotDurableError(f"{_SESSION_SETTING} is not on in the pipeline")


def _sqlite_connections(path: Path) -> Iterator[sqlite3.Connection]:
    """Find the connections to a file that may be used from this thread."""
    for connection in [found for found in gc.get_objects() if type(found) is sqlite3.Connection]:
        try:
            files = [row[2] for row in connection.execute("PRAGMA database_list")]
        except sqlite3.ProgrammingError:  # it is closed, or belongs to another thread
            continue
        if str(path.resolve()) in files:
            yield connection


def _sqlite_mode(connection: sqlite3.Connection) -> tuple[int, str]:
    (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
    (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
    return synchronous, journal


def _check_sessions() -> int:
    """Look at every idle session of this process and return how many there were."""
    connections = [
        found
        for found in gc.get_objects()
        if isinstance(found, (psycopg.Connection, psycopg.AsyncConnection))
        and not found.closed
        and found.pgconn.transaction_status == TransactionStatus.IDLE
        and found.pgconn.pipeline_status == PipelineStatus.OFF
    ]
    for connection in connections:
        _require_on(connection, _SESSION_SETTING)
    return len(connections)


def _require_on(
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], *settings: str
) -> None:
    for name in settings:
        # Below psycopg's own interface, which an asynchronous connection has only for its loop.
        value = connection.pgconn.exec_(f"SHOW {name}".encode()).get_value(0, 0)
        if value != b"on":
            raise NotDurableError(f"{name} is {value!r}")
