"""LangGraph's savers, each opened as its documentation does it best, and the least there can be.

agentflow's needs nothing of the kind: `open_checkpointer(url)` with its defaults.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from benchmarks.floor import sqlite_commits

OURS = "agentflow"
MEMORY = "InMemorySaver"
SQLITE = "AsyncSqliteSaver"
POOL = "AsyncPostgresSaver, pool"
PIPELINE = "AsyncPostgresSaver, pipeline"

BARE = "a bare commit in a thread"

_POOL_SIZE = 20


class BareSaver(InMemorySaver):
    """Stores nothing: each checkpoint waits for a bare commit that a thread makes for all.

    No saver that keeps the event loop free can do with less.
    """

    def __init__(self, path: Path) -> None:
        """Commit to a SQLite database at `path`."""
        super().__init__()
        self._path = path
        self._waiting: queue.SimpleQueue[asyncio.Future[None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._waiting.put(None)
        self._thread.join()

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Wait for a commit."""
        del metadata, new_versions
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(waiter)
        await waiter
        configurable = {**config["configurable"], "checkpoint_id": checkpoint["id"]}
        return {**config, "configurable": configurable}

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Drop them."""

    def _serve(self) -> None:
        with sqlite_commits(self._path) as commit:
            while (first := self._waiting.get()) is not None:
                waiters = [first]
                while not self._waiting.empty():
                    waiter = self._waiting.get()
                    if waiter is None:
                        return
                    waiters.append(waiter)
                commit(1)
                first.get_loop().call_soon_threadsafe(_wake, waiters)


def _wake(waiters: Sequence[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        waiter.set_result(None)


@asynccontextmanager
async def open_bare_saver(path: Path) -> AsyncIterator[BareSaver]:
    """Open the least that there can be."""
    saver = BareSaver(path)
    try:
        yield saver
    finally:
        saver.close()


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
