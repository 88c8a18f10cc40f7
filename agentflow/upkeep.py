"""What is done to a whole database: another key, sweeping, and marking a restored backup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.checkpoint import Retention, Saver, SweepReport
from agentflow.errors import InvalidInputError
from agentflow.keys import KeyRing
from agentflow.storage import RunStore
from agentflow.types import Clock, Restored, Run, RunStatus

_PASSES = 3
"""How often everything is looked through for what is sealed by an old key."""

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

        async def choose(thread_ids: Sequence[str]) -> dict[str, Retention]:
            kept = {name: await self._retention(name, default) for name in thread_ids}
            return {name: each for name, each in kept.items() if each is not None}

        return await self._saver.asweep(choose, dry_run=dry_run, clock=self._clock)

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
        return page.items[0] if page.items else None


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
