"""What has been done and asked since a checkpoint, for a checkpoint of another version after it.

The tasks of the other checkpoint have other ids, and so have their writes, what they ask, and the
namespaces of the subgraphs in which they stand. A subgraph is not migrated itself: it goes on where
it stands if the other version has it still, with the same channels.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.channels import DeltaChannel
from langgraph.channels.base import BaseChannel
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
from langgraph.pregel import Pregel
from langgraph.pregel._algo import _xxhash_str, task_path_str
from langgraph.pregel._checkpoint import achannels_from_checkpoint
from langgraph.types import Interrupt, PregelTask, Send, _interrupt_id

from agentflow.drive import RegisteredGraph, marks_of
from agentflow.effects import NAMES, SHIFT, names_before, shift_of
from agentflow.types import Run, SystemClock
from agentflow.versions import (
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


@dataclass(frozen=True, slots=True)
class Written:
    """What a task has written."""

    task_id: str
    path: str
    writes: list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint in the form of another version, and what goes with it."""

    config: RunnableConfig
    """Of the checkpoint that it follows."""
    checkpoint: Checkpoint
    metadata: CheckpointMetadata
    writes: list[Written] = field(default_factory=list)
    inside: list[Plan] = field(default_factory=list)
    """Those of the subgraphs in which its tasks stand."""


_SAME = Names({}, {})
_Key = tuple[str, int | None]
"""A task, by the node's new name and, of what was sent, which one it is."""


@dataclass(slots=True)
class _Carried:
    """What has been carried over, of the root and of subgraphs."""

    waits: dict[str, dict[str, str]] = field(default_factory=dict)
    """By ids of questions, where and under which ids they are asked from now on."""
    inside: list[Plan] = field(default_factory=list)
    has_work: bool = False
    """Whether some task has neither finished nor asks."""


@dataclass(frozen=True, slots=True)
class _Level:
    """The root, or a subgraph in which a task stands: as it was, and as it is going to be."""

    names: Names
    old: Mapping[str, Any] | None
    new: Mapping[str, Any]
    channels: Collection[str]
    head: CheckpointTuple
    made: Checkpoint
    old_ns: str
    new_ns: str
    parents: Mapping[str, str]
    """The new checkpoints up to this one, by namespace."""

    def of_task(self, node: str, task_id: str, *, is_new: bool) -> str:
        """Return the namespace of a task."""
        ns = self.new_ns if is_new else self.old_ns
        return f"{ns}|{node}:{task_id}" if ns else f"{node}:{task_id}"


