"""A process killed while it writes checkpoints: what was acknowledged is there, and goes on.

The moments are random: a number of acknowledgements, and a little later. A call that was under way
then has become durable whole or not at all; one that was acknowledged before is there.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START

from agentflow.checkpoint import open_checkpointer
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer, Victim
from tests.fault.savers import (
    GRAPHS,
    STAYING_WRITERS,
    TASKS,
    Books,
    Fact,
    Reports,
    assert_kept,
    at,
    awrite_all,
    rounds,
    write,
)
from tests.servers import PostgresServer

Execution = tuple[str, int]
"""A node, and the superstep in which it was executed."""

KILLS = (12, 200)
"""In a sample, and in a full run."""
GRAPH_KILLS = (3, 50)
CREATION_KILLS = (3, 40)
POSITIONS = (6, 50)
"""Different numbers of acknowledgements that are reached, at the least."""
IN_THE_MIDDLE = 0.9
"""The share of kills between the first acknowledgement and the last, at the least."""
THREADS = 6
STEPS = 12
REPORTS = THREADS * (STEPS * (1 + len(TASKS)) - len(TASKS))
"""Of a process that nobody kills, at the least: it leaves the last step's writes to the next."""
LIVES = 3
"""Processes that are killed over the same threads, each of which goes on where they are."""
ROUNDS = 4
GRAPH_REPORTS = THREADS * ROUNDS * 3 * 2
MOMENT = 0.003
"""Seconds after a report, at most: about as long as a commit takes."""
PATIENCE = 30.0


def test_writer_killed_at_any_moment_loses_nothing_acknowledged(
    database_url: str, forkserver: ForkServer, tmp_path: Path, sampler: Sampler, tally: Tally
) -> None:
    dice, books = sampler.dice(), Books()
    positions: list[int] = []
    ahead = 0
    for kill in range(KILLS[sampler.is_full]):
        threads = [f"{kill // LIVES}-{number}" for number in range(THREADS)]
        spawn = partial(forkserver.spawn, STAYING_WRITERS, database_url)
        facts = killed(spawn, tmp_path / f"pipe-{kill}", threads, STEPS, REPORTS, dice)
        positions.append(len(facts))
        books.add_all(facts)
        wait_until_alone(database_url)
        with open_checkpointer(database_url) as saver:
            ahead += sum(assert_kept(saver, thread, books[thread]) for thread in threads)
            asyncio.run(awrite_all(saver, threads, 1, books.add))
            for thread in threads:
                head = saver.get_tuple(at(thread))
                assert head is not None
                assert head.metadata["step"] == books[thread].step
                assert head.checkpoint["id"] in books[thread].puts
    between = sum(0 < position < REPORTS for position in positions)
    assert between >= IN_THE_MIDDLE * len(positions), sorted(positions)
    assert len(set(positions)) >= POSITIONS[sampler.is_full], sorted(positions)
    tally(
        kills=len(positions),
        kills_in_the_middle=between,
        distinct_positions=len(set(positions)),
        acknowledged=sum(positions),
        durable_before_acknowledged=ahead,
    )


def test_graph_killed_at_any_moment_ends_as_its_twin(
    database_url: str, forkserver: ForkServer, tmp_path: Path, sampler: Sampler, tally: Tally
) -> None:
    """And no node is executed again whose writes were durable."""
    dice, kills = sampler.dice(), GRAPH_KILLS[sampler.is_full]
    twin = asyncio.run(run_to_the_end(InMemorySaver(), "twin"))
    assert len(twin.executed) == 3 * ROUNDS
    executed_again = 0
    for kill in range(kills):
        threads = [f"{kill}-{number}" for number in range(THREADS)]
        spawn = partial(forkserver.spawn, GRAPHS, database_url)
        facts = killed(spawn, tmp_path / f"pipe-{kill}", threads, ROUNDS, GRAPH_REPORTS, dice)
        wait_until_alone(database_url)
        with open_checkpointer(database_url) as saver:
            for thread in threads:
                ended = asyncio.run(run_to_the_end(saver, thread))
                assert (ended.output, ended.history) == (twin.output, twin.history)
                assert ended.executed == twin.executed - ended.durable
                begun = executions(fact for fact in facts if fact["thread"] == thread)
                assert ended.durable <= begun
                executed_again += len(begun & ended.executed)
    tally(kills=kills, executed_again=executed_again)


