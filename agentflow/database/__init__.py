"""One database: its engine, its schema, its one writer and its readers.

This package knows tables, dialects and transactions. What the rows mean is known to `storage` and
`checkpoint` above it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy.engine import Connection

from agentflow.config import Settings
from agentflow.database import migrate
from agentflow.database.connections import Connections
from agentflow.database.engine import READERS, parse_url, snapshot, translated
from agentflow.database.forks import FORKS
from agentflow.database.futures import Future
from agentflow.database.notices import Notices
from agentflow.database.pace import Pace
from agentflow.database.session import Session
from agentflow.database.writer import Call, GroupCommitWriter, Operation
from agentflow.errors import StoreUnavailableError

T = TypeVar("T")
_FIRST_PAUSE, _MAX_PAUSE = 0.02, 1.0


class Database:
    """Connects on first use; may be used from any thread, any event loop, and after a fork.

    Only a child that was forked while its parent was inside SQLite gets `StoreUnavailableError`.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        """Check the URL and its driver; connect to nothing yet.

        Raises:
            UnsupportedUrlError: The URL's scheme is unknown.
            MissingDriverError: Its driver is not installed.
        """
        self._url = parse_url(url)
        self._settings = settings
        self._deadline = settings.store_timeout.total_seconds()
        self._guards: list[Callable[[Connection], None]] = []
        self._open()
        self.name = self._connections.name

    def _open(self) -> None:
        self._forks = FORKS.count
        self._lock = threading.Lock()
        self._is_ready = False
        self._connections = Connections(self._url, self._settings)
        self._reads_files = self._connections.dialect == "sqlite"
        self._writer = GroupCommitWriter(
            self._connections,
            self._ensure_writable,
            deadline=self._deadline,
            settled=self._wake_loops,
        )
        self._notices = Notices(self._url, self._settings)
        self._readers: ThreadPoolExecutor | None = None
        self._pace = Pace()
        self._wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = WeakKeyDictionary()
        self._last_waker: _Waker | None = None
        # The loops for which the writer's present batch has settled something; the writer's own.
        self._woken: deque[_Waker] = deque()

    def _ensure_ready(self) -> None:
        if self._is_ready:
            return
        with self._lock:
            if not self._is_ready:
                migrate.ensure(self._connections.engine, self._url)
                self._is_ready = True

    def guard(self, check: Callable[[Connection], None]) -> None:
        """Have `check` look at the database before this process first writes to it.

        What it raises fails the write; with the next one it is called again.
        """
        if not self._connections.is_memory:
            self._guards.append(check)

    def prove_now(self) -> None:
        """Have the guards look now, unless they have."""
        if self._guards:
            self._check_fork()
            self._persistently(self._ask_guards)

    async def prove(self) -> None:
        """Have the guards look now, unless they have."""
        if self._guards:
            self._check_fork()
            await self._in_reader(self.prove_now)

    def _ensure_writable(self) -> None:
        self._ensure_ready()
        self._ask_guards()

    def _ask_guards(self) -> None:
        with self._lock:
            while self._guards:
                self._snapshot(self._guards[0])
                del self._guards[0]

    def _check_fork(self) -> None:
        if self._forks != FORKS.count:
            if self._connections.is_torn:
                advice = (
                    "this process was forked while its parent was using the database; "
                    "fork when nothing runs, or start a new process"
                )
                raise StoreUnavailableError(self.name, advice)
            # Threads and sockets do not survive a fork: the child starts afresh and leaves its
            # parent's connections alone.
            self._connections.abandon()
            self._open()

    @property
    def notices(self) -> Notices:
        """Who tells of changes, and hears of them."""
        self._check_fork()
        return self._notices

    def submit(self, operation: Operation) -> Future:
        """Queue an operation with the writer; the future ends when it is durable, or has failed."""
        self._check_fork()
        return self._writer.submit(operation)

    def enqueue(self, operation: Operation) -> Future:
        """Queue an operation that its submitter will push."""
        self._check_fork()
        return self._writer.enqueue(operation)

    def push(self, operation: Operation) -> None:
        """Have a queued operation written; see `GroupCommitWriter.push`."""
        self._writer.push(operation)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Run `function` in a transaction of the writer's and return when it is durable.

        Cancelling the caller does not tear the transaction: it commits or fails as a whole.
        """
        outcome: T = await self.settled(self.submit(Call(function)))
        return outcome

    def read_now(self, function: Callable[[Connection], T]) -> T:
        """Run `function` on one consistent snapshot, in the calling thread."""
        self._check_fork()
        if self._connections.is_memory:
            outcome: T = self.submit(Call(function)).result()
            return outcome
        return self._persistently(lambda: self._snapshot(function))

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Run `function` on one consistent snapshot, in a reader thread."""
        self._check_fork()
        if self._connections.is_memory:
            return await self.write(function)
        return await self._in_reader(lambda: self.read_now(function))

    def query_now(self, function: Callable[[Session], T]) -> T:
        """Run single queries, each on what is committed then, in the calling thread."""
        self._check_fork()
        if self._connections.is_memory:
            outcome: T = self.submit(_Query(function)).result()
            return outcome
        return self._persistently(lambda: self._query(function))

    async def query(self, function: Callable[[Session], T]) -> T:
        """Run single queries, each on what is committed then.

        Those of a file are run here and now if they have been quick, the others in a reader thread.
        """
        self._check_fork()
        if self._connections.is_memory:
            outcome: T = await self.settled(self.submit(_Query(function)))
            return outcome
        if self._reads_files and self._is_ready and self._pace.is_quick():
            began = time.monotonic()
            try:
                outcome = self._glance(function)
            except StoreUnavailableError:
                self._pace.took(time.monotonic() - began, has_failed=True)
            else:
                self._pace.took(time.monotonic() - began)
                return outcome
        return await self._in_reader(lambda: self.query_now(function))

    async def _in_reader(self, function: Callable[[], T]) -> T:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="agentflow-reader")
        return await asyncio.get_running_loop().run_in_executor(self._readers, function)

    def _snapshot(self, function: Callable[[Connection], T]) -> T:
        with translated(self._url), snapshot(self._connections.engine) as connection:
            return function(connection)

    def _query(self, function: Callable[[Session], T]) -> T:
        with self._connections.reading() as session:
            return function(session)

    def _glance(self, function: Callable[[Session], T]) -> T:
        with self._connections.glancing() as session:
            return function(session)

    def _persistently(self, attempt: Callable[[], T]) -> T:
        """Read again while the database cannot be reached, until the deadline.

        A database that was never reached is a wrong URL more likely than a restart.
        """
        was_ready = self._is_ready
        with translated(self._url):
            self._ensure_ready()
        until = time.monotonic() + self._deadline
        for pause in _pauses():
            try:
                return attempt()
            except StoreUnavailableError as exc:
                is_lost = exc.outcome in {"unreachable", "unknown"}
                if not was_ready or not is_lost or time.monotonic() + pause > until:
                    raise
                time.sleep(pause)
        raise AssertionError

    def _wake_loops(self) -> None:
        while self._woken:
            self._woken.popleft().wake()

    def close(self) -> None:
        """Write what is queued and close all connections; nothing can be written afterwards."""
        if self._forks != FORKS.count:
            return
        self._writer.close()
        self._notices.close()
        if self._readers is not None:
            self._readers.shutdown()
        self._connections.dispose()

    async def settled(self, future: Future) -> Any:
        """Wait for a writer's future from an event loop; cancelling the waiter leaves it alone.

        Raises:
            Exception: The error with which it ended.
        """
        if not future.done():
            await self._end_of(future)
        return future.result()

    async def ended(self, future: Future) -> None:
        """Wait for the end of a writer's future, whatever it is."""
        if not future.done():
            await self._end_of(future)

    def _end_of(self, future: Future) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        # Nearly always the same one asks.
        waker = self._last_waker
        if waker is None or waker.loop() is not loop:
            waker = self._wakers.get(loop)
            if waker is None:
                waker = self._wakers[loop] = _Waker(loop)
            self._last_waker = waker
        waiter: asyncio.Future[None] = loop.create_future()
        future.add_done_callback(partial(self._wake_later, waker, waiter))
        return waiter

    def _wake_later(self, waker: _Waker, waiter: asyncio.Future[None], _: Future) -> None:
        """Wake a waiter at the end of the writer's batch; at once if it was settled before."""
        waker.waiting.append(waiter)
        if not self._writer.is_writing_here():
            waker.wake()
        elif not self._woken or self._woken[-1] is not waker:
            self._woken.append(waker)


class _Query(Operation):
    """Queries of a database that has one connection only."""

    resendable = True

    def __init__(self, function: Callable[[Session], Any]) -> None:
        super().__init__()
        self.function = function

    @classmethod
    def run(cls, session: Session, operations: Any) -> list[Any]:
        return [operation.function(session) for operation in operations]


class _Waker:
    """Wakes what waits in one event loop: all that a batch has settled with one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Wakers are kept as long as their loops, and must not keep them.
        self.loop = weakref.ref(loop)
        self.waiting: deque[asyncio.Future[None]] = deque()

    def wake(self) -> None:
        """Wake what is waiting."""
        loop = self.loop()
        if loop is None:
            return
        if loop is _running_loop():
            loop.call_soon(self._run)
        else:
            # A loop that was closed has nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _pauses() -> Generator[float, None, None]:
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1)  # noqa: S311 -- jitter
        pause = min(_MAX_PAUSE, pause * 2)
