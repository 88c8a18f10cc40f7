"""What effects cost: steps with one each beside steps without, and a recorded outcome."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, TypedDict

import sqlalchemy as sa
from langgraph.graph import START, StateGraph

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.storage.sql import SqlRunStore
from benchmarks.lab import Lab, interleave
from benchmarks.results import Figures, Result, Row, medians, milliseconds

_RUNS, _STEPS, _AT_A_TIME = 100, 10, 50
_RECORDED, _COMMITS = 200, 200
_WITH, _WITHOUT = "one effect per node", "without"


def _last(_: int, new: int) -> int:
    return new


class State(TypedDict):
    """How many nodes have run."""

    count: Annotated[int, _last]


@effect
async def _act(number: int) -> int:
    return number + 1


async def _step(number: int) -> int:
    return number + 1


def _line(act: Callable[[int], Awaitable[int]]) -> StateGraph[Any, None, Any, Any]:
    async def node(state: State) -> State:
        return {"count": await act(state["count"])}

    graph: StateGraph[Any, None, Any, Any] = StateGraph(State)
    before = START
    for number in range(_STEPS):
        graph.add_node(f"n{number}", node)
        graph.add_edge(before, f"n{number}")
        before = f"n{number}"
    return graph


async def speed(lab: Lab) -> Result:
    """Steps of many runs at once, with an effect in each node and without."""
    urls = {"SQLite": lab.sqlite_url, "PostgreSQL": lab.postgres_url}
    subjects = {
        f"{database}, {name}": partial(_steps, make_url(), act)
        for database, make_url in urls.items()
        for name, act in ((_WITH, _act), (_WITHOUT, _step))
    }
    figures = await interleave(subjects, lab.rounds)
    rows = [_slower(database, figures) for database in urls]
    return Result(rows=rows, figures={"steps per second": figures})


async def _steps(url: str, act: Callable[[int], Awaitable[int]]) -> float:
    async with AgentFlow(url) as app:
        app.register(_line(act), name="line")
        async with app.worker(concurrency=_AT_A_TIME):
            began = time.perf_counter()
            handles = [await app.submit("line", {"count": 0}) for _ in range(_RUNS)]
            for handle in handles:
                assert (await handle.result())["count"] == _STEPS
            return _RUNS * _STEPS / (time.perf_counter() - began)


def _slower(database: str, figures: Figures) -> Row:
    of = medians(figures)
    ours, bare = of[f"{database}, {_WITH}"], of[f"{database}, {_WITHOUT}"]
    return Row(
        workload=f"{database}, one effect in each node, {_AT_A_TIME} runs at a time",
        figure=f"{ours:.0f} steps/s, without {bare:.0f}",
        ratio=ours / bare,
        required=0.45,
        aim=0.6,
        at_least=True,
    )


async def recorded(lab: Lab) -> Result:
    """A recorded outcome that is returned, beside a durable commit of one row."""
    url = lab.sqlite_url()
    subjects = {"recorded outcome": partial(_recall, url), "one commit": partial(_commit, url)}
    figures = await interleave(subjects, lab.rounds)
    of = medians(figures)
    row = Row(
        workload="SQLite, a recorded outcome beside one durable commit",
        figure=f"{milliseconds(of['recorded outcome'])}, {milliseconds(of['one commit'])}",
        ratio=of["recorded outcome"] / of["one commit"],
        required=0.2,
    )
    return Result(rows=[row], figures={"seconds": figures})


async def _recall(url: str) -> float:
    took: list[float] = []

    async def node(state: State) -> State:
        began = time.perf_counter()
        for number in range(_RECORDED):
            await _act(number)
        took.append((time.perf_counter() - began) / _RECORDED)
        if len(took) == 1:
            raise ConnectionError
        return state

    graph: StateGraph[Any, None, Any, Any] = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    async with AgentFlow(url) as app:
        app.register(graph, name="recall", retry=RetryPolicy(initial_interval=0, jitter=False))
        await app.drive((await app.submit("recall", {"count": 0})).id)
    return took[-1]


async def _commit(url: str) -> float:
    async with AgentFlow(url) as app:
        store = app._store
        assert isinstance(store, SqlRunStore)
        await store._database.write(
            lambda c: c.execute(sa.text("CREATE TABLE IF NOT EXISTS bench (n INTEGER)"))
        )
        took = []
        for number in range(_COMMITS):
            began = time.perf_counter()
            await store._database.write(
                lambda c, n=number: c.execute(sa.text("INSERT INTO bench VALUES (:n)"), {"n": n})  # type: ignore[misc]  # bound at once
            )
            took.append(time.perf_counter() - began)
        await asyncio.sleep(0)
    return statistics.median(took)
