"""`AgentFlow`: the one object that a program holds."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph.types import StateSnapshot

from agentflow import upkeep
from agentflow.approvals import Approvals
from agentflow.budgets import Budget
from agentflow.checkpoint import Retention, Saver, SweepReport, open_checkpointer
from agentflow.config import Settings, load_settings
from agentflow.control import AttemptControl, monotonic
from agentflow.dead_letters import DeadLetters
from agentflow.doctor import Diagnosis, diagnose
from agentflow.drive import (
    Driver,
    RegisteredGraph,
    drained_by_interrupt,
    end_cancelled,
    opening,
    store_fingerprint,
)
from agentflow.effect_records import EffectRecords
from agentflow.errors import (
    ChangeKind,
    InvalidInputError,
    ThreadBusyError,
)
from agentflow.handle import RunHandle, Until
from agentflow.inputs import (
    check_input,
    check_options,
    check_share,
    check_wait,
    check_worker,
    member,
    pause_scope,
)
from agentflow.inspection import CheckedRun, check_run, check_runs
from agentflow.keys import KeyRing
from agentflow.lease import LeaseKeeper
from agentflow.listener import Listener
from agentflow.migration import MigrationReport, Migrator
from agentflow.offers import Offers
from agentflow.registry import Migrate, Registry, warn_if_redefined
from agentflow.retry import LangGraphRetryPolicy, RetryPolicy
from agentflow.serializer import AllowList
from agentflow.storage import OnBusy, OnExisting, Opening, RunStore
from agentflow.telemetry import traceparent
from agentflow.threads import on_loop
from agentflow.transfer import export_run, import_run
from agentflow.types import (
    AuditEvent,
    Clock,
    Duration,
    Page,
    Pause,
    Restored,
    Route,
    Run,
    RunSpec,
    RunStatus,
    SystemClock,
    new_id,
)
from agentflow.upkeep import Progress, Rotation
from agentflow.versions import ChangeAction
from agentflow.worker import Worker

if TYPE_CHECKING:
    from agentflow.codec import Redact

_EVENT_PAGE = 100
_FIRED_AT_ONCE = 100
_SELDOM = 10
"""How many times longer those wait until they look who are told of what they wait for."""


class AgentFlow:
    """Runs LangGraph graphs durably, on one database.

    Nothing connects before the first use. Safe to use from one event loop; use one object per loop.

    Example:
        ```python
        app = AgentFlow("sqlite:///agents.db")
        app.register(graph, name="refund")
        async with app.worker():
            handle = await app.submit("refund", {"ticket": "…"})
            result = await handle.result()
        ```
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        checkpoints: str | BaseCheckpointSaver[Any] | None = None,
        clock: Clock | None = None,
        tenant: str = "",
        allow: AllowList = "imported",
        keys: KeyRing | None = None,
        redact: Redact | None = None,
        offload: str | None = None,
    ) -> None:
        """Set where runs and checkpoints live.

        Args:
            url: The database; without one the environment's `AGENTFLOW_DB_URL`, else
                `sqlite:///agentflow.db`.
            checkpoints: Where checkpoints live, if not in the same database: a URL, or any
                LangGraph checkpointer. One that is not agentflow's is not fenced.
            clock: The clock of timers and deadlines.
            tenant: Keeps the runs and threads of different tenants apart.
            allow: Which classes may be stored; see `open_checkpointer`.
            keys: Encrypts everything that is stored; without it the environment's
                `AGENTFLOW_KEYS`, if there is one.
            redact: Changes values before they are stored; see `open_checkpointer`. The places in
                what is stored of runs are named by table and column, such as `runs.input`.
            offload: Where large values of checkpoints, and large outcomes of effects, are kept; see
                `open_checkpointer`.

        Raises:
            UnsupportedUrlError: A URL's scheme is unknown.
            MissingDriverError: A database's driver, or `cryptography`, is not installed.
            InvalidInputError: `offload` is malformed.
            ObjectStoreError: The folder of `offload` is not there.
        """
        # Imported with the first object: SQLAlchemy takes longer to import than all else here.
        from agentflow.codec import Codec
        from agentflow.database import Database
        from agentflow.objects import open_tier
        from agentflow.storage.sql import SqlRunStore

        self._settings: Settings = load_settings()
        self.url = url or self._settings.db_url
        self.tenant = tenant
        self._options = {
            "checkpoints": checkpoints,
            "clock": clock,
            "allow": allow,
            "keys": keys,
            "redact": redact,
            "offload": offload,
        }
        self._clock = clock or SystemClock()
        self._keys = keys or self._settings.keys
        tier = open_tier(offload or self._settings.offload) if checkpoints is None else None
        codec = Codec(allow=allow, keys=self._keys, redact=redact, tier=tier)
        database = Database(self.url, self._settings)
        self._store: RunStore = SqlRunStore(
            database,
            codec=codec,
            owns_database=True,
            # The database's own clock is better than this machine's, unless there is a reason.
            clock=clock,
            max_payload=self._settings.max_payload,
        )
        self._owned_saver: Saver | None = None
        self._saver: BaseCheckpointSaver[Any]
        if checkpoints is None:
            self._saver = Saver(database, codec=codec, tenant=tenant)
        elif isinstance(checkpoints, str):
            self._saver = self._owned_saver = open_checkpointer(
                checkpoints,
                keys=keys,
                allow=allow,
                tenant=tenant,
                redact=redact,
                offload=offload,
            )
        else:
            self._saver = checkpoints
        self._registry = Registry()
        self._offers = Offers()
        self.approvals = Approvals(
            self._store,
            tenant,
            saver=self._saver,
            lease=self._settings.lease,
            offers=self._offers,
        )
        self.effects = EffectRecords(self._store, tenant)
        self.dead_letters = DeadLetters(self._store, self._saver, tenant)

    def with_url(self, url: str) -> AgentFlow:
        """Return an `AgentFlow` with the same graphs and options on another database."""
        return self._elsewhere(url, self._options)

    def in_memory(self) -> AgentFlow:
        """Return an `AgentFlow` with the same graphs and keys, whose content is its own."""
        return self._elsewhere("memory://", {**self._options, "checkpoints": None, "offload": None})

    def _elsewhere(self, url: str, options: Mapping[str, Any]) -> AgentFlow:
        other = AgentFlow(url, tenant=self.tenant, **cast(Any, options))
        other._registry = self._registry.copy()
        return other

    def without_graphs(self) -> AgentFlow:
        """Return the same app, on the same connections, without its graphs.

        What is registered there is not known here, and the reverse. Close this one only.
        """
        other = copy.copy(self)
        other._registry = Registry()
        return other

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """Where the checkpoints of all runs are: to be read, for runs write under their leases."""
        return self._saver

    def register(
        self,
        graph: StateGraph[Any, Any, Any, Any] | Pregel[Any, Any, Any, Any],
        *,
        name: str,
        version: str = "1",
        retry: RetryPolicy | LangGraphRetryPolicy | None = None,
        node_retry: Mapping[str, RetryPolicy | LangGraphRetryPolicy] | None = None,
        node_timeout: Mapping[str, Duration] | None = None,
        queue: str = "default",
        context: Callable[[Run], Any] | None = None,
        input_schema: Any = None,
        retention: Retention | None = None,
        on_cancel: Callable[[Run], Any] | None = None,
        node_version: Mapping[str, str] | None = None,
        on_change: ChangeAction | Mapping[ChangeKind, ChangeAction] = "refuse",
        budget: Budget | Sequence[Budget] = (),
    ) -> None:
        """Make a graph known under a name and version.

        Args:
            graph: A `StateGraph` or a compiled graph; the checkpointer of a compiled one is
                replaced by agentflow's, in a copy.
            name: What runs refer to.
            version: Runs stay with the version that they were submitted under.
            retry: When a failed attempt is tried again; LangGraph's policy is accepted too. Its
                numbers are stored with each run.
            node_retry: The same by node, for where a node of that name failed. It is not the
                `retry_policy` of LangGraph's `add_node`, by which a node is tried again in its
                process, before the attempt has failed.
            node_timeout: How long a call of a node may take, by its name. It is for nodes that are
                not async, which LangGraph's `timeout` is not: the attempt is given up and counts as
                failed, the thread is left behind, and what it still returns is dropped.
            queue: Where runs are queued unless `submit` says otherwise.
            context: Makes the graph's context for each attempt, from the run; may be `async`.
            input_schema: A type that inputs must fit, instead of the graph's own input schema.
            retention: How long `sweep` keeps the threads whose newest run is one of this graph's.
            on_cancel: Called, and awaited, when a run that is being driven is cancelled, before it
                becomes `cancelled`; once more if the process dies in between.
            node_version: Versions of nodes, by which they are known instead of by their code; as
                `metadata["version"]` of `add_node` does.
            on_change: What is done about a run that began on this version when its code was another
                one, and that can still come to what has changed: `refuse`, `warn` or `accept`, for
                all changes or by kind.
            budget: What each run, or all runs of a thread together, may use. It is not stored with
                runs: a requeued run goes on under the budget that is registered then.

        Raises:
            InvalidInputError: The name and version are taken by another graph.
        """
        self._registry.register(
            graph,
            name=name,
            version=version,
            retry=retry,
            node_retry=node_retry,
            node_timeout=node_timeout,
            node_version=node_version,
            queue=queue,
            budgets=(budget,) if isinstance(budget, Budget) else tuple(budget),
            context=context,
            input_schema=input_schema,
            retention=retention,
            on_cancel=on_cancel,
            on_change=on_change,
        )

    def migration(
        self,
        graph: str,
        *,
        from_: str,
        to: str,
        nodes: Mapping[str, str] | None = None,
        channels: Mapping[str, str] | None = None,
        ask_again: bool = False,
    ) -> Callable[[Migrate], Migrate]:
        """Decorate the function by which runs get from one version of a graph to another.

        It takes the values of the state and returns those of the other version. It must be pure: it
        is called twice, and both have to return the same. Migrations follow each other.

        Args:
            graph: The graph's name.
            from_: The version that it takes runs from.
            to: The version that it brings them to.
            nodes: What nodes are called there; what was due under the old name is under the new.
            channels: What channels are called there; they come to the function as renamed.
            ask_again: Whether open questions are superseded, and asked again by the new code.
                Otherwise they stay, and so do decisions.
        """
        return self._registry.add_migration(
            graph, from_, to, nodes=nodes, channels=channels, ask_again=ask_again
        )

    @property
    def graphs(self) -> Mapping[tuple[str, str], RegisteredGraph]:
        """What is registered, by name and version, in the order of registration."""
        return MappingProxyType(self._registry.graphs)

    async def submit(
        self,
        name: str,
        input: Any,
        *,
        run_id: str | None = None,
        thread_id: str | None = None,
        version: str | None = None,
        queue: str | None = None,
        priority: int = 0,
        start_at: datetime | None = None,
        start_timeout: Duration | None = None,
        timeout: Duration | None = None,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_existing: OnExisting = "return",
        on_busy: OnBusy = "enqueue",
        by: str | None = None,
    ) -> RunHandle:
        """Store a run of a graph, to be driven by any worker; it is durable on return.

        Args:
            name: The graph's name.
            input: The graph's input.
            run_id: An id of your own, for submitting at most once; a new one by default.
            thread_id: The thread to advance; by default a new one, named like the run.
            version: The graph's version; by default what its routes say, else the one registered
                last.
            queue: The queue, if not the graph's.
            priority: Higher goes first.
            start_at: Not before this time.
            start_timeout: How long it may wait for a worker, from `start_at` on; then it is
                cancelled.
            timeout: How long it may take in all, with all that it waits for; then it fails, with a
                dead letter. A requeue gives it this time again.
            config: `configurable`, `recursion_limit` and `tags` for LangGraph.
            metadata: Kept with the run and with its checkpoints.
            on_existing: What to do if `run_id` is known with the same graph and input: return that
                run, `reject`, or `restart_if_failed`.
            on_busy: What to do if the thread has unfinished runs (LangGraph's multitask
                strategies): wait until they have ended (`enqueue`), refuse (`reject`), or cancel
                them and follow: keeping the state that they have reached (`interrupt`), or
                without it, their checkpoints deleted (`rollback`).
            by: Who submits.

        Raises:
            UnknownGraphError: The graph or version is not registered here.
            InvalidInputError: The input does not fit the graph, or an option is malformed.
            SerializationError: The input could not be loaded back.
            PayloadTooLargeError: The input is too large.
            IdempotencyConflictError: The id is known with another graph, thread or input.
            ThreadBusyError: The thread is busy, and `on_busy` is `reject`.
        """
        chosen_id = run_id or new_id()
        registered = await self._choose_graph(name, version, chosen_id)
        check_input(registered, input)
        options = check_options(
            config=config,
            metadata=metadata,
            start_at=start_at,
            on_existing=on_existing,
            on_busy=on_busy,
            priority=priority,
            timeouts={"start_timeout": start_timeout, "timeout": timeout},
            names={"run_id": run_id, "thread_id": thread_id, "queue": queue, "by": by},
        )
        if on_busy == "rollback" and not isinstance(self._saver, Saver):
            raise InvalidInputError(
                "submission", ("on_busy: only agentflow's checkpointer can roll back",)
            )
        spec = RunSpec(
            run_id=chosen_id,
            thread_id=thread_id or chosen_id,
            graph=registered.name,
            version=registered.version,
            queue=queue or registered.queue,
            input=input,
            metadata=options.metadata,
            config=options.config,
            priority=priority,
            start_at=start_at,
            start_timeout=options.timeouts["start_timeout"],
            timeout=options.timeouts["timeout"],
            retry=registered.policies.to_plain(),
            submitted_by=by,
            traceparent=traceparent(),
            fingerprint=registered.fingerprint.digest,
        )
        await store_fingerprint(self._store, self.tenant, registered)
        create = partial(
            self._store.create_run, self.tenant, spec, on_existing=on_existing, on_busy=on_busy
        )
        graph = (registered.name, registered.version)
        created = await self._offers.hand(
            lambda claimant: create(claimant=claimant),
            lambda claimant: claimant.wants(spec.queue, graph),
        )
        run = created.run
        return RunHandle(self, run.id, run.thread_id)

    async def fork(
        self,
        run_id: str,
        checkpoint_id: str,
        *,
        values: Any = None,
        repeat_effects: bool = False,
        new_run_id: str | None = None,
        by: str | None = None,
    ) -> RunHandle:
        """Store a run that goes on from a checkpoint of another one, on a thread of its own.

        Effects that the other run has called, at the same place with the same arguments or under
        the same key, are not called again: their outcomes are returned.

        Args:
            run_id: The other run.
            checkpoint_id: A checkpoint of its thread.
            values: Updates the state of that checkpoint first, as LangGraph's `update_state` does.
            repeat_effects: Call them again.
            new_run_id: The id of the new run, and of its thread.
            by: Who asks for it.

        Raises:
            NotFoundError: There is no such run, or its thread has no such checkpoint.
            UnknownGraphError: The run's graph is not registered here.
            IdempotencyConflictError: The new id is known.
            InvalidInputError: The checkpointer is not agentflow's.
        """
        run = await self.get_run(run_id)
        registered = self._registry.find(run.graph, run.version)
        new_id_ = new_run_id or new_id()
        resume_from, shift = await upkeep.copy_for_fork(
            self._saver, registered.graph, run, checkpoint_id, values, new_id_
        )
        spec = RunSpec(
            run_id=new_id_,
            thread_id=new_id_,
            graph=run.graph,
            version=run.version,
            queue=run.queue,
            input=run.input,
            metadata=run.metadata,
            config=run.config,
            priority=run.priority,
            retry=run.retry,
            submitted_by=by,
            traceparent=traceparent(),
            root_id=None if repeat_effects else run.root_id or run.id,
            resume_from=resume_from,
            forked_from=run.id,
            effect_shift=shift,
            fingerprint=registered.fingerprint.digest,
        )
        await self._store.create_run(self.tenant, spec, on_existing="reject")
        return RunHandle(self, new_id_, new_id_)

    def handle(self, run_id: str) -> RunHandle:
        """Return a handle on a run; whether it exists shows with its first use."""
        return RunHandle(self, run_id, None)

    async def get_run(self, run_id: str) -> Run:
        """Return a run as it stands; `NotFoundError` if there is none."""
        return await self._store.get_run(self.tenant, run_id)

    async def list_runs(
        self,
        *,
        status: RunStatus | str | None = None,
        graph: str | None = None,
        thread_id: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Run]:
        """Return a page of runs, newest first; give `cursor` of one page for the next."""
        return await self._store.list_runs(
            self.tenant,
            status=member(RunStatus, status),
            graph=graph,
            thread_id=thread_id,
            limit=limit,
            cursor=cursor,
        )

    async def wait(
        self, run_id: str, *, until: Until = "ended", timeout: Duration | None = None
    ) -> Run:
        """Return the run once it has ended, or (`parked`) waits or has ended.

        A failed run is returned like any other; `RunHandle.result` raises.

        Raises:
            TimeoutError: It took longer than `timeout`.
            InvalidInputError: There is nothing of that kind to wait for.
        """
        check_wait(until, timeout)
        limit = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        with self._listen(run_id) as listener:
            async with asyncio.timeout(limit):
                while True:
                    run = await self.get_run(run_id)
                    is_parked = until == "parked" and run.status is RunStatus.WAITING
                    if run.status.is_ended or is_parked:
                        return run
                    await listener.wait(self._pause())

    async def drive(self, run_id: str) -> Run:
        """Drive a run here and now, under a lease, to its end or to its first wait.

        An interrupt at the keyboard lets it come to the end of its step first; another one does
        not.

        Raises:
            NotFoundError: There is no such run.
            ThreadBusyError: Somebody else holds the run, or its thread.
            PausedError: The run is paused, or its graph, its queue or everything is.
            UnknownGraphError: The run's graph is not registered here.
            IncompatibleGraphError: The graph has changed where the run can still come to. Nothing
                ran, and the run is paused.
            UnknownVersionError: A newer agentflow has stored what is needed; the run is paused.
        """
        name = f"drive-{new_id()[-6:]}"
        keeper = self._keeper()
        with keeper, on_loop(1) as threads, self._listen(run_id) as listener:
            while True:
                run = await self.get_run(run_id)
                if run.status.is_ended or run.status is RunStatus.WAITING:
                    return run
                registered = self._registry.find(run.graph, run.version)
                warn_if_redefined(registered)
                since = monotonic()
                claimed = await self._store.claim_run(
                    self.tenant,
                    run_id,
                    worker=name,
                    lease=self._settings.lease,
                    opening=self._opening(),
                )
                if claimed is None:
                    # Not due yet, by the store's clock, or too late, or it has just ended.
                    if not await self._store.fire_due(self.tenant, limit=_FIRED_AT_ONCE):
                        await listener.wait(self._settings.poll_interval.total_seconds())
                else:
                    driver = Driver(self._store, self._saver, keeper, threads)
                    control = AttemptControl()
                    with drained_by_interrupt(control):
                        refused = await driver.attempt(registered, claimed, control, since=since)
                    if refused is not None:
                        raise refused

    def _opening(self) -> Opening | None:
        """Return how claims open attempts, if checkpoints are in the same database."""
        if self._options["checkpoints"] is not None:
            return None
        return opening(self._saver, self._registry.graphs)

    async def cancel(self, run_id: str, *, reason: str | None = None, by: str | None = None) -> Run:
        """Cancel a run: at once unless a worker has it, else as soon as that worker hears of it.

        Raises:
            IllegalTransitionError: It succeeded or failed already.
        """
        run = await self._store.cancel_run(self.tenant, run_id, reason=reason, by=by)
        if run.status is RunStatus.RUNNING:
            run = await self._cancel_abandoned(run)
        return run

    async def _cancel_abandoned(self, run: Run) -> Run:
        """End a run whose worker is gone; leave it to its worker otherwise."""
        try:
            claimed = await self._store.claim_run(
                self.tenant,
                run.id,
                worker=f"cancel-{new_id()[-6:]}",
                lease=self._settings.lease,
                although_paused=True,
            )
        except ThreadBusyError:
            return run
        if claimed is not None:
            await end_cancelled(self._store, self._saver, claimed)
        return await self.get_run(run.id)

    async def pause_run(
        self, run_id: str, *, reason: str | None = None, by: str | None = None
    ) -> Run:
        """Pause a run; one that is being driven stops at its next superstep, its state saved.

        Raises:
            IllegalTransitionError: It has ended.
        """
        return await self._store.pause_run(self.tenant, run_id, reason=reason, by=by)

    async def resume_run(self, run_id: str, *, by: str | None = None) -> Run:
        """Let a paused run go on; one that was paused by its failures gets a new attempt budget.

        Raises:
            IllegalTransitionError: It has ended.
        """
        return await self._store.resume_run(self.tenant, run_id, by=by)

    async def pause(
        self,
        *,
        graph: str | None = None,
        queue: str | None = None,
        reason: str | None = None,
        by: str | None = None,
    ) -> Pause:
        """Pause all runs of a graph, or of a queue, or simply all; also those to come.

        What is being driven stops at its next superstep. Runs can still be submitted, decided about
        and cancelled.
        """
        scope, name = pause_scope(graph, queue)
        return await self._store.pause(self.tenant, scope, name, reason=reason, by=by)

    async def resume(
        self, *, graph: str | None = None, queue: str | None = None, by: str | None = None
    ) -> bool:
        """End the pause of a graph, of a queue, or that of everything; say whether there was one.

        What is paused by itself, or by another pause, stays so.
        """
        scope, name = pause_scope(graph, queue)
        return await self._store.resume(self.tenant, scope, name, by=by)

    async def list_pauses(self) -> tuple[Pause, ...]:
        """Return what is paused, but for single runs; the oldest first."""
        return await self._store.list_pauses(self.tenant)

    async def list_events(
        self, run_id: str | None = None, *, after: int = 0, limit: int = _EVENT_PAGE
    ) -> tuple[AuditEvent, ...]:
        """Return the run's audit events with numbers above `after`, as far as there are any now.

        Without a run, those that concern none: pauses, and restored backups.
        """
        found = await self._store.list_events(self.tenant, run_id or "", after=after, limit=limit)
        if run_id is not None and not (found and run_id):
            await self.get_run(run_id)  # there may be none
        return found

    async def events(self, run_id: str, *, after: int = 0) -> AsyncIterator[AuditEvent]:
        """Yield the run's audit events with numbers above `after`, until it has ended."""
        seen = after
        with self._listen(run_id) as listener:
            while True:
                run = await self.get_run(run_id)
                page = await self._store.list_events(
                    self.tenant, run_id, after=seen, limit=_EVENT_PAGE
                )
                for event in page:
                    seen = event.seq
                    yield event
                if page:
                    continue
                if run.status.is_ended:
                    return
                await listener.wait(self._settings.poll_interval.total_seconds())

    def worker(
        self,
        *,
        concurrency: int = 10,
        queues: Sequence[str] = ("default",),
        name: str | None = None,
        sweep_every: Duration | None = None,
    ) -> Worker:
        """Return a worker for the graphs registered so far; use it with `async with`.

        Args:
            concurrency: How many runs it drives at once.
            queues: The queues that it takes runs from.
            name: Shown in audit events; need not be unique.
            sweep_every: About how often it calls `sweep`; several workers do so at different times.

        Raises:
            InvalidInputError: Something of that cannot be.
        """
        interval = check_worker(concurrency, queues, sweep_every)
        return Worker(
            self._store,
            self._saver,
            dict(self._registry.graphs),
            self._settings,
            tenant=self.tenant,
            concurrency=concurrency,
            queues=queues,
            name=name,
            sweep=self.sweep,
            sweep_every=interval,
            opening=self._opening(),
            offers=self._offers,
        )

    async def state(self, run_id: str) -> StateSnapshot:
        """Return the state of the run's thread, as LangGraph shows it, with subgraphs."""
        run = await self.get_run(run_id)
        registered = self._registry.find(run.graph, run.version)
        graph = registered.graph.copy(update={"checkpointer": self._saver})
        return await graph.aget_state(
            {"configurable": {"thread_id": run.thread_id}}, subgraphs=True
        )

    async def migrate_run(
        self, run_id: str, *, to: str | None = None, by: str | None = None
    ) -> Run:
        """Bring a run that nobody drives to another version of its graph, by its migrations.

        The checkpoint that it stands at stays; a new one follows it. Killed at any point it can be
        called again. A run that has ended, or has that version, is returned as it is.

        Args:
            run_id: The run.
            to: The version; by default the one registered last.
            by: Who asks for it.

        Raises:
            MigrationError: There is no way, or the migration is not pure, or its state is invalid;
                nothing was changed.
            ThreadBusyError: The run is being driven.
        """
        return await self._migrator().migrate(run_id, to, by=by)

    async def migrate_runs(
        self,
        graph: str,
        *,
        to: str | None = None,
        from_: str | None = None,
        dry_run: bool = False,
        by: str | None = None,
    ) -> MigrationReport:
        """Bring all unfinished runs of a graph to a version, one after another, and report.

        Args:
            graph: The graph's name.
            to: The version; by default the one registered last.
            from_: Only runs of this version.
            dry_run: Only say what would happen.
            by: Who asks for it.
        """
        return await self._migrator().migrate_all(graph, to, from_, is_dry=dry_run, by=by)

    async def route(
        self, graph: str, version: str, share: float | None, *, by: str | None = None
    ) -> tuple[Route, ...]:
        """Send a share of a graph's new runs to one of its versions; return all its routes.

        Which runs is decided by their ids. What is submitted with a version is not routed, and the
        other runs go to the newest version that has no share of its own. It holds for all processes
        at once, until it is set to `None`.

        Raises:
            InvalidInputError: It is not between 0 and 1, or there would be more than 1 in all.
        """
        check_share(graph, version, share)
        return await self._store.route_graph(self.tenant, graph, version, share, by=by)

    async def list_routes(self, graph: str | None = None) -> tuple[Route, ...]:
        """Return where new runs of a graph go, or of all graphs."""
        return await self._store.list_routes(self.tenant, graph)

    async def check_runs(self, graph: str | None = None) -> tuple[CheckedRun, ...]:
        """Say of each unfinished run what would become of it with what is registered here.

        Runs nothing and changes nothing: for a deploy that is about to happen.
        """
        return await check_runs(self._store, self._saver, self._registry, self.tenant, graph)

    async def check_run(self, run_id: str) -> CheckedRun:
        """Say what would become of one run; see `check_runs`."""
        return await check_run(self._store, self._saver, self._registry, await self.get_run(run_id))

    async def export_run(self, run_id: str) -> dict[str, Any]:
        """Return a run with all that is stored of it and of its thread, to be written as JSON.

        What is encrypted stays encrypted. The run stays as well: to move it, pause it before, and
        cancel it here once it is imported elsewhere.

        Raises:
            ConflictError: It is being driven, or shares its effects with other runs.
            InvalidInputError: The checkpointer is not agentflow's.
        """
        return await export_run(self._store, self._saver, self.tenant, run_id)

    async def import_run(self, exported: Mapping[str, Any], *, by: str | None = None) -> Run:
        """Store a run that `export_run` has returned, to go on here; all of it, or nothing.

        Raises:
            InvalidInputError: It is no exported run, or of another tenant.
            HashMismatchError: It is damaged.
            UnknownVersionError: A newer program made it.
            UnknownKeyError: It is encrypted by a key that is not here.
            ConflictError: Its run or its thread is there already.
        """
        return await import_run(self._store, self._saver, self.tenant, exported, by=by)

    def _migrator(self) -> Migrator:
        return Migrator(
            self._store,
            self._saver,
            self._registry,
            tenant=self.tenant,
            lease=self._settings.lease,
        )

    async def rotate_keys(self, progress: Progress | None = None) -> Rotation:
        """Seal by the current key everything, of all tenants, that is not; also plaintext.

        It may be killed at any point and started again: what is done stays done. Meanwhile runs go
        on, in processes that have both keys.

        Args:
            progress: Called now and then with what is looked through (`runs` or `checkpoints`),
                the rows looked through so far, and how many of them were sealed.

        Raises:
            InvalidInputError: There are no keys.
            UnknownKeyError: Something is sealed by a key that is not here.
            UnencryptedValueError: Something is not encrypted, and the ring does not accept that.
            HashMismatchError: Something is damaged; what comes before it is done.
        """
        return await upkeep.rotate_keys(self._store, self._saver, self._keys, progress)

    async def sweep(
        self, retention: Retention | None = None, *, dry_run: bool = False
    ) -> SweepReport:
        """Delete checkpoints and threads that need not be kept any longer.

        Threads with a run that has not ended are let be, and those that have work left. It goes in
        small batches while runs go on, and may be interrupted and called again at any time. Runs
        and their events are not deleted; the records of their effects are, as long after the end of
        a run as its thread's `ttl` says.

        Args:
            retention: What is kept of the threads of graphs that were registered without a
                `retention`; by default what the checkpointer was opened with, or all of them.
            dry_run: Only say what would go.

        Raises:
            InvalidInputError: The app was given a checkpointer that cannot be swept.
        """
        own = {key: each.retention for key, each in self._registry.graphs.items()}
        sweeper = upkeep.Sweeper(self._store, self._saver, self.tenant, own, self._clock)
        return await sweeper.sweep(retention, dry_run=dry_run)

    async def restore(self, *, reason: str | None = None, by: str | None = None) -> Restored:
        """Mark that the database was put back from a backup; everything is paused then.

        To be called after the backup is back, before any worker starts. No process from before can
        write any more. Look through the unfinished runs, of all tenants: what they did since the
        backup was made, they are about to do again. Then call `resume_restored`.

        Raises:
            InvalidInputError: The checkpointer is not agentflow's: it cannot be marked.
        """
        return await upkeep.restore(self._store, self._saver, reason=reason, by=by)

    async def resume_restored(self, *, by: str | None = None) -> bool:
        """Let the runs of a restored database go on; say whether they were paused."""
        return await self._store.resume(self.tenant, "store", "", by=by)

    async def doctor(self) -> Diagnosis:
        """Look for what is wrong: with the database, with workers, with runs. Changes nothing."""
        return await diagnose(
            self._store, self._saver, url=self.url, tenant=self.tenant, lease=self._settings.lease
        )

    async def aclose(self) -> None:
        """Write what is queued and close all connections."""
        if self._owned_saver is not None:
            await self._owned_saver.aclose()
        await self._store.close()

    async def __aenter__(self) -> Self:
        """Return the app, which connects on first use."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the app."""
        await self.aclose()

    def _keeper(self) -> LeaseKeeper:
        return LeaseKeeper(
            self._store, lease=self._settings.lease, heartbeat=self._settings.heartbeat
        )

    def _pause(self) -> float:
        """Return for how many seconds nobody looks who listens."""
        poll = self._settings.poll_interval.total_seconds()
        return poll * _SELDOM if self._store.hears_others else poll

    def _listen(self, run_id: str) -> Listener:
        return Listener(partial(self._store.subscribe, "settled", run_id=run_id))

    async def _choose_graph(self, name: str, version: str | None, run_id: str) -> RegisteredGraph:
        registry = self._registry
        if version is None and registry.has_choice(name):
            routes = await self._store.list_routes(self.tenant, name)
            registered = registry.choose(name, run_id, routes)
        else:
            registered = registry.find(name, version)
        warn_if_redefined(registered)
        return registered
