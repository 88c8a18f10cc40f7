"""The run store: who may drive which run, on each database."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agentflow.database.engine import parse_url
from agentflow.database.tables import events, runs
from agentflow.errors import HashMismatchError, LeaseLostError, PausedError, ThreadBusyError
from agentflow.keys import KeyRing
from agentflow.storage import RunStore
from agentflow.types import RunStatus
from tests.conformance.runs import (
    EXPIRED,
    FAILURE,
    LEASE,
    claim,
    claim_all,
    create,
    finish,
    open_store,
    park,
    question,
    running,
    spec,
    types_of_events,
)

Q, R, W, F = RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING, RunStatus.FAILED


async def test_order_is_that_of_all_queues_together(store: RunStore) -> None:
    for name, priority in (("a1", 0), ("b2", 5), ("a3", 5), ("b4", 0), ("a5", 0), ("b6", 9)):
        queue = {"a": "default", "b": "mail"}[name[0]]
        await create(store, name, priority=priority, queue=queue)
    queues = ["mail", "default", "none"]
    first, then = (
        await claim_all(store, limit=3, queues=queues),
        await claim_all(store, queues=queues),
    )
    assert [c.run.id for c in first] == ["b6", "b2", "a3"]
    assert [c.run.id for c in then] == ["a1", "b4", "a5"]


async def test_higher_priority_is_claimed_first_then_the_older(store: RunStore) -> None:
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)):
        await create(store, name, priority=priority)
    assert [c.run.id for c in await claim_all(store, limit=3)] == ["b", "d", "a"]
    assert [c.run.id for c in await claim_all(store)] == ["c", "e"]


async def test_only_runs_that_are_due_are_claimed(store: RunStore) -> None:
    await create(store, "later", start_at=datetime.now(UTC) + timedelta(hours=1))
    await create(store, "elsewhere", queue="slow")
    await create(store, "unknown", graph="h")
    await create(store, "old version", version="0")
    assert await claim_all(store) == []
    assert await claim_all(store, queues=[]) == []
    assert await claim_all(store, graphs=[]) == []
    assert await claim_all(store, limit=0) == []
    assert await store.claim_run("", "later", worker="w", lease=LEASE) is None
    (slow,) = await claim_all(store, queues=["slow", "default"])
    assert slow.run.id == "elsewhere"
    (old,) = await claim_all(store, graphs=[("g", "0"), ("g", "1")])
    assert old.run.id == "old version"


async def test_runs_of_a_thread_go_one_by_one_in_order(store: RunStore) -> None:
    for name, priority in (("a", 0), ("b", 9), ("c", 0)):
        await create(store, name, thread_id="t", priority=priority)
    order = []
    while claimed := await claim_all(store):
        assert len(claimed) == 1
        order.append(claimed[0].run.id)
        assert await claim_all(store) == []
        with pytest.raises(ThreadBusyError):
            await claim(store, "c")
        await finish(store, claimed[0].lease)
    assert order == ["a", "b", "c"]


@pytest.mark.parametrize("status", [W, Q])
async def test_unfinished_run_holds_the_later_ones_of_its_thread(
    store: RunStore, status: RunStatus
) -> None:
    lease = await running(store, "r")
    await create(store, "next", thread_id="r")
    if status is W:
        await park(store, lease, question())
    else:
        await store.retry_run(
            lease, FAILURE, delay=timedelta(hours=1), failures={}, checkpoint_id=None, step=None
        )
    assert await claim_all(store) == []
    with pytest.raises(ThreadBusyError):
        await claim(store, "next")
    await store.cancel_run("", "r", reason=None, by=None)
    assert [c.run.id for c in await claim_all(store)] == ["next"]


async def test_requeued_run_waits_for_the_one_that_holds_its_thread(store: RunStore) -> None:
    lease = await running(store, "old")
    await store.fail_run(lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None)
    newer = await running(store, "new", thread_id="old")
    await store.create_run("", spec("old"), on_existing="restart_if_failed")
    assert await claim_all(store) == []
    await park(store, newer, question())
    assert await claim_all(store) == []
    with pytest.raises(ThreadBusyError):
        await claim(store, "old")


async def test_tokens_of_a_thread_only_grow(store: RunStore) -> None:
    first = await running(store, "a", thread_id="t")
    await store.release_run(first, reason="drain", counts=False)
    second = await claim(store, "a")
    await finish(store, second)
    third = await running(store, "b", thread_id="t")
    raised = await store.raise_token(third, above=type(third.token)(40))
    assert first.token < second.token < third.token < 41 <= raised.token
    with pytest.raises(LeaseLostError):
        await finish(store, third)
    await finish(store, raised)
    again = await running(store, "c", thread_id="t")
    assert again.token > raised.token


@pytest.mark.slow
async def test_no_run_is_given_to_two_of_many_claimers(store: RunStore, database_url: str) -> None:
    total = 60
    for i in range(total):
        # Three runs to a thread, so that claims also compete for threads.
        await create(store, f"r{i}", thread_id=f"t{i // 3}")
    others = [open_store(database_url) for _ in range(4)]
    taken: list[str] = []
    held: set[str] = set()

    async def work(worker: RunStore) -> None:
        while len(taken) < total:
            for claimed in await claim_all(worker, limit=3):
                assert claimed.run.thread_id not in held
                held.add(claimed.run.thread_id)
                taken.append(claimed.run.id)
                await asyncio.sleep(0)
                held.discard(claimed.run.thread_id)
                await finish(worker, claimed.lease)

    await asyncio.gather(*(work(other) for other in others))
    assert sorted(taken) == sorted(f"r{i}" for i in range(total))
    for other in others:
        await other.close()


async def test_expired_run_is_recovered_and_its_old_holder_is_locked_out(store: RunStore) -> None:
    await create(store, "r")
    stale = await claim(store, "r", lease=EXPIRED)
    (claimed,) = await claim_all(store)
    assert claimed.reason == "recovery"
    assert (claimed.run.attempt, claimed.run.claims) == (2, 2)
    assert claimed.lease.token > stale.token
    for call in (
        finish(store, stale),
        store.raise_token(stale, above=stale.token),
        store.start_attempt(
            stale, progress="", reason="start", checkpoint_id=None, step=None, traceparent=None
        ),
    ):
        with pytest.raises(LeaseLostError):
            await call
    assert await types_of_events(store, "r") == [
        "run.submitted",
        "run.claimed",
        "run.recovered",
        "run.claimed",
    ]
    await finish(store, claimed.lease)


async def test_expired_lease_is_lost_although_nobody_took_over(store: RunStore) -> None:
    await create(store, "r")
    stale = await claim(store, "r", lease=EXPIRED)
    assert (await store.extend_leases([stale], LEASE))["r"].lost
    with pytest.raises(LeaseLostError):
        await finish(store, stale)
    assert (await claim(store, "r")).token > stale.token


async def test_heartbeat_extends_what_holds_and_reports_on_each(store: RunStore) -> None:
    kept, gone = await running(store, "kept"), await running(store, "gone")
    await store.release_run(gone, reason="drain", counts=False)
    await store.cancel_run("", "kept", reason="enough", by="ada")
    report = await store.extend_leases([kept, gone], LEASE)
    assert (report["kept"].lost, report["kept"].cancel_requested) == (False, True)
    assert (report["gone"].lost, report["gone"].cancel_requested) == (True, False)
    assert await store.extend_leases([], LEASE) == {}
    # An extension into the past ends the lease: it does set the time.
    await store.extend_leases([kept], EXPIRED)
    assert (await store.extend_leases([kept], LEASE))["kept"].lost


async def test_attempts_start_anew_with_progress_and_are_counted_without(store: RunStore) -> None:
    await create(store, "r")

    async def attempt(progress: str, checkpoint_id: str = "c1") -> tuple[int, dict[str, int]]:
        (claimed,) = await claim_all(store)
        started = await store.start_attempt(
            claimed.lease,
            progress=progress,
            reason=claimed.reason,
            checkpoint_id=checkpoint_id,
            step=1,
            traceparent=None,
        )
        await store.retry_run(
            claimed.lease,
            FAILURE,
            delay=timedelta(0),
            failures={"t": started.attempt},
            checkpoint_id=checkpoint_id,
            step=None,
        )
        return started.attempt, dict(started.failures)

    assert await attempt("p1") == (1, {})
    assert await attempt("p1") == (2, {"t": 1})
    assert await attempt("p1") == (3, {"t": 2})
    assert await attempt("p2") == (1, {"t": 3}), "progress within the superstep keeps failures"
    assert await attempt("p3", "c2") == (1, {})
    assert (await store.get_run("", "r")).claims == 5


async def test_beginning_of_an_attempt_is_noted_with_reason_and_checkpoint(store: RunStore) -> None:
    await create(store, "r")
    lease = await claim(store, "r")
    facts: dict[str, Any] = {"progress": "p", "checkpoint_id": "c5", "step": 5, "traceparent": None}
    await store.start_attempt(lease, reason="start", **facts)
    await store.release_run(lease, reason="drain", counts=False)
    (claimed,) = await claim_all(store)
    assert claimed.reason == "drain"
    assert claimed.run.attempt == 1, "a clean release clears the attempts"
    await store.start_attempt(claimed.lease, reason=claimed.reason, **facts)
    log = {e.type: e.data for e in await store.list_events("", "r", after=0, limit=99)}
    assert log["run.started"]["checkpoint"] == "c5"
    assert (log["run.resumed"]["reason"], log["run.resumed"]["checkpoint"]) == ("drain", "c5")
    assert log["run.released"]["reason"] == "drain"
    run = await store.get_run("", "r")
    assert (run.checkpoint_id, run.step) == ("c5", 5)


async def test_run_whose_classes_are_not_known_here_is_left_to_others(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_elsewhere.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Ticket:\n    x: int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_elsewhere")
    await create(store, "strange", input={"t": module.Ticket(1)}, priority=9)
    await create(store, "plain")
    monkeypatch.delitem(sys.modules, "only_elsewhere")
    assert [c.run.id for c in await claim_all(store)] == ["plain"]
    assert (await store.get_run("", "strange")).status is Q
    monkeypatch.setitem(sys.modules, "only_elsewhere", module)
    (claimed,) = await claim_all(store)
    assert claimed.run.input == {"t": module.Ticket(1)}


@pytest.fixture
def change(database_url: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Changes a run behind the store's back, and returns what stood there."""
    engine = sa.create_engine(parse_url(database_url))

    def put(run_id: str, **columns: Any) -> dict[str, Any]:
        is_it = runs.c.run_id == run_id
        named = [runs.c[name] for name in columns]
        with engine.begin() as connection:
            before = connection.execute(sa.select(*named).where(is_it)).mappings().one()
            connection.execute(sa.update(runs).where(is_it).values(columns))
        return dict(before)

    yield put
    engine.dispose()


