"""How fast workers are: steps, the way from a submission or decision to a node, claims.

Workers of agentflow run in the process that submits, as DBOS' workflows do.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
import unittest.mock
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypedDict

import sqlalchemy as sa
from langgraph.graph import START, StateGraph

from agentflow import AgentFlow, request_approval
from agentflow.database import Database
from agentflow.database.prepared import Prepared
from agentflow.database.tables import leases, runs, waits
from benchmarks import dbos_runs, graphs
from benchmarks.lab import Lab, interleave
from benchmarks.results import Figures, Result, Row, medians, milliseconds
from benchmarks.savers import OURS

DBOS = "DBOS"
_RUNS, _STEPS, _AT_A_TIME = 100, 10, 50
_TRIES = 30
_FEW, _MANY = 10_000, 1_000_000
"""Waiting runs beside which claims are measured."""
_CLAIMS = 200
_IDLE = 10.0
"""Seconds for which an idle worker is watched."""
_LEASE = 0.5
_UNTIL_IDLE = dbos_runs.UNTIL_IDLE
"""Seconds after which nothing is left to do of what was before."""

Subject = Callable[[], Awaitable[float]]


class Asked(TypedDict):
    """A run that asks once."""

    name: str


class Watched:
    """A graph whose nodes say when they are entered."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self.entered: dict[str, asyncio.Future[float]] = {}

    def builder(self) -> graphs.Builder:
        """Return a graph that asks a person, and says when it begins and when it goes on."""

        async def begin(state: Asked) -> None:
            self._enter(f"begin {state['name']}")

        async def ask(state: Asked) -> None:
            if request_approval({"name": state["name"]}).approved:
                self._enter(f"go on {state['name']}")

        builder: graphs.Builder = StateGraph(Asked)
        builder.add_node("begin", begin)
        builder.add_node("ask", ask)
        builder.add_edge(START, "begin")
        builder.add_edge("begin", "ask")
        return builder

    def expect(self, what: str) -> asyncio.Future[float]:
        """Return a future of the time at which a node is entered."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.entered[what] = future
        return future

    def _enter(self, what: str) -> None:
        now = time.perf_counter()
        if (future := self.entered.pop(what, None)) is not None and not future.done():
            future.set_result(now)


@asynccontextmanager
async def working(
    url: str, watched: Watched, *, concurrency: int = _AT_A_TIME
) -> AsyncIterator[AgentFlow]:
    """Open an app with a worker in this process."""
    async with AgentFlow(url) as app:
        _register(app, watched)
        async with app.worker(concurrency=concurrency):
            yield app


def _register(app: AgentFlow, watched: Watched) -> None:
    app.register(graphs.counter(_STEPS), name="count")
    app.register(watched.builder(), name="ask")


async def steps(lab: Lab) -> Result:
    """Steps of many short runs that are submitted to a worker, beside DBOS."""
    urls = {"SQLite": lab.sqlite_url, "PostgreSQL": lab.postgres_url}
    subjects: dict[str, Subject] = {}
    for database, make_url in urls.items():
        subjects[f"{OURS}, {database}"] = _with_url(make_url(), _our_steps)
        subjects[f"{DBOS}, {database}"] = _with_url(make_url(), _dbos_steps)
    figures = await interleave(subjects, lab.rounds)
    rows = [
        _faster(
            f"{database}, {_STEPS}-step runs through a worker, {_AT_A_TIME} in flight",
            figures,
            f"{OURS}, {database}",
            f"{DBOS}, {database}",
        )
        for database in urls
    ]
    return Result(rows=rows, figures={"steps per second": figures})


def _with_url(url: str, measure: Callable[[str], Awaitable[float]]) -> Subject:
    return lambda: measure(url)


async def _our_steps(url: str) -> float:
    async with working(url, Watched()) as app:
        turn = asyncio.Semaphore(_AT_A_TIME)

        async def one() -> None:
            async with turn:
                handle = await app.submit("count", {"count": 0, "value": ""})
                assert (await handle.result())["count"] == _STEPS

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(_RUNS):
                group.create_task(one())
        return _RUNS * _STEPS / (time.perf_counter() - began)


async def _dbos_steps(url: str) -> float:
    return await dbos_runs.in_loop_of_its_own(
        url, lambda: dbos_runs.steps_per_second(_RUNS, _STEPS, _AT_A_TIME)
    )


def _faster(workload: str, figures: Figures, ours: str, theirs: str) -> Row:
    of = medians(figures)
    return Row(
        workload=workload,
        figure=f"{of[ours]:.0f} steps/s, {theirs} {of[theirs]:.0f}",
        ratio=of[ours] / of[theirs],
        required=2,
        aim=3,
        at_least=True,
    )


async def latency(lab: Lab) -> Result:
    """The way from a submission, or from a decision, to the first node, with an idle worker."""
    watched = Watched()
    sqlite, postgres = lab.sqlite_url(), lab.postgres_url()
    submitted, decided = "submit to first node", "decision to first node"
    subjects: dict[str, Subject] = {
        f"{submitted}, SQLite": _median_of(sqlite, watched, _submit),
        f"{decided}, SQLite": _median_of(sqlite, watched, _decide),
        f"{submitted}, PostgreSQL": _median_of(postgres, watched, _submit),
        f"{decided}, PostgreSQL": _median_of(postgres, watched, _decide),
        f"{DBOS}, send to recv, PostgreSQL": _with_url(lab.postgres_url(), _dbos_latency),
    }
    figures = await interleave(subjects, lab.rounds)
    of = medians(figures)
    theirs = of[f"{DBOS}, send to recv, PostgreSQL"]
    rows = []
    for what in (submitted, decided):
        alone, beside = of[f"{what}, SQLite"], of[f"{what}, PostgreSQL"]
        rows += [
            Row(
                workload=f"SQLite, {what}, one process",
                figure=f"{milliseconds(alone)} of 20 ms",
                ratio=alone / 0.020,
                required=1,
            ),
            Row(
                workload=f"PostgreSQL, {what}",
                figure=f"{milliseconds(beside)}, {DBOS} send to recv {milliseconds(theirs)}",
                ratio=beside / theirs,
                required=1,
            ),
        ]
    return Result(rows=rows, figures={"seconds, median of a round": figures})


def _median_of(
    url: str, watched: Watched, once: Callable[[AgentFlow, Watched], Awaitable[float]]
) -> Subject:
    async def measure() -> float:
        async with working(url, watched) as app:
            return statistics.median([await once(app, watched) for _ in range(_TRIES)])

    return measure


async def _submit(app: AgentFlow, watched: Watched) -> float:
    name = uuid.uuid4().hex
    entered = watched.expect(f"begin {name}")
    await asyncio.sleep(_UNTIL_IDLE)
    began = time.perf_counter()
    handle = await app.submit("ask", {"name": name})
    seconds = await entered - began
    await handle.wait(until="parked")
    return seconds


async def _decide(app: AgentFlow, watched: Watched) -> float:
    name = uuid.uuid4().hex
    handle = await app.submit("ask", {"name": name})
    await handle.wait(until="parked")
    (approval,) = await handle.approvals()
    entered = watched.expect(f"go on {name}")
    await asyncio.sleep(_UNTIL_IDLE)
    began = time.perf_counter()
    await app.approvals.decide(approval, "approve", by="bench")
    seconds = await entered - began
    await handle.result()
    return seconds


async def _dbos_latency(url: str) -> float:
    async def median() -> float:
        return statistics.median(
            [await dbos_runs.send_to_recv(uuid.uuid4().hex) for _ in range(_TRIES)]
        )

    return await dbos_runs.in_loop_of_its_own(url, median)


async def expiry(lab: Lab) -> Result:
    """From the moment at which a dead worker's lease expires to the first node on another."""
    watched = Watched()

    subjects = {
        "SQLite": _with_url(lab.sqlite_url(), lambda url: _expire(url, watched)),
        "PostgreSQL": _with_url(lab.postgres_url(), lambda url: _expire(url, watched)),
    }
    figures = await interleave(subjects, max(lab.rounds, 3))
    worst = {name: max(each) for name, each in figures.items()}
    rows = [
        Row(
            workload=f"{name}, expiry of a lease to first node on another worker",
            figure=f"{milliseconds(worst[name])} at worst, of 1 s",
            ratio=worst[name],
            required=1,
        )
        for name in subjects
    ]
    return Result(rows=rows, figures={"seconds": figures})


