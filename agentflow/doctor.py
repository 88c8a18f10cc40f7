"""What may be wrong with a deployment, and what to do about it; changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.errors import AgentflowError
from agentflow.storage import RunStore
from agentflow.types import RunStatus, Survey, SystemClock, UnfinishedRuns

Level = Literal["ok", "warning", "problem"]

_OFFSET = timedelta(seconds=1)
_SILENCE = timedelta(seconds=30)
"""After which a worker is taken for dead, if its leases are not longer still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    level: Level
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What `AgentFlow.doctor` has found."""

    checks: tuple[Check, ...]

    @property
    def level(self) -> Level:
        """The worst of what was found."""
        levels = {check.level for check in self.checks}
        return "problem" if "problem" in levels else "warning" if "warning" in levels else "ok"


async def diagnose(
    store: RunStore, saver: BaseCheckpointSaver[Any], *, url: str, tenant: str, lease: timedelta
) -> Diagnosis:
    """See `AgentFlow.doctor`."""
    checks: list[Check] = []
    try:
        checks.append(await asyncio.to_thread(_migrations, url))
        asked = SystemClock().now()
        survey = await store.survey(tenant)
        answered = SystemClock().now()
        checks.insert(0, Check(name="database", level="ok", message="it answers"))
    except AgentflowError as exc:
        checks.append(Check(name="database", level="problem", message=str(exc)))
        return Diagnosis(checks=tuple(checks))
    checks.append(await _checkpoints(saver))
    checks.append(_clock(survey.at - asked, survey.at - answered))
    alive = max(_SILENCE, lease * 3)
    checks += [_leases(survey), _deadlines(survey), _letters(survey), _pauses(survey)]
    checks += [_workers(survey, alive), _versions(survey, alive), _graphs(survey)]
    return Diagnosis(checks=tuple(checks))


def _migrations(url: str) -> Check:
    # SQLAlchemy is imported with the first database.
    from agentflow.database import migrate
    from agentflow.database.engine import is_memory, parse_url

    name = "migrations"
    if is_memory(parse_url(url)):
        return Check(name=name, level="ok", message="a database in memory needs none")
    found = migrate.status(url)
    if found.current == found.head or found.current is None:
        return Check(name=name, level="ok", message=f"the schema is at revision {found.head}")
    if not found.pending:
        return Check(
            name=name,
            level="problem",
            message=f"the schema is at {found.current}, which this program does not know; "
            "upgrade agentflow here",
        )
    return Check(
        name=name,
        level="problem",
        message=f"the schema is at {found.current}, {', '.join(found.pending)} are due; "
        "run 'agentflow migrate up'",
    )


async def _checkpoints(saver: BaseCheckpointSaver[Any]) -> Check:
    place = {"thread_id": "agentflow doctor", "checkpoint_ns": ""}
    try:
        await saver.aget_tuple({"configurable": place})
    except AgentflowError as exc:
        return Check(name="checkpoints", level="problem", message=str(exc))
    return Check(name="checkpoints", level="ok", message="the checkpointer answers")


def _clock(at_most: timedelta, at_least: timedelta) -> Check:
    """Judge by how much the database's clock is ahead: between two limits, as it took a while."""
    ahead = max(at_least, timedelta(0)) + min(at_most, timedelta(0))
    text = f"the database's clock is {abs(ahead.total_seconds()):.1f} s "
    text += "ahead of" if ahead > timedelta(0) else "behind"
    if abs(ahead) <= _OFFSET:
        return Check(name="clock", level="ok", message="this machine's agrees with the database's")
    return Check(
        name="clock",
        level="warning",
        message=f"{text} this machine's; leases and deadlines go by the database's, logs do not",
    )


def _leases(survey: Survey) -> Check:
    count = survey.expired_leases
    if count == 0:
        return Check(name="leases", level="ok", message="none has expired")
    return Check(
        name="leases",
        level="warning",
        message=f"{count} runs have lost their worker and were not taken over yet; if that stays "
        "so, no worker has room for them",
    )


def _deadlines(survey: Survey) -> Check:
    if survey.overdue == 0:
        return Check(name="deadlines", level="ok", message="none has passed unheeded")
    return Check(
        name="deadlines",
        level="warning",
        message=f"{survey.overdue} runs are past a deadline; a running worker ends them",
    )


def _letters(survey: Survey) -> Check:
    if survey.dead_letters == 0:
        return Check(name="dead_letters", level="ok", message="there are none")
    return Check(
        name="dead_letters",
        level="warning",
        message=f"there are {survey.dead_letters}; look at them with 'agentflow dead-letter list'",
    )


def _pauses(survey: Survey) -> Check:
    named = {"all": "everything", "store": "the restored store"}
    found = [named.get(pause.scope, f"{pause.scope} {pause.name!r}") for pause in survey.pauses]
    if survey.paused:
        found.append(f"{survey.paused} single runs")
    if not found:
        return Check(name="pauses", level="ok", message="nothing is paused")
    is_restored = any(pause.scope == "store" for pause in survey.pauses)
    advice = "agentflow restore --resume" if is_restored else "agentflow resume"
    return Check(
        name="pauses",
        level="warning",
        message=f"paused: {', '.join(found)}; '{advice}' lets it go on",
    )


def _workers(survey: Survey, alive: timedelta) -> Check:
    living = [worker for worker in survey.workers if worker.silence <= alive]
    unwell = [worker.report.name for worker in living if worker.report.health == "overloaded"]
    if unwell:
        return Check(
            name="workers",
            level="problem",
            message=f"{', '.join(sorted(unwell))} cannot take any more runs: replace them",
        )
    silent = len(survey.workers) - len(living)
    text = f"{len(living)} are at work" + (f", {silent} have gone silent" if silent else "")
    return Check(name="workers", level="warning" if silent else "ok", message=text)


def _versions(survey: Survey, alive: timedelta) -> Check:
    orphans = list(_orphans(survey, alive))
    if not orphans:
        return Check(
            name="versions", level="ok", message="every unfinished run has a worker for its version"
        )
    shown = ", ".join(
        f"{runs.count} {runs.status.value} of {runs.graph}@{runs.version} in queue {runs.queue!r}"
        for runs in orphans
    )
    # Who waits for a person needs no worker before there is an answer.
    waits = all(runs.status is RunStatus.WAITING for runs in orphans)
    return Check(
        name="versions",
        level="warning" if waits else "problem",
        message=f"no worker has the graph, the version and the queue of: {shown}; start one",
    )


def _graphs(survey: Survey) -> Check:
    if survey.incompatible == 0:
        return Check(name="graphs", level="ok", message="no run is kept by a change of its graph")
    return Check(
        name="graphs",
        level="problem",
        message=f"{survey.incompatible} runs are paused because their graph has changed where they "
        "can still come to, or a newer agentflow has stored them; 'agentflow run show' says what, "
        "and what can be done",
    )


def _orphans(survey: Survey, alive: timedelta) -> Iterator[UnfinishedRuns]:
    living = [worker.report for worker in survey.workers if worker.silence <= alive]
    for runs in survey.unfinished:
        wanted = (runs.graph, runs.version)
        if not any(wanted in each.graphs and runs.queue in each.queues for each in living):
            yield runs