def test_writer_killed_while_it_makes_the_tables_leaves_a_usable_database(
    database_url: str,
    forkserver: ForkServer,
    tmp_path: Path,
    sampler: Sampler,
    tally: Tally,
    request: pytest.FixtureRequest,
) -> None:
    dice, kills = sampler.dice(), CREATION_KILLS[sampler.is_full]
    took = 0.0
    before_first = 0
    for kill in range(-1, kills):
        with (
            empty_database(request, database_url, kill) as url,
            Reports(tmp_path / f"pipe-{kill}") as reports,
        ):
            victim = forkserver.spawn(STAYING_WRITERS, url, reports.path, ["t", "u"], 1)
            reports.wait_for(1, victim)
            if kill < 0:  # the first one shows how long it takes
                began = time.monotonic()
                reports.wait_for(2, victim)
                took = time.monotonic() - began
            # The moment itself, not a synchronisation; at once for the second one.
            time.sleep(dice.uniform(0, took) if kill > 0 else 0)
            victim.kill()
            assert victim.wait() == -signal.SIGKILL, victim.output()
            _, *facts = reports.take()
            before_first += not facts
            wait_until_alone(url)
            assert_usable(url, facts)
    assert before_first > 0, "nobody was killed while the tables were made"
    tally(kills=kills + 1, kills_before_the_first_acknowledgement=before_first)


def assert_usable(url: str, facts: Iterable[Fact]) -> None:
    """Hold a database against what was acknowledged, and write to it."""
    books = Books()
    books.add_all(facts)
    with open_checkpointer(url) as saver:
        for thread in ("t", "u"):
            assert_kept(saver, thread, books[thread])
            write(saver, thread, 2, books.add)
            assert_kept(saver, thread, books[thread])


def killed(
    spawn: Callable[..., Victim],
    pipe: Path,
    threads: list[str],
    length: int,
    reports_in_all: int,
    dice: random.Random,
) -> list[Fact]:
    """Kill a process at some moment of its work, and return what it has reported."""
    with Reports(pipe) as reports:
        victim = spawn(reports.path, threads, length)
        # Early enough that even a machine that is busy kills before the work is done.
        reports.wait_for(1 + dice.randint(1, int(0.85 * reports_in_all)), victim)
        time.sleep(dice.uniform(0, MOMENT))  # the moment itself, not a synchronisation
        victim.kill()
        assert victim.wait() == -signal.SIGKILL, victim.output()
        began, *facts = reports.take()
        assert began == {"began": True}
        return facts


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a graph ended, and what that took."""

    output: Any
    history: list[Any]
    durable: set[Execution]
    """What had been executed and saved before."""
    executed: set[Execution]
    """What was executed to get there."""


async def run_to_the_end(saver: BaseCheckpointSaver[Any], thread: str) -> Ended:
    """Run the graph of `rounds`, from its beginning or from where the thread is."""
    facts: list[Fact] = []
    graph = rounds(lambda **fact: facts.append(fact)).compile(checkpointer=saver)
    durable = {
        (task.name, state.metadata["step"] + 1)
        async for state in graph.aget_state_history(at(thread))
        for task in state.tasks
        if task.result is not None and state.metadata and task.name != START
    }
    has_begun = await saver.aget_tuple(at(thread)) is not None
    given = None if has_begun else {"wanted": ROUNDS}
    output = await graph.ainvoke(given, at(thread), durability="sync")
    history = [
        (state.values, state.next, state.metadata["source"], state.metadata["step"])
        async for state in graph.aget_state_history(at(thread))
        if state.metadata
    ]
    executed = executions(facts)
    assert len(facts) == 2 * len(executed), "a node was executed twice"
    return Ended(output=output, history=history, durable=durable, executed=executed)


def executions(facts: Iterable[Fact]) -> set[Execution]:
    """Return which nodes began in which steps."""
    return {(fact["enter"], fact["step"]) for fact in facts if "enter" in fact}


@contextmanager
def empty_database(request: pytest.FixtureRequest, url: str, number: int) -> Iterator[str]:
    """Make a database beside that of `url`, without tables."""
    if url.startswith("sqlite"):
        yield f"{url}-{number + 1}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_database()
    yield server.url(name)
    server.drop_database(name)


def wait_until_alone(url: str) -> None:
    """Wait until the server has noticed that its clients are dead.

    What it was doing for them may still become durable, which would be a race with what follows.
    """
    if url.startswith("sqlite"):
        return
    others = (
        "SELECT 1 FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + PATIENCE
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute(others).fetchone() is not None:
            assert time.monotonic() < deadline, "the server still serves the dead"
            time.sleep(0.002)