async def _expire(url: str, watched: Watched) -> float:
    name = uuid.uuid4().hex
    entered = watched.expect(f"begin {name}")
    async with AgentFlow(url) as dead:
        # It claims the run and is never heard of again.
        _register(dead, watched)
        handle = await dead.submit("ask", {"name": name})
        lease = timedelta(seconds=_LEASE)
        claimed = await dead._store.claim_run("", handle.id, worker="dead", lease=lease)
        expires = time.perf_counter() + _LEASE
        assert claimed is not None
        async with working(url, watched) as app:
            seconds = await entered - expires
            await app.wait(handle.id, until="parked")
    return seconds


async def claims(lab: Lab) -> Result:
    """Claims and decisions beside few and beside very many waiting runs, on PostgreSQL."""
    watched = Watched()
    figures: dict[str, list[float]] = {}
    plans: dict[int, list[str]] = {}
    for count in (_FEW, _MANY):
        url = lab.postgres_url()
        async with AgentFlow(url) as app:
            _register(app, watched)
            await _make_waiting(app, count)
            for name, figure in (await _claim_times(app)).items():
                figures[f"{name}, {count:,} waiting"] = figure
            plans[count] = await _plan(app)
    print(f"claim beside {_MANY:,} waiting runs:", *plans[_MANY], sep="\n  ", file=sys.stderr)
    rows = []
    for what in ("claim", "decide and claim"):
        few, many = (_p99(figures[f"{what}, {count:,} waiting"]) for count in (_FEW, _MANY))
        rows.append(
            Row(
                workload=f"PostgreSQL, {what}, p99, {_MANY:,} waiting runs beside {_FEW:,}",
                figure=f"{milliseconds(many)}, beside {_FEW:,} {milliseconds(few)}; "
                f"{_way(plans[_MANY])}",
                ratio=many / few,
                required=1.5,
            )
        )
    return Result(rows=rows, figures={"seconds": figures})


