"""Whatever is done to what stands in clear in the rows of runs: `verify` names it.

Each case changes one column behind agentflow's back, verifies, and puts it back. Payloads, which
are bound to their rows, are in `test_fuzz`.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow import AgentFlow
from agentflow.database.tables import (
    anchors,
    checkpoints,
    effects,
    fingerprints,
    leases,
    metadata,
    object_space,
    objects,
    pauses,
    runs,
    threads,
    values,
    waits,
    workers,
    writes,
)
from agentflow.storage import RowDamage
from agentflow.storage.marks import agree, mark
from tests.fault.conftest import Sampler, Tally
from tests.fault.test_fuzz import Rows, Tables, copy_column, extend, flip, swap_column, truncate
from tests.integration.sealed import fill, open_app, ring

_ALL_ROUNDS = 50
"""How often each column is changed in each way; without `make chaos` in one way and once."""
_OF_CHECKPOINTS = {threads, checkpoints, values, writes, anchors, objects, object_space}
_TRIES = 5
"""Some changes change nothing, or nothing that the database takes."""

NOT_COMPARED = {
    runs.c.seq: "the order in which runs are listed, and taken of one thread",
    waits.c.seq: "the order in which they are listed",
    effects.c.seq: "the order in which they are listed, and what an object is kept for",
    runs.c.claimed_at: "how long a suspect is isolated",
    runs.c.rollback: "whether checkpoints of the run are deleted before the next one of its thread",
    runs.c.is_isolated: "whether its worker claims nothing else meanwhile",
    runs.c.pardoned: "when it is isolated again",
    runs.c.lease_expires_at: "when it is taken for lost; whoever held it is fenced then",
    runs.c.token: "whoever holds the run loses it; that it was lowered below its claim is found",
    fingerprints.c.graph: "with which runs it is exported",
    fingerprints.c.at: "is only told",
    **dict.fromkeys(leases.c, "the next token is higher still; that one was lowered is found"),
    **dict.fromkeys(workers.c, "what a worker says of itself until it does so again"),
}
"""What may be changed without being found, and all that it does then.

