"""What is done to a whole database: another key, sweeping, and marking a restored backup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel

from agentflow.checkpoint import Retention, Saver, SweepReport
from agentflow.effects import NAMES, shift_of
from agentflow.errors import CodecError, InvalidInputError, NotFoundError
from agentflow.keys import KeyRing
from agentflow.storage import RunStore
from agentflow.types import Clock, Restored, Run, RunStatus, to_timedelta

_PASSES = 3
"""How often everything is looked through for what is sealed by an old key."""

_EFFECTS_AT_ONCE = 500

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What `AgentFlow.rotate_keys` has done."""

    sealed: int
    """How many rows and payloads were sealed by the current key."""
    is_complete: bool
    """Whether nothing is left. If not, some process still seals by an old key."""


async def rotate_keys(
    store: RunStore,
    saver: BaseCheckpointSaver[Any],
    keys: KeyRing | None,
    progress: Progress | None,
) -> Rotation:
    """See `AgentFlow.rotate_keys`."""
    # SQLAlchemy is imported with the first database.
    from agentflow.checkpoint.rotation import rotate_checkpoints

    if keys is None:
        raise InvalidInputError("key ring", ("there are no keys; set AGENTFLOW_KEYS",))
    tell = progress or _silent
    sealed = 0
    for _ in range(_PASSES):
        before = sealed
        sealed += await store.rotate_keys(partial(tell, "runs"))
        # A checkpointer of the caller's own may do without keys.
        if isinstance(saver, Saver) and saver.keys is not None:
            sealed += await rotate_checkpoints(saver, partial(tell, "checkpoints"))
        if sealed == before:
            return Rotation(sealed=sealed, is_complete=True)
    return Rotation(sealed=sealed, is_complete=False)


def _silent(what: str, seen: int, sealed: int) -> None:
    del what, seen, sealed


class Sweeper:
    """Deletes checkpoints and threads that need not be kept any longer."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        tenant: str,
        own: Mapping[tuple[str, str], Retention | None],
        clock: Clock,
    ) -> None:
        """Sweep the threads of `tenant`; `own` are the retentions of graphs that have one."""
        self._store = store
        self._saver = saver
        self._tenant = tenant
        self._own = own
        self._clock = clock

    async def sweep(self, retention: Retention | None, *, dry_run: bool) -> SweepReport:
        """See `AgentFlow.sweep`."""
        if not isinstance(self._saver, Saver):
            raise InvalidInputError(
                "checkpoints", ("must be opened by open_checkpointer to be swept",)
            )

        default = retention or self._saver.retention
        unreadable: set[str] = set()

        async def choose(thread_ids: Sequence[str]) -> dict[str, Retention]:
            kept: dict[str, Retention | None] = {}
            for name in thread_ids:
                try:
                    kept[name] = await self._retention(name, default)
                except CodecError:
                    unreadable.add(name)  # nobody can say whether its runs have ended
            return {name: each for name, each in kept.items() if each is not None}

        report = await self._saver.asweep(choose, dry_run=dry_run, clock=self._clock)
        if not dry_run:
            await self._prune_effects(default)
        if unreadable:
            damaged = report.spared.get("damaged", 0) + len(unreadable)
            report = replace(report, spared={**report.spared, "damaged": damaged})
        return report

    async def _prune_effects(self, default: Retention | None) -> None:
        """Delete the records of effects of runs whose threads are not kept any longer."""
        own = {key: each for key, each in self._own.items() if each is not None}
        for key, retention in own.items():
            await self._prune_of(retention, [key], are_others=False)
        if default is not None:
            await self._prune_of(default, list(own), are_others=True)

    async def _prune_of(
        self, retention: Retention, graphs: Sequence[tuple[str, str]], *, are_others: bool
    ) -> None:
        if retention.ttl is None:
            return
        ended_before = self._clock.now() - to_timedelta(retention.ttl)
        prune = partial(
            self._store.prune_effects,
            self._tenant,
            ended_before=ended_before,
            graphs=graphs,
            are_others=are_others,
            limit=_EFFECTS_AT_ONCE,
        )
        while await prune() == _EFFECTS_AT_ONCE:
            pass

    async def _retention(self, thread_id: str, default: Retention | None) -> Retention | None:
        """Say how long a thread is kept; `None` if it is to be let be."""
        for status in RunStatus:
            if not status.is_ended and await self._newest(thread_id, status) is not None:
                return None
        run = await self._newest(thread_id, None)
        own = None if run is None else self._own.get((run.graph, run.version))
        return default if own is None else own

    async def _newest(self, thread_id: str, status: RunStatus | None) -> Run | None:
        page = await self._store.list_runs(
            self._tenant, status=status, graph=None, thread_id=thread_id, limit=1, cursor=None
        )
        return next(iter(page.whole()), None)


async def copy_for_fork(
    saver: BaseCheckpointSaver[Any],
    graph: Pregel[Any, Any, Any, Any],
    run: Run,
    checkpoint_id: str,
    values: Any,
    thread_id: str,
) -> tuple[str | None, int]:
    """Copy the thread of a run for a fork.

    Returns:
        The checkpoint at which the fork begins, or `None` if that is the head of the copy already,
        with `values` in it; and by how many supersteps what follows has moved then.
    """
    if not isinstance(saver, Saver):
        problem = "must be opened by open_checkpointer to be forked"
        raise InvalidInputError("checkpoints", (problem,))
    place = {"checkpoint_ns": "", "checkpoint_id": checkpoint_id}
    found = await saver.aget_tuple({"configurable": {"thread_id": run.thread_id, **place}})
    if found is None:
        raise NotFoundError("checkpoint", checkpoint_id)
    if values is not None and NAMES in found.metadata:
        problem = "values: cannot be given where a migration has made the checkpoint; fork from a "
        raise InvalidInputError("fork", (problem + "later one, or from the one before",))
    await saver.acopy_thread(run.thread_id, thread_id)
    shift = shift_of(found, run)
    if values is None:
        return checkpoint_id, shift
    here: RunnableConfig = {"configurable": {"thread_id": thread_id, **place}}
    await graph.copy(update={"checkpointer": saver}).aupdate_state(here, values)
    return None, shift + 1


async def restore(
    store: RunStore, saver: BaseCheckpointSaver[Any], *, reason: str | None, by: str | None
) -> Restored:
    """See `AgentFlow.restore`."""
    if not isinstance(saver, Saver):
        raise InvalidInputError(
            "checkpoints", ("must be opened by open_checkpointer to be marked as restored",)
        )
    # First, so that once the runs go on nobody from before can write their checkpoints.
    await saver.begin_epoch()
    return await store.restore(reason=reason, by=by)
