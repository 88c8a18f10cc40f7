"""What tests of transactions that meet wait for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import psycopg


def wait_for_lock(url: str, waiting: Future[Any]) -> None:
    """Return once the server says that somebody waits for a lock; `waiting` must not end before."""
    with psycopg.connect(url, autocommit=True) as server:
        query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        while (server.execute(query).fetchone() or (0,))[0] == 0:
            assert not waiting.done()
