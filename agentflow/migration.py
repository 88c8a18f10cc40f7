"""Brings runs that wait from one version of their graph to another.

A run is migrated under a lease, so that nobody drives it meanwhile. Its checkpoint in the form of
the other version becomes the head of its thread, in front of the old one, which stays. What the
run store knows follows, in one transaction. Whoever is killed in between leaves a thread that says
what it was migrated from and to, and another call goes on from there.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel._algo import _xxhash_str, task_path_str
from langgraph.types import Interrupt, PregelTask, Send, _interrupt_id

from agentflow.checkpoint import Saver
from agentflow.drive import RegisteredGraph, acquire, is_begun, marks_of, store_fingerprint
from agentflow.effects import NAMES, SHIFT, names_before, shift_of
from agentflow.errors import AgentflowError, FencedError, MigrationError, ThreadBusyError
from agentflow.failpoints import failpoint
from agentflow.inspection import list_unfinished
from agentflow.registry import Registry
from agentflow.storage import RunStore
from agentflow.types import Approval, Lease, MovedWait, Run, RunStatus, SystemClock, new_id
from agentflow.versions import (
    Fingerprint,
    GraphMigration,
    Names,
    Renaming,
    TransformationError,
    due_nodes,
    transform,
)

MIGRATION = "migration"
"""The key of a checkpoint's metadata that says what it was migrated from."""
_NULL_TASK = "00000000-0000-0000-0000-000000000000"
_PULL, _PUSH, _SENDS = "__pregel_pull", "__pregel_push", "__pregel_tasks"
_SPECIAL = frozenset({ERROR, INTERRUPT, RESUME, SCHEDULED})
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


