"""`SqlRunStore`: the run store on SQLite and Postgres, one transaction for each verb."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import Codec
from agentflow.database import Database
from agentflow.database.engine import now as database_now
from agentflow.database.tables import dead_letters, events, runs, waits
from agentflow.errors import (
    AlreadyResolvedError,
    IdempotencyConflictError,
    InvalidInputError,
    NotFoundError,
    SupersededError,
    VersionChangedError,
)
from agentflow.storage import attempts, claims
from agentflow.storage.base import OnExisting, RunStore
from agentflow.storage.questions import to_approval
from agentflow.storage.rotation import rotate_payloads
from agentflow.storage.rows import (
    GENESIS,
    Payloads,
    change_run,
    drop_dead_letter,
    find_run,
    get_run,
    to_dead_letter,
    to_event,
    to_run,
)
from agentflow.types import (
    Approval,
    ApprovalRequest,
    AttemptStart,
    AuditEvent,
    ClaimedRun,
    DeadLetter,
    Decision,
    FencingToken,
    Heartbeat,
    Lease,
    NewEvent,
    NewWait,
    Page,
    Run,
    RunFailure,
    RunSpec,
    RunStatus,
    WaitStatus,
)

T = TypeVar("T")


class SqlRunStore(RunStore):
    """Runs in a SQL database."""

    def __init__(self, database: Database, *, codec: Codec, owns_database: bool = False) -> None:
        """Keep runs in `database`, their payloads encoded by `codec`."""
        self._database = database
        self._owns_database = owns_database
        self._payloads = Payloads(strict=codec, lenient=codec.readable_anywhere())

    async def create_run(
        self, tenant: str, spec: RunSpec, *, on_existing: OnExisting
    ) -> tuple[Run, bool]:
        # Encoded before the writer is asked, so that an unstorable input costs the batch nothing.
        row = _new_run(self._payloads, tenant, spec)
        create = partial(_create_run, self._payloads, tenant, spec, row, on_existing)
        try:
            return await self._database.write(create)
        except sa.exc.IntegrityError:
            # Another process has just stored a run of this id; now it can be compared.
            return await self._database.write(create)

    async def get_run(self, tenant: str, run_id: str) -> Run:
        def read(connection: Connection) -> Run:
            return to_run(get_run(connection, tenant, run_id, lock=False), self._payloads)

        return await self._database.read(read)

    async def list_runs(
        self,
        tenant: str,
        *,
        status: RunStatus | None,
        graph: str | None,
        thread_id: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[Run]:
        query = sa.select(runs).where(runs.c.tenant == tenant).order_by(runs.c.seq.desc())
        if status is not None:
            query = query.where(runs.c.status == status.value)
        if graph is not None:
            query = query.where(runs.c.graph == graph)
        if thread_id is not None:
            query = query.where(runs.c.thread_id == thread_id)
        if cursor is not None:
            query = query.where(runs.c.seq < _parse_cursor(cursor))
        return await self._page(query, limit, to_run)

    async def list_events(
        self, tenant: str, run_id: str, *, after: int, limit: int
    ) -> tuple[AuditEvent, ...]:
        query = (
            sa.select(events)
            .where(events.c.tenant == tenant, events.c.run_id == run_id, events.c.seq > after)
            .order_by(events.c.seq)
            .limit(limit)
        )
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return tuple(to_event(row, self._payloads) for row in rows)

    async def find_dead_letter(self, tenant: str, run_id: str) -> DeadLetter | None:
        query = sa.select(dead_letters).where(
            dead_letters.c.tenant == tenant, dead_letters.c.run_id == run_id
        )
        row = await self._database.read(lambda connection: connection.execute(query).first())
        return None if row is None else to_dead_letter(row, self._payloads)

    async def claim_runs(
        self,
        tenant: str,
        *,
        worker: str,
        queues: Collection[str],
        graphs: Collection[tuple[str, str]],
        limit: int,
        lease: timedelta,
    ) -> list[ClaimedRun]:
        if limit <= 0 or not queues or not graphs:
            return []
        if not await self._database.read(
            lambda connection: claims.has_due(connection, tenant, queues, graphs)
        ):
            return []
        return await self._write(
            claims.claim_runs,
            tenant,
            worker=worker,
            queues=queues,
            graphs=graphs,
            limit=limit,
            lease=lease,
        )

    async def claim_run(
        self, tenant: str, run_id: str, *, worker: str, lease: timedelta
    ) -> ClaimedRun | None:
        return await self._write(claims.claim_run, tenant, run_id, worker=worker, lease=lease)

    async def raise_token(self, lease: Lease, *, above: FencingToken) -> Lease:
        return await self._write(claims.raise_token, lease, above=above)

    async def extend_leases(
        self, leases: Sequence[Lease], duration: timedelta
    ) -> Mapping[str, Heartbeat]:
        return await self._database.write(
            lambda connection: claims.extend_leases(connection, leases, duration)
        )

    async def start_attempt(
        self,
        lease: Lease,
        *,
        progress: str,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
        traceparent: str | None,
    ) -> AttemptStart:
        return await self._write(
            attempts.start_attempt,
            lease,
            progress=progress,
            reason=reason,
            checkpoint_id=checkpoint_id,
            step=step,
            traceparent=traceparent,
        )

    async def park_run(
        self, lease: Lease, waits: Sequence[NewWait], *, checkpoint_id: str | None, step: int | None
    ) -> None:
        await self._write(attempts.park_run, lease, waits, checkpoint_id=checkpoint_id, step=step)

    async def finish_run(
        self, lease: Lease, output: Any, *, checkpoint_id: str | None, step: int | None
    ) -> None:
        await self._write(
            attempts.finish_run, lease, output, checkpoint_id=checkpoint_id, step=step
        )

    async def retry_run(
        self,
        lease: Lease,
        failure: RunFailure,
        *,
        delay: timedelta,
        failures: Mapping[str, int],
        checkpoint_id: str | None,
        step: int | None,
    ) -> None:
        await self._write(
            attempts.retry_run,
            lease,
            failure,
            delay=delay,
            failures=failures,
            checkpoint_id=checkpoint_id,
            step=step,
        )

    async def fail_run(
        self,
        lease: Lease,
        failure: RunFailure,
        *,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
    ) -> None:
        await self._write(
            attempts.fail_run,
            lease,
            failure,
            reason=reason,
            checkpoint_id=checkpoint_id,
            step=step,
        )

    async def release_run(self, lease: Lease, *, reason: str, counts: bool) -> None:
        await self._write(attempts.release_run, lease, reason=reason, counts=counts)

    async def finish_cancel(self, lease: Lease) -> None:
        await self._write(attempts.finish_cancel, lease)

    async def cancel_run(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        return await self._write(attempts.cancel_run, tenant, run_id, reason=reason, by=by)

    async def get_wait(self, tenant: str, wait_id: str) -> Approval:
        def read(connection: Connection) -> Approval:
            return to_approval(_get_wait(connection, tenant, wait_id), self._payloads)

        return await self._database.read(read)

    async def list_waits(
        self,
        tenant: str,
        *,
        status: WaitStatus | None,
        run_id: str | None,
        graph: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[Approval]:
        query = sa.select(waits).where(waits.c.tenant == tenant).order_by(waits.c.seq)
        if status is not None:
            query = query.where(waits.c.status == status.value)
        if run_id is not None:
            query = query.where(waits.c.run_id == run_id)
        if graph is not None:
            query = query.where(waits.c.graph == graph)
        if cursor is not None:
            query = query.where(waits.c.seq > _parse_cursor(cursor))
        return await self._page(query, limit, to_approval)

    async def resolve_wait(
        self,
        tenant: str,
        wait_id: str,
        decision: Decision,
        *,
        by: str,
        comment: str | None,
        version: int | None,
        idempotency_key: str | None,
        request: ApprovalRequest,
    ) -> Approval:
        return await self._write(
            _resolve_wait,
            tenant,
            wait_id,
            decision,
            by=by,
            comment=comment,
            version=version,
            idempotency_key=idempotency_key,
            request=request,
        )

    async def rotate_keys(self, tell: Callable[[int, int], None]) -> int:
        return await rotate_payloads(self._database, self._payloads, tell)

    async def close(self) -> None:
        if self._owns_database:
            await asyncio.to_thread(self._database.close)

    async def _write(self, verb: Callable[..., T], *args: Any, **named: Any) -> T:
        return await self._database.write(
            lambda connection: verb(connection, self._payloads, *args, **named)
        )

    async def _page(
        self, query: sa.Select[Any], limit: int, build: Callable[[sa.Row[Any], Payloads], T]
    ) -> Page[T]:
        rows = await self._database.read(
            lambda connection: connection.execute(query.limit(limit + 1)).all()
        )
        items = tuple(build(row, self._payloads) for row in rows[:limit])
        has_more = len(rows) > limit > 0
        return Page(items=items, cursor=str(rows[limit - 1].seq) if has_more else None)


def _parse_cursor(cursor: str) -> int:
    try:
        return int(cursor)
    except ValueError as exc:
        raise InvalidInputError("cursor", ("it is not one that a listing returned",)) from exc


def _new_run(payloads: Payloads, tenant: str, spec: RunSpec) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tenant": tenant,
        "run_id": spec.run_id,
        "thread_id": spec.thread_id,
        "graph": spec.graph,
        "version": spec.version,
        "queue": spec.queue,
        "status": RunStatus.QUEUED.value,
        "priority": spec.priority,
        "wake_reason": "start",
        "attempt": 0,
        "claims": 0,
        "is_dead_letter": False,
        "submitted_by": spec.submitted_by,
        "traceparent": spec.traceparent,
        "event_seq": 0,
        "event_hash": GENESIS,
    }
    row["input"] = payloads.dump(spec.input, runs.c.input, row)
    row["config"] = payloads.dump(dict(spec.config), runs.c.config, row)
    row["metadata"] = payloads.dump(dict(spec.metadata), runs.c.metadata, row)
    return row


def _create_run(
    payloads: Payloads,
    tenant: str,
    spec: RunSpec,
    row: dict[str, Any],
    on_existing: OnExisting,
    connection: Connection,
) -> tuple[Run, bool]:
    now = database_now(connection)
    stored = find_run(connection, tenant, spec.run_id, lock=True)
    is_new = stored is None
    if stored is None:
        # Under the lock the runs of a thread are numbered in the order in which they are committed.
        claims.lock_thread(connection, tenant, spec.thread_id)
        values = {**row, "created_at": now, "available_at": spec.start_at or now}
        connection.execute(sa.insert(runs).values(values))
        stored = get_run(connection, tenant, spec.run_id, lock=True)
        submitted = NewEvent(
            type="run.submitted",
            data={"graph": spec.graph, "version": spec.version, "by": spec.submitted_by},
        )
        change_run(connection, stored, payloads, now, log=[submitted])
    else:
        _check_same(payloads, stored, row)
        if on_existing == "reject":
            raise IdempotencyConflictError(spec.run_id, "submission (on_existing is 'reject')")
        if on_existing == "restart_if_failed" and stored.status == RunStatus.FAILED:
            _requeue(connection, payloads, stored, now)
    final = find_run(connection, tenant, spec.run_id, lock=False)
    assert final is not None
    return to_run(final, payloads), is_new


def _check_same(payloads: Payloads, stored: sa.Row[Any], new: Mapping[str, Any]) -> None:
    """Raise unless a known run id comes again with what it came with before."""
    for column in ("graph", "thread_id"):
        if getattr(stored, column) != new[column]:
            raise IdempotencyConflictError(stored.run_id, column.removesuffix("_id"))
    # Compared as values: equal inputs need not have equal bytes, a dictionary keeps its order.
    before, after = (payloads.load(runs.c.input, row) for row in (stored, new))
    if before != after:
        raise IdempotencyConflictError(stored.run_id, "input")


def _requeue(connection: Connection, payloads: Payloads, stored: sa.Row[Any], now: Any) -> None:
    drop_dead_letter(connection, stored)
    change_run(
        connection,
        stored,
        payloads,
        now,
        status=RunStatus.QUEUED,
        log=[NewEvent(type="run.requeued")],
        wake_reason="requeue",
        available_at=now,
        attempt=0,
        failures=None,
        is_dead_letter=False,
        ended_at=None,
    )


def _get_wait(
    connection: Connection, tenant: str, wait_id: str, *, lock: bool = False
) -> sa.Row[Any]:
    query = sa.select(waits).where(waits.c.tenant == tenant, waits.c.wait_id == wait_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFoundError("approval", wait_id)
    return row


def _resolve_wait(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    wait_id: str,
    decision: Decision,
    *,
    by: str,
    comment: str | None,
    version: int | None,
    idempotency_key: str | None,
    request: ApprovalRequest,
) -> Approval:
    now = database_now(connection)
    # The run first, then its waits: the order in which every verb locks them.
    run_id = _get_wait(connection, tenant, wait_id).run_id
    run = get_run(connection, tenant, run_id, lock=True)
    row = _get_wait(connection, tenant, wait_id, lock=True)
    stored = to_approval(row, payloads)
    if stored.status is WaitStatus.RESOLVED:
        if idempotency_key and idempotency_key == row.idempotency_key:
            if stored.decision == payloads.redacted(decision, waits.c.decision):
                return stored
            raise IdempotencyConflictError(run_id, "decision under this idempotency key")
        raise AlreadyResolvedError(wait_id, stored.status.value, row.decision_type, row.decided_by)
    if stored.status is not WaitStatus.PENDING:
        raise SupersededError(wait_id, stored.status.value)
    if version is not None and version != row.version:
        raise VersionChangedError(wait_id, version, row.version)
    if stored.request != request:
        raise VersionChangedError(wait_id, row.version - 1, row.version)
    connection.execute(
        sa.update(waits)
        .where(waits.c.tenant == tenant, waits.c.wait_id == wait_id)
        .values(
            status=WaitStatus.RESOLVED.value,
            decision=payloads.dump(decision, waits.c.decision, row),
            decision_type=decision.type,
            decided_by=by,
            decided_at=now,
            comment=None if comment is None else payloads.dump(comment, waits.c.comment, row),
            idempotency_key=idempotency_key,
        )
    )
    resolved = NewEvent(
        type="approval.resolved",
        data={
            "approval": wait_id,
            "decision": decision.type,
            "by": by,
            "proposal_hash": stored.proposal_hash,
        },
    )
    if run.status == RunStatus.WAITING:
        change_run(
            connection,
            run,
            payloads,
            now,
            status=RunStatus.QUEUED,
            log=[resolved],
            wake_reason="approval",
            available_at=now,
        )
    else:
        change_run(connection, run, payloads, now, log=[resolved])
    return to_approval(_get_wait(connection, tenant, wait_id), payloads)
