"""Whether a run that has begun can go on with the graph that is registered, before anything runs.

What the graph was is known by the fingerprint that its checkpoint refers to; where the run stands,
by the checkpoint itself. Nothing is written here, and no node is called.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.types import StateSnapshot

from agentflow.drive.forks import find_start
from agentflow.drive.graph import RegisteredGraph
from agentflow.errors import FencedError, IncompatibleGraphError, StoreUnavailableError
from agentflow.storage import RunStore
from agentflow.types import FROM_START, Run
from agentflow.versions import Change, Fingerprint, Frontier, compare, compare_channels, due_nodes

logger = logging.getLogger(__name__)

NAME, VERSION, DIGEST = "graph_name", "graph_version", "graph_fingerprint"
"""Keys of the metadata of checkpoints: the graph that made them."""


def marks_of(registered: RegisteredGraph) -> dict[str, str]:
    """Return what the checkpoints of a graph say of it."""
    return {
        NAME: registered.name,
        VERSION: registered.version,
        DIGEST: registered.fingerprint.digest,
    }


async def store_fingerprint(store: RunStore, tenant: str, registered: RegisteredGraph) -> None:
    """Store what a graph is made of, before anything refers to it."""
    made = registered.fingerprint
    await store.create_fingerprint(tenant, made.digest, registered.name, made.text)


async def is_begun(saver: BaseCheckpointSaver[Any], run: Run) -> bool:
    """Whether some checkpoint of the run's thread carries its id."""
    # The head may be somebody's `update_state`, or an earlier run's last checkpoint.
    of_thread: RunnableConfig = {"configurable": {"thread_id": run.thread_id}}
    return [each async for each in saver.alist(of_thread, filter={"run_id": run.id}, limit=1)] != []


@dataclass(frozen=True, slots=True)
class Verdict:
    """What has become of a graph since a run was last driven."""

    before: str | None = None
    """The fingerprint that it had; `None` if that is not known."""
    changes: tuple[Change, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether it is what it was, as far as is known."""
        return not self.changes

    @property
    def ahead(self) -> tuple[Change, ...]:
        """The changes that the run can still come to."""
        return tuple(change for change in self.changes if change.is_ahead)

    @property
    def name(self) -> Literal["same", "behind", "ahead"]:
        """Return `same`, `behind` or `ahead`."""
        return "same" if self.is_same else "ahead" if self.ahead else "behind"


SAME = Verdict()


class Compatibility:
    """Judges runs of one graph against what is stored of them."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        registered: RegisteredGraph,
        tenant: str,
    ) -> None:
        """Judge runs of `registered`, of a tenant."""
        self._tenant = tenant
        self._store = store
        self._saver = saver
        self._registered = registered

    async def fitting_state(
        self, run: Run, read: Callable[[], Awaitable[StateSnapshot]]
    ) -> tuple[StateSnapshot, dict[str, Any] | None]:
        """Read a run's thread, and see that it can go on with the graph.

        Args:
            run: The run, which is about to be driven.
            read: Reads its thread as the graph shows it, which a graph that does not fit may not.

        Returns:
            The thread, and what is to be noted of the graph.

        Raises:
            IncompatibleGraphError: It cannot.
        """
        state: StateSnapshot | None = None
        failure: Exception | None = None
        try:
            state = await read()
        except (FencedError, StoreUnavailableError):
            raise
        except Exception as exc:  # noqa: BLE001 -- whatever the graph makes of what does not fit
            failure = exc
        digest = self._registered.fingerprint.digest
        marks: Mapping[str, Any] = {} if state is None else state.metadata or {}
        if state is not None and run.resume_from is None:
            is_empty = not state.config["configurable"].get("checkpoint_id")
            if is_empty or marks.get(DIGEST) == digest:
                return state, None
        begun = (
            run.resume_from is not None
            or marks.get("run_id") == run.id
            or await is_begun(self._saver, run)
        )
        verdict = await self.judge(run, is_begun=begun, state=state, checkpoint_id=run.resume_from)
        noted = settle(self._registered, run, verdict)
        if failure is not None or state is None:
            assert failure is not None
            raise failure
        return state, None if run.fingerprint == digest else noted

    async def look(self, run: Run) -> Verdict:
        """Judge a run that nobody drives now."""
        graph = self._registered.graph.copy(update={"checkpointer": self._saver})
        place: RunnableConfig = {"configurable": {"thread_id": run.thread_id}}
        state: StateSnapshot | None = None
        with suppress(Exception):  # of what a graph is made that does not fit
            state = await graph.aget_state(place, subgraphs=True)
        begun = run.resume_from is not None or await is_begun(self._saver, run)
        return await self.judge(run, is_begun=begun, state=state, checkpoint_id=run.resume_from)

    async def judge(
        self,
        run: Run,
        *,
        is_begun: bool,
        state: StateSnapshot | None,
        checkpoint_id: str | None = None,
    ) -> Verdict:
        """Say how the graph differs from what the run has been driven with.

        Args:
            run: The run.
            is_begun: Whether a checkpoint of its thread is its own.
            state: Its thread, as the graph shows it; `None` if the graph cannot.
            checkpoint_id: Where it is going to go on, if not at its head.
        """
        place: dict[str, Any] = {"thread_id": run.thread_id, "checkpoint_ns": ""}
        if checkpoint_id == FROM_START:
            checkpoint_id = await find_start(self._saver, run)
        if checkpoint_id is not None:
            # Its tasks are going to have other ids: nothing of them is done yet.
            place["checkpoint_id"], state = checkpoint_id, None
        head = await self._saver.aget_tuple({"configurable": place})
        if head is None:
            return SAME
        marks = head.metadata
        digest = marks.get(DIGEST)
        now = self._registered.fingerprint
        if digest is None and is_begun:
            # Somebody's `update_state`, which says nothing of the graph.
            digest = run.fingerprint
        if digest == now.digest:
            return SAME
        if not is_begun and marks.get(NAME) != run.graph:
            return SAME  # another graph's thread, or what an earlier version of agentflow left
        if digest is None:
            return _judge_unknown(head, now)
        old = await self._load(str(digest))
        if old is None:
            return Verdict(str(digest), _UNKNOWN)
        if not is_begun:
            return Verdict(old.digest, compare_channels(old.graph, now.graph))
        frontier = await self._frontier(head, old.graph, state)
        return Verdict(old.digest, compare(old.graph, now.graph, frontier))

    async def _load(self, digest: str) -> Fingerprint | None:
        text = await self._store.find_fingerprint(self._tenant, digest)
        return None if text is None else Fingerprint.of_text(text, f"fingerprint {digest}")

    async def _frontier(
        self, saved: CheckpointTuple, form: Any, state: StateSnapshot | None
    ) -> Frontier:
        """Say where a run stands, in a graph and in its subgraphs."""
        due = due_nodes(saved.checkpoint, form)
        tasks = () if state is None else state.tasks
        # Whose result is durable does not run again; a node of which any call is open does.
        done = {
            name
            for name in due
            if (own := [task for task in tasks if task.name == name])
            and all(task.result is not None for task in own)
        }
        inside: dict[str, tuple[Frontier, ...]] = {}
        for name in due - done:
            inner = form["nodes"].get(name, {}).get("graph")
            if inner is None:
                continue
            places = [
                await self._frontier_inside(task.state, inner)
                for task in tasks
                if task.name == name and task.result is None
            ]
            if places and all(place is not None for place in places):
                inside[name] = tuple(place for place in places if place is not None)
        return Frontier(due=frozenset(due - done), done=frozenset(done), inside=inside)

    async def _frontier_inside(
        self, state: StateSnapshot | RunnableConfig | None, form: Any
    ) -> Frontier | None:
        """Say where a run stands in a subgraph; `None` if it has not begun there."""
        if not isinstance(state, StateSnapshot):
            return None
        saved = await self._saver.aget_tuple(state.config)
        return None if saved is None else await self._frontier(saved, form, state)


