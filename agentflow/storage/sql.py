"""`SqlRunStore`: the run store on SQLite and Postgres, one transaction for each verb."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa

from agentflow.codec import Codec
from agentflow.database import Database
from agentflow.database.session import Session
from agentflow.database.tables import dead_letters, events, runs, waits
from agentflow.database.tables import effects as effects_table
from agentflow.errors import InvalidInputError
from agentflow.journal import Begun, Effect, EffectStatus, NewEffect, Outcome, Resolution
from agentflow.storage import (
    attempts,
    claims,
    due,
    effect_objects,
    effect_queries,
    effect_rows,
    effects,
    endings,
    letters,
    pauses,
    reopening,
    submission,
    workers,
)
from agentflow.storage.base import ChangeKind, OnBusy, OnExisting, RunStore
from agentflow.storage.effect_keys import EffectKeys
from agentflow.storage.events import to_event
from agentflow.storage.integrity import Verified
from agentflow.storage.key_check import check_keys
from agentflow.storage.opening import Claimant, Created, Opening, Resolved
from agentflow.storage.pages import to_page
from agentflow.storage.payloads import MAX_PAYLOAD, Payloads
from agentflow.storage.questions import to_approval
from agentflow.storage.rotation import rotate_payloads
from agentflow.storage.rows import get_run, to_dead_letter, to_run
from agentflow.storage.sql_versions import SqlVersionVerbs
from agentflow.storage.verification import find_damages
from agentflow.storage.waits import get_wait, list_of_run, resolve_wait
from agentflow.types import (
    Approval,
    ApprovalRequest,
    AttemptStart,
    AuditEvent,
    ClaimedRun,
    Clock,
    DeadLetter,
    Decision,
    FencingToken,
    Heartbeat,
    Lease,
    NewWait,
    NextDue,
    Page,
    Pause,
    PauseScope,
    Restored,
    Run,
    RunFailure,
    RunSpec,
    RunStatus,
    Survey,
    WaitStatus,
    WorkerRecord,
    WorkerReport,
)

T = TypeVar("T")


class SqlRunStore(SqlVersionVerbs, RunStore):
    """Runs in a SQL database."""

    def __init__(
        self,
        database: Database,
        *,
        codec: Codec,
        owns_database: bool = False,
        clock: Clock | None = None,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        """Keep runs in `database`.

        Args:
            database: Where.
            codec: Encodes their payloads.
            owns_database: Whether closing the store closes it.
            clock: Judges times of starting, backoff and deadlines instead of the database's.
            max_payload: How many bytes a payload may have.
        """
        self._database = database
        self._owns_database = owns_database
        self._stored = set()
        self._payloads = Payloads(
            strict=codec, lenient=codec.readable_anywhere(), limit=max_payload, clock=clock
        )
        self._effect_keys = EffectKeys(database, self._payloads)
        if codec.keys is not None:
            database.guard(partial(check_keys, self._payloads))

    async def create_run(
        self,
        tenant: str,
        spec: RunSpec,
        *,
        on_existing: OnExisting,
        on_busy: OnBusy = "enqueue",
        claimant: Claimant | None = None,
    ) -> Created:
        # Encoded before the writer is asked, so that an unstorable input costs the batch nothing.
        row = submission.new_run(self._payloads, tenant, spec)
        create = partial(
            submission.create_run,
            self._payloads,
            tenant,
            spec,
            row,
            on_existing,
            on_busy,
            claimant,
        )
        created = await self._database.write(create)
        if created.claimed is None:
            self._tell("due")
        if on_busy in {"interrupt", "rollback"}:
            self._tell("stop", "settled")
        return created

    async def get_run(self, tenant: str, run_id: str) -> Run:
        def read(session: Session) -> sa.Row[Any]:
            return get_run(session, tenant, run_id, lock=False)

        return to_run(await self._database.query(read), self._payloads)

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
        instance: str | None = None,
        queues: Collection[str],
        graphs: Collection[tuple[str, str]],
        limit: int,
        lease: timedelta,
        opening: Opening | None = None,
    ) -> list[ClaimedRun]:
        if limit <= 0 or not queues or not graphs:
            return []
        return await self._write(
            claims.claim_runs,
            tenant,
            worker=worker,
            instance=instance,
            queues=queues,
            graphs=graphs,
            limit=limit,
            lease=lease,
            opening=opening,
        )

    async def claim_run(
        self,
        tenant: str,
        run_id: str,
        *,
        worker: str,
        instance: str | None = None,
        lease: timedelta,
        although_paused: bool = False,
        opening: Opening | None = None,
    ) -> ClaimedRun | None:
        return await self._write(
            claims.claim_run,
            tenant,
            run_id,
            worker=worker,
            instance=instance,
            lease=lease,
            although_paused=although_paused,
            opening=opening,
        )

    async def raise_token(self, lease: Lease, *, above: FencingToken) -> Lease:
        return await self._write(claims.raise_token, lease, above=above)

    async def extend_leases(
        self, leases: Sequence[Lease], duration: timedelta
    ) -> Mapping[str, Heartbeat]:
        return await self._write(claims.extend_leases, leases, duration)

    async def end_isolation(self, lease: Lease) -> None:
        await self._write(attempts.end_isolation, lease)

    async def finish_rollback(self, lease: Lease, run_ids: Collection[str]) -> None:
        await self._write(attempts.finish_rollback, lease, run_ids)

    async def start_attempt(
        self,
        lease: Lease,
        *,
        progress: str,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
        traceparent: str | None,
        effect_shift: int | None = None,
        fingerprint: str | None = None,
        graph_changed: Mapping[str, Any] | None = None,
    ) -> AttemptStart:
        return await self._write(
            attempts.start_attempt,
            lease,
            progress=progress,
            reason=reason,
            checkpoint_id=checkpoint_id,
            step=step,
            traceparent=traceparent,
            effect_shift=effect_shift,
            fingerprint=fingerprint,
            graph_changed=graph_changed,
        )

    async def park_run(
        self,
        lease: Lease,
        waits: Sequence[NewWait],
        *,
        checkpoint_id: str | None,
        step: int | None,
        progress: str | None = None,
    ) -> None:
        is_waiting: bool = await self._write(
            attempts.park_run,
            lease,
            waits,
            checkpoint_id=checkpoint_id,
            step=step,
            progress=progress,
        )
        if is_waiting:
            # While it waits no other run of its thread is due.
            self._tell(f"settled:{_topic(lease.run_id)}")
        else:
            self._tell_settled(lease.run_id)

    async def finish_run(
        self, lease: Lease, output: Any, *, checkpoint_id: str | None, step: int | None
    ) -> None:
        # Here, so that an output that cannot be stored costs the batch nothing.
        key = {"tenant": lease.tenant, "run_id": lease.run_id}
        sealed = self._payloads.dump(output, runs.c.output, key)
        await self._write(
            attempts.finish_run, lease, sealed, checkpoint_id=checkpoint_id, step=step
        )
        self._tell_settled(lease.run_id)

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
        if not delay:
            self._tell("due")

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
        self._tell_settled(lease.run_id)

    async def pause_failed_run(
        self,
        lease: Lease,
        failure: RunFailure,
        *,
        reason: str,
        checkpoint_id: str | None,
        step: int | None,
    ) -> None:
        await self._write(
            attempts.pause_failed_run,
            lease,
            failure,
            reason=reason,
            checkpoint_id=checkpoint_id,
            step=step,
        )
        self._tell_settled(lease.run_id)

    async def release_run(
        self, lease: Lease, *, reason: str, counts: bool, delay: timedelta = timedelta(0)
    ) -> None:
        await self._write(attempts.release_run, lease, reason=reason, counts=counts, delay=delay)
        self._tell("due")

    async def finish_cancel(self, lease: Lease) -> None:
        await self._write(attempts.finish_cancel, lease)
        self._tell_settled(lease.run_id)

    async def cancel_run(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        run: Run = await self._write(attempts.cancel_run, tenant, run_id, reason=reason, by=by)
        self._tell_settled(run_id)
        self._tell("stop")
        return run

    async def get_wait(self, tenant: str, wait_id: str) -> Approval:
        def read(session: Session) -> sa.Row[Any]:
            return get_wait(session, tenant, wait_id)

        return to_approval(await self._database.query(read), self._payloads)

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
        if run_id is not None and status is None and graph is None:
            return await self._waits_of_run(tenant, run_id, limit, cursor)
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
        claimant: Claimant | None = None,
    ) -> Resolved:
        resolved: Resolved = await self._write(
            resolve_wait,
            tenant,
            wait_id,
            decision,
            by=by,
            comment=comment,
            version=version,
            idempotency_key=idempotency_key,
            request=request,
            claimant=claimant,
        )
        if resolved.claimed is None:
            self._tell("due")
        return resolved

    async def claim_reopening(
        self, tenant: str, wait_id: str, *, worker: str, lease: timedelta, by: str
    ) -> ClaimedRun:
        return await self._write(
            reopening.claim_reopening, tenant, wait_id, worker=worker, lease=lease, by=by
        )

    async def reopen_wait(
        self, lease: Lease, wait_id: str, *, by: str, comment: str | None
    ) -> Approval:
        opened: Approval = await self._write(
            reopening.reopen_wait, lease, wait_id, by=by, comment=comment
        )
        self._tell("due")
        return opened

    async def begin_effect(
        self, lease: Lease, new: NewEffect, *, retake: int | None = None
    ) -> Begun:
        await self._effect_keys.meet(lease, new)
        row = effect_rows.new_row(self._payloads, lease.tenant, new)
        begin = partial(self._write, effects.begin_effect, lease, new, row, retake=retake)
        try:
            begun = await begin()
        except sa.exc.IntegrityError:
            # Another process was first with a key of the whole tenant; now it can be compared.
            begun = await begin()
        if isinstance(begun, Begun):
            return begun
        found, is_held = begun
        (effect,) = (await self._effects([found], strict=True)).whole()
        return Begun(effect=effect, is_due=False, is_held=is_held)

    async def finish_effect(self, lease: Lease, effect_id: str, outcome: Outcome) -> bool:
        # Here, so that an outcome that cannot be stored costs the batch nothing.
        key = {"tenant": lease.tenant, "effect_id": effect_id}
        body, plain = effect_rows.outcome_body(self._payloads, key, outcome)
        while True:
            sealed = await effect_objects.seal_body(self._database, self._payloads, key, body)
            is_current: bool | None = await self._write(
                effects.finish_effect, lease, effect_id, outcome.status, sealed, plain
            )
            if is_current is not None:
                return is_current

    async def resolve_effect(self, tenant: str, effect_id: str, resolution: Resolution) -> Effect:
        row = await self._write(effects.resolve_effect, tenant, effect_id, resolution)
        self._tell("due")
        return (await self._effects([row])).whole()[0]

    async def get_effect(self, tenant: str, effect_id: str) -> Effect:
        row = await self._database.read(
            lambda connection: effect_rows.get_effect(connection, tenant, effect_id)
        )
        return (await self._effects([row])).whole()[0]

    async def list_effects(
        self,
        tenant: str,
        *,
        run_id: str | None = None,
        scope: str | None = None,
        status: EffectStatus | None = None,
        in_doubt: bool = False,
        limit: int = 100,
        cursor: str | None = None,
        strict: bool = False,
        in_rows: bool = False,
    ) -> Page[Effect]:
        query = effect_queries.listed(
            tenant, run_id=run_id, scope=scope, status=status, in_doubt=in_doubt
        )
        if cursor is not None:
            query = query.where(effects_table.c.seq > _parse_cursor(cursor))
        page = await self._page(query, limit, lambda row, _: row)
        rows = page.items
        if in_rows:
            rows = tuple(row for row in rows if not effect_objects.has_any([row]))
        return await self._effects(rows, page.cursor, strict=strict)

    async def pause_run(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        run: Run = await self._write(pauses.pause_run, tenant, run_id, reason=reason, by=by)
        self._tell("stop")
        return run

    async def resume_run(self, tenant: str, run_id: str, *, by: str | None) -> Run:
        run: Run = await self._write(pauses.resume_run, tenant, run_id, by=by)
        self._tell("due")
        return run

    async def pause(
        self, tenant: str, scope: PauseScope, name: str, *, reason: str | None, by: str | None
    ) -> Pause:
        made: Pause = await self._write(pauses.pause, tenant, scope, name, reason=reason, by=by)
        self._tell("stop")
        return made

    async def resume(self, tenant: str, scope: PauseScope, name: str, *, by: str | None) -> bool:
        was_paused: bool = await self._write(pauses.resume, tenant, scope, name, by=by)
        self._tell("due")
        return was_paused

    async def list_pauses(self, tenant: str) -> tuple[Pause, ...]:
        return await self._read(pauses.list_pauses, tenant)

    async def fire_due(self, tenant: str, *, limit: int) -> int:
        if not await self._read(endings.has_due, tenant):
            return 0
        fired: int = await self._write(endings.fire_due, tenant, limit)
        self._tell("due", "settled")
        return fired

    async def next_due(
        self, tenant: str, *, queues: Collection[str], graphs: Collection[tuple[str, str]]
    ) -> NextDue:
        return await self._database.query(
            lambda session: due.next_due(session, self._payloads, tenant, queues, graphs)
        )

    async def list_dead_letters(
        self,
        tenant: str,
        *,
        graph: str | None,
        reason: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[DeadLetter]:
        return await self._read(
            letters.list_dead_letters,
            tenant,
            graph=graph,
            reason=reason,
            limit=limit,
            cursor=cursor,
        )

    async def requeue_dead_letter(
        self, tenant: str, run_id: str, *, checkpoint_id: str | None, by: str | None
    ) -> Run:
        run: Run = await self._write(
            letters.requeue_dead_letter, tenant, run_id, checkpoint_id=checkpoint_id, by=by
        )
        self._tell("due")
        return run

    async def discard_dead_letter(
        self, tenant: str, run_id: str, *, reason: str | None, by: str | None
    ) -> Run:
        return await self._write(letters.discard_dead_letter, tenant, run_id, reason=reason, by=by)

    async def beat_worker(self, tenant: str, report: WorkerReport) -> None:
        await self._write(workers.beat_worker, tenant, report)

    async def remove_worker(self, tenant: str, instance: str) -> None:
        await self._write(workers.remove_worker, tenant, instance)

    async def list_workers(self, tenant: str) -> tuple[WorkerRecord, ...]:
        return await self._read(workers.list_workers, tenant)

    async def survey(self, tenant: str) -> Survey:
        return await self._read(workers.survey, tenant)

    async def restore(self, *, reason: str | None, by: str | None) -> Restored:
        return await self._write(workers.restore, reason=reason, by=by)

    async def prune_effects(
        self,
        tenant: str,
        *,
        ended_before: datetime,
        graphs: Collection[tuple[str, str]],
        are_others: bool,
        limit: int,
    ) -> int:
        doomed = effect_queries.doomed(
            tenant, ended_before, graphs, are_others=are_others, limit=limit
        )
        if not await self._database.read(lambda connection: connection.execute(doomed).first()):
            return 0
        return await self._write(effect_queries.prune_effects, doomed)

    @property
    def codec(self) -> Codec:
        return self._payloads.strict

    @property
    def hears_others(self) -> bool:
        return self._database.notices.hears_others

    def subscribe(
        self, kind: ChangeKind, wake: Callable[[], None], *, run_id: str | None = None
    ) -> Callable[[], None]:
        topic = kind if run_id is None else f"{kind}:{_topic(run_id)}"
        return self._database.notices.subscribe(topic, wake)

    async def rotate_keys(self, tell: Callable[[int, int], None]) -> int:
        return await rotate_payloads(self._database, self._payloads, tell)

    def find_damages(
        self, *, tenant: str | None = None, thread_id: str | None = None
    ) -> AsyncIterator[Verified]:
        return find_damages(self._database, self._payloads, tenant, thread_id)

    async def close(self) -> None:
        if self._owns_database:
            await asyncio.to_thread(self._database.close)

    async def _write(self, verb: Callable[..., T], *args: Any, **named: Any) -> T:
        return await self._database.write(
            lambda connection: verb(connection, self._payloads, *args, **named)
        )

    async def _read(self, look: Callable[..., T], *args: Any, **named: Any) -> T:
        return await self._database.read(
            lambda connection: look(connection, self._payloads, *args, **named)
        )

    async def _effects(
        self, rows: Sequence[sa.Row[Any]], cursor: str | None = None, *, strict: bool = False
    ) -> Page[Effect]:
        """Read effects; in a thread, if their outcomes are objects."""
        read = partial(
            to_page, rows, self._payloads, partial(effect_rows.to_effect, strict=strict), cursor
        )
        return await asyncio.to_thread(read) if effect_objects.has_any(rows) else read()

    def _tell(self, *kinds: str) -> None:
        self._database.notices.tell(*kinds)

    def _tell_settled(self, run_id: str) -> None:
        """Tell that a run has settled, and that another one of its thread may be due."""
        self._database.notices.tell("due", f"settled:{_topic(run_id)}")

    async def _page(
        self, query: sa.Select[Any], limit: int, build: Callable[[sa.Row[Any], Payloads], T]
    ) -> Page[T]:
        if limit < 0:
            raise InvalidInputError("limit", ("it must not be negative",))
        rows = await self._database.read(
            lambda connection: connection.execute(query.limit(limit + 1)).all()
        )
        return self._as_page(rows, limit, build)

    async def _waits_of_run(
        self, tenant: str, run_id: str, limit: int, cursor: str | None
    ) -> Page[Approval]:
        """Return what a run has asked, as every attempt does."""
        after = 0 if cursor is None else _parse_cursor(cursor)

        def read(session: Session) -> Sequence[sa.Row[Any]]:
            return list_of_run(session, tenant, run_id, after=after, count=limit + 1)

        return self._as_page(await self._database.query(read), limit, to_approval)

    def _as_page(
        self,
        rows: Sequence[sa.Row[Any]],
        limit: int,
        build: Callable[[sa.Row[Any], Payloads], T],
    ) -> Page[T]:
        cursor = str(rows[limit - 1].seq) if len(rows) > limit > 0 else None
        return to_page(rows[:limit], self._payloads, build, cursor)


def _topic(run_id: str) -> str:
    """Name a run in notices: a few characters, whatever its id holds."""
    return f"{zlib.crc32(run_id.encode()):x}"


def _parse_cursor(cursor: str) -> int:
    try:
        return int(cursor)
    except ValueError as exc:
        raise InvalidInputError("cursor", ("it is not one that a listing returned",)) from exc
