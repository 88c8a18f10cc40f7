"""What the database's writer runs for a saver: puts, many in one batch, and verbs on a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from agentflow.checkpoint.batch import After, Batch, ThreadStates
from agentflow.checkpoint.planning import conflict
from agentflow.checkpoint.puts import Planned, PlannedCheckpoint
from agentflow.checkpoint.rows import Rows
from agentflow.checkpoint.sql import open_rows
from agentflow.database.futures import Future
from agentflow.database.session import Session
from agentflow.database.writer import MAX_BATCH_BYTES, Operation, Rejected


class Put(Operation):
    """A put of a checkpoint, or of writes; all that are neighbours run in one batch, in order."""

    resendable = True

    def __init__(
        self, planned: Planned, states: ThreadStates, *, size: int, is_followed: bool = False
    ) -> None:
        """Hold what is to be written, and where the states of threads are remembered.

        `is_followed` says that another put is about to follow, and this one may wait for it.
        """
        super().__init__()
        self.planned = planned
        self.states = states
        self.size = size
        self.is_patient = is_followed or not isinstance(planned, PlannedCheckpoint)
        self.owner = planned.key[:2]
        self.previous: Future | None = None
        """The operation of the same invocation before this one."""

    @classmethod
    def commits_itself(cls) -> bool:
        """Puts are applied by one statement, or in a transaction of their own."""
        return True

    def explain(self, error: Exception) -> Exception:
        """Name what a database calls a duplicate: somebody else has put a checkpoint of this id."""
        is_duplicate = any(cls.__name__ == "IntegrityError" for cls in type(error).__mro__)
        return conflict(self.planned.key[1]) if is_duplicate else error

    @classmethod
    def run(cls, session: Session, operations: Sequence[Put]) -> list[Any]:
        """Write what may be written, in order, and say for each what became of it."""
        places = {operation.future: place for place, operation in enumerate(operations)}
        puts = [operation.planned for operation in operations]
        after = [_outcome(operation.previous, places) for operation in operations]
        batch = Batch(open_rows(session), operations[0].states, puts, after)
        try:
            batch.run()
        finally:
            # From here on it may be stored, whatever the caller is told.
            for put in puts:
                if isinstance(put, PlannedCheckpoint):
                    put.was_sent = True
        session.after_commit(batch.publish)
        return [None if error is None else Rejected(error) for error in batch.outcomes]


def _outcome(previous: Future | None, places: Mapping[Future, int]) -> After:
    """Say what a put depends on: one of the same batch, or something that is over."""
    if previous is None:
        return None
    if previous in places:
        return places[previous]
    return previous.exception() if previous.done() else None


class Verb(Operation):
    """A change of threads that is decided under their locks, and is safe to run twice."""

    resendable = True

    def __init__(self, function: Callable[[Rows], Any], *, is_step: bool = False) -> None:
        """Run `function` in a transaction; what it returns is the outcome.

        Args:
            function: What to run.
            is_step: It does as much as one transaction should, and shares it with no other step.
        """
        super().__init__()
        self.function = function
        self.size = MAX_BATCH_BYTES if is_step else 0

    @classmethod
    def run(cls, session: Session, operations: Sequence[Verb]) -> list[Any]:
        """Call each function in turn."""
        return [operation.function(open_rows(session)) for operation in operations]


class Short(Operation):
    """A change of a thread that is one statement, decides by itself, and is safe to run twice."""

    resendable = True

    def __init__(self, function: Callable[[Rows], Any]) -> None:
        """Run `function`; what it returns is the outcome."""
        super().__init__()
        self.function = function

    @classmethod
    def commits_itself(cls) -> bool:
        """One commits by its statement; several share a commit."""
        return True

    @classmethod
    def run(cls, session: Session, operations: Sequence[Short]) -> list[Any]:
        """Call each function in turn."""
        with session.transaction() if len(operations) > 1 else nullcontext():
            return [operation.function(open_rows(session)) for operation in operations]
