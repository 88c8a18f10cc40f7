"""The one writer of a database: group commit, in order, with failures kept apart.

Everything that this process writes to a database goes through one thread. It takes what is queued,
of all runs, and commits it in one transaction, so that fifty runs share the cost of one fsync.
Operations run in the order in which they were submitted. If a batch raises, nothing of it is kept,
and it is tried again one operation at a time, so that only the offender fails. While the database
cannot be reached, what may be sent again is sent again, until the deadline.

A run that is alone pays for the change of threads in each step, and nobody shares its commits. So
what only one owner has written for a while is committed by the thread that submits it; if that is
an event loop's, as long as that mostly takes no longer than another thread may keep the loop from
the interpreter anyway (`pace`). Whatever goes wrong there is left to the writer's thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy.engine import Connection

from agentflow.database.connections import Connections
from agentflow.database.engine import translated
from agentflow.database.futures import Future
from agentflow.database.pace import Pace
from agentflow.database.session import Session
from agentflow.errors import StoreUnavailableError
from agentflow.failpoints import failpoint

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 8 * 1024 * 1024
"""A batch is closed once it holds this much; one larger operation is a batch of its own."""
COMPANY_WAIT = 0.002
"""Seconds that operations which are in no hurry wait for others to share a commit with."""
_LOOKS = 10
"""How often an idle writer looks into its queue before it falls asleep."""
_FIRST_PAUSE, _MAX_PAUSE = 0.02, 1.0
"""Seconds between two attempts to reach the database."""
_ALONE = 4
"""After how many urgent operations of one owner, and none of others, the owner is alone."""
_HERE_BYTES = 256 * 1024
"""How much that thread writes at most."""
_DECIDED = {"not_written", "contended"}
"""Outcomes after which another attempt at the whole batch would only fail again."""


class Rejected:
    """What an operation returns when it refused without having written anything.

    Unlike an exception it does not undo the batch, so losing a race costs the others nothing.
    """

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        """Carry the error for the one who submitted the operation."""
        self.error = error


class Operation(ABC):
    """Something to write, and the future of its outcome."""

    size: int = 0
    """Bytes that it will send, roughly."""
    is_patient: bool = False
    """Whether it may wait a moment for company."""
    resendable: bool = False
    """Whether running it again after a commit of unknown outcome gives the same end state."""
    owner: object = None
    """Who writes, to tell one who is alone; `None` for what comes beside everybody's operations."""
    was_sent: bool = False
    """Whether it may have been committed, though its future is open."""

    def __init__(self) -> None:
        """Start with an open future."""
        self.future = Future()

    def explain(self, error: Exception) -> Exception:
        """Return what to tell the caller about an error of the database's."""
        return error

    @classmethod
    def commits_itself(cls) -> bool:
        """Whether `run` needs no transaction around it, since it makes its own."""
        return False

    @classmethod
    @abstractmethod
    def run(cls, session: Session, operations: Sequence[Any]) -> list[Any]:
        """Execute neighbouring operations of this class and return an outcome for each."""


class Call(Operation):
    """A function of the connection; one verb of a store."""

    def __init__(self, function: Callable[[Connection], Any]) -> None:
        """Run `function` inside the transaction; what it returns is the outcome."""
        super().__init__()
        self.function = function

    @classmethod
    def run(cls, session: Session, operations: Sequence[Call]) -> list[Any]:
        """Call each function in turn."""
        return [operation.function(session.connection) for operation in operations]


