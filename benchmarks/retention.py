"""How long pruning a long thread holds its lock, and how much memory it takes."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import Saver, open_checkpointer
from benchmarks.lab import Lab
from benchmarks.results import Result, Row, milliseconds

_MANY, _MILLION = 100_000, 1_000_000
_LONGEST = 0.1
"""Seconds for which a transaction may hold its lock."""
_AT_ONCE = 500
_SAID = "text that is too long to stand in the row of each checkpoint " * 5


async def prune(lab: Lab) -> Result:
    """Prune a thread of 100,000 checkpoints on SQLite; and the memory for few and for more."""
    return await _measure(lab, _MANY, few=2_000, more=20_000)


async def prune_million(lab: Lab) -> Result:
    """Prune a thread of 1,000,000 checkpoints on SQLite; and the memory for few and for many."""
    return await _measure(lab, _MILLION, few=2_000, more=200_000)


async def _measure(lab: Lab, count: int, *, few: int, more: int) -> Result:
    async with open_checkpointer(lab.sqlite_url()) as saver:
        await _fill(saver, count)
        began = time.perf_counter()
        times = _watch(saver)
        await saver.aprune(["thread"])
        took = time.perf_counter() - began
    least, most = [await _peak(lab, number) for number in (few, more)]
    name = f"SQLite, prune of {count:,} checkpoints"
    rows = [
        Row(
            workload=f"{name}: the longest transaction, beside 100 ms",
            figure=f"{milliseconds(max(times))}; {len(times):,} of them, {took:.1f} s in all",
            ratio=max(times) / _LONGEST,
            required=1.0,
        ),
        Row(
            workload=f"SQLite, prune of {more:,} checkpoints: peak memory, beside {few:,}",
            figure=f"{most:,} bytes; {least:,}",
            ratio=most / least,
            required=1.3,
        ),
    ]
    figures = {
        "seconds": {"longest transaction": [max(times)], "all": [took]},
        "bytes": {f"{few:,}": [float(least)], f"{more:,}": [float(most)]},
    }
    return Result(rows=rows, figures=figures)


async def _fill(saver: Saver, count: int) -> None:
    """Put a line of checkpoints, each with a value of its own, and writes that led to it."""
    config: RunnableConfig = _at(None)
    for begin in range(0, count, _AT_ONCE):
        puts: list[Any] = []
        for number in range(begin, min(begin + _AT_ONCE, count)):
            name = version = f"{number:09}"
            made: Any = {
                **empty_checkpoint(),
                "id": name,
                "channel_versions": {"said": version, "number": version},
                "channel_values": {"said": f"{number} {_SAID}", "number": number},
            }
            changed: Any = {"said": version, "number": version}
            puts.append(saver.aput(config, made, {"step": number}, changed))
            config = _at(name)
            puts.append(saver.aput_writes(config, [("number", number + 1)], "task"))
        await asyncio.gather(*puts)


def _at(checkpoint_id: str | None) -> RunnableConfig:
    place = {"thread_id": "thread", "checkpoint_ns": ""}
    named = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    return {"configurable": {**place, **named}}


def _watch(saver: Saver) -> list[float]:
    """Take the time of each of the writer's transactions from now on, commit included."""
    writer = saver._database._writer
    transact, times = writer._transact, []

    def timed(batch: Any, *, is_patient: bool) -> Any:
        began = time.perf_counter()
        outcomes = transact(batch, is_patient=is_patient)
        times.append(time.perf_counter() - began)
        return outcomes

    writer._transact = timed  # type: ignore[method-assign]
    return times


async def _peak(lab: Lab, count: int) -> int:
    async with open_checkpointer(lab.sqlite_url()) as saver:
        await _fill(saver, count)
        await saver.aget_tuple(_at(None))
        tracemalloc.start()
        await saver.aprune(["thread"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak
