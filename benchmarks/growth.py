"""What becomes of long threads: the size of their database, the time of a step, and of a load."""

from __future__ import annotations

import functools
import shutil
import sqlite3
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.checkpoint import open_checkpointer
from benchmarks import graphs
from benchmarks.graphs import Builder, Chat, Graph, PlainChat
from benchmarks.lab import Lab, folder_size, interleave
from benchmarks.results import Result, Row, medians, milliseconds
from benchmarks.savers import BARE, OURS, SQLITE, open_bare_saver, open_sqlite_saver
from benchmarks.texts import MESSAGE_SIZE, make_messages

_MESSAGES = 200

_EARLY, _LATE = range(10, 91), range(4_960, 5_041)
"""Around message 50 and around message 5,000: where steps are timed."""
_EARLY_BYTES, _LATE_BYTES = range(300, 701), range(4_540, 4_941)
"""Around message 500 and short of message 5,000: where growth is weighed, between the timings."""
_LONG_ROUNDS = 3

_TURNS = 1_000
_EARLY_TURNS, _LATE_TURNS = range(100, 301), range(800, 1_001)

_LONG, _SHORT = 5_000, 50
_SAID = 50
_LOADS = 20

Open = Callable[[Path], AbstractAsyncContextManager[BaseCheckpointSaver[Any]]]


def _open_ours(path: Path) -> AbstractAsyncContextManager[BaseCheckpointSaver[Any]]:
    return open_checkpointer(f"sqlite:///{path}")


async def chat_size(lab: Lab) -> Result:
    """The files of a database after a chat, beside the raw bytes of its messages."""
    texts = make_messages(_MESSAGES, seed=1)
    raw = sum(len(text.encode()) for text in texts)
    rows, figures = [], {}

    async def one_run(graph: Graph) -> None:
        await graphs.run(graph, {"messages": []})

    async def many_runs(graph: Graph) -> None:
        await graphs.hold_chat(graph, texts)

    variants: list[tuple[str, Builder, Callable[[Graph], Awaitable[None]]]] = [
        ("a run for each pair", graphs.chat(texts), many_runs),
        ("one run, one message a step", graphs.monologue(texts, Chat), one_run),
    ]
    peers: list[tuple[str, Open, float | None]] = [
        (OURS, _open_ours, 3.0),
        (SQLITE, open_sqlite_saver, None),
    ]
    for variant, builder, hold in variants:
        for saver_name, open_saver, required in peers:
            path = lab.sqlite_path()
            async with open_saver(path) as saver:
                await hold(builder.compile(checkpointer=saver))
            size = folder_size(path)
            figures[f"{saver_name}, {variant}"] = [float(size)]
            rows.append(
                Row(
                    workload=f"{_MESSAGES} messages of 1 kB, {variant}: {saver_name} on SQLite",
                    figure=f"{size:,} bytes on disk; raw: {raw:,}",
                    ratio=size / raw,
                    required=required,
                    aim=required and 2.0,
                )
            )
    return Result(rows=rows, figures={"bytes": figures})


async def long_chat(lab: Lab) -> Result:
    """One run of 5,000 messages: the time that each step adds, and the bytes, early and late."""
    texts = make_messages(_LATE.stop, seed=2)
    rows: list[Row] = []
    figures: dict[str, dict[str, list[float]]] = {}
    for reducer, schema in (("add_messages", Chat), ("a reducer that appends", PlainChat)):
        subjects: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
            "engine": functools.partial(_time_long_chat, texts, schema, None),
            OURS: functools.partial(_long_chat_on_disk, texts, schema, lab),
            BARE: functools.partial(_bare_long_chat, texts, schema, lab),
        }
        await _long_chat_on_disk(texts[: _EARLY.stop], schema, lab)  # the warm-up
        rounds = await interleave(subjects, min(lab.rounds, _LONG_ROUNDS), warm_up=False)
        measured = {
            f"{subject}, {figure}": [one_round[figure] for one_round in rounds[subject]]
            for subject in subjects
            for figure in rounds[subject][0]
        }
        figures[reducer] = measured
        rows += _long_chat_rows(reducer, medians(measured))
    return Result(rows=rows, figures=figures)


