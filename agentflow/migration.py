"""Brings runs that wait from one version of their graph to another.

A run is migrated under a lease, so that nobody drives it meanwhile. Its checkpoint in the form of
the other version becomes the head of its thread, in front of the old one, which stays. What the
run store knows follows, in one transaction. Whoever is killed in between leaves a thread that says
what it was migrated from and to, and another call goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph

from agentflow.carrier import MIGRATION, Carrier, Plan, whole_values
from agentflow.checkpoint import Saver
from agentflow.drive import RegisteredGraph, acquire, is_begun, store_fingerprint
from agentflow.errors import AgentflowError, FencedError, MigrationError, ThreadBusyError
from agentflow.failpoints import failpoint
from agentflow.inspection import list_unfinished
from agentflow.registry import Registry
from agentflow.storage import RunStore
from agentflow.types import Approval, Lease, MovedWait, Run, RunStatus, new_id
from agentflow.versions import Fingerprint, GraphMigration, Names, TransformationError, transform

_PAGE = 200

Outcome = Literal["migrated", "would_migrate", "refused", "busy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratedRun:
    """What has become of one run, or would."""

    run_id: str
    status: RunStatus
    from_version: str
    to_version: str
    outcome: Outcome
    reason: str | None = None
    """Why it was left as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """What `AgentFlow.migrate_runs` has done, or would do."""

    graph: str
    to_version: str
    is_dry: bool
    runs: tuple[MigratedRun, ...]

    def count(self, outcome: Outcome) -> int:
        """Return how many runs had an outcome."""
        return sum(run.outcome == outcome for run in self.runs)


