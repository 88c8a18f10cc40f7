"""Times the checkpointers beside each other and writes `docs/benchmarks.md`.

Each figure is the median of several interleaved rounds, so that a machine whose speed drifts is
fair to all. Ratios are what can be compared between machines.
"""

from __future__ import annotations

import asyncio
import json
import operator
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from rich.console import Console

from agentflow.checkpoint import open_checkpointer
from tests.servers import PostgresServer

ROUNDS = 5
STEPS = 100
CONCURRENT_RUNS, CONCURRENT_STEPS = 50, 10
DOCS = Path(__file__).parents[1] / "docs"

Opener = Callable[[], AbstractAsyncContextManager[BaseCheckpointSaver[Any]]]


class Counter(TypedDict):
    """A state that costs nothing to compute."""

    count: int
    log: Annotated[list[int], operator.add]


def make_graph(steps: int) -> StateGraph[Any, Any, Any, Any]:
    """Make a line of nodes that do nothing of note."""
    builder: StateGraph[Any, Any, Any, Any] = StateGraph(Counter)
    before = START
    for number in range(steps):
        name = f"step{number}"
        builder.add_node(name, lambda state: {"count": state["count"] + 1})
        builder.add_edge(before, name)
        before = name
    builder.add_edge(before, END)
    return builder


async def measure(opener: Opener, round_number: int) -> dict[str, float]:
    """Measure one saver once: seconds per step alone, and steps per second of many runs."""
    async with opener() as saver:
        line = make_graph(STEPS).compile(checkpointer=saver)
        short = make_graph(CONCURRENT_STEPS).compile(checkpointer=saver)
        await line.ainvoke(*_call(f"warm-{round_number}"), durability="sync")
        began = time.perf_counter()
        await line.ainvoke(*_call(f"line-{round_number}"), durability="sync")
        alone = (time.perf_counter() - began) / STEPS
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(CONCURRENT_RUNS):
                call = _call(f"short-{round_number}-{number}")
                group.create_task(short.ainvoke(*call, durability="sync"))
        together = CONCURRENT_RUNS * CONCURRENT_STEPS / (time.perf_counter() - began)
    return {"seconds_per_step": alone, "steps_per_second": together}


def _call(thread_id: str) -> tuple[Any, Any]:
    config = {"configurable": {"thread_id": thread_id}, "recursion_limit": STEPS + 10}
    return {"count": 0, "log": []}, config


def openers(folder: Path, postgres: PostgresServer) -> dict[str, Opener]:
    """Return the savers to compare, each on a database of its own."""
    ours, theirs = (postgres.url(postgres.create_database()) for _ in range(2))

    @asynccontextmanager
    async def in_memory() -> AsyncIterator[BaseCheckpointSaver[Any]]:
        yield InMemorySaver()

    @asynccontextmanager
    async def their_sqlite() -> AsyncIterator[BaseCheckpointSaver[Any]]:
        async with AsyncSqliteSaver.from_conn_string(str(folder / "theirs.db")) as saver:
            await saver.conn.execute("PRAGMA synchronous=FULL")
            yield saver

    @asynccontextmanager
    async def their_postgres() -> AsyncIterator[BaseCheckpointSaver[Any]]:
        async with AsyncPostgresSaver.from_conn_string(theirs) as saver:
            await saver.setup()
            yield saver

    return {
        "LangGraph InMemorySaver": in_memory,
        "LangGraph AsyncSqliteSaver": their_sqlite,
        "agentflow sqlite": lambda: open_checkpointer(f"sqlite:///{folder / 'ours.db'}"),
        "LangGraph AsyncPostgresSaver": their_postgres,
        "agentflow postgresql": lambda: open_checkpointer(ours),
    }


async def run_all(folder: Path, postgres: PostgresServer) -> dict[str, dict[str, list[float]]]:
    """Measure every saver in turn, several times over."""
    raw: dict[str, dict[str, list[float]]] = {}
    for round_number in range(ROUNDS):
        for name, opener in openers(folder, postgres).items():
            for metric, value in (await measure(opener, round_number)).items():
                raw.setdefault(name, {}).setdefault(metric, []).append(value)
    return raw


def report(raw: dict[str, dict[str, list[float]]], commit: str) -> str:
    """Write the table of medians."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`; the raw figures are in `benchmarks.json` beside this page.",
        f'Medians of {ROUNDS} interleaved rounds in one run, full fsync, `durability="sync"`.',
        f"Commit {commit}, Python {platform.python_version()}.",
        "",
        f"| checkpointer | {STEPS} steps alone, ms a step | {CONCURRENT_RUNS} runs, steps/s |",
        "|---|---|---|",
    ]
    for name, metrics in raw.items():
        alone = statistics.median(metrics["seconds_per_step"]) * 1000
        together = statistics.median(metrics["steps_per_second"])
        lines.append(f"| {name} | {alone:.2f} | {together:,.0f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and write the page and the raw figures."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder, PostgresServer() as postgres:
        raw = asyncio.run(run_all(Path(folder), postgres))
    page = report(raw, commit or "unknown")
    DOCS.mkdir(exist_ok=True)
    (DOCS / "benchmarks.md").write_text(page)
    (DOCS / "benchmarks.json").write_text(json.dumps(raw, indent=1) + "\n")
    Console().print(page)


if __name__ == "__main__":
    main()
