"""The verbs of `Saver` that are about what is stored, and not about a graph that runs.

Verifying and counting it, deleting, copying, sweeping and archiving threads. What takes long goes
in steps, each of which leaves all threads whole; so it may be interrupted, and graphs run
meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Literal, get_args

from sqlalchemy.engine import Connection

from agentflow.checkpoint.archive import Archived, archive, restore
from agentflow.checkpoint.audit import Audited, Scope, audit_group
from agentflow.checkpoint.collection import GRACE
from agentflow.checkpoint.copying import copy_thread
from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.ids import check_ids, thread_key
from agentflow.checkpoint.intake import Intake
from agentflow.checkpoint.pruning import Selection, check_leases, delete, prune
from agentflow.checkpoint.records import column_text
from agentflow.checkpoint.retention import Chooser, Retention, SweepReport, sweep
from agentflow.checkpoint.rows import Rows, ThreadKey
from agentflow.checkpoint.runner import StepRunner
from agentflow.checkpoint.sql import on_rows, on_snapshot, open_rows
from agentflow.checkpoint.steps import Ask, Read, Steps, Wait
from agentflow.codec import Codec
from agentflow.database import Database
from agentflow.database.futures import Future
from agentflow.database.session import Session
from agentflow.database.tables import EPOCH
from agentflow.errors import InvalidInputError
from agentflow.objects import ObjectStore, open_objects
from agentflow.types import Clock, Duration, Lease, SystemClock

PruneStrategy = Literal["keep_latest", "delete"]
_RUNS_AT_ONCE = 10_000
"""A statement may not name any number of them."""


class MaintenanceVerbs:
    """What a `Saver` does with stored threads; what it is made of is the saver's own."""

    _database: Database
    _tenant: str
    _codec: Codec
    _encoder: Encoder
    _intake: Intake
    _runner: StepRunner
    _lease: Lease | None
    retention: Retention | None
    """What `sweep` keeps, unless it is told otherwise."""

    async def verify(
        self,
        *,
        tenant: str | None = None,
        thread_id: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Audited]:
        """Verify all that is stored, of all tenants; yields what has come of each few threads.

        Every row, hash, chain and value is read and compared, and nothing is changed. Each thread
        is seen as it is at one moment.

        Args:
            tenant: Narrows to a tenant.
            thread_id: Narrows to threads of this id.
            advance: Told of numbers of checkpoints, from another thread, as they are verified.
        """
        scope = Scope(tenant=tenant, thread_id=thread_id)
        after: int | None = 0
        while after is not None:
            run = partial(
                audit_group, codec=self._codec, scope=scope, after=after, advance=advance or _ignore
            )
            audited = await self._database.read(on_snapshot(run))
            yield audited
            after = audited.after

    async def count(self, *, tenant: str | None = None, thread_id: str | None = None) -> int:
        """Count the checkpoints of all tenants, or as narrowed."""
        return await self._database.query(
            on_rows(lambda rows: rows.count_checkpoints(tenant, thread_id))
        )

    async def count_by_namespace(self, thread_id: str) -> dict[str, int]:
        """Count the checkpoints of a thread; there is nothing for one that is unknown."""
        thread = thread_key(self._tenant, thread_id)
        return await self._database.query(on_rows(lambda rows: rows.count_by_namespace(thread)))

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread's checkpoints and writes in all namespaces.

        The thread's fencing token stays, so that a worker that was left behind stays locked out.

        Raises:
            FencedError: A run holds the thread.
        """
        self._runner.run(self._delete_thread(thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete a thread; see `delete_thread`."""
        await self._runner.arun(self._delete_thread(thread_id))

    def _delete_thread(self, thread_id: str) -> Steps[bool]:
        thread = thread_key(self._tenant, thread_id)
        return delete(thread, self._lease, partial(self._intake.forget_thread, thread))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata has one of these run ids, with their writes.

        They go in batches, each of which leaves the threads whole: what stays can be loaded and
        continued as before at any moment. If the call is interrupted, another one goes on with it.

        Raises:
            FencedError: A run holds one of the threads. If it held it from the beginning, nothing
                is deleted.
        """
        self._runner.run(self._delete_for_runs(run_ids))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of runs; see `delete_for_runs`."""
        await self._runner.arun(self._delete_for_runs(run_ids))

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Steps[None]:
        yield Wait(self._intake.ahead_of(None))
        doomed = sorted({column_text(run_id) for run_id in run_ids})
        found: list[tuple[Selection, Sequence[ThreadKey]]] = []
        for begin in range(0, len(doomed), _RUNS_AT_ONCE):
            some = frozenset(doomed[begin : begin + _RUNS_AT_ONCE])
            threads = yield Read(partial(_threads_of_runs, self._tenant, some))
            yield from check_leases(threads, self._lease)
            found.append((Selection(run_ids=some), threads))
        for selection, threads in found:
            for thread in threads:
                yield from prune(self._encoder, thread, selection, self._lease)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread with all its checkpoints, their ids and their writes.

        Nothing happens if the source does not exist.

        Raises:
            ConflictError: The target has checkpoints.
            FencedError: A run holds the target.
        """
        self._copy_thread(source_thread_id, target_thread_id).result()

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread; see `copy_thread`."""
        await self._database.settled(self._copy_thread(source_thread_id, target_thread_id))

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Future:
        source, target = (
            thread_key(self._tenant, source_thread_id),
            thread_key(self._tenant, target_thread_id),
        )
        lease, codec = self._lease, self._codec
        self._intake.store_held(source)
        calls = count()

        def run(rows: Rows) -> Any:
            return copy_thread(rows, codec, source, target, lease, is_again=next(calls) > 0)

        return self._intake.verb(target, run)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete old checkpoints of some threads.

        They go in batches, each of which leaves its thread whole: what is there can be loaded and
        continued at any moment, graphs may run meanwhile, and what they put is kept. If the call is
        interrupted, another one goes on with it. A thread that is deleted is gone at once.

        Args:
            thread_ids: Unknown ones are passed over.
            strategy: `keep_latest` keeps the newest checkpoint of each namespace, with its writes;
                `delete` keeps nothing. Delta channels of what is kept keep their values.

        Raises:
            FencedError: A run holds one of the threads. If it held it from the beginning, nothing
                is deleted.
            InvalidInputError: The strategy is unknown.
        """
        self._runner.run(self._prune(thread_ids, strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete old checkpoints; see `prune`."""
        await self._runner.arun(self._prune(thread_ids, strategy))

    def _prune(self, thread_ids: Sequence[str], strategy: str) -> Steps[None]:
        if strategy not in get_args(PruneStrategy):
            raise InvalidInputError("strategy", (f"must be one of {get_args(PruneStrategy)}",))
        given = [thread_key(self._tenant, thread_id) for thread_id in dict.fromkeys(thread_ids)]
        for thread in given:
            yield Wait(self._intake.ahead_of(thread))
        threads = yield Read(
            lambda rows: [key for key in given if rows.find_checkpoint((*key, ""), None)]
        )
        yield from check_leases(threads, self._lease)
        for thread in threads:
            if strategy == "delete":
                yield from delete(thread, self._lease)
            else:
                yield from prune(self._encoder, thread, Selection(keep_last=1), self._lease)

    def sweep(
        self,
        retention: Retention | None = None,
        *,
        dry_run: bool = False,
        thread_ids: Sequence[str] | None = None,
        clock: Clock | None = None,
        grace: Duration = GRACE,
    ) -> SweepReport:
        """Delete what need not be kept any longer, of all threads of the tenant.

        Threads with work left, and those that runs hold, are let be. It goes in small batches while
        graphs run, and may be interrupted and called again at any time.

        Args:
            retention: What is kept; by default what the checkpointer was opened with.
            dry_run: Only say what would go.
            thread_ids: Sweep only these.
            clock: Tells the age of threads; the machine's by default.
            grace: How long objects of the object tier are kept to which nothing refers any more.
                They are looked at when all threads are.

        Raises:
            InvalidInputError: Nobody has said what is kept.
        """
        kept = self._kept(retention)

        def answer(asked: Ask) -> Mapping[str, Retention]:
            return dict.fromkeys(asked.thread_ids, kept)

        return self._runner.run(self._sweep(thread_ids, clock, grace, dry_run=dry_run), answer)

    async def asweep(
        self,
        retention: Retention | Chooser | None = None,
        *,
        dry_run: bool = False,
        thread_ids: Sequence[str] | None = None,
        clock: Clock | None = None,
        grace: Duration = GRACE,
    ) -> SweepReport:
        """Delete what need not be kept any longer; see `sweep`.

        Instead of one `Retention` for all, it takes a function that gets some thread ids and
        returns what is kept of each; those that it leaves out are let be. It is asked about a
        thread again before that is deleted as a whole.
        """
        chosen = retention if callable(retention) else self._kept(retention)

        async def answer(asked: Ask) -> Mapping[str, Retention]:
            if isinstance(chosen, Retention):
                return dict.fromkeys(asked.thread_ids, chosen)
            return await chosen(asked.thread_ids)

        return await self._runner.arun(
            self._sweep(thread_ids, clock, grace, dry_run=dry_run), answer
        )

    def _kept(self, retention: Retention | None) -> Retention:
        found = retention or self.retention
        if found is None:
            raise InvalidInputError("retention", ("is missing: give it here or when opening",))
        return found

    def _sweep(
        self,
        thread_ids: Sequence[str] | None,
        clock: Clock | None,
        grace: Duration,
        *,
        dry_run: bool,
    ) -> Steps[SweepReport]:
        for thread_id in thread_ids or ():
            check_ids(thread_id=thread_id)
        now = (clock or SystemClock()).now()
        return sweep(self._encoder, self._tenant, thread_ids, now, dry_run=dry_run, grace=grace)

    def archive(self, thread_id: str, *, to: str | ObjectStore, keep: bool = False) -> Archived:
        """Move a thread with all that it has into an object store.

        Rows are deleted once the archive is durable. Killed before, it leaves the thread as it is.

        Args:
            thread_id: The thread.
            to: The object store, or its URL: `file:///folder`.
            keep: Do not delete the thread.

        Raises:
            NotFoundError: There is no such thread.
            FencedError: A run holds it.
            ConflictError: It was written meanwhile; nothing was deleted.
            ObjectStoreError: The store could not be written; nothing was deleted.
        """
        return self._runner.run(self._archive(thread_id, to, keep=keep))

    async def aarchive(
        self, thread_id: str, *, to: str | ObjectStore, keep: bool = False
    ) -> Archived:
        """Move a thread into an object store; see `archive`."""
        return await self._runner.arun(self._archive(thread_id, to, keep=keep))

    def _archive(self, thread_id: str, to: str | ObjectStore, *, keep: bool) -> Steps[Archived]:
        thread, store = thread_key(self._tenant, thread_id), _opened(to)
        yield Wait(self._intake.ahead_of(thread))
        forget = partial(self._intake.forget_thread, thread)
        return (
            yield from archive(
                self._codec, thread, store, self._lease, keep=keep, on_deleted=forget
            )
        )

    def restore(
        self, thread_id: str, *, source: str | ObjectStore, archive_id: str | None = None
    ) -> Archived:
        """Make a thread from its archive, also in another database; the archive stays.

        It is there whole, in one commit, or not at all.

        Args:
            thread_id: The thread, which must not have anything.
            source: The object store, or its URL: `file:///folder`.
            archive_id: Which archive; by default the newest of the thread.

        Raises:
            NotFoundError: There is no such archive.
            ConflictError: The thread is there already.
            FencedError: A run holds the thread.
            HashMismatchError: The archive is damaged, or is another thread's.
            MissingBlobError: A part of it is not there.
            UnknownKeyError: It is encrypted by a key that is not here.
        """
        return self._runner.run(self._restore(thread_id, source, archive_id))

    async def arestore(
        self, thread_id: str, *, source: str | ObjectStore, archive_id: str | None = None
    ) -> Archived:
        """Make a thread from its archive; see `restore`."""
        return await self._runner.arun(self._restore(thread_id, source, archive_id))

    def _restore(
        self, thread_id: str, source: str | ObjectStore, archive_id: str | None
    ) -> Steps[Archived]:
        thread, store = thread_key(self._tenant, thread_id), _opened(source)
        return restore(self._codec, thread, store, self._lease, archive_id)

    async def begin_epoch(self) -> None:
        """Raise the tokens of all threads, of all tenants, above any that was given before.

        For a database that was put back from a backup: who holds a lease from before cannot write.
        """

        def raise_tokens(connection: Connection) -> None:
            open_rows(Session.inside(connection)).raise_tokens(EPOCH)

        await self._database.write(raise_tokens)


def _opened(objects: str | ObjectStore) -> ObjectStore:
    return open_objects(objects) if isinstance(objects, str) else objects


def _threads_of_runs(tenant: str, run_ids: frozenset[str], rows: Rows) -> Sequence[ThreadKey]:
    return rows.list_threads_of_runs(tenant, run_ids)


def _ignore(_: int) -> None:
    """Tell nobody."""
