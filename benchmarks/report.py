"""The page and the raw figures: how results are written, not how they are measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.results import Result, Row

_PACKAGES = (
    "langgraph",
    "langgraph-checkpoint",
    "langgraph-checkpoint-sqlite",
    "langgraph-checkpoint-postgres",
    "dbos",
    "aiosqlite",
    "psycopg",
)
_PROJECT = Path(__file__).parents[1]

_INTRODUCTION = """
Made by `make bench`; the figures of each round are in `benchmarks.json` beside this page. A figure
is the median of {rounds} (3 at most for the chat to 5,000 messages; sizes are weighed once),
and a ratio is that of two such figures of the same run, so it can be compared between machines.
What takes too long for every run stands in `benchmarks-long.md`, if it was measured.
"""
_LONG_INTRODUCTION = """
What takes too long for `make bench`, by the command below; the raw figures are in
`benchmarks-long.json` beside this page, and how it is measured stands in `benchmarks.md`.
"""
_METHOD = """
- **Floor**: the same graph without a checkpointer, plus one bare commit of a row of 300 bytes by
  the raw driver, per step: what a durable step costs at least. Both are measured in the same run.
- **Durable**: everything runs with `durability="sync"`. Before anything is measured, the live
  connections of all sides are asked: SQLite in WAL mode with `synchronous=FULL`, PostgreSQL with
  `fsync`, `full_page_writes` and `synchronous_commit` on.
- **Fair**: agentflow runs with its defaults, every safeguard on. LangGraph's savers run at their
  documented best: a write-ahead log; a pool of up to 20 connections with `autocommit`,
  `prepare_threshold=0` and `dict_row`; or one connection in pipeline mode. All sides take turns
  within each round, each round begins with another one, garbage is collected before each timing,
  and each side has run once before the first round.
- **DBOS** is launched with its defaults. Its workflows are started in the process that executes
  them, which is faster than its queues; agentflow's runs are submitted to a worker. Its SQLite
  database is as it makes it.
- **A bare commit in a thread**: a saver that stores nothing. Each checkpoint waits for one commit
  of 300 bytes, which a thread makes for all that wait, as any saver must that keeps the event loop
  free. What it costs beyond the floor are two changes of threads and what a processor forgets while
  its thread sleeps.
- **No-op steps**: one node that counts and sends itself on with a `Command`, the cheapest way
  through LangGraph; the same graph for all savers, a new thread for each run.
- **Messages**: 1,000 bytes of English-like text each, no two alike. The time that a step of the
  long chat adds is its own less that of the same graph without a checkpointer, each the mean over
  80 steps from node to node, around message 50 and around message 5,000; bytes a step are those of
  the database's pages over 400 steps, around message 500 and up to message 4,940.
  Sizes are those of the asynchronous API. LangGraph's synchronous one hands over what is written of
  an input behind its checkpoint, and not before it, and a run for each pair of messages takes 2.9
  to 3.0 times their bytes.
- **Load the head**: both threads end in the same state, 50 messages and a counter. Each load is the
  first of that thread by a saver that is connected already; a figure is the median of 20.
- **Synchronous API**: the ratio is that of whole steps, LangGraph's own part included.
"""

_PROFILE = """
Where a step of one run alone goes on SQLite, in microseconds, by timestamps at each border, when
the writer's thread makes the commit (300 steps on a machine whose speed varies by half from minute
to minute):

| part | µs |
|---|---|
| LangGraph between two checkpoints, with what a checkpointer makes it do | 230 to 280 |
| taking the writes of the task: serialized and queued | 17 |
| taking the checkpoint: serialized and queued | 63 |
| the writer's thread wakes | 45 |
| deciding what may be written, and packing it | 60 |
| the statement with its commit | 280 to 320 |
| settling the futures | 30 |
| the event loop's thread wakes, and LangGraph's tasks go on | 100 |

The same calls in a loop that does nothing else take 8 µs and 17 µs for taking, and 20 µs for
deciding: a thread that sleeps in each step finds its caches cold, and takes three times as long.
That is also why the bare commit in a thread, which stores nothing, is so far above the floor, and
why LangGraph's own `add_messages` becomes slower when anything waits between two steps.

