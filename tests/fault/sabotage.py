"""Kills, stops, cuts off or counts a victim at an exact place; runs inside the victim.

A place is a commit of the database's writer, named by what it changed; or a verb of one of the two
ports, before it is called and after it has returned; or a node's beginning or end. Heartbeats and
looks at an empty queue change nothing that is named here, so a place does not depend on time: the
fourth checkpoint is the fourth checkpoint on a fast machine and on a slow one.

A verb of the run store is a place in four moments: `before` it is called; `uncommitted`, when its
transaction has done everything but its commit; `committed`, when nobody knows of that yet; and
`after`, when it has returned.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import sqlalchemy as sa

from agentflow.checkpoint import Saver
from agentflow.checkpoint.planning import ThreadPlan
from agentflow.checkpoint.puts import Planned, PlannedWrites
from agentflow.checkpoint.rows import Rows
from agentflow.checkpoint.sql import PostgresRows, SqliteRows
from agentflow.database.prepared import On, Prepared
from agentflow.database.session import Session
from agentflow.database.writer import Call, GroupCommitWriter, Operation
from agentflow.failpoints import arm, instrument, points, transitions
from agentflow.storage import RunStore
from agentflow.storage.sql import SqlRunStore
from tests.fault.ledger import record
from tests.proxy import ask

Kind = str
"""What a commit changed: `claim`; `thread`, acquiring or releasing it; `run`, a transition of the
run; `writes`; `checkpoint`. Or `node`. Or a verb, such as `RunStore.park_run` or `Rows.apply`.

