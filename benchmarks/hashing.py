"""What the hashes cost: the workloads of the checkpointer with them, and with none."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from unittest.mock import patch

from agentflow.checkpoint import open_checkpointer
from benchmarks import graphs
from benchmarks.lab import Lab, interleave
from benchmarks.results import Result, Row, medians, milliseconds
from benchmarks.speed import STEPS, seconds_a_step, steps_per_second

_WITH, _WITHOUT = "with hashes", "without"


class _NoHash:
    """Takes the place of SHA-256, and looks at nothing."""

    def __init__(self, _data: bytes = b"") -> None:
        """Ignore the data."""

    def update(self, _data: bytes) -> None:
        """Ignore more of it."""

    def digest(self) -> bytes:
        """Return what is the same for everything."""
        return bytes(32)


async def hashing(lab: Lab) -> Result:
    """One run alone and many at once, on both databases, each with hashes and without."""
    rows: list[Row] = []
    figures = {}
    for database, make_url in (("SQLite", lab.sqlite_url), ("PostgreSQL", lab.postgres_url)):
        async with AsyncExitStack() as stack:
            savers = {
                each: await stack.enter_async_context(open_checkpointer(make_url()))
                for each in (_WITH, _WITHOUT)
            }
            alone, short = graphs.counter(STEPS), graphs.counter(STEPS // 10)
            subjects: dict[str, Callable[[], Awaitable[float]]] = {}
            for each, saver in savers.items():
                measures = {
                    "alone": functools.partial(seconds_a_step, alone.compile(checkpointer=saver)),
                    "at once": functools.partial(
                        steps_per_second, short.compile(checkpointer=saver)
                    ),
                }
                for name, measure in measures.items():
                    plain = measure if each == _WITH else functools.partial(_unhashed, measure)
                    subjects[f"{name}, {each}"] = plain
            measured = await interleave(subjects, lab.rounds)
        figures[database] = measured
        of = medians(measured)
        rows += [
            Row(
                workload=f"{database}, {STEPS} no-op steps, one run alone, with hashes",
                figure=f"{milliseconds(of[f'alone, {_WITH}'])} a step; "
                f"without: {milliseconds(of[f'alone, {_WITHOUT}'])}",
                ratio=of[f"alone, {_WITH}"] / of[f"alone, {_WITHOUT}"],
            ),
            Row(
                workload=f"{database}, 50 runs of 10 steps at once, with hashes",
                figure=f"{of[f'at once, {_WITH}']:,.0f} steps/s; "
                f"without: {of[f'at once, {_WITHOUT}']:,.0f}",
                ratio=of[f"at once, {_WITH}"] / of[f"at once, {_WITHOUT}"],
                at_least=True,
            ),
        ]
    return Result(rows=rows, figures=figures)


async def _unhashed(measure: Callable[[], Awaitable[float]]) -> float:
    with patch("agentflow.codec.hashlib", SimpleNamespace(sha256=_NoHash)):
        return await measure()
