"""How fast a whole database is verified."""

from __future__ import annotations

import time

from agentflow.checkpoint import Saver, open_checkpointer
from benchmarks import graphs
from benchmarks.lab import Lab, interleave
from benchmarks.results import Result, Row, medians
from benchmarks.savers import OURS

_THREADS, _STEPS = 1_000, 99
_REQUIRED = 20_000
"""Checkpoints a second, on one core."""


async def verify(lab: Lab) -> Result:
    """Verify 100,000 checkpoints of small state; one thread of the process works."""
    async with open_checkpointer(lab.sqlite_url()) as saver:
        config = graphs.new_config()
        graph = graphs.counter(_STEPS).compile(checkpointer=saver)
        await graphs.run(graph, {"count": 0, "value": ""}, config)
        source = config["configurable"]["thread_id"]
        for number in range(1, _THREADS):
            # All of a copy is sealed and hashed as its own.
            await saver.acopy_thread(source, f"copy {number}")
        count = await saver.count()

        async def subject() -> float:
            return count / await _seconds(saver)

        figures = await interleave({OURS: subject}, lab.rounds)
    rate = medians(figures)[OURS]
    row = Row(
        workload=f"SQLite, `verify` of {count:,} checkpoints in {_THREADS:,} threads",
        figure=f"{rate:,.0f} checkpoints/s; asked for: {_REQUIRED:,}",
        ratio=rate / _REQUIRED,
        required=1.0,
        aim=1.5,
        at_least=True,
    )
    return Result(rows=[row], figures={"checkpoints a second": figures})


async def _seconds(saver: Saver) -> float:
    began = time.perf_counter()
    async for audited in saver.verify():
        assert audited.damages == []
    return time.perf_counter() - began
