"""How fast steps are that do nothing: alone, many at once, beside a large value, and by either API.

Everything is `durability="sync"`: a step is over when its checkpoint is durable.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from agentflow.checkpoint import open_checkpointer
from agentflow.keys import KeyRing
from benchmarks import graphs
from benchmarks.floor import Commits, postgres_commits, sqlite_commits
from benchmarks.graphs import Graph
from benchmarks.lab import Lab, interleave
from benchmarks.results import Figures, Result, Row, medians, milliseconds
from benchmarks.savers import (
    BARE,
    MEMORY,
    OURS,
    PIPELINE,
    POOL,
    SQLITE,
    open_bare_saver,
    open_pipeline_saver,
    open_pool_saver,
    open_sqlite_saver,
)
from benchmarks.texts import make_text

STEPS = 100
"""Of a run that is alone."""
_RUNS, _STEPS_OF_RUN = 50, 10
_VALUE_SIZE = 1_000_000
_ENGINE, _COMMIT = "LangGraph without a checkpointer", "one bare commit"
_SAVED = "LangGraph with it"

Saver = BaseCheckpointSaver[Any]
Subject = Callable[[], Awaitable[float]]


async def sqlite_alone(lab: Lab) -> Result:
    """One run on SQLite, beside the floor and `AsyncSqliteSaver`."""
    name = f"SQLite, {STEPS} no-op steps, one run alone"
    async with AsyncExitStack() as stack:
        savers: dict[str, Saver] = {
            OURS: await stack.enter_async_context(open_checkpointer(lab.sqlite_url())),
            SQLITE: await stack.enter_async_context(open_sqlite_saver(lab.sqlite_path())),
            BARE: await stack.enter_async_context(open_bare_saver(lab.sqlite_path())),
        }
        commits = stack.enter_context(sqlite_commits(lab.sqlite_path()))
        figures = await _measure_alone(lab, savers, commits)
    rows = [
        _beside_floor(name, figures, required=1.5, aim=1.25),
        _beside(name, figures, SQLITE, required=0.55, aim=0.45),
        _beside(name, figures, BARE),
    ]
    return Result(rows=rows, figures={"seconds a step": figures})


async def postgres_alone(lab: Lab) -> Result:
    """One run on PostgreSQL, beside the floor and both ways to open `AsyncPostgresSaver`."""
    name = f"PostgreSQL, {STEPS} no-op steps, one run alone"
    async with AsyncExitStack() as stack:
        savers: dict[str, Saver] = {
            OURS: await stack.enter_async_context(open_checkpointer(lab.postgres_url())),
            POOL: await stack.enter_async_context(open_pool_saver(lab.postgres_url())),
            PIPELINE: await stack.enter_async_context(open_pipeline_saver(lab.postgres_url())),
        }
        commits = stack.enter_context(postgres_commits(lab.postgres_url()))
        figures = await _measure_alone(lab, savers, commits)
    rows = [
        _beside_floor(name, figures, required=1.9, aim=1.6),
        _beside(name, figures, POOL, required=0.85, aim=0.7),
        _beside(name, figures, PIPELINE, required=1.0, aim=0.85),
    ]
    return Result(rows=rows, figures={"seconds a step": figures})


async def concurrent(lab: Lab) -> Result:
    """Many short runs at once in one process, beside the savers of LangGraph."""
    sqlite, postgres = f"{OURS}, SQLite", f"{OURS}, PostgreSQL"
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        savers: dict[str, Saver] = {
            sqlite: await enter(open_checkpointer(lab.sqlite_url())),
            SQLITE: await enter(open_sqlite_saver(lab.sqlite_path())),
            MEMORY: InMemorySaver(),
            postgres: await enter(open_checkpointer(lab.postgres_url())),
            POOL: await enter(open_pool_saver(lab.postgres_url())),
            BARE: await enter(open_bare_saver(lab.sqlite_path())),
        }
        builder = graphs.counter(_STEPS_OF_RUN)
        subjects = {
            name: functools.partial(steps_per_second, builder.compile(checkpointer=saver))
            for name, saver in savers.items()
        }
        figures = await interleave(subjects, lab.rounds)
    middle = medians(figures)

    def row(
        ours: str, other: str, *, required: float | None = None, aim: float | None = None
    ) -> Row:
        return Row(
            workload=f"{_RUNS} runs of {_STEPS_OF_RUN} steps at once: {ours}",
            figure=f"{middle[ours]:,.0f} steps/s; {other}: {middle[other]:,.0f}",
            ratio=middle[ours] / middle[other],
            required=required,
            aim=aim,
            at_least=True,
        )

    rows = [
        row(sqlite, MEMORY, required=0.75, aim=0.85),
        row(sqlite, SQLITE, required=2.5, aim=3.0),
        row(sqlite, BARE),
        row(postgres, MEMORY, required=0.65, aim=0.8),
        row(postgres, POOL, required=2.0, aim=2.5),
    ]
    return Result(rows=rows, figures={"steps a second": figures})


async def static_value(lab: Lab) -> Result:
    """A run whose state holds a large value that never changes, beside one without it."""
    seeds = itertools.count()  # each run has a value of its own
    rows, figures = [], {}
    for database, url in (("SQLite", lab.sqlite_url()), ("PostgreSQL", lab.postgres_url())):
        async with open_checkpointer(url) as saver:
            graph = graphs.counter(STEPS).compile(checkpointer=saver)

            async def with_value(graph: Graph = graph) -> float:
                value = make_text(_VALUE_SIZE, seed=next(seeds))
                return await graphs.run(graph, {"count": 0, "value": value}) / STEPS

            subjects: dict[str, Subject] = {
                "with the value": with_value,
                "without": functools.partial(seconds_a_step, graph),
            }
            measured = await interleave(subjects, lab.rounds)
        beside, alone = medians(measured).values()
        rows.append(
            Row(
                workload=f"{database}, {STEPS} no-op steps beside a static value of 1 MB",
                figure=f"{milliseconds(beside)} a step; without it: {milliseconds(alone)}",
                ratio=beside / alone,
                required=1.3,
                aim=1.1,
            )
        )
        figures[f"seconds a step, {database}"] = measured
    return Result(rows=rows, figures=figures)


async def encryption(lab: Lab) -> Result:
    """Steps with everything compressed and encrypted, beside steps with neither."""
    keys = KeyRing({"bench": bytes(range(32))})
    rows, figures = [], {}
    databases = (("SQLite", lab.sqlite_url), ("PostgreSQL", lab.postgres_url))
    for database, make_url in databases:
        async with (
            open_checkpointer(make_url(), keys=keys) as sealed,
            open_checkpointer(make_url(), compress=False) as bare,
        ):
            builder = graphs.counter(STEPS)
            subjects: dict[str, Subject] = {
                name: functools.partial(seconds_a_step, builder.compile(checkpointer=saver))
                for name, saver in (("compressed and encrypted", sealed), ("neither", bare))
            }
            measured = await interleave(subjects, lab.rounds)
        with_keys, without = medians(measured).values()
        rows.append(
            Row(
                workload=f"{database}, {STEPS} no-op steps, compressed and encrypted",
                figure=f"{milliseconds(with_keys)} a step; neither: {milliseconds(without)}",
                ratio=with_keys / without,
                required=1.3,
            )
        )
        figures[f"seconds a step, {database}"] = measured
    return Result(rows=rows, figures=figures)


async def sync_api(lab: Lab) -> Result:
    """The synchronous API beside the asynchronous one, on the same database."""
    figures = {}
    for database, url in (("SQLite", lab.sqlite_url()), ("PostgreSQL", lab.postgres_url())):
        async with open_checkpointer(url) as saver:
            figures[database] = await interleave(_both_apis(saver), lab.rounds)
    # What it costs with a saver that stores nothing.
    figures[MEMORY] = await interleave(_both_apis(InMemorySaver()), lab.rounds)
    rows = [
        _sync_beside_async(where, measured, None if where == MEMORY else 1.2)
        for where, measured in figures.items()
    ]
    return Result(rows=rows, figures={f"seconds a step, {w}": m for w, m in figures.items()})


def _sync_beside_async(where: str, measured: Figures, required: float | None) -> Row:
    middle = medians(measured)
    total = {api: middle[f"{_SAVED}, {api}"] for api in ("sync", "async")}
    text = {
        api: f"{milliseconds(seconds)} a step, "
        f"{milliseconds(seconds - middle[f'{_ENGINE}, {api}'])} of it added"
        for api, seconds in total.items()
    }
    return Row(
        workload=f"{where}, {STEPS} no-op steps by the synchronous API",
        figure=f"{text['sync']}; asynchronous: {text['async']}",
        ratio=total["sync"] / total["async"],
        required=required,
        aim=required,
    )


async def _measure_alone(lab: Lab, savers: dict[str, Saver], commits: Commits) -> Figures:
    builder = graphs.counter(STEPS)

    async def commit() -> float:
        return commits(STEPS) / STEPS

    subjects: dict[str, Subject] = {
        name: functools.partial(seconds_a_step, builder.compile(checkpointer=saver))
        for name, saver in savers.items()
    }
    subjects[_ENGINE] = functools.partial(seconds_a_step, builder.compile())
    subjects[_COMMIT] = commit
    return await interleave(subjects, lab.rounds)


def _beside_floor(workload: str, figures: Figures, *, required: float, aim: float) -> Row:
    middle = medians(figures)
    ours, engine, commit = middle[OURS], middle[_ENGINE], middle[_COMMIT]
    return Row(
        workload=workload,
        figure=f"{milliseconds(ours)} a step; floor: {milliseconds(engine + commit)} "
        f"({milliseconds(engine)} LangGraph, {milliseconds(commit)} commit)",
        ratio=ours / (engine + commit),
        required=required,
        aim=aim,
    )


def _beside(
    workload: str,
    figures: Figures,
    other: str,
    *,
    required: float | None = None,
    aim: float | None = None,
) -> Row:
    middle = medians(figures)
    return Row(
        workload=workload,
        figure=f"{milliseconds(middle[OURS])} a step; {other}: {milliseconds(middle[other])}",
        ratio=middle[OURS] / middle[other],
        required=required,
        aim=aim,
    )


def _both_apis(saver: Saver) -> dict[str, Subject]:
    subjects: dict[str, Subject] = {}
    for name, checkpointer in ((_SAVED, saver), (_ENGINE, None)):
        by_async = graphs.counter(STEPS).compile(checkpointer=checkpointer)
        by_sync = graphs.sync_counter(STEPS).compile(checkpointer=checkpointer)
        subjects[f"{name}, async"] = functools.partial(seconds_a_step, by_async)
        subjects[f"{name}, sync"] = functools.partial(_seconds_a_sync_step, by_sync)
    return subjects


async def seconds_a_step(graph: Graph) -> float:
    """Run a graph of `STEPS` steps once and return the seconds that one took."""
    return await graphs.run(graph, {"count": 0}) / STEPS


async def _seconds_a_sync_step(graph: Graph) -> float:
    return await graphs.run_sync(graph, {"count": 0}) / STEPS


async def steps_per_second(graph: Graph) -> float:
    """Run a graph many times at once and return how many steps were made in a second."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for _ in range(_RUNS):
            group.create_task(graphs.run(graph, {"count": 0}))
    return _RUNS * _STEPS_OF_RUN / (loop.time() - began)