@dataclass(frozen=True, slots=True)
class _Write:
    task_id: str
    path: str
    writes: list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checkpoint in the form of another version, and what goes with it."""

    config: RunnableConfig
    """Of the checkpoint that it follows."""
    checkpoint: Checkpoint
    metadata: CheckpointMetadata
    writes: list[_Write] = field(default_factory=list)


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
        for run in await list_unfinished(self._store, self._tenant, graph):
            if run.version == registered.version or from_version not in {None, run.version}:
                continue
            found.append(await self._try(run, registered, is_dry=is_dry, by=by))
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

    async def _save(self, saver: BaseCheckpointSaver[Any], plan: _Plan) -> None:
        """Make a plan's checkpoint the head; its writes come first, since nobody sees them then."""
        own = plan.config["configurable"]
        if own["checkpoint_id"] == plan.checkpoint["id"]:
            return  # it was saved before, by somebody who did not come any further
        place: RunnableConfig = {
            "configurable": {**own, "checkpoint_id": plan.checkpoint["id"]},
        }
        for each in plan.writes:
            await saver.aput_writes(place, each.writes, each.task_id, each.path)
        failpoint("migration.carried")
        await saver.aput(
            plan.config, plan.checkpoint, plan.metadata, plan.checkpoint["channel_versions"]
        )

    async def _plan(
        self,
        run: Run,
        registered: RegisteredGraph,
        way: Sequence[GraphMigration],
        saver: BaseCheckpointSaver[Any],
    ) -> _Plan | None:
        """Work out the checkpoint of the other version; `None` for a run that has not begun."""
        head = await saver.aget_tuple(
            {"configurable": {"thread_id": run.thread_id, "checkpoint_ns": ""}}
        )
        if head is None or not await is_begun(saver, run):
            return None
        marks: Mapping[str, Any] = head.metadata
        digest = registered.fingerprint.digest
        if marks.get(MIGRATION) and marks.get("graph_fingerprint") == digest:
            return _Plan(head.config, head.checkpoint, head.metadata)
        if run.resume_from is not None:
            raise _refused(run, registered, "it is about to go on from an earlier checkpoint")
        if not isinstance(registered.graph, CompiledStateGraph):
            raise _refused(run, registered, "only the state of a StateGraph can be migrated")
        old = await self._form(str(marks.get("graph_fingerprint") or run.fingerprint or ""))
        try:
            made = transform(
                head.checkpoint,
                way,
                registered.graph,
                old=old,
                new=registered.fingerprint.graph,
                next_version=saver.get_next_version,
            )
            return await _Carrier(run, registered, way, head, old, saver).carry(made)
        except TransformationError as exc:
            raise _refused(run, registered, str(exc)) from exc

    async def _form(self, digest: str) -> Mapping[str, Any] | None:
        text = await self._store.find_fingerprint(self._tenant, digest)
        return None if text is None else Fingerprint.of_text(text, digest).graph

    async def _moved(self, run: Run, plan: _Plan | None) -> tuple[list[MovedWait], bool]:
        """Say which waits are asked under which ids, and whether the run has other work."""
        if plan is None:
            return [], True
        noted: Mapping[str, Any] = json.loads(str(dict(plan.metadata)[MIGRATION]))
        waits: Mapping[str, Any] = noted["waits"]
        found: list[MovedWait] = []
        for wait in await self._waits(run):
            new_ids = waits.get(wait.interrupt_id)
            is_asked = wait.checkpoint_id in {noted["before"], plan.checkpoint["id"]}
            if new_ids is not None and is_asked and wait.ns == "":
                found.append(
                    MovedWait(
                        wait_id=wait.id,
                        task_id=new_ids[0],
                        interrupt_id=new_ids[1],
                        checkpoint_id=plan.checkpoint["id"],
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
            found += page.items
            if (cursor := page.cursor) is None:
                return found


class _Carrier:
    """Carries over what has been done and asked since a checkpoint: its tasks get other ids."""

    def __init__(
        self,
        run: Run,
        registered: RegisteredGraph,
        way: Sequence[GraphMigration],
        head: CheckpointTuple,
        old: Mapping[str, Any] | None,
        saver: BaseCheckpointSaver[Any],
    ) -> None:
        self._run, self._registered, self._way = run, registered, way
        self._head, self._old, self._saver = head, old, saver
        self._names = Names.of(way)
        self._renaming = Renaming(self._names, registered.fingerprint.graph["nodes"])

    async def carry(self, made: Checkpoint) -> _Plan:
        head, run, registered = self._head, self._run, self._registered
        made["id"] = str(uuid6(clock_seq=-2))
        made["ts"] = SystemClock().now().isoformat()
        metadata: dict[str, Any] = {
            **head.metadata,
            **marks_of(registered),
            "source": "update",
            "step": head.metadata.get("step", -1) + 1,
            "run_id": run.id,
        }
        tasks = await self._tasks_after(made, metadata)
        writes: list[_Write] = []
        waits: dict[str, tuple[str, str]] = {}
        open_tasks = {task.id for task in tasks.values()}
        asks_again = any(step.ask_again for step in self._way)
        before = self._tasks_before()
        for old_id, (key, node) in before.items():
            await self._refuse_inside(node, old_id)
            found = [(c, v) for writer, c, v in head.pending_writes or () if writer == old_id]
            task = tasks.get(key)
            if task is None and not found and self._is_deferred(key[0]):
                continue  # it has been triggered, and waits until all others have finished
            if task is None:
                raise TransformationError(f"the task of node {node!r} cannot be carried over")
            carried, asked = self._carried(found, task, node, old_id, asks_again=asks_again)
            if carried:
                open_tasks.discard(task.id)
                writes.append(_Write(task.id, task_path_str(task.path), carried))
            waits |= asked
        # Effects that are known by their place in the graph are known by what it was before.
        metadata[NAMES] = json.dumps(names_before(self._named(before), dict(head.metadata)))
        metadata[SHIFT] = shift_of(head, run) + 1
        metadata[MIGRATION] = json.dumps(
            {
                "from": run.version,
                "to": registered.version,
                "before": head.config["configurable"]["checkpoint_id"],
                "waits": waits,
                "work": bool(open_tasks),
            },
            sort_keys=True,
        )
        return _Plan(head.config, made, cast("CheckpointMetadata", metadata), writes)

    def _named(self, tasks: Mapping[str, tuple[tuple[str, int | None], str]]) -> dict[str, str]:
        """Return what due nodes were called, by what they are called now."""
        named: dict[str, str] = {}
        for (new, _), node in tasks.values():
            if named.setdefault(new, node) != node:
                raise TransformationError(
                    f"nodes {named[new]!r} and {node!r} are both due and would become one, {new!r}"
                )
        return named

    def _is_deferred(self, node: str) -> bool:
        return bool(self._registered.fingerprint.graph["nodes"][node].get("deferred"))

    def _carried(
        self,
        found: Sequence[tuple[str, Any]],
        task: PregelTask,
        node: str,
        old_id: str,
        *,
        asks_again: bool,
    ) -> tuple[list[tuple[str, Any]], dict[str, tuple[str, str]]]:
        """Return the writes of a task as another one's, and the questions among them."""
        if done := [(c, v) for c, v in found if c not in _SPECIAL]:
            return [self._write(c, v, node) for c, v in done], {}
        if asks_again:
            return [], {}
        given: Any = next((v for c, v in found if c == RESUME), [])
        answers: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        asked = {}
        carried: list[tuple[str, Any]] = [(RESUME, answers)] if answers else []
        for interrupt in (each for c, v in found if c == INTERRUPT for each in v):
            ids = [
                [_interrupt_id(f"{name}:{task_id}", count) for count in range(len(answers) + 1)]
                for name, task_id in ((node, old_id), (task.name, task.id))
            ]
            if interrupt.id not in ids[0]:
                raise TransformationError(f"the question of node {node!r} cannot be carried over")
            new = ids[1][ids[0].index(interrupt.id)]
            asked[interrupt.id] = (task.id, new)
            schema = interrupt.response_schema
            carried.append(
                (INTERRUPT, [Interrupt(interrupt.value, id=new, response_schema=schema)])
            )
        return carried, asked

    def _write(self, name: str, value: Any, node: str) -> tuple[str, Any]:
        if name == _SENDS:
            return name, Send(self._names.node(value.node), value.arg)
        new, renamed = self._renaming.write(name, value)
        if new not in self._registered.graph.channels and not new.startswith("__"):
            raise TransformationError(
                f"node {node!r} has finished and wrote to {name!r}, which the new version has not"
            )
        return new, renamed

    def _tasks_before(self) -> dict[str, tuple[tuple[str, int | None], str]]:
        """Return the tasks of the old checkpoint by id: what they are called now, and were."""
        checkpoint = self._head.checkpoint
        own = binascii.unhexlify(checkpoint["id"].replace("-", ""))
        step = str(self._head.metadata.get("step", -1) + 1)
        found: dict[str, tuple[tuple[str, int | None], str]] = {}
        nodes = {} if self._old is None else self._old["nodes"]
        sends = checkpoint["channel_values"].get(_SENDS) or ()
        for number, send in enumerate(sends):
            task_id = _xxhash_str(own, send.node, step, send.node, _PUSH, str(number))
            found[task_id] = ((self._names.node(send.node), number), send.node)
        pulled = {"channel_values": {**checkpoint["channel_values"]}}
        pulled["channel_values"].pop(_SENDS, None)
        for name in due_nodes({**checkpoint, **pulled}, self._old):  # type: ignore[typeddict-item]
            triggers = nodes[name]["triggers"] if name in nodes else [f"branch:to:{name}"]
            task_id = _xxhash_str(own, name, step, name, _PULL, *sorted(triggers))
            found[task_id] = ((self._names.node(name), None), name)
        known = {*found, _NULL_TASK}
        if any(writer not in known for writer, *_ in self._head.pending_writes or ()):
            raise TransformationError("what has been done since its checkpoint cannot be told")
        return found

    async def _tasks_after(
        self, made: Checkpoint, metadata: Mapping[str, Any]
    ) -> dict[tuple[str, int | None], PregelTask]:
        """Have LangGraph say which tasks the new checkpoint has."""
        aside = InMemorySaver()
        place: RunnableConfig = {
            "configurable": {"thread_id": "aside", "checkpoint_ns": ""},
        }
        graph = self._registered.graph.copy(update={"checkpointer": aside})
        saved = await aside.aput(
            place, made, cast("CheckpointMetadata", metadata), made["channel_versions"]
        )
        try:
            state = await graph.aget_state(saved)
        except Exception as exc:
            # A validator of the user's, say, whose message may hold what it was given.
            raise TransformationError(
                f"the new version cannot read the migrated state: {type(exc).__name__}"
            ) from exc
        return {
            (task.name, task.path[1] if task.path[0] == _PUSH else None): task  # type: ignore[misc]
            for task in state.tasks
        }

    async def _refuse_inside(self, node: str, task_id: str) -> None:
        """Refuse a run that stands inside of a subgraph, whose state belongs to an old task."""
        for ns in (f"{node}:{task_id}", node):
            place = {"thread_id": self._run.thread_id, "checkpoint_ns": ns}
            if await self._saver.aget_tuple({"configurable": place}) is not None:
                raise TransformationError(
                    f"it stands inside of the subgraph of node {node!r}; let a worker of version "
                    f"{self._run.version!r} drive it until it has left that"
                )


def _refused(run: Run, registered: RegisteredGraph, reason: str) -> MigrationError:
    return MigrationError(run.id, run.version, registered.version, reason)
