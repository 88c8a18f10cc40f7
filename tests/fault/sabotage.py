"""Kills, stops or counts a victim at an exact place; runs inside the victim.

A place is a commit of the database's writer, named by what it changed, or a node's beginning or
end. Heartbeats and looks at an empty queue change nothing that is named here, so a place does not
depend on time: the fourth checkpoint is the fourth checkpoint on a fast machine and on a slow one.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa

from agentflow.checkpoint.planning import Planned, PlannedWrites, ThreadPlan
from agentflow.database.session import Session
from agentflow.database.writer import Call, GroupCommitWriter, Operation
from agentflow.failpoints import arm
from tests.fault.ledger import record

Kind = Literal["claim", "thread", "run", "writes", "checkpoint", "insert", "node"]
"""What a commit changed: `thread` is acquiring or releasing it, `run` a transition of the run.

`insert` is no commit but the middle of one: before a checkpoint is decided on, and after the
statement that writes it. What is put alone is committed by that statement, so the moment after it
exists only in company: where the batch holds something else as well, and is a transaction.
"""
Moment = Literal["before", "after"]

FAILPOINTS = (
    "database.before_commit",
    "database.after_commit",
    "checkpoint.before_insert",
    "checkpoint.after_insert",
)
"""Every failpoint that these tests arm; a test holds the list against the source."""

# One statement may change several tables. Every put raises its thread's number, which is no change
# of the thread.
_CHANGE = re.compile(
    r"\b(?:INSERT INTO|UPDATE(?! agentflow_threads (?:t )?SET seq)|DELETE FROM) agentflow_(\w+)"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Before or after the `number`-th time that something of a kind happens in the victim."""

    kind: Kind
    number: int
    moment: Moment

    def __str__(self) -> str:
        return f"{self.moment}-{self.kind}-{self.number}"

    def plain(self) -> dict[str, Any]:
        """Return what `Sabotage` is made from in the victim."""
        return asdict(self)


class Sabotage:
    """Sends this process a signal when it passes a place, or reports every place to the ledger."""

    def __init__(
        self,
        ledger: str,
        *,
        at: Place | None = None,
        how: str = "SIGKILL",
        company: bool = False,
    ) -> None:
        """Act at one place; without one, report them all.

        Args:
            ledger: Where to report.
            at: The place.
            how: The signal.
            company: Whether to put another operation before every batch of this process' writer.
                What would be one statement that commits by itself is a part of a transaction then,
                as it is beside a heartbeat, or beside what another run needs.
        """
        self._ledger = ledger
        self._at = at
        self._how = signal.Signals[how]
        self._company = company
        self._passed: Counter[tuple[str, str]] = Counter()
        self._writer = 0
        self._changed: set[str] = set()
        self._kinds: tuple[Kind, ...] = ()

    def arm(self) -> None:
        """From now on watch the writer's transactions."""
        _wrap(GroupCommitWriter, "_transact", before=self._begin)
        sa.event.listen(sa.Engine, "before_cursor_execute", self._execute)
        # The checkpointer's statements go past SQLAlchemy.
        for name in ("execute", "execute_many", "commit_by"):
            _wrap(Session, name, before=lambda _, sql, *__: self._note(sql))
        if self._company:
            _keep_company()
            _wrap(Session, "commit_by", after=self._executed)
        _wrap(ThreadPlan, "add", after=self._planned)
        arm("database.before_commit", self._before_commit)
        arm("database.after_commit", self._after_commit)
        arm("checkpoint.before_insert", lambda: self.meet("insert", "before"))
        arm("checkpoint.after_insert", lambda: self.meet("insert", "after"))

    def meet(self, kind: Kind, moment: Moment) -> None:
        """Note that the victim passes a place."""
        self._passed[kind, moment] += 1
        here = Place(kind, self._passed[kind, moment], moment)
        if self._at is None:
            record(self._ledger, event="place", pid=os.getpid(), **here.plain())
        elif here == self._at:
            # To this thread: sent to the process, another thread would take the signal, and this
            # one would go on for a moment, perhaps into the next transaction.
            signal.pthread_kill(threading.get_ident(), self._how)

    def _begin(self, *_: Any, **__: Any) -> None:
        # One who is alone writes in the thread that submits.
        self._writer = threading.get_ident()
        self._changed.clear()

    def _execute(
        self,
        _connection: sa.Connection,
        _cursor: Any,
        statement: str,
        _parameters: Any,
        _context: Any,
        _executemany: bool,
    ) -> None:
        self._note(statement)

    def _note(self, statement: str) -> None:
        if threading.get_ident() == self._writer:
            self._changed.update(_CHANGE.findall(statement))

    def _planned(self, refused: Exception | None, _plan: ThreadPlan, put: Planned) -> None:
        # One statement may name no table of its own: SQLite's triggers find the right ones. Writes
        # that become durable together with a checkpoint may have no row of their own.
        if refused is None:
            self._changed.add("writes" if isinstance(put, PlannedWrites) else "checkpoints")

    def _executed(self, _rows: Any, session: Session, sql: str, *_: Any) -> None:
        # Where one statement is the whole commit, it has no middle, and so no failpoint there.
        assert session._is_open
        if "checkpoints" in _CHANGE.findall(sql):
            self.meet("insert", "after")

    def _before_commit(self) -> None:
        self._kinds = _kinds(self._changed)
        self._changed.clear()
        for kind in self._kinds:
            self.meet(kind, "before")

    def _after_commit(self) -> None:
        for kind in self._kinds:
            self.meet(kind, "after")


def _kinds(changed: set[str]) -> tuple[Kind, ...]:
    """Name a transaction by the tables that it changed; a heartbeat changes `runs` alone."""
    kinds: list[Kind] = []
    if "leases" in changed:
        kinds.append("claim")
    elif "events" in changed:
        kinds.append("run")
    if "writes" in changed:
        kinds.append("writes")
    if "checkpoints" in changed:
        kinds.append("checkpoint")
    if "threads" in changed:
        kinds.append("thread")
    return tuple(kinds)


def _keep_company() -> None:
    alone = GroupCommitWriter._transact

    def in_company(writer: GroupCommitWriter, batch: Sequence[Operation], **how: Any) -> list[Any]:
        return alone(writer, [Call(_ask), *batch], **how)[1:]

    setattr(GroupCommitWriter, "_transact", in_company)  # noqa: B010 -- mypy knows better


def _ask(connection: sa.Connection) -> None:
    connection.execute(sa.select(1))


def _wrap(
    owner: type,
    name: str,
    *,
    before: Callable[..., None] = lambda *_: None,
    after: Callable[..., None] = lambda *_: None,
) -> None:
    """Have each call of a method looked at: its arguments before it, its result and them after."""
    method = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        returned = method(*arguments, **options)
        after(returned, *arguments)
        return returned

    setattr(owner, name, watched)
