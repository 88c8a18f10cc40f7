"""Stored runs of released versions against today's code, for a user's own tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig

from agentflow.errors import MigrationError, UnknownGraphError
from agentflow.inspection import CheckedRun

if TYPE_CHECKING:
    from agentflow.app import AgentFlow


async def replay_stored(
    app: AgentFlow, *stored: str | Path | Mapping[str, Any]
) -> list[CheckedRun]:
    """Load runs that `agentflow run export` has written, and see that they could go on.

    Each is loaded into a database of its own in memory: run, approvals, and all checkpoints of its
    thread with all values, by the classes that are there today. Its place is compared with the
    graph of its version that is registered in `app`. A run of a version that is not registered any
    more is migrated to the newest one, and held against that. No node runs.

    Args:
        app: Has today's graphs and migrations, and the keys of what is encrypted.
        stored: Files, folders with `*.json`, or exported runs.

    Returns:
        What would become of each.

    Raises:
        AssertionError: Some could not go on; it says which, and why.
        AgentflowError: One cannot be loaded.
    """
    checked, problems = [], []
    for each in _each(stored):
        async with app.in_memory() as alone:
            run = await alone.import_run(each)
            place: RunnableConfig = {"configurable": {"thread_id": run.thread_id}}
            async for _ in alone.checkpointer.alist(place):
                pass  # it could be loaded
            found = await alone.check_run(run.id)
            if found.verdict == "unregistered" and not run.status.is_ended:
                found = await _migrated(alone, found)
            if found.action != "refuse":
                await alone.state(run.id)
        checked.append(found)
        if found.action == "refuse":
            problems.append(
                f"run {run.id!r} of {run.graph}@{run.version}: {'; '.join(found.changes)}"
            )
    if problems:
        raise AssertionError("\n".join(["stored runs cannot go on with today's code:", *problems]))
    return checked


async def _migrated(alone: AgentFlow, found: CheckedRun) -> CheckedRun:
    """Migrate a run of a version that is not there any more, and say what becomes of it then."""
    try:
        await alone.migrate_run(found.run_id)
    except MigrationError as exc:
        return replace(found, changes=(*found.changes, str(exc)))
    except UnknownGraphError:
        return found
    return await alone.check_run(found.run_id)


def _each(stored: tuple[str | Path | Mapping[str, Any], ...]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for each in stored:
        if isinstance(each, Mapping):
            found.append(each)
            continue
        path = Path(each)
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        found += [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not found:
        raise AssertionError("there is nothing stored to replay")
    return found