Of those with a lease, and of tokens, what would let somebody else write is found: see below.
"""
COMPARED = [
    column
    for table in metadata.sorted_tables
    if table not in _OF_CHECKPOINTS
    for column in table.c
    if column not in NOT_COMPARED
]
"""Every other column, payloads too; one that is new is among them."""

Change = Callable[[random.Random, Rows, str], tuple[Rows, Rows]]


async def fill_rows(app: AgentFlow) -> None:
    """Leave something in every table, and each kind of run."""
    await fill(app)
    await app.submit("fail", {}, run_id="failed-2")
    await app.drive("failed-2")
    timeouts: dict[str, Any] = {"timeout": 3600, "start_timeout": 1800}
    await app.submit("refund", {}, run_id="timed", priority=3, by="ann", **timeouts)
    await app.submit("refund", {}, run_id="rolled", thread_id="shared")
    await app.submit("refund", {}, run_id="after", thread_id="shared", on_busy="rollback")
    head = await app.state("decided")
    before = head.parent_config or {}
    place = before["configurable"]["checkpoint_id"]
    await app.fork("decided", place, new_run_id="forked")
    await app.pause_run("forked")
    (version,) = [version for name, version in app.graphs if name == "refund"]
    await app.route("refund", version, 0.5, by="ann")
    await app.restore(by="ann")
    await app.resume_restored()
    claim = app._store.claim_run("", "timed", worker="w", lease=timedelta(hours=1))
    assert await claim is not None


async def damages(app: AgentFlow) -> list[RowDamage]:
    found = app._store.find_damages()
    return [damage async for verified in found for damage in verified.damages]


def mutate(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    row = dice.choice(rows)
    ways = (flip, truncate, extend) if isinstance(row[column], (bytes, str)) else (flip,)
    return [row], [{**row, column: dice.choice(ways)(dice, row[column])}]


def toggle(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    """Change a truth: any number but 0 is read as the same one."""
    row = dice.choice(rows)
    return [row], [
        {**row, column: dice.choice({0: (1, None), 1: (0, None)}.get(row[column], (1,)))}
    ]


def empty(dice: random.Random, rows: Rows, column: str) -> tuple[Rows, Rows]:
    row = dice.choice(rows)
    return [row], [{**row, column: None}]


def is_quick(column: sa.Column[Any]) -> bool:
    """Whether a column is changed without `make chaos` too: `test_verify_runs` has all payloads."""
    return column.nullable or not isinstance(column.type, sa.LargeBinary)


def changes_of(column: sa.Column[Any], rows: Rows) -> list[Change]:
    if isinstance(column.type, sa.Boolean):
        return [toggle]
    several: list[Change] = [swap_column, copy_column] if len(rows) > 1 else []
    return [mutate, empty, *several]


@pytest.mark.timeout(3600)
async def test_changed_columns_are_found(tmp_path: Path, sampler: Sampler, tally: Tally) -> None:
    path = tmp_path / "fuzzed.db"
    dice, found = sampler.dice(), Counter[str]()
    columns = COMPARED * _ALL_ROUNDS if sampler.is_full else [*filter(is_quick, COMPARED)]
    async with open_app(f"sqlite:///{path}", ring("one") if sampler.is_full else None) as app:
        await fill_rows(app)
        assert await damages(app) == []
        stored = Tables(path)
        with closing(stored.connection):
            for column in columns:
                table = column.table.name.removeprefix("agentflow_")
                rows = stored.rows(table)
                changes = changes_of(column, rows)
                for change in dice.sample(changes * _TRIES, len(changes) * _TRIES):
                    before, after = change(dice, rows, column.name)
                    if before == after:
                        continue
                    try:
                        with stored.changed(table, before, after):
                            assert await damages(app), (change.__name__, column, before, after)
                    except sqlite3.IntegrityError:
                        stored.connection.execute("ROLLBACK")  # the database refuses it
                        continue
                    found[str(column)] += 1
                    if not sampler.is_full:
                        break
        assert await damages(app) == []
    assert {str(column) for column in columns} == set(found), "all were changed"
    tally(found=found.total())


async def test_what_would_let_somebody_else_write_is_found(tmp_path: Path) -> None:
    path = tmp_path / "fuzzed.db"
    async with open_app(f"sqlite:///{path}", None) as app:
        await fill_rows(app)
        stored = Tables(path)
        with closing(stored.connection):
            (held,) = [row for row in stored.rows("runs") if row["run_id"] == "timed"]
            (queued,) = [row for row in stored.rows("runs") if row["run_id"] == "forked"]
            (lease,) = [row for row in stored.rows("leases") if row["thread_id"] == "timed"]
            for table, row, change in (
                ("runs", held, {"token": held["token"] - 1}),
                ("runs", held, {"token": None}),
                ("runs", held, {"lease_expires_at": None}),
                ("runs", queued, {"lease_expires_at": held["lease_expires_at"]}),
                ("leases", lease, {"token": lease["token"] - 1}),
                ("leases", lease, {"thread_id": "another"}),
                ("leases", lease, {"tenant": "another"}),
            ):
                with stored.changed(table, [row], [{**row, **change}]):
                    assert len(await damages(app)) == 1, change
        assert await damages(app) == []


def test_form_of_marks_does_not_change() -> None:
    """What is stored was made of it; a column that is empty does not count."""
    row = {
        "tenant": "acme",
        "scope": "queue",
        "name": "default",
        "at": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        "paused_by": None,
        "reason": b"sealed",
    }
    found = mark(pauses, row)
    assert found.hex() == "afb0c199095d5038b31894573a8a8dfdcfa07a4d"
    changed = mark(pauses, {**row, "name": "other"})
    assert agree(found, found)
    assert not agree(changed, found)
    assert agree(b"1234" + changed[4:], found), "it covers other columns"
    assert mark(pauses, {**row, "reason": b"sealed anew"}) == mark(pauses, row)
    assert mark(pauses, {**row, "reason": None}) != mark(pauses, row)