def _p99(figures: list[float]) -> float:
    return statistics.quantiles(figures, n=100)[98]


async def _make_waiting(app: AgentFlow, count: int) -> None:
    """Copy one run that waits as often as is asked for, below agentflow."""
    await app.submit("ask", {"name": "template"}, run_id="template")
    await app.drive("template")

    def copies(table: sa.Table, **changed: str) -> str:
        columns = [column.name for column in table.c if column.name != "seq"]
        made = ", ".join(changed.get(name, name) for name in columns)
        return (
            f"INSERT INTO {table.name} ({', '.join(columns)}) SELECT {made} "  # noqa: S608
            f"FROM {table.name}, generate_series(1, {count}) AS n "
            "WHERE thread_id = 'template'"
        )

    name = "'waiting-' || n"

    def fill(connection: sa.Connection) -> None:
        connection.execute(sa.text(copies(runs, run_id=name, thread_id=name)))
        connection.execute(sa.text(copies(waits, run_id=name, thread_id=name, wait_id=name)))
        connection.execute(sa.text(copies(leases, thread_id=name)))

    database: Database = app._store._database  # type: ignore[attr-defined]  # of SqlRunStore
    await database.write(fill)
    await database.write(lambda connection: connection.execute(sa.text("ANALYZE")))


async def _claim_times(app: AgentFlow) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"claim": [], "decide and claim": []}
    for number in range(_CLAIMS):
        await app.submit("count", {"count": 0, "value": ""}, run_id=f"new-{number}")
        found["claim"].append(await _claim(app))
        handle = await app.submit("ask", {"name": "x"}, run_id=f"asks-{number}")
        await app.drive(handle.id)
        (approval,) = await handle.approvals()
        began = time.perf_counter()
        await app.approvals.decide(approval.id, "approve", by="bench")
        decided = time.perf_counter() - began
        found["decide and claim"].append(decided + await _claim(app))
    return found


async def _plan(app: AgentFlow) -> list[str]:
    """Return PostgreSQL's plan for finding what is due, as a claim asks for it."""
    asked: list[tuple[str, Any]] = []
    execute = Prepared.execute

    def noted(statement: Prepared, on: Any, parameters: Any) -> Any:
        compiled = statement.compiled(on)
        if "SKIP LOCKED" in compiled.text and "'queued'" in compiled.text:
            asked.append((f"EXPLAIN {compiled.text}", compiled.bind(parameters)))
        return execute(statement, on, parameters)

    await app.submit("count", {"count": 0, "value": ""}, run_id="explained")
    with unittest.mock.patch.object(Prepared, "execute", noted):
        await _claim(app)
    database: Database = app._store._database  # type: ignore[attr-defined]  # of SqlRunStore
    plan = await database.query(lambda session: session.fetch(*asked[0]))
    return [str(line) for (line,) in plan]


def _way(plan: list[str]) -> str:
    """Say how the runs are found."""
    if any("Seq Scan on agentflow_runs" in line for line in plan):
        return "all runs are read"
    used = {word for line in plan for word in line.split() if word.startswith("agentflow_runs_")}
    return f"by {', '.join(sorted(used))}"


async def _claim(app: AgentFlow) -> float:
    began = time.perf_counter()
    claimed = await app._store.claim_runs(
        "",
        worker="bench",
        queues=["default"],
        graphs=list(app.graphs),
        limit=10,
        lease=timedelta(minutes=10),
    )
    seconds = time.perf_counter() - began
    assert len(claimed) == 1
    return seconds


async def idle(lab: Lab) -> Result:
    """What an idle worker costs beside many waiting runs: processor, tasks, threads."""
    watched = Watched()
    url = lab.postgres_url()
    async with AgentFlow(url) as app:
        _register(app, watched)
        await _make_waiting(app, _FEW)
    async with working(url, watched):
        await asyncio.sleep(1)
        tasks, threads = len(asyncio.all_tasks()), threading.active_count()
        began = time.process_time()
        await asyncio.sleep(_IDLE)
        share = (time.process_time() - began) / _IDLE
    row = Row(
        workload=f"PostgreSQL, an idle worker beside {_FEW:,} waiting runs, {_IDLE:.0f} s",
        figure=f"{share:.2%} of a processor, {tasks} tasks, {threads} threads",
        ratio=share / 0.01,
        required=1,
    )
    return Result(rows=[row], figures={"share of a processor": {OURS: [share]}})