`insert` is no commit but the middle of one: before a checkpoint is decided on, and after the
statement that writes it. What is put alone is committed by that statement, so the moment after it
exists only in company: where the batch holds something else as well, and is a transaction.
"""
Moment = Literal["before", "uncommitted", "committed", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "uncommitted", "committed", "after")

VERBS = transitions(RunStore, reads={"close", "next_due", "subscribe", "survey"})
"""By which something becomes durable; whatever is added to the port is among them."""
ROW_VERBS = transitions(
    Rows, reads={"exclude_referrers", "exclusive", "has_objects", "locate", "scan", "sweep"}
)
SAVER_VERBS = ("acquire", "aput", "aput_writes", "release")
"""What a worker asks of the checkpointer."""
_PERIODIC = {
    "RunStore.beat_worker",
    "RunStore.claim_runs",
    "RunStore.extend_leases",
    "RunStore.fire_due",
    "RunStore.remove_worker",
}
"""Called again and again: how often, before something happens, is a matter of time."""

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
            how: The signal; or the address of the proxy's that is to cut the connections.
            company: Whether to put another operation before every batch of this process' writer.
                What would be one statement that commits by itself is a part of a transaction then,
                as it is beside a heartbeat, or beside what another run needs.
        """
        self._ledger = ledger
        self._at = at
        self._how = how
        self._company = company
        self._passed: Counter[tuple[str, str]] = Counter()
        self._writer = 0
        self._changed: Counter[str] = Counter()
        self._inserted = 0
        self._kinds: tuple[Kind, ...] = ()
        self._verb: ContextVar[Kind | None] = ContextVar("verb", default=None)
        self._verbs: weakref.WeakKeyDictionary[Operation, Kind] = weakref.WeakKeyDictionary()
        self._committing: list[Kind] = []

    def arm(self) -> None:
        """From now on watch the writer's transactions, and the verbs."""
        _wrap(GroupCommitWriter, "enqueue", before=self._submitted)
        _wrap(GroupCommitWriter, "_transact", before=self._begun)
        sa.event.listen(sa.Engine, "before_cursor_execute", self._execute)
        # The checkpointer's statements go past SQLAlchemy, and so do the run store's frequent ones.
        _wrap(Prepared, "execute", before=self._prepared)
        for name in ("execute", "execute_many", "commit_by"):
            _wrap(Session, name, before=lambda _, sql, *__: self._note(sql))
        if self._company:
            _keep_company()
            _wrap(Session, "commit_by", after=self._executed)
        _wrap(ThreadPlan, "add", after=self._planned)
        arm("database.before_commit", self._before_commit)
        arm("database.after_commit", self._after_commit)
        arm("checkpoint.before_insert", lambda: self.meet("insert", "before"))
        arm("checkpoint.after_insert", self._after_inserts)
        self._arm_port(SqlRunStore, RunStore, VERBS)
        self._arm_port(Saver, Saver, SAVER_VERBS)
        for rows in (SqliteRows, PostgresRows):
            self._arm_port(rows, Rows, ROW_VERBS)

    def meet(self, kind: Kind, moment: Moment) -> None:
        """Note that the victim passes a place."""
        self._passed[kind, moment] += 1
        here = Place(kind, self._passed[kind, moment], moment)
        if self._at is None:
            if kind not in _PERIODIC and moment in {"before", "after"}:
                record(self._ledger, event="place", pid=os.getpid(), **here.plain())
        elif here == self._at:
            self._strike()

    def _strike(self) -> None:
        if self._how.startswith("SIG"):
            # To this thread: sent to the process, another thread would take the signal, and this
            # one would go on for a moment, perhaps into the next transaction.
            signal.pthread_kill(threading.get_ident(), signal.Signals[self._how])
        else:
            ask(self._how)

    def _arm_port(self, implementation: type, port: type, verbs: Sequence[str]) -> None:
        instrument(implementation, port, verbs)
        for verb in verbs:
            kind = f"{port.__name__}.{verb}"
            before, after = points(port, verb)
            arm(before, partial(self._call, kind))
            arm(after, partial(self._return, kind))

    def _call(self, kind: Kind) -> None:
        if kind.startswith("RunStore."):
            self._verb.set(kind)
        self.meet(kind, "before")

    def _return(self, kind: Kind) -> None:
        if kind.startswith("RunStore."):
            self._verb.set(None)
        self.meet(kind, "after")

    def _submitted(self, _writer: GroupCommitWriter, operation: Operation) -> None:
        if (verb := self._verb.get()) is not None:
            self._verbs[operation] = verb

    def _begun(self, _writer: GroupCommitWriter, batch: Sequence[Operation], **_: object) -> None:
        # One who is alone writes in the thread that submits.
        self._writer = threading.get_ident()
        self._changed.clear()
        self._inserted = 0
        self._committing = [self._verbs[each] for each in batch if each in self._verbs]

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

    def _prepared(self, statement: Prepared, on: On, _parameters: object) -> None:
        self._note(statement.compiled(on).text)

    def _note(self, statement: str) -> None:
        if threading.get_ident() == self._writer:
            self._changed.update(_CHANGE.findall(statement))

    def _planned(self, refused: Exception | None, _plan: ThreadPlan, put: Planned) -> None:
        # One statement may name no table of its own: SQLite's triggers find the right ones. Writes
        # that become durable together with a checkpoint may have no row of their own.
        if refused is None:
            self._changed["planned writes" if isinstance(put, PlannedWrites) else "planned"] += 1

    def _executed(self, _rows: Any, session: Session, sql: str, *_: Any) -> None:
        # Where one statement is the whole commit, it has no middle, and so no failpoint there.
        assert session._is_open
        if "checkpoints" in _CHANGE.findall(sql):
            self._after_inserts()

    def _after_inserts(self) -> None:
        # Each checkpoint counts for itself, as before the statement.
        planned = self._changed["planned"]
        for _number in range(self._inserted, planned):
            self.meet("insert", "after")
        self._inserted = planned

    def _before_commit(self) -> None:
        self._kinds = _kinds(self._changed)
        self._changed.clear()
        for kind in self._kinds:
            self.meet(kind, "before")
        for verb in self._committing:
            self.meet(verb, "uncommitted")

    def _after_commit(self) -> None:
        for kind in self._kinds:
            self.meet(kind, "after")
        for verb in self._committing:
            self.meet(verb, "committed")


def _kinds(changed: Counter[str]) -> tuple[Kind, ...]:
    """Name a transaction by the tables that it changed; a heartbeat changes `runs` alone.

    Each put counts for itself, whether the others of its superstep are in the same commit or not.
    """
    kinds: list[Kind] = []
    if changed["leases"]:
        kinds.append("claim")
    elif changed["events"]:
        kinds.append("run")
    kinds += ["writes"] * (changed["planned writes"] or min(changed["writes"], 1))
    kinds += ["checkpoint"] * (changed["planned"] or min(changed["checkpoints"], 1))
    if changed["threads"]:
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