class Carrier:
    """Carries over what has been done and asked since a checkpoint."""

    def __init__(
        self,
        run: Run,
        registered: RegisteredGraph,
        way: Sequence[GraphMigration],
        head: CheckpointTuple,
        old: Mapping[str, Any] | None,
        saver: BaseCheckpointSaver[Any],
    ) -> None:
        """Carry over from the head of a run's thread, to a graph, by some migrations."""
        self._run, self._registered = run, registered
        self._head, self._old, self._saver = head, old, saver
        self._names = Names.of(way)
        self._asks_again = any(step.ask_again for step in way)
        self._aside = InMemorySaver()

    async def carry(self, made: Checkpoint) -> Plan:
        """Return the plan for a checkpoint, which gets an id.

        Raises:
            TransformationError: Not everything can be carried over.
        """
        head, run, registered = self._head, self._run, self._registered
        _stamp(made)
        level = _Level(
            names=self._names,
            old=self._old,
            new=registered.fingerprint.graph,
            channels=registered.graph.channels.keys(),
            head=head,
            made=made,
            old_ns="",
            new_ns="",
            parents={"": made["id"]},
        )
        metadata = {**self._metadata(head), "step": _step(head) + 1}
        done = _Carried()
        before = self._tasks_before(level)
        writes = await self._carry_tasks(level, metadata, before, done)
        # Effects that are known by their place in the graph are known by what it was before.
        metadata[NAMES] = json.dumps(names_before(_named(before), dict(head.metadata)))
        metadata[SHIFT] = shift_of(head, run) + 1
        metadata[MIGRATION] = json.dumps(
            {
                "from": run.version,
                "to": registered.version,
                "before": head.config["configurable"]["checkpoint_id"],
                "waits": done.waits,
                "work": done.has_work,
            },
            sort_keys=True,
        )
        return Plan(head.config, made, cast("CheckpointMetadata", metadata), writes, done.inside)

    def _metadata(self, head: CheckpointTuple) -> dict[str, Any]:
        marks = marks_of(self._registered)
        return {**head.metadata, **marks, "source": "update", "run_id": self._run.id}

    async def _carry_tasks(
        self,
        level: _Level,
        metadata: Mapping[str, Any],
        before: Mapping[str, tuple[_Key, str]],
        done: _Carried,
    ) -> list[Written]:
        """Return the writes of the new tasks, and add to what was done."""
        tasks = await self._tasks_after(level, metadata)
        open_tasks = {task.id for task in tasks.values()}
        writes = []
        for old_id, (key, node) in before.items():
            found = [(c, v) for who, c, v in level.head.pending_writes or () if who == old_id]
            task = tasks.get(key)
            if task is None and not found and level.new["nodes"][key[0]].get("deferred"):
                continue  # it has been triggered, and waits until all others have finished
            if task is None:
                raise TransformationError(f"the task of node {node!r} cannot be carried over")
            if own := [(c, v) for c, v in found if c not in _SPECIAL]:
                carried = [self._write(level, c, v, node) for c, v in own]
            else:
                is_inside = await self._carry_inside(level, node, old_id, task, done)
                if is_inside:
                    open_tasks.discard(task.id)  # whether there is work is known by those in there
                carried = self._carry_questions(
                    level, node, old_id, found, task, done, is_inside=is_inside
                )
            if carried:
                open_tasks.discard(task.id)
                writes.append(Written(task.id, task_path_str(task.path), carried))
        done.has_work |= bool(open_tasks)
        return writes

    def _carry_questions(
        self,
        level: _Level,
        node: str,
        old_id: str,
        found: Sequence[tuple[str, Any]],
        task: PregelTask,
        done: _Carried,
        *,
        is_inside: bool,
    ) -> list[tuple[str, Any]]:
        """Return what a task asks and was answered, as another one's."""
        if self._asks_again:
            return []
        given: Any = next((v for c, v in found if c == RESUME), [])
        answers: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        carried: list[tuple[str, Any]] = [(RESUME, answers)] if answers else []
        places = [
            level.of_task(name, task_id, is_new=is_new)
            for name, task_id, is_new in ((node, old_id, False), (task.name, task.id, True))
        ]
        ids = [[_interrupt_id(ns, n) for n in range(len(answers) + 1)] for ns in places]
        for interrupt in (each for c, v in found if c == INTERRUPT for each in v):
            if (asked := done.waits.get(interrupt.id)) is not None:
                new = asked["interrupt"]  # inside of its subgraph, which is listed here too
            elif interrupt.id in ids[0]:
                new = ids[1][ids[0].index(interrupt.id)]
                done.waits[interrupt.id] = {
                    "ns": level.new_ns,
                    "task": task.id,
                    "interrupt": new,
                    "before": level.head.checkpoint["id"],
                    "checkpoint": level.made["id"],
                }
            elif is_inside:
                continue  # answered; it stays listed here until the subgraph has ended
            else:
                raise TransformationError(f"the question of node {node!r} cannot be carried over")
            schema = interrupt.response_schema
            carried.append(
                (INTERRUPT, [Interrupt(interrupt.value, id=new, response_schema=schema)])
            )
        return carried

    async def _carry_inside(
        self, level: _Level, node: str, old_id: str, task: PregelTask, done: _Carried
    ) -> bool:
        """Carry over the subgraph of a task that has begun it, and say whether it is due there."""
        old_ns = level.of_task(node, old_id, is_new=False)
        old = (level.old or {"nodes": {}})["nodes"].get(node, {}).get("graph")
        for ns in (f"{old_ns}|1", _without_ids(old_ns)):
            # Of a node that calls several, and of one that remembers its earlier calls.
            kept = await self._find(ns)
            if kept is not None and (old is None or due_nodes(kept.checkpoint, old)):
                raise self._inside(node, "which keeps its state in a way that cannot be moved")
        if (head := await self._find(old_ns)) is None:
            return False
        new = level.new["nodes"][task.name].get("graph")
        new_ns = level.of_task(task.name, task.id, is_new=True)
        graph = await self._subgraph(new_ns)
        if old is None or new is None or graph is None:
            raise self._inside(node, "which the new version has not")
        if gone := sorted(due_nodes(head.checkpoint, old) - set(new["nodes"])):
            raise self._inside(node, f"at {gone[0]!r}, which the new version has not")
        try:
            whole = await whole_values(self._saver, head, _SAME, old, graph)
            made = transform(
                head.checkpoint,
                (),
                graph,
                old=old,
                new=new,
                whole=whole,
                next_version=self._saver.get_next_version,
            )
        except TransformationError as exc:
            raise self._inside(node, f"where {exc}") from exc
        _stamp(made)
        parents = dict(level.parents)
        inner = _Level(
            names=_SAME,
            old=old,
            new=new,
            channels=graph.channels.keys(),
            head=head,
            made=made,
            old_ns=old_ns,
            new_ns=new_ns,
            parents={**parents, new_ns: made["id"]},
        )
        # The same step: effects inside of subgraphs are known by it.
        metadata = {**self._metadata(head), "parents": parents}
        before = self._tasks_before(inner)
        writes = await self._carry_tasks(inner, metadata, before, done)
        place = {"thread_id": self._run.thread_id, "checkpoint_ns": new_ns}
        done.inside.append(
            Plan({"configurable": place}, made, cast("CheckpointMetadata", metadata), writes)
        )
        return bool(before)

    def _inside(self, node: str, why: str) -> TransformationError:
        return TransformationError(
            f"it stands inside of the subgraph of node {node!r}, {why}; let a worker of version "
            f"{self._run.version!r} drive it until it has left that"
        )

    async def _find(self, ns: str) -> CheckpointTuple | None:
        place = {"thread_id": self._run.thread_id, "checkpoint_ns": ns}
        return await self._saver.aget_tuple({"configurable": place})

    async def _subgraph(self, ns: str) -> CompiledStateGraph[Any, Any, Any, Any] | None:
        path = _without_ids(ns)
        async for name, each in self._registered.graph.aget_subgraphs(recurse=True):
            if name == path and isinstance(each, CompiledStateGraph):
                return each
        return None

    def _write(self, level: _Level, name: str, value: Any, node: str) -> tuple[str, Any]:
        if name == _SENDS:
            return name, Send(level.names.node(value.node), value.arg)
        new, renamed = Renaming(level.names, level.new["nodes"]).write(name, value)
        if new not in level.channels and not new.startswith("__"):
            raise TransformationError(
                f"node {node!r} has finished and wrote to {name!r}, which the new version has not"
            )
        return new, renamed

    def _tasks_before(self, level: _Level) -> dict[str, tuple[_Key, str]]:
        """Return the tasks of the old checkpoint by id: what they are called now, and were."""
        checkpoint, names = level.head.checkpoint, level.names
        own = binascii.unhexlify(checkpoint["id"].replace("-", ""))
        step = str(_step(level.head) + 1)
        around = f"{level.old_ns}|" if level.old_ns else ""
        found: dict[str, tuple[_Key, str]] = {}
        nodes = {} if level.old is None else level.old["nodes"]
        sends = checkpoint["channel_values"].get(_SENDS) or ()
        for number, send in enumerate(sends):
            task_id = _xxhash_str(own, f"{around}{send.node}", step, send.node, _PUSH, str(number))
            found[task_id] = ((names.node(send.node), number), send.node)
        pulled = {"channel_values": {**checkpoint["channel_values"]}}
        pulled["channel_values"].pop(_SENDS, None)
        for name in due_nodes({**checkpoint, **pulled}, level.old):  # type: ignore[typeddict-item]
            triggers = nodes[name]["triggers"] if name in nodes else [f"branch:to:{name}"]
            task_id = _xxhash_str(own, f"{around}{name}", step, name, _PULL, *sorted(triggers))
            found[task_id] = ((names.node(name), None), name)
        known = {*found, _NULL_TASK}
        if any(writer not in known for writer, *_ in level.head.pending_writes or ()):
            raise TransformationError("what has been done since its checkpoint cannot be told")
        return found

    async def _tasks_after(
        self, level: _Level, metadata: Mapping[str, Any]
    ) -> dict[_Key, PregelTask]:
        """Have LangGraph say which tasks the new checkpoint has."""
        place: RunnableConfig = {
            "configurable": {"thread_id": "aside", "checkpoint_ns": level.new_ns},
        }
        graph = self._registered.graph.copy(update={"checkpointer": self._aside})
        await self._aside.aput(
            place,
            level.made,
            cast("CheckpointMetadata", metadata),
            level.made["channel_versions"],
        )
        try:
            state = await graph.aget_state(place)
        except Exception as exc:
            # A validator of the user's, say, whose message may hold what it was given.
            raise TransformationError(
                f"the new version cannot read the migrated state: {type(exc).__name__}"
            ) from exc
        return {
            (task.name, task.path[1] if task.path[0] == _PUSH else None): task  # type: ignore[misc]
            for task in state.tasks
        }