class Migrator:
    """Migrates runs of one tenant."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        registry: Registry,
        *,
        tenant: str,
        lease: timedelta,
    ) -> None:
        """Migrate on a run store and a checkpointer, by what is registered."""
        self._store = store
        self._saver = saver
        self._registry = registry
        self._tenant = tenant
        self._lease = lease

    async def migrate_all(
        self,
        graph: str,
        to_version: str | None,
        from_version: str | None,
        *,
        is_dry: bool,
        by: str | None,
    ) -> MigrationReport:
        """See `AgentFlow.migrate_runs`."""
        registered = self._registry.find(graph, to_version)
        found = []
        runs, unreadable = await list_unfinished(self._store, self._tenant, graph)
        for run in runs:
            if run.version == registered.version or from_version not in {None, run.version}:
                continue
            found.append(await self._try(run, registered, is_dry=is_dry, by=by))
        found += [
            MigratedRun(
                run_id=each.id,
                status=RunStatus(str(each.status)),
                from_version=each.version or "",
                to_version=registered.version,
                outcome="refused",
                reason=str(each.error),
            )
            for each in unreadable
            if each.version != registered.version and from_version in {None, each.version}
        ]
        return MigrationReport(
            graph=graph, to_version=registered.version, is_dry=is_dry, runs=tuple(found)
        )

    async def _try(
        self, run: Run, registered: RegisteredGraph, *, is_dry: bool, by: str | None
    ) -> MigratedRun:
        outcome: Outcome = "would_migrate" if is_dry else "migrated"
        reason = None
        try:
            if is_dry:
                await self._check(run, registered)
            else:
                await self.migrate(run.id, registered.version, by=by)
        except ThreadBusyError as exc:
            outcome, reason = "busy", str(exc)
        except AgentflowError as exc:
            outcome, reason = "refused", str(exc)
        return MigratedRun(
            run_id=run.id,
            status=run.status,
            from_version=run.version,
            to_version=registered.version,
            outcome=outcome,
            reason=reason,
        )

    async def _check(self, run: Run, registered: RegisteredGraph) -> None:
        """See whether a run can be migrated, without changing anything."""
        if run.status is RunStatus.RUNNING:
            raise ThreadBusyError(run.thread_id, run.id)
        await self._plan(run, registered, self._way(run, registered), self._saver)

    def _way(self, run: Run, registered: RegisteredGraph) -> list[GraphMigration]:
        way = self._registry.way(run.graph, run.version, registered.version)
        if way is None:
            raise _refused(
                run,
                registered,
                f"no migration leads there: write one with @app.migration({run.graph!r}, "
                f"from_={run.version!r}, to={registered.version!r})",
            )
        return way

    async def migrate(self, run_id: str, to_version: str | None, *, by: str | None) -> Run:
        """See `AgentFlow.migrate_run`."""
        run = await self._store.get_run(self._tenant, run_id)
        registered = self._registry.find(run.graph, to_version)
        if run.status.is_ended or run.version == registered.version:
            return run
        way = self._way(run, registered)
        if run.status is not RunStatus.RUNNING:
            # Found out before anything is touched. What runs may have lost its worker.
            await self._plan(run, registered, way, self._saver)
        claimed = await self._store.claim_migration(
            self._tenant, run_id, worker=f"migrate-{new_id()[-6:]}", lease=self._lease
        )
        if claimed is None:
            return await self._store.get_run(self._tenant, run_id)
        lease = await acquire(self._store, self._saver, claimed.lease)
        try:
            return await self._migrate(claimed.run, registered, lease, by)
        except BaseException:
            # The lease ends at once instead of in a while: the run goes on as it was.
            with suppress(FencedError):
                if isinstance(self._saver, Saver):
                    await self._saver.release(lease)
                await self._store.release_run(lease, reason="migration", counts=False)
            raise

    async def _migrate(
        self, run: Run, registered: RegisteredGraph, lease: Lease, by: str | None
    ) -> Run:
        saver = self._saver.with_lease(lease) if isinstance(self._saver, Saver) else self._saver
        plan = await self._plan(run, registered, self._way(run, registered), saver)
        await store_fingerprint(self._store, self._tenant, registered)
        if plan is not None and plan.checkpoint is not None:
            await self._save(saver, plan)
        if isinstance(saver, Saver):
            await saver.flush(run.thread_id)
            await saver.release(lease)
        failpoint("migration.saved")
        moved, has_work = await self._moved(run, plan)
        return await self._store.migrate_run(
            lease,
            version=registered.version,
            fingerprint=registered.fingerprint.digest,
            checkpoint_id=None if plan is None else plan.checkpoint["id"],
            waits=moved,
            has_work=has_work,
            by=by,
        )

    async def _save(self, saver: BaseCheckpointSaver[Any], plan: Plan) -> None:
        """Make a plan's checkpoint the head.

        What belongs to it comes first, since nobody sees that then: its writes, and the subgraphs
        of its tasks.
        """
        if plan.config["configurable"].get("checkpoint_id") == plan.checkpoint["id"]:
            return  # it was saved before, by somebody who did not come any further
        for each in (*plan.inside, plan):
            own = each.config["configurable"]
            place: RunnableConfig = {
                "configurable": {**own, "checkpoint_id": each.checkpoint["id"]},
            }
            for done in each.writes:
                await saver.aput_writes(place, done.writes, done.task_id, done.path)
            if each is plan:
                failpoint("migration.carried")
            await saver.aput(
                each.config, each.checkpoint, each.metadata, each.checkpoint["channel_versions"]
            )

    async def _plan(
        self,
        run: Run,
        registered: RegisteredGraph,
        way: Sequence[GraphMigration],
        saver: BaseCheckpointSaver[Any],
    ) -> Plan | None:
        """Work out the checkpoint of the other version; `None` for a run that has not begun."""
        head = await saver.aget_tuple(
            {"configurable": {"thread_id": run.thread_id, "checkpoint_ns": ""}}
        )
        if head is None or not await is_begun(saver, run):
            return None
        marks: Mapping[str, Any] = head.metadata
        if _is_done(marks, run, registered):
            return Plan(head.config, head.checkpoint, head.metadata)
        if run.resume_from is not None:
            raise _refused(run, registered, "it is about to go on from an earlier checkpoint")
        if not isinstance(registered.graph, CompiledStateGraph):
            raise _refused(run, registered, "only the state of a StateGraph can be migrated")
        old = await self._form(str(marks.get("graph_fingerprint") or run.fingerprint or ""))
        known = [registered, self._registry.graphs.get((run.graph, run.version))]
        try:
            whole = await whole_values(
                saver, head, Names.of(way), old, *[each.graph for each in known if each]
            )
            made = transform(
                head.checkpoint,
                way,
                registered.graph,
                old=old,
                new=registered.fingerprint.graph,
                whole=whole,
                next_version=saver.get_next_version,
            )
            return await Carrier(run, registered, way, head, old, saver).carry(made)
        except TransformationError as exc:
            raise _refused(run, registered, str(exc)) from exc

    async def _form(self, digest: str) -> Mapping[str, Any] | None:
        text = await self._store.find_fingerprint(self._tenant, digest)
        return None if text is None else Fingerprint.of_text(text, digest).graph

    async def _moved(self, run: Run, plan: Plan | None) -> tuple[list[MovedWait], bool]:
        """Say which waits are asked under which ids, and whether the run has other work."""
        if plan is None:
            return [], True
        noted: Mapping[str, Any] = json.loads(str(dict(plan.metadata)[MIGRATION]))
        waits: Mapping[str, Any] = noted["waits"]
        found: list[MovedWait] = []
        for wait in await self._waits(run):
            if (new := waits.get(wait.interrupt_id)) is None:
                continue
            if isinstance(new, list):  # as it was noted when nothing inside was carried over
                new = {"task": new[0], "interrupt": new[1], "before": noted["before"]}
            if wait.checkpoint_id == new["before"]:
                found.append(
                    MovedWait(
                        wait_id=wait.id,
                        ns=new.get("ns", ""),
                        task_id=new["task"],
                        interrupt_id=new["interrupt"],
                        checkpoint_id=new.get("checkpoint", plan.checkpoint["id"]),
                    )
                )
        return found, bool(noted["work"]) or len(found) < len(waits)

    async def _waits(self, run: Run) -> list[Approval]:
        found: list[Approval] = []
        cursor: str | None = None
        while True:
            page = await self._store.list_waits(
                self._tenant, status=None, run_id=run.id, graph=None, limit=_PAGE, cursor=cursor
            )
            found += page.whole()
            if (cursor := page.cursor) is None:
                return found


def _is_done(marks: Mapping[str, Any], run: Run, registered: RegisteredGraph) -> bool:
    """Whether a checkpoint was made by this migration, which came no further."""
    if MIGRATION not in marks or marks.get("graph_fingerprint") != registered.fingerprint.digest:
        return False
    noted = json.loads(marks[MIGRATION])
    return bool(noted["from"] == run.version and noted["to"] == registered.version)


def _refused(run: Run, registered: RegisteredGraph, reason: str) -> MigrationError:
    return MigrationError(run.id, run.version, registered.version, reason)