Designs that were tried:

- **The commit of a lone run in its own thread** (kept). Both changes of threads go, and the caches
  stay warm between taking and writing. On a file in memory, where a commit costs next to nothing, a
  step took 0.98 ms instead of 1.30 ms. The event loop stands still for the length of a commit, so
  it is done only while commits are short and nobody else writes.
- **One row of the thread without a join on PostgreSQL** (kept): 35 µs of 350 µs at the server.
- **The head found by `ORDER BY` and `LIMIT` in a `LATERAL` on PostgreSQL** (kept). Compared with
  the highest number in a subquery, it was looked for with each checkpoint of its thread as long as
  the server had no statistics of the table: 17 to 30 ms of 1,500 checkpoints, and now 0.1 ms.
- **Tables without row ids, and an index of runs only where there is one** (dropped): 5 µs of 59 µs
  for the statement, on SQLite.
- **One statement instead of a transaction** (kept). Five calls of the driver became one, since each
  gives up the interpreter and waits to get it back: with fifty runs a batch waited 570 µs a step
  for its statements, and then 170 µs. What one run alone gains is within the noise.
- **A log that is long from the start** (kept). A commit that makes its file longer took 320 µs, one
  that writes over what is there 180 µs; the floor's commits make theirs longer.
- **Our own future** (kept). Making and ending `concurrent.futures.Future` takes 2.5 µs, ours
  0.4 µs.
- **A Zstandard dictionary for small values** (dropped): 16 % smaller, and one more thing without
  which nothing can be read.
- **Arrays and `unnest` on PostgreSQL** (dropped): the driver turns plain parameters into bytes
  faster.
- **The commits of many runs in the event loop's thread** (dropped), once for each turn of the loop.
  With fifty runs on SQLite the loop waits for the writer for a fifth of the time, mostly because
  the writer waits up to 5 ms for the interpreter after each call of the driver. Without that thread
  the waiting went, and the processor time of a step fell from 1.01 ms to 0.91 ms, but a step took
  as long as before: the statement and its commit no longer run beside the graphs. Measured again,
  it made 5 % to 8 % more steps, for a loop that stands still during commits.
- **Pages of 1,024 bytes** in a new SQLite file (kept). Each table and each index has a page,
  however little is in it: 200 messages took 2.5 times their bytes instead of 3.3 times, or, in one
  run, 2.0 times instead of 2.7 times. What it costs lies in large values and deletions: in the runs
  of this page before and after, a step beside a value of 1 MB took 1.06 and 1.25 times one without
  it, and the longest transaction of the prune 17 ms and 28 ms.
- **The synchronous API commits in LangGraph's threads, however slow that is** (kept). They would
  wait anyway; held to the limit of event loops, one slow second sent them to the writer's thread.
- **A shorter switch interval** of the interpreter (dropped): at 1 ms the loop waited half as long,
  and what both threads did took so much more of the processor that fifty runs were slower by 5 % to
  15 %; at 0.5 ms by a quarter.

With fifty runs at a time the processor is what they share, and a step of agentflow's takes 1.7
times as long as one with `InMemorySaver`. Counted by the profiler, whatever the speed of the
machine, a step with `InMemorySaver` is 1,136 calls of functions, nearly all of them LangGraph's
own; with agentflow it is 1,337 in the event loop's thread and 242 in the writer's, and one
statement for each batch. Three quarters of the steps leave room for what 380 calls cost, with all
that the database does. No function stands out: the one that calls most others makes 20 of these
calls.

Taken in turns in one process, with ten to twenty rounds each, none of these made the ratio better;
of the same code it varied by 0.09 from one such run to the next: no garbage collection below 10,000
objects, and what was there before frozen (it takes 0.07 ms of a step, and 0.04 ms with
`InMemorySaver`); both threads on one processor, each on its own, or one of them free; and waking
one, two, four or eight runs of a batch in each turn of the loop instead of all of them, so that
each finds its caches warm.

