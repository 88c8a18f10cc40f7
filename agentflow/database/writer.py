"""The one writer of a database: group commit, in order, with failures kept apart.

Everything that this process writes to a database goes through one thread. It takes what is queued,
of all runs, and commits it in one transaction, so that fifty runs share the cost of one fsync.
Operations run in the order in which they were submitted. If a batch raises, nothing of it is kept,
and it is tried again one operation at a time, so that only the offender fails.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from sqlalchemy.engine import URL, Connection, Engine

from agentflow.database.engine import translated, writing
from agentflow.errors import StoreUnavailableError
from agentflow.failpoints import failpoint

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 8 * 1024 * 1024
"""A batch is closed once it holds this much; one larger operation is a batch of its own."""
COMPANY_WAIT = 0.002
"""Seconds that operations which are in no hurry wait for others to share a commit with."""


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
    patient: bool = False
    """Whether it may wait a moment for company."""
    resendable: bool = False
    """Whether running it again after a commit of unknown outcome gives the same end state."""

    def __init__(self) -> None:
        """Start with an open future."""
        self.future: Future[Any] = Future()

    @property
    def family(self) -> type[Operation]:
        """Neighbours of one family are run together, by its `run`."""
        return type(self)

    @classmethod
    @abstractmethod
    def run(cls, connection: Connection, operations: Sequence[Any]) -> list[Any]:
        """Execute neighbouring operations of this family and return an outcome for each."""


class Call(Operation):
    """A function of the connection; one verb of a store."""

    def __init__(self, function: Callable[[Connection], Any]) -> None:
        """Run `function` inside the transaction; what it returns is the outcome."""
        super().__init__()
        self.function = function

    @classmethod
    def run(cls, connection: Connection, operations: Sequence[Call]) -> list[Any]:
        """Call each function in turn."""
        return [operation.function(connection) for operation in operations]


class GroupCommitWriter:
    """Owns the thread, its connection and its queue; started by the first operation."""

    def __init__(self, engine: Engine, url: URL, prepare: Callable[[], None]) -> None:
        """Write through `engine`; `prepare` is called before each batch."""
        self._engine = engine
        self._url = url
        self._prepare = prepare
        self._queue: deque[Operation] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation; its future ends when it is durable, or has failed."""
        with self._wake:
            if self._closing:
                raise StoreUnavailableError(str(self._url.database), "it was closed")
            self._queue.append(operation)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="agentflow-writer", daemon=True
                )
                self._thread.start()
            self._wake.notify()
        return operation.future

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._wake:
            self._closing = True
            thread = self._thread
            self._wake.notify()
        if thread is not None:
            thread.join()

    def _serve(self) -> None:
        while batch := self._take():
            try:
                self._write(batch)
            except BaseException as exc:
                logger.exception("the writer failed", extra={"operations": len(batch)})
                for operation in batch:
                    _settle(operation, Rejected(_as_exception(exc)))

    def _take(self) -> list[Operation]:
        """Wait for operations and take a batch; empty once closed and drained."""
        with self._wake:
            while not self._queue:
                if self._closing:
                    return []
                self._wake.wait()
            deadline = time.monotonic() + COMPANY_WAIT
            while all(operation.patient for operation in self._queue) and not self._closing:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._wake.wait(remaining)
            batch = [self._queue.popleft()]
            size = batch[0].size
            while self._queue and size + self._queue[0].size <= MAX_BATCH_BYTES:
                size += self._queue[0].size
                batch.append(self._queue.popleft())
            return batch

    def _write(self, batch: list[Operation]) -> None:
        try:
            with translated(self._url):
                self._prepare()
        except Exception as exc:  # noqa: BLE001 -- every failure is handed to its submitter
            outcomes: list[Any] = [Rejected(exc)] * len(batch)
        else:
            try:
                with translated(self._url):
                    outcomes = self._transact(batch)
            except Exception as exc:  # noqa: BLE001 -- every failure is handed to its submitter
                self._write_apart(batch, exc)
                return
        for operation, outcome in zip(batch, outcomes, strict=True):
            _settle(operation, outcome)

    def _write_apart(self, batch: list[Operation], error: Exception) -> None:
        """Give each operation of a failed batch a transaction of its own."""
        outcome_is = error.outcome if isinstance(error, StoreUnavailableError) else None
        for operation in batch:
            # Where the commit may have happened, only what can be sent again without harm is.
            may_repeat = operation.resendable if outcome_is == "unknown" else len(batch) > 1
            if outcome_is == "not_written" or not may_repeat:
                _settle(operation, Rejected(error))
                continue
            try:
                with translated(self._url):
                    (outcome,) = self._transact([operation])
            except Exception as exc:  # noqa: BLE001 -- every failure is handed to its submitter
                outcome = Rejected(exc)
            _settle(operation, outcome)

    def _transact(self, batch: Sequence[Operation]) -> list[Any]:
        outcomes: list[Any] = []
        with writing(self._engine) as connection:
            for kind, group in _neighbours(batch):
                outcomes.extend(kind.run(connection, group))
            failpoint("database.before_commit")
        failpoint("database.after_commit")
        return outcomes


def _neighbours(batch: Sequence[Operation]) -> list[tuple[type[Operation], list[Operation]]]:
    groups: list[tuple[type[Operation], list[Operation]]] = []
    for operation in batch:
        if not groups or groups[-1][0] is not operation.family:
            groups.append((operation.family, []))
        groups[-1][1].append(operation)
    return groups


def _settle(operation: Operation, outcome: Any) -> None:
    if not operation.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Rejected):
        operation.future.set_exception(outcome.error)
    else:
        operation.future.set_result(outcome)


def _as_exception(exc: BaseException) -> Exception:
    return exc if isinstance(exc, Exception) else RuntimeError(type(exc).__name__)