async def whole_values(
    saver: BaseCheckpointSaver[Any],
    head: CheckpointTuple,
    names: Names,
    old: Mapping[str, Any] | None,
    *graphs: Pregel[Any, Any, Any, Any],
) -> dict[str, Any]:
    """Return the values of channels of which a checkpoint has only changes, by their old names.

    Args:
        saver: Has the checkpoints before it.
        head: The checkpoint.
        names: What channels are going to be called.
        old: What the graph was when it was saved.
        graphs: Those that may know how changes add up: after the migrations, and before.

    Raises:
        TransformationError: None of them does.
    """
    specs: dict[str, BaseChannel[Any, Any, Any]] = {}
    for name in sorted(head.checkpoint["channel_versions"]):
        known = [
            graph.channels.get(each)
            for graph in graphs
            for each in (names.channels.get(name, name), name)
        ]
        spec = next((each for each in known if isinstance(each, DeltaChannel)), None)
        kind = None if old is None else old["channels"].get(name, {}).get("kind")
        if old is not None and kind != DeltaChannel.__name__:
            continue
        if spec is not None:
            specs[name] = spec
        elif kind is not None:
            raise TransformationError(
                f"channel {name!r} is stored as changes, and only the old version knows how they "
                "add up; register that as well"
            )
    if not specs:
        return {}
    channels, _ = await achannels_from_checkpoint(
        specs, head.checkpoint, saver=saver, config=head.config
    )
    return {name: each.get() for name, each in channels.items() if each.is_available()}


def _stamp(made: Checkpoint) -> None:
    made["id"] = str(uuid6(clock_seq=-2))
    made["ts"] = SystemClock().now().isoformat()


def _step(head: CheckpointTuple) -> int:
    return head.metadata.get("step", -1)


def _without_ids(ns: str) -> str:
    return "|".join(part.partition(":")[0] for part in ns.split("|") if not part.isdigit())


def _named(tasks: Mapping[str, tuple[_Key, str]]) -> dict[str, str]:
    """Return what due nodes were called, by what they are called now."""
    named: dict[str, str] = {}
    for (new, _), node in tasks.values():
        if named.setdefault(new, node) != node:
            raise TransformationError(
                f"nodes {named[new]!r} and {node!r} are both due and would become one, {new!r}"
            )
    return named
