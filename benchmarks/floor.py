"""The floor below any durable checkpointer: bare commits of one small row by the raw driver."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

_ROW = bytes(range(50)) * 6  # 300 bytes

Commits = Callable[[int], float]
"""Makes that many commits and returns the seconds."""


@contextmanager
def sqlite_commits(path: Path) -> Iterator[Commits]:
    """Commit through `sqlite3`, with a write-ahead log and full synchronisation."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE floor (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")

    def commit(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            connection.execute("INSERT INTO floor (body) VALUES (?)", (_ROW,))
        return time.perf_counter() - began

    try:
        yield commit
    finally:
        connection.close()


@contextmanager
def postgres_commits(url: str) -> Iterator[Commits]:
    """Commit through `psycopg`, by a prepared statement on a connection that commits by itself."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        connection.execute("CREATE TABLE floor (id bigserial PRIMARY KEY, body bytea NOT NULL)")

        def commit(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                connection.execute("INSERT INTO floor (body) VALUES (%s)", (_ROW,))
            return time.perf_counter() - began

        yield commit