class GroupCommitWriter:
    """Owns the thread and its queue; started by the first operation."""

    def __init__(
        self,
        connections: Connections,
        prepare: Callable[[], None],
        *,
        deadline: float,
        settled: Callable[[], None],
    ) -> None:
        """Write through `connections`.

        Args:
            connections: Where sessions come from.
            prepare: Called before each batch.
            deadline: Seconds to go on trying while the database cannot be reached.
            settled: Called after each batch whose futures have ended.
        """
        self._connections = connections
        self._prepare = prepare
        self._deadline = deadline
        self._settled = settled
        self._queue: deque[Operation] = deque()
        # Waking a thread costs both threads more than a commit of SQLite does. While it is awake
        # the writer looks into the queue by itself, and only what is urgent wakes it at once.
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_signalled = False
        self._is_asleep = False
        self._lock = threading.Lock()
        # Held from the moment in which operations leave the queue until they have ended.
        self._role = threading.Lock()
        self._holder: int | None = None
        self._company = _Company()
        self._pace_of_loops = Pace()
        self._pace_of_threads = Pace(is_for_loop=False)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._was_reached = False

    def submit(self, operation: Operation) -> Future:
        """Queue an operation; its future ends when it is durable, or has failed."""
        future = self.enqueue(operation)
        self.push(operation)
        return future

    def enqueue(self, operation: Operation) -> Future:
        """Queue an operation, of which nobody hears before it is pushed."""
        with self._lock:
            if self._closing.is_set():
                raise StoreUnavailableError(self._connections.name, "it was closed")
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="agentflow-writer", daemon=True)
                # If none can be had, nothing is queued, and the next operation asks again.
                thread.start()
                self._thread = thread
            self._queue.append(operation)
            self._company.meet(operation)
        return operation.future

    def push(self, operation: Operation) -> None:
        """Have a queued operation written, perhaps by the calling thread and before this returns.

        The caller must hold no lock that the end of any operation takes.
        """
        try:
            if self._may_write_here(operation) and self._role.acquire(blocking=False):
                try:
                    self._write_here(type(operation))
                finally:
                    self._holder = None
                    self._role.release()
                if not self._queue:
                    return
        finally:
            with self._lock:
                if self._queue and (self._is_asleep or not operation.is_patient):
                    self._wake()

    def is_writing_here(self) -> bool:
        """Whether the calling thread is the one that writes now."""
        return self._holder == threading.get_ident()

    def _may_write_here(self, operation: Operation) -> bool:
        is_urgent = operation.commits_itself() and not operation.is_patient and self._was_reached
        is_quick = self._pace().is_quick() and not self._connections.is_log_short
        return is_urgent and self._company.lacks(operation) and is_quick

    def _pace(self) -> Pace:
        """Return that of callers like this one: a thread of a caller's own would wait anyway."""
        return self._pace_of_loops if _is_in_loop() else self._pace_of_threads

    def _write_here(self, kind: type[Operation]) -> None:
        """Commit what is queued in the thread of the submitter; leave it there if that fails.

        The caller may be an event loop, so nothing is waited for: no lock of the database, no
        server that is slow, no second attempt.
        """
        self._holder = threading.get_ident()
        queued = tuple(self._queue)
        if (
            any(type(op) is not kind for op in queued)
            or sum(op.size for op in queued) > _HERE_BYTES
        ):
            return
        batch = [self._queue.popleft() for _ in queued]
        began = time.monotonic()
        error: BaseException | None = None
        try:
            error = self._attempt(batch, is_patient=False) if batch else None
        except BaseException as exc:
            error = exc
            raise
        finally:
            if error is not None:
                for operation in batch:
                    operation.was_sent = operation.was_sent or _may_be_written(error)
                self._queue.extendleft(reversed(batch))
            self._pace().took(time.monotonic() - began, has_failed=error is not None)
            self._tell()

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._lock:
            self._closing.set()
            self._wake()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _wake(self) -> None:
        if not self._is_signalled:
            self._is_signalled = True
            self._signal.put(None)

    def _serve(self) -> None:
        try:
            while self._await_work():
                with self._role:
                    self._holder = threading.get_ident()
                    try:
                        # In no variable, which would keep what was written until there is more.
                        self._serve_batch(self._pop())
                    finally:
                        self._holder = None
            with self._role:
                self._connections.end_writing()
        finally:
            with self._lock:
                # However it ends, what is queued later gets another one.
                self._thread = None

    def _serve_batch(self, batch: list[Operation]) -> None:
        if not batch:
            return
        try:
            self._write(batch)
        except BaseException as exc:
            logger.exception("the writer failed", extra={"operations": len(batch)})
            for operation in batch:
                _settle(operation, Rejected(_as_exception(exc)))
        self._tell()

    def _tell(self) -> None:
        try:
            self._settled()
        except Exception:  # whoever else waits must not wait for ever
            logger.exception("the writer could not wake an event loop")

    def _await_work(self) -> bool:
        """Wait for operations that have to be written now; `False` once closed and drained."""
        self._listen()
        deadline: float | None = None
        while not self._queue or self._may_wait():
            if self._queue:
                now = time.monotonic()
                deadline = deadline or now + COMPANY_WAIT
                if now >= deadline:
                    break
                self._sleep(deadline - now)
            elif self._closing.is_set():
                return False
            else:
                deadline = None
                self._rest()
        return True

    def _pop(self) -> list[Operation]:
        """Take a batch out of the queue; by whoever has the role of the writer."""
        if not self._queue:
            return []
        batch = [self._queue.popleft()]
        size = batch[0].size
        while self._queue and size + self._queue[0].size <= MAX_BATCH_BYTES:
            operation = self._queue.popleft()
            size += operation.size
            batch.append(operation)
        return batch

    def _may_wait(self) -> bool:
        return not self._closing.is_set() and all(op.is_patient for op in tuple(self._queue))

    def _listen(self) -> None:
        """Take back a signal for what the writer is going to see anyway."""
        if self._is_signalled:
            self._sleep(0)

    def _sleep(self, pause: float | None) -> bool:
        """Wait for a signal, so long at most; say whether there was one."""
        try:
            if pause == 0:
                self._signal.get_nowait()
            else:
                self._signal.get(timeout=pause)
        except queue.Empty:
            return False
        self._is_signalled = False
        return True

    def _rest(self) -> None:
        """Wait until there is something to do; after some looks in vain for as long as it takes."""
        for _ in range(_LOOKS):
            if self._sleep(COMPANY_WAIT) or self._queue:
                return
        self._is_asleep = True
        if not self._queue and not self._closing.is_set():
            self._sleep(None)
        self._is_asleep = False

    def _write(self, batch: list[Operation]) -> None:
        until = time.monotonic() + self._deadline
        pause = _FIRST_PAUSE
        was_unknown = any(operation.was_sent for operation in batch)
        while (error := self._attempt(batch)) is not None:
            if was_unknown and isinstance(error, StoreUnavailableError):
                # Whatever became of this attempt, an earlier one may have been committed.
                error = StoreUnavailableError(error.store, error.reason, "unknown")
            if isinstance(error, StoreUnavailableError) and time.monotonic() >= until:
                # Apart, each of them would wait as long again.
                self._give_up(batch, error, lambda _: True)
                return
            if not isinstance(error, StoreUnavailableError) or error.outcome in _DECIDED:
                self._write_apart(batch, error)
                return
            if error.outcome == "unknown":
                was_unknown = True
                batch = self._give_up(batch, error, lambda operation: not operation.resendable)
            # A database that was never reached is a wrong URL more likely than a restart.
            is_late = time.monotonic() + pause > until or self._closing.is_set()
            if is_late or not self._was_reached:
                batch = self._give_up(batch, error, lambda _: True)
            if not batch:
                return
            self._closing.wait(pause * random.uniform(0.5, 1))  # noqa: S311 -- jitter
            pause = min(_MAX_PAUSE, pause * 2)

    @staticmethod
    def _give_up(
        batch: list[Operation], error: Exception, is_hopeless: Callable[[Operation], bool]
    ) -> list[Operation]:
        """Fail some operations of a batch and return the others."""
        for operation in batch:
            if is_hopeless(operation):
                _settle(operation, Rejected(error))
        return [operation for operation in batch if not is_hopeless(operation)]

    def _attempt(self, batch: list[Operation], *, is_patient: bool = True) -> Exception | None:
        """Write a batch and settle it, or say why it could not be written."""
        try:
            if not self._was_reached:
                with translated(self._connections.url):
                    self._prepare()
                self._was_reached = True
            outcomes = self._transact(batch, is_patient=is_patient)
        except Exception as exc:  # noqa: BLE001 -- every failure is handed to its submitter
            return exc
        for operation, outcome in zip(batch, outcomes, strict=True):
            _settle(operation, outcome)
        return None

    def _write_apart(self, batch: list[Operation], error: Exception) -> None:
        """Give each operation of a failed batch a transaction of its own."""
        if len(batch) == 1:
            _settle(batch[0], Rejected(batch[0].explain(error)))
            return
        for operation in batch:
            self._write([operation])

    def _transact(self, batch: Sequence[Operation], *, is_patient: bool) -> list[Any]:
        groups = _neighbours(batch)
        if len(groups) == 1 and groups[0][0].commits_itself():
            run = partial(_run_committing, *groups[0])
            return self._connections.run_committing(run, is_patient=is_patient)
        with self._connections.writing() as session:
            outcomes: list[Any] = []
            for kind, group in groups:
                outcomes.extend(kind.run(session, group))
            failpoint("database.before_commit")
        failpoint("database.after_commit")
        session.committed()
        return outcomes