_UNKNOWN = (
    Change(
        kind="code_changed",
        what="(any)",
        detail="may have changed: the fingerprint of what the run began with is not stored here",
        is_ahead=True,
    ),
)


def _judge_unknown(head: CheckpointTuple, now: Fingerprint) -> Verdict:
    """Judge a run of before there were fingerprints: its next nodes must be there."""
    gone = sorted(due_nodes(head.checkpoint, None) - set(now.graph["nodes"]))
    return Verdict(
        None, tuple(Change(kind="node_removed", what=name, is_ahead=True) for name in gone)
    )


def settle(registered: RegisteredGraph, run: Run, verdict: Verdict) -> dict[str, Any] | None:
    """Return what is to be noted of a verdict, if anything.

    Raises:
        IncompatibleGraphError: The run must not go on.
    """
    if verdict.is_same:
        return None
    action = registered.on_change.verdict(verdict.changes)
    if action == "refuse":
        refused = [
            change for change in verdict.ahead if registered.on_change.action(change) == "refuse"
        ]
        raise incompatible(registered, run, refused)
    if action == "warn":
        logger.warning(
            "run goes on with a graph that has changed where it can still come to",
            extra={"run_id": run.id, "changes": [str(change) for change in verdict.ahead]},
        )
    return {
        "verdict": verdict.name,
        "policy": action if verdict.ahead else None,
        "from": verdict.before,
        "to": registered.fingerprint.digest,
        "changes": [str(change) for change in verdict.changes],
    }


def incompatible(
    registered: RegisteredGraph, run: Run, changes: Sequence[Change]
) -> IncompatibleGraphError:
    """Return the error that names what is in the way of a run."""
    changed = {change.what for change in changes if change.kind == "code_changed"}
    main = {
        name
        for node, names in registered.fingerprint.main.items()
        if node in changed
        for name in names
    }
    return IncompatibleGraphError(
        run.id,
        registered.name,
        registered.version,
        tuple((change.kind, str(change)) for change in changes),
        tuple(sorted(main)),
    )
