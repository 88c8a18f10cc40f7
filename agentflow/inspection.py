"""Which unfinished runs could go on with the graphs that are registered here; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.drive import Compatibility
from agentflow.errors import AgentflowError, CodecError, UnknownGraphError
from agentflow.registry import Registry
from agentflow.storage import RunStore
from agentflow.types import Run, RunStatus, Unreadable
from agentflow.versions import ChangeAction

_PAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """What would become of a run."""

    run_id: str
    graph: str
    version: str
    status: RunStatus
    verdict: Literal["same", "behind", "ahead", "unregistered", "unreadable"]
    """What of the graph has changed since: nothing; only what the run cannot come to any more; what
    it can; or its version is not registered here. Or the run, or its thread, cannot be read."""
    action: ChangeAction
    """What is done about it; a run without its version, or that is unreadable, is refused."""
    changes: tuple[str, ...] = ()


async def check_runs(
    store: RunStore,
    saver: BaseCheckpointSaver[Any],
    registry: Registry,
    tenant: str,
    graph: str | None,
) -> tuple[CheckedRun, ...]:
    """See `AgentFlow.check_runs`."""
    found, unreadable = await list_unfinished(store, tenant, graph)
    checked = [await _try(store, saver, registry, run) for run in found]
    for each in unreadable:
        facts = {"graph": each.graph or "", "version": each.version or ""}
        status = RunStatus(str(each.status))
        checked.append(_unreadable(each.error, run_id=each.id, status=status, **facts))
    return tuple(checked)


async def _try(
    store: RunStore, saver: BaseCheckpointSaver[Any], registry: Registry, run: Run
) -> CheckedRun:
    try:
        return await check_run(store, saver, registry, run)
    except CodecError as exc:
        facts = {"graph": run.graph, "version": run.version}
        return _unreadable(exc, run_id=run.id, status=run.status, **facts)


def _unreadable(error: AgentflowError, **run: Any) -> CheckedRun:
    changes = (f"{type(error).__name__}: {error}",)
    return CheckedRun(verdict="unreadable", action="refuse", changes=changes, **run)


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


async def list_unfinished(
    store: RunStore, tenant: str, graph: str | None
) -> tuple[Sequence[Run], Sequence[Unreadable]]:
    """Return all runs that have not ended, the oldest first, and those that cannot be read."""
    found: dict[str, Run] = {}
    unreadable: dict[str, Unreadable] = {}
    for status in RunStatus:
        cursor: str | None = None
        while not status.is_ended:
            page = await store.list_runs(
                tenant, status=status, graph=graph, thread_id=None, limit=_PAGE, cursor=cursor
            )
            found |= {run.id: run for run in page.items}
            unreadable |= {each.id: each for each in page.unreadable}
            if (cursor := page.cursor) is None:
                break
    return sorted(found.values(), key=lambda run: run.created_at), list(unreadable.values())
