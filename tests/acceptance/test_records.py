"""What is on record of a run: all of it, in order, for every process, and never changed."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple

from agentflow import AgentFlow
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.records import Place, hash_of, unpack_record
from agentflow.checkpoint.rows import CheckpointRow
from agentflow.codec import Codec
from agentflow.database.tables import checkpoints, events, values
from agentflow.errors import ConflictError
from agentflow.testing.savers.calls import id_of, load, put
from agentflow.types import RunStatus
from tests.acceptance.victims import ASK, NODES, done, interview, on, steps
from tests.fault.forkserver import ForkServer
from tests.fault.scene import connected, read_rows, read_thread_rows
from tests.integration.cli import fresh_cli
from tests.integration.graphs import chain, logs

ENGINE = {"__input__", "__start__", "__interrupt__"}
"""What LangGraph sees to besides nodes."""


async def test_checkpoint_holds_step_state_question_and_history_for_another_process(
    database_url: str, tmp_path: Path, forkserver: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = str(tmp_path / "trace.txt")
    victim = forkserver.spawn(ASK, database_url, trace, "r")
    assert await asyncio.to_thread(victim.wait) == -signal.SIGKILL, victim.output()

    cli = fresh_cli(database_url, monkeypatch)
    shown = await asyncio.to_thread(cli.data, "checkpoint", "show", "r")
    assert shown.keys() == {
        *("thread_id", "ns", "checkpoint_id", "parent_id", "step", "source", "run_id"),
        *("created_at", "values", "versions", "metadata", "writes"),
    }
    assert (shown["step"], shown["run_id"], shown["values"]["log"]) == (1, "r", ["a"])
    (asked,) = shown["writes"]
    assert asked["channel"] == "__interrupt__"
    assert asked["value"][0]["value"]["proposal"] == {"amount": 5}

    history = await asyncio.to_thread(cli.data, "checkpoint", "list", "--thread", "r")
    assert [each["step"] for each in history] == [1, 0, -1]
    assert [each["parent_id"] for each in history] == [
        *(each["checkpoint_id"] for each in history[1:]),
        None,
    ]

    async with AgentFlow(database_url) as app:
        app.register(interview(trace), name="interview")
        run = await app.get_run("r")
        assert (run.status, run.step, run.checkpoint_id) == (
            RunStatus.WAITING,
            1,
            shown["checkpoint_id"],
        )
        (approval,) = await app.handle("r").approvals()
        assert approval.checkpoint_id == shown["checkpoint_id"]
        assert approval.request.proposal == {"amount": 5}
        told = [each.type for each in await app.list_events("r")]
        assert told[:3] == ["run.submitted", "run.claimed", "run.started"]
        await app.approvals.decide(approval.id, "approve", by="ada")
        assert (await app.drive("r")).output["log"] == ["a", {"amount": 5}, "c"]
    assert done(trace) == ["a", "c"], "and what had been done was not done again"


def test_record_names_run_step_nodes_that_are_done_state_checkpoint_and_time(
    database_url: str, tmp_path: Path
) -> None:
    began = datetime.now(UTC)
    with open_checkpointer(database_url) as saver:
        graph = steps(saver, str(tmp_path / "trace.txt"))
        graph.invoke({"log": []}, on("t"), durability="sync")
        found = list(saver.list(on("t")))[::-1]
        (snapshot,) = [each for each in graph.get_state_history(on("t")) if each.next == ("d",)]
    for taken, each in enumerate(found[1:]):
        assert each.config["configurable"]["thread_id"] == "t"
        assert each.metadata["run_id"] == "run-t"
        assert each.metadata["step"] == taken
        assert each.checkpoint["versions_seen"].keys() - ENGINE == set(NODES[:taken])
        assert each.checkpoint["channel_values"].get("log", []) == list(NODES[:taken])
        assert id_of(each) == each.config["configurable"]["checkpoint_id"]
    assert len({id_of(each) for each in found}) == len(found) == len(NODES) + 2
    assert began <= times(found)[0] <= times(found)[-1] <= datetime.now(UTC)
    assert snapshot.created_at == found[4].checkpoint["ts"], "LangGraph's own view of it"
    assert snapshot.values == {"log": list("abc")}


def times(found: list[CheckpointTuple]) -> list[datetime]:
    """Return when checkpoints were made: texts in ISO 8601, in UTC, in their order."""
    made = [datetime.fromisoformat(each.checkpoint["ts"]) for each in found]
    assert {each.utcoffset() for each in made} == {timedelta(0)}
    assert made == sorted(made)
    return made


async def test_versions_count_one_up_with_each_commit_and_no_other_is_taken(
    database_url: str, tmp_path: Path
) -> None:
    trace = str(tmp_path / "trace.txt")
    with open_checkpointer(database_url) as saver, open_checkpointer(database_url) as other:
        steps(saver, trace).invoke({"log": []}, on("t"), durability="sync")
        here, there = (load(each).config for each in (saver, other))
        assert versions(saver) == list(range(-1, 7))
        put(saver, "seventh", here, metadata={"step": 7})
        # The same one from somebody who has seen the same; and one that leaves others out.
        with pytest.raises(ConflictError):
            put(other, "seventh again", there, metadata={"step": 7})
        with pytest.raises(ConflictError):
            put(other, "ninth", "eighth", metadata={"step": 9})
        assert id_of(load(other)) == "seventh"
        assert versions(other) == list(range(-1, 8))
    async with AgentFlow(database_url) as app:
        app.register(interview(trace), name="interview")
        await app.submit("interview", {"log": []}, run_id="r")
        await app.drive("r")
        told = [each.seq for each in await app.list_events("r")]
    assert told == list(range(1, len(told) + 1)), "of what happened to a run, likewise"
    again = sa.insert(events).from_select(list(events.c.keys()), sa.select(events))
    with connected(database_url) as connection, pytest.raises(sa.exc.IntegrityError):
        connection.execute(again)


def versions(saver: Saver) -> list[int]:
    """Return the numbers of the steps of a thread, the oldest first."""
    return [each.metadata["step"] for each in saver.list(on("t"))][::-1]


def test_history_is_of_step_time_and_hash_and_cannot_be_changed(
    database_url: str, tmp_path: Path
) -> None:
    with open_checkpointer(database_url) as saver:
        steps(saver, str(tmp_path / "trace.txt")).invoke({"log": []}, on("t"), durability="sync")
        before = list(saver.list(on("t")))[::-1]
    rows = stored(database_url)
    times(before)

    previous = None
    for row, each in zip(rows, before, strict=True):
        place = Place("", "t", "")
        record = unpack_record(Codec(), row, place)
        covered = hash_of(Codec(), place, row, record.head, record.layout, previous)
        assert hashlib.sha256(covered).digest() == row.hash
        assert (row.step, record.parent_hash) == (each.metadata["step"], previous)
        previous = row.hash

    with open_checkpointer(database_url) as other:
        for each in before:
            # Under its own name, on the one before it, with something else in it.
            parent = each.parent_config or on("t")
            forged: Any = {**each.checkpoint, "channel_values": {"log": ["forged"]}}
            with pytest.raises(ConflictError):
                other.put(parent, forged, each.metadata, each.checkpoint["channel_versions"])
    assert stored(database_url) == rows

    with connected(database_url) as connection:
        changed = sa.update(checkpoints).where(checkpoints.c.step == 3).values(step=4)
        assert connection.execute(changed).rowcount == 1
        connection.commit()
    assert asyncio.run(damages(database_url)) == {("HashMismatchError", id_of(before[4]))}


def test_compression_keeps_values_and_what_was_stored_without_it_is_still_read(
    database_url: str,
) -> None:
    text = "".join(f"{number} bottles of beer on the wall. " for number in range(300))
    with open_checkpointer(database_url, compress=False) as plain:
        assert talk(plain, "plain", text) == [text, "b"]
    with open_checkpointer(database_url) as saver:
        assert talk(saver, "small", text) == [text, "b"]
        for thread in ("plain", "small"):
            found = list(saver.list({"configurable": {"thread_id": thread}}))
            logged = [each.checkpoint["channel_values"].get("log", []) for each in found]
            assert logged == [[text, "b"], [text], []], thread
        assert talk(saver, "plain", "more") == [text, "b", "more", "b"]
    assert 5 * size(database_url, "small") < size(database_url, "plain")


def talk(saver: Saver, thread: str, text: str) -> list[str]:
    """Add a text to the log of a thread, and what its one node says to it."""
    graph = chain(("b", logs("b"))).compile(checkpointer=saver)
    place: RunnableConfig = {"configurable": {"thread_id": thread}}
    log: list[str] = graph.invoke({"log": [text]}, place, durability="sync")["log"]
    return log


def size(url: str, thread: str) -> int:
    """Return how many bytes the values of a thread take."""
    return sum(len(row.data) for row in read_thread_rows(url, values, [thread]))


def stored(url: str) -> list[CheckpointRow]:
    """Return all that is stored of checkpoints, past agentflow."""
    found = [CheckpointRow._make(row) for row in read_rows(url, checkpoints)]
    return sorted(found, key=lambda row: row.seq)


async def damages(url: str) -> set[tuple[str, str | None]]:
    """Return what verification finds."""
    async with open_checkpointer(url) as saver:
        return {
            (each.error, each.checkpoint_id)
            async for audited in saver.verify(tenant=None, thread_id=None)
            for each in audited.damages
        }