class _Company:
    """Watches who writes."""

    def __init__(self) -> None:
        self._owner: object = None
        self._streak = 0

    def meet(self, operation: Operation) -> None:
        """Note an operation that was queued."""
        if operation.owner is None or operation.is_patient:
            return
        self._streak = self._streak + 1 if operation.owner == self._owner else 0
        self._owner = operation.owner

    def lacks(self, operation: Operation) -> bool:
        """Whether nobody but the owner of an operation has written for a while."""
        is_owner = operation.owner is not None and operation.owner == self._owner
        return is_owner and self._streak >= _ALONE


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_committing(
    kind: type[Operation], operations: list[Operation], session: Session
) -> list[Any]:
    outcomes = kind.run(session, operations)
    failpoint("database.after_commit")
    session.committed()
    return outcomes


def _neighbours(batch: Sequence[Operation]) -> list[tuple[type[Operation], list[Operation]]]:
    groups: list[tuple[type[Operation], list[Operation]]] = []
    for operation in batch:
        if not groups or groups[-1][0] is not type(operation):
            groups.append((type(operation), []))
        groups[-1][1].append(operation)
    return groups


def _settle(operation: Operation, outcome: Any) -> None:
    if isinstance(outcome, Rejected):
        operation.future.settle(error=outcome.error)
    else:
        operation.future.settle(outcome)


def _may_be_written(error: BaseException) -> bool:
    if isinstance(error, StoreUnavailableError):
        return error.outcome == "unknown"
    return not isinstance(error, Exception)


def _as_exception(exc: BaseException) -> Exception:
    return exc if isinstance(exc, Exception) else RuntimeError(type(exc).__name__)
