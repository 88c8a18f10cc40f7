"""The tables, as SQLAlchemy Core sees them; `migrations` creates them.

Every key starts with the tenant. Times are microseconds since 1970 as integers, which compare and
index the same everywhere. Binary columns hold payloads in envelopes of the codec (`channels` one
for each value); what stands outside them (ids, statuses, times, names of graphs and queues) is what
the database must be able to search.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NO_TIME = datetime.max.replace(tzinfo=UTC)
"""What is read where no time stands: one such row must not keep all others from being read."""


class Timestamp(TypeDecorator[datetime]):
    """An aware UTC datetime, stored as microseconds since 1970."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Turn a datetime into microseconds."""
        del dialect
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Turn microseconds into a datetime."""
        del dialect
        try:
            return None if value is None else _EPOCH + timedelta(microseconds=int(value))
        except (ValueError, OverflowError):
            return _NO_TIME


class Length(TypeDecorator[timedelta]):
    """A length of time, stored as microseconds."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: timedelta | None, dialect: Dialect) -> int | None:
        """Turn a length of time into microseconds."""
        del dialect
        return None if value is None else value // _MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> timedelta | None:
        """Turn microseconds into a length of time."""
        del dialect
        try:
            return None if value is None else timedelta(microseconds=int(value))
        except (ValueError, OverflowError):
            return timedelta.max


def partial_index(name: str, *columns: Any, where: str) -> Index:
    """Describe an index of the rows for which `where` holds.

    Queries that are to use it have to say the same in literals: neither database compares them
    with parameters.
    """
    condition = text(where)
    return Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


# Ids and names come from users and from LangGraph's nested namespaces: no length fits all.
_ID = Text()
_NAME = Text()
# SQLite numbers rows by itself only where the primary key is a plain INTEGER.
_AUTO = BigInteger().with_variant(Integer, "sqlite")

EPOCH = 2**32
"""By how much tokens jump when a backup was restored: more than any thread is claimed meanwhile."""

metadata = MetaData()


def _table(name: str, *parts: Any) -> Table:
    return Table(f"agentflow_{name}", metadata, *parts)


threads = _table(
    "threads",
    # What the other tables of checkpoints call the thread: its names may be long.
    Column("id", _AUTO, primary_key=True, autoincrement=True),
    Column("tenant", _ID, nullable=False),
    Column("thread_id", _ID, nullable=False),
    # The fencing token of the newest lease. It outlives `delete_thread`.
    Column("token", BigInteger, nullable=False),
    Column("is_leased", Boolean, nullable=False),
    # The newest number given in the thread: to a checkpoint, to writes or to a value.
    Column("seq", BigInteger, nullable=False),
    UniqueConstraint("tenant", "thread_id", name="agentflow_threads_id"),
)

# The newest checkpoint of a namespace, the one with the highest number, is its head.
checkpoints = _table(
    "checkpoints",
    Column("thread", BigInteger, nullable=False),
    Column("ns", _ID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("checkpoint_id", _ID, nullable=False),
    Column("parent_id", _ID),
    Column("attempt", _ID, nullable=False),
    Column("run_id", _ID),
    Column("step", Integer),
    Column("data", LargeBinary, nullable=False),
    # Covers the checkpoint, its values and the hash of its parent.
    Column("hash", LargeBinary, nullable=False),
    # Writes bound to its parent that became durable together with it.
    Column("parent_writes", LargeBinary),
    # What its delta channels had at its parent, if that was deleted.
    Column("base", LargeBinary),
    PrimaryKeyConstraint("thread", "ns", "seq"),
    UniqueConstraint("thread", "ns", "checkpoint_id", name="agentflow_checkpoints_id"),
    Index("agentflow_checkpoints_run", "run_id"),
)

values = _table(
    "values",
    Column("thread", BigInteger, nullable=False),
    # A list that grows is one series of stretches, anything else a series of one.
    Column("series", BigInteger, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("thread", "series", "start"),
)

writes = _table(
    "writes",
    Column("thread", BigInteger, nullable=False),
    Column("ns", _ID, nullable=False),
    # No foreign key: a write may become durable before its checkpoint, or without it.
    Column("checkpoint_id", _ID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("thread", "ns", "checkpoint_id", "seq"),
)

anchors = _table(
    "anchors",
    Column("thread", BigInteger, nullable=False),
    Column("ns", _ID, nullable=False),
    Column("checkpoint_id", _ID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    # The hash of a checkpoint that was deleted although something that is kept follows it.
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("thread", "ns", "checkpoint_id"),
)

objects = _table(
    "objects",
    # Which value is in which object of the object tier.
    Column("thread", BigInteger, nullable=False),
    Column("series", BigInteger, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("object", _NAME, nullable=False),
    # Since when no value is; 0 if that is not known yet.
    Column("unneeded_at", Timestamp),
    PrimaryKeyConstraint("thread", "series", "start", "object"),
    Index("agentflow_objects_object", "object"),
)

# One row: the folder of this database in its object tier.
object_space = _table(
    "object_space",
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", _NAME, nullable=False),
)

leases = _table(
    "leases",
    Column("tenant", _ID, nullable=False),
    Column("thread_id", _ID, nullable=False),
    Column("token", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant", "thread_id"),
)

runs = _table(
    "runs",
    Column("seq", _AUTO, primary_key=True, autoincrement=True),
    Column("tenant", _ID, nullable=False),
    Column("run_id", _ID, nullable=False),
    Column("thread_id", _ID, nullable=False),
    Column("graph", _NAME, nullable=False),
    Column("version", _NAME, nullable=False),
    Column("queue", _NAME, nullable=False),
    Column("status", _NAME, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("available_at", Timestamp, nullable=False),
    # Why the run will next be driven: start, approval, retry, drain or requeue.
    Column("wake_reason", _NAME, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("claims", Integer, nullable=False),
    # What was durable when the current attempt began; another value means progress.
    Column("progress", _NAME),
    Column("step", Integer),
    Column("checkpoint_id", _ID),
    Column("worker", _ID),
    Column("token", BigInteger),
    Column("lease_expires_at", Timestamp),
    Column("cancel_requested_at", Timestamp),
    Column("is_dead_letter", Boolean, nullable=False),
    Column("submitted_by", _NAME),
    Column("traceparent", _NAME),
    Column("created_at", Timestamp, nullable=False),
    Column("started_at", Timestamp),
    Column("ended_at", Timestamp),
    Column("event_seq", BigInteger, nullable=False),
    Column("event_hash", _NAME, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("config", LargeBinary, nullable=False),
    Column("metadata", LargeBinary, nullable=False),
    Column("output", LargeBinary),
    Column("error", LargeBinary),
    # task id -> failures, of the superstep that is being tried.
    Column("failures", LargeBinary),
    # Which start of which worker has it, and since when.
    Column("instance", _ID),
    Column("claimed_at", Timestamp),
    # Attempts without progress that ended with their worker, and whether the last one counted.
    Column("losses", Integer),
    Column("has_loss_counted", Boolean),
    # Whether its worker claims nothing else that might kill it.
    Column("is_isolated", Boolean),
    # The losses for which it has proved not to be to blame.
    Column("pardoned", Integer),
    Column("resume_from", _ID),
    Column("paused_at", Timestamp),
    Column("is_paused_by_failure", Boolean),
    Column("start_deadline_at", Timestamp),
    Column("deadline_at", Timestamp),
    Column("timeout", Length),
    # `pending` until the checkpoints of a cancelled run are gone, then `done`.
    Column("rollback", _NAME),
    # Why and by whom the run was cancelled.
    Column("cancellation", LargeBinary),
    Column("retry", LargeBinary),
    # The run whose effects are this one's too, if it is a fork that does not repeat them.
    Column("root", _ID),
    Column("forked_from", _ID),
    # How many supersteps forks and requeues have added, that its effects do not know of.
    Column("effect_shift", Integer),
    # Whether its effects are being undone, or were: compensating, compensated or
    # partially_compensated; and how it ends then.
    Column("saga", _NAME),
    Column("saga_cause", LargeBinary),
    # Of the graph that it was last driven with, or submitted for.
    Column("fingerprint", _NAME),
    UniqueConstraint("tenant", "run_id", name="agentflow_runs_id"),
    Index("agentflow_runs_thread", "tenant", "thread_id", "status", "seq"),
    Index("agentflow_runs_graph", "tenant", "graph", "seq"),
)
# What is asked for again and again must be found without passing by what waits. Whatever the
# planner knows of the table, it sees that these indexes are small.
partial_index(
    "agentflow_runs_due",
    runs.c.tenant,
    runs.c.queue,
    runs.c.priority.desc(),
    runs.c.seq,
    where="status = 'queued' AND paused_at IS NULL",
)
partial_index(
    "agentflow_runs_start_deadline",
    runs.c.tenant,
    runs.c.start_deadline_at,
    where="status = 'queued' AND start_deadline_at IS NOT NULL",
)
partial_index(
    "agentflow_runs_deadline",
    runs.c.tenant,
    runs.c.deadline_at,
    where="status IN ('queued', 'waiting') AND deadline_at IS NOT NULL",
)
partial_index(
    "agentflow_runs_lease",
    runs.c.tenant,
    runs.c.lease_expires_at,
    where="status = 'running'",
)
partial_index("agentflow_runs_instance", runs.c.instance, where="status = 'running'")
partial_index(
    "agentflow_runs_rollback", runs.c.tenant, runs.c.thread_id, where="rollback = 'pending'"
)

waits = _table(
    "waits",
    Column("seq", _AUTO, primary_key=True, autoincrement=True),
    Column("tenant", _ID, nullable=False),
    Column("wait_id", _ID, nullable=False),
    Column("kind", _NAME, nullable=False),
    Column("run_id", _ID, nullable=False),
    Column("thread_id", _ID, nullable=False),
    Column("graph", _NAME, nullable=False),
    Column("ns", _ID, nullable=False),
    Column("task_id", _ID, nullable=False),
    Column("interrupt_id", _ID, nullable=False),
    Column("checkpoint_id", _ID, nullable=False),
    Column("answers_recorded", Integer, nullable=False),
    Column("status", _NAME, nullable=False),
    Column("version", Integer, nullable=False),
    Column("proposal_hash", _NAME, nullable=False),
    Column("request", LargeBinary, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("decision", LargeBinary),
    Column("decision_type", _NAME),
    Column("decided_by", _NAME),
    Column("decided_at", Timestamp),
    Column("comment", LargeBinary),
    Column("idempotency_key", _ID),
    UniqueConstraint("tenant", "wait_id", name="agentflow_waits_id"),
    UniqueConstraint(
        "tenant",
        "thread_id",
        "ns",
        "interrupt_id",
        "checkpoint_id",
        name="agentflow_waits_question",
    ),
    Index("agentflow_waits_status", "tenant", "status", "seq"),
    Index("agentflow_waits_run", "tenant", "run_id", "status"),
)

events = _table(
    "events",
    Column("tenant", _ID, nullable=False),
    Column("run_id", _ID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("type", _NAME, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("prev_hash", _NAME, nullable=False),
    Column("hash", _NAME, nullable=False),
    PrimaryKeyConstraint("tenant", "run_id", "seq"),
)

dead_letters = _table(
    "dead_letters",
    Column("tenant", _ID, nullable=False),
    Column("run_id", _ID, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("claims", Integer, nullable=False),
    Column("checkpoint_id", _ID),
    Column("cause", LargeBinary, nullable=False),
    Column("thread_id", _ID),
    Column("graph", _NAME),
    Column("version", _NAME),
    Column("reason", _NAME),
    Column("step", Integer),
    PrimaryKeyConstraint("tenant", "run_id"),
    Index("agentflow_dead_letters_at", "tenant", "at", "run_id"),
)

pauses = _table(
    "pauses",
    Column("tenant", _ID, nullable=False),
    # `graph`, `queue`, `all`, or `store`, which holds for all tenants.
    Column("scope", _NAME, nullable=False),
    Column("name", _NAME, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("paused_by", _NAME),
    Column("reason", LargeBinary),
    PrimaryKeyConstraint("tenant", "scope", "name"),
)

workers = _table(
    "workers",
    Column("tenant", _ID, nullable=False),
    Column("instance", _ID, nullable=False),
    Column("name", _NAME, nullable=False),
    # JSON: what the worker says about itself. Empty until it has said something.
    Column("report", _NAME, nullable=False),
    Column("started_at", Timestamp, nullable=False),
    Column("beat_at", Timestamp, nullable=False),
    # How many runs it held when the first of them was found to have expired.
    Column("lost", Integer),
    Column("lost_at", Timestamp),
    PrimaryKeyConstraint("tenant", "instance"),
)

effects = _table(
    "effects",
    Column("seq", _AUTO, primary_key=True, autoincrement=True),
    Column("tenant", _ID, nullable=False),
    Column("effect_id", _ID, nullable=False),
    # Where the key is unique: a run and its forks, or, if empty, the tenant.
    Column("scope", _ID, nullable=False),
    Column("key_hash", _NAME, nullable=False),
    Column("run_id", _ID, nullable=False),
    Column("thread_id", _ID, nullable=False),
    Column("graph", _NAME, nullable=False),
    Column("kind", _NAME, nullable=False),
    Column("name", _NAME, nullable=False),
    Column("compensate", _NAME),
    Column("ns", _ID, nullable=False),
    Column("task_id", _ID, nullable=False),
    Column("node", _NAME, nullable=False),
    Column("status", _NAME, nullable=False),
    Column("on_in_doubt", _NAME, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("worker", _ID, nullable=False),
    Column("intended_at", Timestamp, nullable=False),
    Column("timeout", Length),
    Column("ended_at", Timestamp),
    # The number of the event with which it ended.
    Column("ended_seq", BigInteger),
    Column("resolved_by", _NAME),
    # Its key and its arguments.
    Column("request", LargeBinary, nullable=False),
    # What it returned or raised, or what somebody said of it.
    Column("outcome", LargeBinary),
    Column("comment", LargeBinary),
    # Outcomes that arrived when something else had been decided.
    Column("late", LargeBinary),
    UniqueConstraint("tenant", "effect_id", name="agentflow_effects_id"),
    UniqueConstraint("tenant", "scope", "key_hash", name="agentflow_effects_key"),
    Index("agentflow_effects_run", "tenant", "run_id", "seq"),
)

# The ends of the chains of those audit events that concern no single run.
logs = _table(
    "logs",
    Column("tenant", _ID, nullable=False),
    Column("event_seq", BigInteger, nullable=False),
    Column("event_hash", _NAME, nullable=False),
    PrimaryKeyConstraint("tenant"),
)

epochs = _table(
    "epochs",
    Column("epoch", BigInteger, autoincrement=False, nullable=False),
    Column("at", Timestamp, nullable=False),
    # The least token that threads have which are new since.
    Column("token", BigInteger, nullable=False),
    PrimaryKeyConstraint("epoch"),
)

# What graphs were made of. Nothing is ever taken away: a checkpoint may refer to it.
fingerprints = _table(
    "fingerprints",
    Column("tenant", _ID, nullable=False),
    Column("digest", _NAME, nullable=False),
    Column("graph", _NAME, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("form", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant", "digest"),
)

# Which share of a graph's new runs goes to a version.
routes = _table(
    "routes",
    Column("tenant", _ID, nullable=False),
    Column("graph", _NAME, nullable=False),
    Column("version", _NAME, nullable=False),
    # Of a million.
    Column("share", Integer, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("set_by", _NAME),
    PrimaryKeyConstraint("tenant", "graph", "version"),
)
