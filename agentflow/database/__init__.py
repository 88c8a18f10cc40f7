"""One database: its engine, its schema, its one writer and its readers.

This package knows tables, dialects and transactions. What the rows mean is known to `storage` and
`checkpoint` above it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from agentflow.config import Settings
from agentflow.database import migrate
from agentflow.database.engine import (
    READERS,
    display_url,
    is_memory,
    make_engine,
    parse_url,
    snapshot,
    translated,
)
from agentflow.database.writer import Call, GroupCommitWriter, Operation

T = TypeVar("T")


class Database:
    """Connects on first use; may be used from any thread, any event loop, and after a fork."""

    def __init__(self, url: str, settings: Settings) -> None:
        """Check the URL and its driver; connect to nothing yet.

        Raises:
            UnsupportedUrlError: The URL's scheme is unknown.
            MissingDriverError: Its driver is not installed.
        """
        self._url = parse_url(url)
        self._settings = settings
        self._in_memory = is_memory(self._url)
        self.name = display_url(self._url)
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_ready = False
        self._engine = make_engine(self._url, self._settings)
        self._writer = GroupCommitWriter(self._engine, self._url, self._ensure_ready)
        self._readers: ThreadPoolExecutor | None = None

    def _ensure_ready(self) -> None:
        if self._is_ready:
            return
        with self._lock:
            if not self._is_ready:
                migrate.ensure(self._engine, self._url)
                self._is_ready = True

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            # Threads and sockets do not survive a fork: the child starts afresh and leaves its
            # parent's connections alone.
            self._engine.dispose(close=False)
            self._open()

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation with the writer; the future ends when it is durable, or has failed."""
        self._check_fork()
        return self._writer.submit(operation)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Run `function` in a transaction of the writer's and return when it is durable.

        Cancelling the caller does not tear the transaction: it commits or fails as a whole.
        """
        outcome: T = await settled(self.submit(Call(function)))
        return outcome

    def read_now(self, function: Callable[[Connection], T]) -> T:
        """Run `function` on one consistent snapshot, in the calling thread."""
        self._check_fork()
        if self._in_memory:
            outcome: T = self.submit(Call(function)).result()
            return outcome
        with translated(self._url):
            self._ensure_ready()
            with snapshot(self._engine) as connection:
                return function(connection)

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Run `function` on one consistent snapshot, in a reader thread."""
        self._check_fork()
        if self._in_memory:
            return await self.write(function)
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="agentflow-reader")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self.read_now, function)

    def close(self) -> None:
        """Write what is queued and close all connections; nothing can be written afterwards."""
        if self._pid != os.getpid():
            return
        self._writer.close()
        if self._readers is not None:
            self._readers.shutdown()
        self._engine.dispose()


async def settled(future: Future[Any]) -> Any:
    """Wait for a writer's future from an event loop; cancelling the waiter leaves it alone."""
    return await asyncio.shield(asyncio.wrap_future(future))