async def test_run_with_a_damaged_input_is_paused_and_does_not_block_the_others(
    store: RunStore, change: Callable[..., dict[str, Any]]
) -> None:
    await create(store, "damaged", priority=9)
    await create(store, "whole")
    whole = change("damaged", input=b"\x01\x00\x01\x00junk")
    assert [c.run.id for c in await claim_all(store)] == ["whole"]
    log = ["run.submitted", "run.unreadable", "run.paused"]
    assert await types_of_events(store, "damaged") == log
    assert await claim_all(store) == []
    with pytest.raises(PausedError):
        await store.claim_run("", "damaged", worker="w", lease=LEASE)
    with pytest.raises(HashMismatchError, match=r"runs\.input"):
        await store.get_run("", "damaged")
    with pytest.raises(HashMismatchError, match=r"runs\.input"):
        await store.resume_run("", "damaged", by=None)
    assert await types_of_events(store, "damaged") == log
    change("damaged", **whole)
    await store.resume_run("", "damaged", by=None)
    assert [c.run.id for c in await claim_all(store)] == ["damaged"]


@pytest.mark.parametrize(
    "changed",
    [
        {"thread_id": "another"},
        {"attempt": 4},
        {"root": "another"},
        {"event_seq": 0},
        {"event_hash": "0" * 64},
        {"available_at": datetime(2020, 1, 1, tzinfo=UTC)},
    ],
    ids=lambda changed: next(iter(changed)),
)
async def test_run_that_is_not_what_its_events_say_is_not_driven(
    store: RunStore,
    change: Callable[..., dict[str, Any]],
    changed: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await create(store, "damaged", priority=9, timeout=timedelta(hours=1))
    await create(store, "whole")
    whole = change("damaged", **changed)
    assert [c.run.id for c in await claim_all(store)] == ["whole"]
    (told,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert (told.__dict__["run_id"], told.__dict__["error"]) == ("damaged", "HashMismatchError")
    assert await types_of_events(store, "damaged") == ["run.submitted"], "it is not confirmed"
    assert any([bool(each.damages) async for each in store.find_damages()])
    assert await claim_all(store) == []
    change("damaged", **whole)
    await store.resume_run("", "damaged", by=None)
    assert [c.run.id for c in await claim_all(store)] == ["damaged"]


async def test_run_whose_chain_is_damaged_does_not_keep_deadlines_from_others(
    store: RunStore, change: Callable[..., dict[str, Any]]
) -> None:
    for run_id in ("damaged", "whole"):
        await create(store, run_id, timeout=timedelta(microseconds=1))
    whole = change("damaged", event_seq=0)
    assert await store.fire_due("", limit=9) == 1
    assert (await store.get_run("", "whole")).status is F
    change("damaged", **whole)
    assert await store.fire_due("", limit=9) == 1


async def test_plaintext_is_left_to_workers_that_accept_it(
    store: RunStore, database_url: str
) -> None:
    for number in range(2):
        await create(store, f"r{number}")
    strict = open_store(database_url, keys=KeyRing({"k": bytes(32)}))
    assert await claim_all(strict) == []
    await strict.close()
    assert [each.run.id for each in await claim_all(store)] == ["r0", "r1"]


async def test_value_of_another_type_than_comes_back_is_no_damage(store: RunStore) -> None:
    await create(store, "r", priority=True)
    assert [each.run.priority for each in await claim_all(store)] == [1]


@pytest.mark.parametrize("body", [None, 5, [b"salt"], [b"salt", {}, 7], [b"salt", {}, {"run": 7}]])
async def test_event_that_says_nothing_sensible_stops_its_own_run_only(
    database_url: str, body: Any
) -> None:
    store = open_store(database_url)
    await create(store, "damaged", priority=9)
    await create(store, "whole")
    payloads, key = store._payloads, {"tenant": "", "run_id": "damaged", "seq": 1}
    data = payloads.seal(payloads.serialize(body, events.c.data, key), events.c.data, key)
    engine = sa.create_engine(parse_url(database_url))
    with engine.begin() as connection:
        changed = sa.update(events).where(events.c.run_id == "damaged").values(data=data)
        assert connection.execute(changed).rowcount == 1
    engine.dispose()
    assert [each.run.id for each in await claim_all(store)] == ["whole"]
    assert (await store.get_run("", "damaged")).paused_at is not None
    await store.close()
