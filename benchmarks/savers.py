"""LangGraph's savers, each opened as its documentation does it best.

agentflow's needs nothing of the kind: `open_checkpointer(url)` with its defaults.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

OURS = "agentflow"
MEMORY = "InMemorySaver"
SQLITE = "AsyncSqliteSaver"
POOL = "AsyncPostgresSaver, pool"
PIPELINE = "AsyncPostgresSaver, pipeline"

_POOL_SIZE = 20


@asynccontextmanager
async def open_sqlite_saver(path: Path) -> AsyncIterator[AsyncSqliteSaver]:
    """Open `AsyncSqliteSaver` with a write-ahead log, waiting for the disk as agentflow does."""
    async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
        await saver.setup()  # switches to the write-ahead log
        await saver.conn.execute("PRAGMA synchronous=FULL")
        yield saver


@asynccontextmanager
async def open_pool_saver(url: str) -> AsyncIterator[AsyncPostgresSaver]:
    """Open `AsyncPostgresSaver` on a pool of connections."""
    options: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": 0,
        "row_factory": dict_row,
    }
    pool: AsyncConnectionPool[AsyncConnection[DictRow]] = AsyncConnectionPool(
        url, max_size=_POOL_SIZE, kwargs=options, open=False
    )
    async with pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        yield saver


@asynccontextmanager
async def open_pipeline_saver(url: str) -> AsyncIterator[AsyncPostgresSaver]:
    """Open `AsyncPostgresSaver` on one connection that stays in pipeline mode."""
    # Its tables are made outside of the pipeline, where PostgreSQL refuses to.
    async with AsyncPostgresSaver.from_conn_string(url) as saver:
        await saver.setup()
    async with AsyncPostgresSaver.from_conn_string(url, pipeline=True) as saver:
        yield saver