A saver that stores nothing, and only waits for a bare commit in a thread, made 0.88 to 1.08 times
the steps that `InMemorySaver` did, which serializes but never waits. Three quarters of its steps
leave some 0.2 ms of a step for serializing, hashing, deciding and storing. Of a step with agentflow
the event loop's thread takes 0.35 ms more than with `InMemorySaver`, and the writer 0.3 ms; on one
interpreter they add up.

A saver without any safeguard, which packs what it is given with MessagePack and stores a row for
each put in one commit for each batch, made 0.81 to 0.98 times the steps, in four runs of eleven
rounds. Ours, in the same runs, made 0.54 to 0.63.

Alone on PostgreSQL, in a process without the savers of LangGraph, a step took 1.74 and 1.78 times
the floor, and 2.03 and 2.17 times in one where these were measured in turn with it.

What is left beyond the floor is serializing, hashing and deciding, in Python, and that LangGraph's
own code runs slower after each wait for a disk or a server: after a pause of 0.3 ms its part of a
step took 0.58 ms instead of 0.40 ms. No checkpointer that waits for durability can avoid that; the
rows for a bare commit in a thread show how much it is.
"""

_RUNTIME_PROFILE = """
A worker with fifty runs of ten steps keeps one processor busy, so that what counts is what a run
takes of it. LangGraph alone, with its checkpointer in memory, made some 1,500 steps a second where
DBOS made some 150 on PostgreSQL; twice DBOS is far below that ceiling. Of a run of ten steps on
PostgreSQL, in milliseconds of the processor, by thread:

| thread | at first | now |
|---|---|---|
| the event loop: LangGraph (7), serializing, the worker, whoever waits for results | 11.7 | 13.1 |
| the writer: checkpoints, and the run store's verbs | 12.8 | 7.4 |
| readers: the thread before and after, the run for whoever waits | 5.5 | 2.1 |

The way from a submission to the first node on PostgreSQL, with nothing else to do, in milliseconds;
each part that asks the database has two changes of threads, of 0.2 ms each:

| part | ms | round trips, with the commit | at first |
|---|---|---|---|
| what is submitted is checked and encoded | 0.7 | | |
| stored, claimed, its thread taken, its start noted; beside the commit it is read | 4.5 | 5 | 33 |
| LangGraph reads the new thread and prepares | 1.8 | 0 | 4 |
| two checkpoints, that of the input and the first | 1.7 | 1 | 3 |
| the node is called | 0.7 | | |

A decision is the same way, without the checkpoints: the wait is resolved in the transaction, which
reads the thread's head as well, and beside whose last statement the attempt reads what it needs (5
round trips, 8 ms), before LangGraph does (2.3 ms). DBOS's `send` and `recv` are two commits.

Designs that were tried:

- **Statements compiled once and run on the bare driver** (kept). Reading the 47 columns of a run
  through SQLAlchemy Core took 0.4 ms of the processor; it takes 0.17 ms. A run had some 20
  statements of that kind.
- **Fewer statements** (kept): the clock's time as a column of what is locked; expired runs only
  looked for if there are any; a thread locked and its token raised at once; a run and its events in
  one statement, with the decision that wakes it; taking a thread in one.
- **One read of the thread for each attempt** (kept): what was read first answers the others while
  the lease holds and nothing was written; a new thread is not read at all.
- **One transaction instead of four** (kept): a claim takes the thread and notes the start, and what
  is submitted or decided beside an idle worker is claimed as it is stored. Storing, claiming,
  taking and noting one after the other took 11 ms, and a decision's way 21 ms instead of 11 ms.
- **The checkpoint of an input together with the one that follows** (kept): LangGraph waited for one
  after the other, which took 1.5 ms more.
- **psycopg's pipeline mode** for `BEGIN` with the first statement and the last ones with `COMMIT`
  (dropped): two round trips instead of five took 0.95 ms instead of 0.84 ms, since its own part
  costs more than they do; after a pause of 25 ms, `BEGIN` with the first statement took 1.55 ms
  instead of 1.36 ms.
- **A wait read with the lock of its run, a new thread looked at where its row is made, and the
  thread's head together with its writes** (kept): one round trip less each, which take 0.4 to
  0.5 ms after a pause.
