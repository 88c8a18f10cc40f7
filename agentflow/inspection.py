"""Which unfinished runs could go on with the graphs that are registered here; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.drive import Compatibility
from agentflow.errors import UnknownGraphError
from agentflow.registry import Registry
from agentflow.storage import RunStore
from agentflow.types import Run, RunStatus
from agentflow.versions import ChangeAction

_PAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """What would become of a run."""

    run_id: str
    graph: str
    version: str
    status: RunStatus
    verdict: Literal["same", "behind", "ahead", "unregistered"]
    """What of the graph has changed since: nothing; only what the run cannot come to any more; what
    it can; or its version is not registered here."""
    action: ChangeAction
    """What is done about it; a run without its version is refused."""
    changes: tuple[str, ...] = ()


async def check_runs(
    store: RunStore,
    saver: BaseCheckpointSaver[Any],
    registry: Registry,
    tenant: str,
    graph: str | None,
) -> tuple[CheckedRun, ...]:
    """See `AgentFlow.check_runs`."""
    found = await list_unfinished(store, tenant, graph)
    return tuple([await check_run(store, saver, registry, run) for run in found])


async def check_run(
    store: RunStore, saver: BaseCheckpointSaver[Any], registry: Registry, run: Run
) -> CheckedRun:
    """See `AgentFlow.check_run`."""
    try:
        registered = registry.find(run.graph, run.version)
    except UnknownGraphError:
        return _unregistered(run, registry)
    verdict = await Compatibility(store, saver, registered, run.tenant).look(run)
    return CheckedRun(
        run_id=run.id,
        graph=run.graph,
        version=run.version,
        status=run.status,
        verdict=verdict.name,
        action=registered.on_change.verdict(verdict.changes),
        changes=tuple(map(str, verdict.ahead or verdict.changes)),
    )


def _unregistered(run: Run, registry: Registry) -> CheckedRun:
    text = "its version is not registered here"
    newest = registry.versions_of(run.graph)[:1]
    if newest and registry.way(run.graph, run.version, newest[0]) is not None:
        text += f"; 'agentflow run migrate' brings it to version {newest[0]!r}"
    return CheckedRun(
        run_id=run.id,
        graph=run.graph,
        version=run.version,
        status=run.status,
        verdict="unregistered",
        action="refuse",
        changes=(text,),
    )


async def list_unfinished(store: RunStore, tenant: str, graph: str | None) -> Sequence[Run]:
    """Return all runs that have not ended, the oldest first."""
    found: dict[str, Run] = {}
    for status in RunStatus:
        cursor: str | None = None
        while not status.is_ended:
            page = await store.list_runs(
                tenant, status=status, graph=graph, thread_id=None, limit=_PAGE, cursor=cursor
            )
            found |= {run.id: run for run in page.items}
            if (cursor := page.cursor) is None:
                break
    return sorted(found.values(), key=lambda run: run.created_at)