async def fresh_savers(lab: Lab) -> Result:
    """A chat in which each turn opens the saver anew and closes it again."""
    texts = make_messages(2 * _TURNS, seed=3)
    builder = graphs.chat(texts)
    path, config = lab.sqlite_path(), graphs.new_config()
    sizes, seconds = [0], []
    for text in texts[::2]:
        began = time.perf_counter()
        async with _open_ours(path) as saver:
            graph = builder.compile(checkpointer=saver)
            await graphs.run(graph, {"messages": [HumanMessage(text)]}, config)
        seconds.append(time.perf_counter() - began)
        sizes.append(folder_size(path))
    early, late = (
        (sizes[turns[-1]] - sizes[turns[0]]) / (len(turns) - 1)
        for turns in (_EARLY_TURNS, _LATE_TURNS)
    )
    row = Row(
        workload=f"{_TURNS:,} chat turns, each with a fresh saver: bytes a turn at the end",
        figure=f"{late:,.0f} bytes in the last 200; turns 100 to 300: {early:,.0f}",
        ratio=late / early,
        required=1.2,
    )
    hundreds = [seconds[first : first + 100] for first in range(0, _TURNS, 100)]
    figures = {
        "bytes after each hundred turns": {OURS: [float(size) for size in sizes[100::100]]},
        "mean seconds a turn of each hundred": {OURS: [statistics.mean(some) for some in hundreds]},
    }
    return Result(rows=[row], figures=figures)


async def load_head(lab: Lab) -> Result:
    """The head of a long thread, beside an equal one with a short past and beside the peer's."""
    long, short = f"{OURS}, {_LONG:,} checkpoints", f"{OURS}, {_SHORT} checkpoints"
    peer = f"{SQLITE}, {_LONG:,} checkpoints"
    threads: dict[str, tuple[Open, int]] = {
        long: (_open_ours, _LONG),
        short: (_open_ours, _SHORT),
        peer: (open_sqlite_saver, _LONG),
    }
    subjects: dict[str, Callable[[], Awaitable[float]]] = {}
    for name, (open_saver, steps) in threads.items():
        path = lab.sqlite_path()
        config = await _make_log(path, open_saver, steps=steps)
        subjects[name] = functools.partial(_median_load, path, open_saver, config)
    figures = await interleave(subjects, lab.rounds)
    middle = medians(figures)

    def row(other: str, *, required: float) -> Row:
        return Row(
            workload=f"SQLite, load the head of a thread with {_LONG:,} checkpoints",
            figure=f"{milliseconds(middle[long])}; {other}: {milliseconds(middle[other])}",
            ratio=middle[long] / middle[other],
            required=required,
        )

    rows = [row(short, required=1.5), row(peer, required=1.0)]
    return Result(rows=rows, figures={"seconds": figures})


async def _long_chat_on_disk(texts: list[str], schema: type[Any], lab: Lab) -> dict[str, float]:
    path = lab.sqlite_path()
    weighed: dict[int, int] = {}

    def weigh(said: int) -> None:
        if said in {_EARLY_BYTES[0], _EARLY_BYTES[-1], _LATE_BYTES[0], _LATE_BYTES[-1]}:
            weighed[said] = _database_size(path)

    async with _open_ours(path) as saver:
        figures = await _time_long_chat(texts, schema, saver, weigh)
    shutil.rmtree(path.parent)  # should growth ever not be flat, that is many gigabytes
    if weighed:
        for name, steps in (("early bytes", _EARLY_BYTES), ("late bytes", _LATE_BYTES)):
            grown = weighed[steps[-1]] - weighed[steps[0]]
            figures[name] = grown / (len(steps) - 1)
    return figures


async def _bare_long_chat(texts: list[str], schema: type[Any], lab: Lab) -> dict[str, float]:
    async with open_bare_saver(lab.sqlite_path()) as saver:
        return await _time_long_chat(texts, schema, saver)


async def _time_long_chat(
    texts: list[str],
    schema: type[Any],
    saver: BaseCheckpointSaver[Any] | None,
    also: Callable[[int], None] = lambda _said: None,
) -> dict[str, float]:
    """Return the mean seconds of a step, from when its node begins to when the next one does."""
    began_at: list[float] = []

    def at_step(said: int) -> None:
        also(said)
        began_at.append(time.perf_counter())

    graph = graphs.monologue(texts, schema, at_step).compile(checkpointer=saver)
    await graphs.run(graph, {"messages": []})
    return {
        name: (began_at[steps[-1]] - began_at[steps[0]]) / (len(steps) - 1)
        for name, steps in (("early seconds", _EARLY), ("late seconds", _LATE))
        if steps[-1] < len(began_at)
    }


def _long_chat_rows(reducer: str, middle: Mapping[str, float]) -> list[Row]:
    (early, late), (bare_early, bare_late) = (
        [
            middle[f"{saver}, {when} seconds"] - middle[f"engine, {when} seconds"]
            for when in ("early", "late")
        ]
        for saver in (OURS, BARE)
    )
    early_bytes, late_bytes = (middle[f"{OURS}, {when} bytes"] for when in ("early", "late"))
    return [
        Row(
            workload=f"Chat to 5,000 messages by {reducer}: time added to a step at the end",
            figure=f"{milliseconds(late)} beyond LangGraph's own "
            f"{milliseconds(middle['engine, late seconds'])}; around message 50: "
            f"{milliseconds(early)} beyond {milliseconds(middle['engine, early seconds'])}",
            ratio=late / early,
            required=1.5,
            aim=1.2,
        ),
        Row(
            workload=f"Chat to 5,000 messages by {reducer}: time added by {BARE}",
            figure=f"{milliseconds(bare_late)}; around message 50: {milliseconds(bare_early)}",
            ratio=bare_late / bare_early,
        ),
        Row(
            workload=f"Chat to 5,000 messages by {reducer}: bytes a step at the end",
            figure=f"{late_bytes:,.0f} bytes; around message 500: {early_bytes:,.0f}; "
            f"a message is {MESSAGE_SIZE:,}",
            ratio=late_bytes / early_bytes,
            required=1.2,
        ),
    ]


def _database_size(path: Path) -> int:
    """Return the bytes of all committed pages, those that are still in the log too."""
    with closing(sqlite3.connect(path)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    return int(pages) * int(page_size)


async def _make_log(path: Path, open_saver: Open, *, steps: int) -> RunnableConfig:
    """Make a thread that ends in the same state, however many steps it takes there."""
    texts = make_messages(_SAID, seed=4)
    config = graphs.new_config()
    builder = graphs.log(texts, steps=steps, every=_LONG // _SAID)
    async with open_saver(path) as saver:
        await graphs.run(builder.compile(checkpointer=saver), {"count": 0, "messages": []}, config)
    return config


async def _median_load(path: Path, open_saver: Open, config: RunnableConfig) -> float:
    """Load a head by savers that are connected but have seen nothing of the thread yet."""
    seconds = []
    for _ in range(_LOADS):
        async with open_saver(path) as saver:
            assert await saver.aget_tuple(graphs.new_config()) is None
            began = time.perf_counter()
            found = await saver.aget_tuple(config)
            seconds.append(time.perf_counter() - began)
        assert found is not None
        values = found.checkpoint["channel_values"]
        assert (values["count"], len(values["messages"])) == (_LONG, _SAID)
    return statistics.median(seconds)