- **Plans made once** (kept). psycopg prepares a statement when it comes for the sixth time, and
  PostgreSQL plans the next five executions anew: the first eleven decisions beside a new worker
  took 13 to 18 ms, and those after them 10 ms; now it is the first two. Without statistics newer
  than 3 runs, beside 200,000 more, a run took 0.3 s instead of 0.6 to 1.5 s.
- **An effect, its event and the end of its run's chain in one statement on PostgreSQL** (kept):
  each of the two steps of an effect is two round trips instead of four, after each of which the
  writer waits for the interpreter. With one effect in each node 0.52 to 0.61 of the steps are left;
  it was 0.45 to 0.53.
- **A limit of 5 ms instead of 2 ms for commits in an event loop's thread** (kept). On PostgreSQL
  the first ones of a process took longer, and the next second was left to the writer's thread: a
  step of a run that is alone took 3.6 ms, and 2.4 ms since, taken in turns.
- **An attempt that reads while its claim is being committed** (kept): 0.3 to 0.9 ms, as far as it
  waits for the server and not for the interpreter. What LangGraph does before its first checkpoint
  could be done then as well (dropped), but it calls routes and reducers, before it is known
  whether there is a run.
- **The first checkpoint after a pause in the event loop's thread** (dropped): no difference.

Not tried: a worker that looks only every second where it hears of others by `NOTIFY`, since an
expired lease would be found too late.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What was measured, and on what."""

    commit: str
    python: str
    machine: str
    versions: Mapping[str, str]
    command: str

    @classmethod
    def current(cls, arguments: Sequence[str]) -> Self:
        """Describe this process."""
        commit = _git("rev-parse", "--short", "HEAD") or "unknown"
        if _git("status", "--porcelain", "--", "agentflow", "benchmarks"):
            commit += " with uncommitted changes"
        return cls(
            commit=commit,
            python=platform.python_version(),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
            command=" ".join(["python -m benchmarks", *arguments]),
        )


def line(row: Row) -> str:
    """Write one row of the table."""
    sign = "≥" if row.at_least else "≤"
    required, aim = (
        "" if bound is None else f"{sign} {bound:g}" for bound in (row.required, row.aim)
    )
    return f"| {row.workload} | {row.figure} | {row.ratio:.2f} | {required} | {aim} | {row.met} |"


def page(results: Mapping[str, Result], environment: Environment, rounds: int) -> str:
    """Write the page for people."""
    return "\n".join(
        [
            "# Benchmarks",
            _INTRODUCTION.format(rounds="1 round" if rounds == 1 else f"{rounds} rounds"),
            *_table(results),
            "",
            "## How it is measured",
            _METHOD,
            "## Where the time goes",
            _PROFILE,
            "## Where a worker's time goes",
            _RUNTIME_PROFILE,
            "## What was measured",
            "",
            *_describe(environment),
            "",
        ]
    )


def long_page(results: Mapping[str, Result], environment: Environment) -> str:
    """Write the page of what is measured by its name alone."""
    return "\n".join(
        ["# Long benchmarks", _LONG_INTRODUCTION, *_table(results), "", *_describe(environment), ""]
    )


def _table(results: Mapping[str, Result]) -> list[str]:
    return [
        "| workload | figure | ratio | required | aim | met? |",
        "|---|---|---|---|---|---|",
        *(line(row) for result in results.values() for row in result.rows),
    ]


def raw_figures(
    results: Mapping[str, Result], environment: Environment, rounds: int
) -> dict[str, Any]:
    """Return everything that was measured, for programs."""
    return {
        **asdict(environment),
        "rounds": rounds,
        "workloads": {
            name: {
                "rows": [{**asdict(row), "met": row.met} for row in result.rows],
                "figures": result.figures,
            }
            for name, result in results.items()
        },
    }


def _describe(environment: Environment) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    text = (
        f"Commit {environment.commit}, Python {environment.python} on {environment.machine}; "
        f"{versions}. Command: `{environment.command}`."
    )
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_PROJECT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
