"""Which workers there are, how the store is doing, and the beginning of another epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.statements import insert_new
from agentflow.database.tables import EPOCH, dead_letters, epochs, leases, runs, workers
from agentflow.storage.due import is_expired
from agentflow.storage.events import append_to_log
from agentflow.storage.marks import marked, of_epoch
from agentflow.storage.pauses import STORE, list_pauses, pause
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import INCOMPATIBLE, UNFINISHED
from agentflow.types import (
    NewEvent,
    Restored,
    RunStatus,
    Survey,
    UnfinishedRuns,
    WorkerRecord,
    WorkerReport,
)

logger = logging.getLogger(__name__)

_FORGET = timedelta(days=1)
_SILENCE = timedelta(minutes=1)
"""After which nobody counts on a worker any more."""


def beat_worker(
    connection: Connection, payloads: Payloads, tenant: str, report: WorkerReport
) -> None:
    """See `RunStore.beat_worker`."""
    now = database_now(connection)
    row = {
        "tenant": tenant,
        "instance": report.instance,
        "name": report.name,
        "report": json.dumps(asdict(report)),
        "beat_at": now,
    }
    is_own = (workers.c.tenant == tenant, workers.c.instance == report.instance)
    changed = connection.execute(sa.update(workers).where(*is_own).values(row))
    if changed.rowcount == 0:
        insert_new(connection, workers, [{**row, "started_at": now}])
        is_old = (workers.c.tenant == tenant, workers.c.beat_at < now - _FORGET)
        connection.execute(sa.delete(workers).where(*is_old))
        _tell_stranded(connection, payloads, tenant, now)
    _tell_silent(connection, payloads, tenant, now)


def _tell_silent(connection: Connection, payloads: Payloads, tenant: str, now: datetime) -> None:
    """Note workers that live no more, and what runs they have left that no other can drive."""
    silent = (
        sa.select(workers)
        .where(
            workers.c.tenant == tenant,
            workers.c.report != "",
            workers.c.beat_at < now - _SILENCE,
        )
        .order_by(workers.c.instance)
    )
    left: set[tuple[str, str]] = set()
    for row in connection.execute(silent).all():
        record = _to_record(row, now)
        if record is None or record.report.health == "silent":
            continue
        report = record.report
        # Of all that find it out, one tells.
        noted = connection.execute(
            sa.update(workers)
            .where(
                workers.c.tenant == tenant,
                workers.c.instance == row.instance,
                workers.c.report == row.report,
                workers.c.beat_at == row.beat_at,
            )
            .values(report=json.dumps(asdict(replace(report, health="silent"))))
        )
        if noted.rowcount == 1:
            left.update(report.graphs)
    if left:
        _tell_stranded(connection, payloads, tenant, now, among=left)


def remove_worker(connection: Connection, payloads: Payloads, tenant: str, instance: str) -> None:
    """See `RunStore.remove_worker`."""
    is_own = (workers.c.tenant == tenant, workers.c.instance == instance)
    gone = connection.execute(sa.select(workers).where(*is_own)).first()
    connection.execute(sa.delete(workers).where(*is_own))
    if gone is not None and gone.report:
        now = database_now(connection)
        if (record := _to_record(gone, now)) is not None:
            _tell_stranded(connection, payloads, tenant, now, among=record.report.graphs)


def _tell_stranded(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    now: datetime,
    among: Collection[tuple[str, str]] | None = None,
) -> None:
    """Note the versions, perhaps only some, of which there are runs and no living worker."""
    alive = {
        graph
        for worker in list_workers(connection, payloads, tenant)
        if worker.silence <= _SILENCE
        for graph in worker.report.graphs
    }
    version = (runs.c.graph, runs.c.version)
    query = (
        sa.select(*version, sa.func.count())
        .where(runs.c.tenant == tenant, runs.c.status.in_(UNFINISHED))
        .group_by(*version)
        .order_by(*version)
    )
    for graph, number, count in connection.execute(query).all():
        if (graph, number) not in alive and (among is None or (graph, number) in among):
            event = NewEvent(
                type="graph.stranded", data={"graph": graph, "version": number, "runs": count}
            )
            append_to_log(connection, payloads, tenant, now, event)


def list_workers(
    connection: Connection, payloads: Payloads, tenant: str
) -> tuple[WorkerRecord, ...]:
    """See `RunStore.list_workers`."""
    del payloads
    now = database_now(connection)
    query = (
        sa.select(workers)
        .where(workers.c.tenant == tenant, workers.c.report != "")
        .order_by(workers.c.name, workers.c.started_at)
    )
    found = [_to_record(row, now) for row in connection.execute(query)]
    return tuple(each for each in found if each is not None)


def _to_record(row: sa.Row[Any], now: datetime) -> WorkerRecord | None:
    """Return what a worker has told; `None`, as before it did, if nobody can read that."""
    known = {each.name for each in fields(WorkerReport)}
    try:
        said = json.loads(row.report)
        said["queues"] = tuple(said["queues"])
        said["graphs"] = tuple((name, version) for name, version in said["graphs"])
        # A newer program may tell more about itself.
        report = WorkerReport(**{name: value for name, value in said.items() if name in known})
    except (TypeError, ValueError, LookupError):
        logger.warning("report of a worker cannot be read", extra={"instance": row.instance})
        return None
    return WorkerRecord(
        report=report,
        started_at=row.started_at,
        beat_at=row.beat_at,
        silence=now - row.beat_at,
    )


def survey(connection: Connection, payloads: Payloads, tenant: str) -> Survey:
    """See `RunStore.survey`."""
    now = database_now(connection)
    kinds = (runs.c.graph, runs.c.version, runs.c.queue, runs.c.status)
    of_tenant = runs.c.tenant == tenant
    is_unfinished = runs.c.status.in_(UNFINISHED)
    unfinished = (
        sa.select(*kinds, sa.func.count().label("count"))
        .where(of_tenant, is_unfinished)
        .group_by(*kinds)
        .order_by(*kinds)
    )
    is_overdue = sa.or_(
        runs.c.deadline_at <= payloads.time(now),
        sa.and_(
            runs.c.status == RunStatus.QUEUED.value,
            runs.c.start_deadline_at <= payloads.time(now),
        ),
    )

    def count(table: sa.Table, *conditions: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(table).where(*conditions)
        return int(connection.execute(query).scalar_one())

    return Survey(
        at=now,
        epoch=_epoch(connection),
        unfinished=tuple(
            UnfinishedRuns(
                graph=row.graph,
                version=row.version,
                queue=row.queue,
                status=RunStatus(row.status),
                count=row._mapping["count"],
            )
            for row in connection.execute(unfinished)
        ),
        paused=count(runs, of_tenant, is_unfinished, runs.c.paused_at.is_not(None)),
        incompatible=count(
            runs,
            of_tenant,
            is_unfinished,
            runs.c.paused_at.is_not(None),
            runs.c.wake_reason == INCOMPATIBLE,
        ),
        expired_leases=count(runs, of_tenant, is_expired(now), runs.c.paused_at.is_(None)),
        overdue=count(runs, of_tenant, is_unfinished, is_overdue),
        dead_letters=count(dead_letters, dead_letters.c.tenant == tenant),
        pauses=list_pauses(connection, payloads, tenant),
        workers=list_workers(connection, payloads, tenant),
    )


def _epoch(connection: Connection) -> int:
    query = sa.select(sa.func.coalesce(sa.func.max(epochs.c.epoch), 0))
    return int(connection.execute(query).scalar_one())


def restore(
    connection: Connection, payloads: Payloads, *, reason: str | None, by: str | None
) -> Restored:
    """See `RunStore.restore`."""
    now = database_now(connection)
    # The pause takes the lock under which epochs follow each other.
    pause(connection, payloads, "", STORE, "", reason=reason or "restored", by=by)
    epoch = _epoch(connection) + 1
    row = {"epoch": epoch, "at": now, "token": epoch * EPOCH}
    connection.execute(sa.insert(epochs).values(row))
    connection.execute(sa.update(leases).values(token=leases.c.token + EPOCH))
    connection.execute(
        sa.update(runs)
        .where(runs.c.status == RunStatus.RUNNING.value)
        .values(token=runs.c.token + EPOCH, lease_expires_at=now)
    )
    count = sa.select(sa.func.count()).select_from(runs).where(runs.c.status.in_(UNFINISHED))
    unfinished = int(connection.execute(count).scalar_one())
    event = NewEvent(
        type="store.restored",
        data={"epoch": epoch, "unfinished": unfinished, "reason": reason, "by": by},
    )
    append_to_log(connection, payloads, "", now, marked(event, of_epoch(epoch), epochs, row))
    return Restored(epoch=epoch, at=now, unfinished=unfinished)
