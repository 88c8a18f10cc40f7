"""The run store: lost attempts, pauses, deadlines, busy threads and restored backups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentflow.errors import (
    IllegalTransitionError,
    LeaseLostError,
    NotFoundError,
    PausedError,
    PayloadTooLargeError,
    SerializationError,
    ThreadBusyError,
)
from agentflow.storage import OnBusy, RunStore
from agentflow.testing import VirtualClock
from agentflow.types import (
    ClaimedRun,
    Lease,
    PauseScope,
    RunFailure,
    RunStatus,
    WaitStatus,
    WorkerReport,
)
from tests.conformance.runs import (
    EXPIRED,
    FAILURE,
    GRAPHS,
    LEASE,
    bring_to,
    claim,
    claim_all,
    create,
    finish,
    open_store,
    park,
    parked,
    question,
    resolve,
    running,
    spec,
    types_of_events,
)

Q, R, W = RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING
S, F, C = RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED
HOUR = timedelta(hours=1)


@pytest.fixture
def clock() -> VirtualClock:
    """The clock of `timed`."""
    return VirtualClock(datetime(2030, 1, 1, tzinfo=UTC))


@pytest.fixture
async def timed(database_url: str, clock: VirtualClock) -> AsyncIterator[RunStore]:
    """A store whose timers go by `clock`."""
    opened = open_store(database_url, clock=clock)
    yield opened
    await opened.close()


async def begin(
    store: RunStore, claimed: ClaimedRun, progress: str = "p", checkpoint_id: str | None = None
) -> Any:
    """Begin an attempt."""
    return await store.start_attempt(
        claimed.lease,
        progress=progress,
        reason=claimed.reason,
        checkpoint_id=checkpoint_id,
        step=None,
        traceparent=None,
    )


async def die(store: RunStore, instance: str, limit: int = 9) -> list[ClaimedRun]:
    """Claim what is due for a worker, begin to drive it, and let the worker die."""
    claimed = await claim_all(store, limit=limit, instance=instance, lease=LEASE)
    for each in claimed:
        await begin(store, each)
    await store.extend_leases([each.lease for each in claimed], EXPIRED)
    return claimed


async def counts(store: RunStore, run_id: str) -> tuple[int, int]:
    """Return a run's attempts and losses."""
    run = await store.get_run("", run_id)
    return run.attempt, run.losses


async def test_attempt_lost_alone_counts(store: RunStore) -> None:
    await create(store, "r")
    await die(store, "one")
    (claimed,) = await claim_all(store, instance="two")
    assert await counts(store, "r") == (2, 1)
    assert claimed.isolation is None, "one loss is what any restart does"
    (recovered,) = (
        e for e in await store.list_events("", "r", after=0, limit=99) if e.type == "run.recovered"
    )
    assert recovered.data["counts"] is True


async def test_attempts_lost_together_count_for_none_of_the_runs(store: RunStore) -> None:
    for name in ("a", "b", "c"):
        await create(store, name)
    assert len(await die(store, "one")) == 3
    # One by one, by claimers that see fewer and fewer of them.
    for name in ("a", "b", "c"):
        await store.claim_run("", name, worker="w", instance=f"of {name}", lease=LEASE)
        assert await counts(store, name) == (1, 1)


async def test_suspect_is_claimed_alone_and_counted_whatever_else_was_there(
    store: RunStore,
) -> None:
    for name in ("long", "poison", "other"):
        await create(store, name)
    for instance in ("one", "two"):
        await die(store, instance)
    (long,) = await claim_all(store, instance="three")
    assert (long.run.id, long.isolation) == ("long", LEASE)
    assert (await begin(store, long)).is_isolated
    await store.end_isolation(long.lease)
    (poison,) = await claim_all(store, instance="three")
    assert (poison.run.id, poison.isolation) == ("poison", LEASE)
    await begin(store, poison)
    await store.extend_leases([long.lease, poison.lease], EXPIRED)
    again = {
        name: await store.claim_run("", name, worker="w", instance="four", lease=LEASE)
        for name in ("poison", "long")
    }
    assert await counts(store, "poison") == (2, 3)
    assert await counts(store, "long") == (1, 3)
    assert again["poison"] is not None
    assert again["poison"].isolation == LEASE
    assert again["long"] is not None
    assert again["long"].isolation is None, "it has outlived its isolation"


async def test_suspects_do_not_hold_up_the_others(store: RunStore) -> None:
    await create(store, "suspect")
    for instance in ("one", "two"):
        await die(store, instance)
    await create(store, "fresh", priority=1)
    (lost,) = await claim_all(store, instance="three")
    assert lost.run.id == "suspect"
    await store.release_run(lost.lease, reason="drain", counts=True)
    assert [c.run.id for c in await claim_all(store, instance="four")] == ["fresh"]
    (alone,) = await claim_all(store, instance="four")
    assert (alone.run.id, alone.isolation) == ("suspect", LEASE)


async def test_progress_ends_all_suspicion(store: RunStore) -> None:
    for name in ("a", "b"):
        await create(store, name)
    for instance in ("one", "two"):
        await die(store, instance)
    (claimed,) = await claim_all(store, instance="three")
    started = await begin(store, claimed, "p2", "c2")
    # The last attempt got further: it was lost at what comes next, and not counted there.
    assert (started.attempt, started.losses, started.is_isolated) == (1, 1, False)
    await park(store, claimed.lease, question())
    assert await counts(store, "a") == (0, 0)


async def test_worker_that_lives_is_judged_again(store: RunStore) -> None:
    report = WorkerReport(
        instance="one", name="w", queues=("default",), graphs=(("g", "1"),), concurrency=2
    )
    for name in ("a", "b"):
        await create(store, name)
    leases = [c.lease for c in await claim_all(store, instance="one")]
    await store.extend_leases(leases[:1], EXPIRED)
    await claim(store, "a")
    assert await counts(store, "a") == (1, 1), "it held another run"
    await store.beat_worker("", report)
    await store.extend_leases(leases[1:], EXPIRED)
    await claim(store, "b")
    assert await counts(store, "b") == (2, 1), "it held nothing else by then"


@pytest.mark.parametrize("status", [Q, R, W])
async def test_paused_run_keeps_its_status_and_is_not_driven(
    store: RunStore, status: RunStatus
) -> None:
    lease = await bring_to(store, status, "r")
    for _ in range(2):
        run = await store.pause_run("", "r", reason="look", by="ada")
        assert (run.status, run.paused_at is not None) == (status, True)
    if status is R:
        beat = (await store.extend_leases([lease], LEASE))["r"]
        assert (beat.lost, beat.stop) == (False, "pause")
        await store.extend_leases([lease], EXPIRED)
    if status is W:
        (wait,) = (await _waits(store, "r")).items
        await resolve(store, wait.id)
    assert await claim_all(store) == []
    with pytest.raises(PausedError, match="agentflow run resume r"):
        await claim(store, "r")
    run = await store.resume_run("", "r", by="ada")
    assert run.paused_at is None
    assert [c.run.id for c in await claim_all(store)] == ["r"]
    log = await types_of_events(store, "r")
    assert (log.count("run.paused"), log.count("run.unpaused")) == (1, 1)


async def _waits(store: RunStore, run_id: str) -> Any:
    return await store.list_waits("", status=None, run_id=run_id, graph=None, limit=9, cursor=None)


@pytest.mark.parametrize("status", [S, F, C])
async def test_run_that_has_ended_is_neither_paused_nor_resumed(
    store: RunStore, status: RunStatus
) -> None:
    await bring_to(store, status, "r")
    for call in (
        store.pause_run("", "r", reason=None, by=None),
        store.resume_run("", "r", by=None),
    ):
        with pytest.raises(IllegalTransitionError, match="'r' is"):
            await call


async def test_paused_run_can_be_cancelled(store: RunStore) -> None:
    lease = await running(store, "r")
    await store.pause_run("", "r", reason=None, by=None)
    await store.cancel_run("", "r", reason="enough", by="ada")
    assert (await store.extend_leases([lease], LEASE))["r"].stop == "cancel", "more urgent"
    await store.extend_leases([lease], EXPIRED)
    taken = await store.claim_run("", "r", worker="w", lease=LEASE, although_paused=True)
    assert taken is not None
    await store.finish_cancel(taken.lease)
    assert (await store.get_run("", "r")).cancel_reason == "enough"


@pytest.mark.parametrize(
    ("scope", "name", "hint"),
    [
        ("graph", "g", "agentflow resume --graph g"),
        ("queue", "default", "agentflow resume --queue default"),
        ("all", "", "agentflow resume --all"),
    ],
)
async def test_paused_scope_holds_what_it_names_and_nothing_else(
    store: RunStore, scope: PauseScope, name: str, hint: str
) -> None:
    held, queued = await running(store, "held"), await create(store, "queued")
    made = await store.pause("", scope, name, reason="incident", by="ada")
    assert await store.pause("", scope, name, reason="again", by="bob") == made
    assert await store.list_pauses("") == (made,)
    assert (await store.extend_leases([held], LEASE))["held"].stop == "pause"
    await create(store, "later")
    await create(store, "elsewhere", graph="h", queue="slow")
    options: dict[str, Any] = {"queues": ["default", "slow"], "graphs": [*GRAPHS, ("h", "1")]}
    free = [] if scope == "all" else ["elsewhere"]
    assert [c.run.id for c in await claim_all(store, **options)] == free
    with pytest.raises(PausedError, match=hint):
        await claim(store, queued.id)
    await store.create_run("acme", spec("theirs"), on_existing="return")
    assert len(await _claims_of(store, "acme")) == 1, "another tenant's"
    assert await store.resume("", scope, name, by="ada")
    assert not await store.resume("", scope, name, by="ada")
    assert (await store.extend_leases([held], LEASE))["held"].stop is None
    assert len(await claim_all(store, **options)) == 3 - len(free)
    events = await store.list_events("", "", after=0, limit=9)
    assert [e.type for e in events] == [f"{scope}.paused", f"{scope}.unpaused"]
    assert events[0].data == {"name": name, "reason": "incident", "by": "ada"}
    assert events[1].prev_hash == events[0].hash


async def _claims_of(store: RunStore, tenant: str) -> list[ClaimedRun]:
    return await store.claim_runs(
        tenant, worker="w", queues=["default"], graphs=GRAPHS, limit=9, lease=LEASE
    )


async def test_run_paused_by_its_failure_gets_a_new_budget(store: RunStore) -> None:
    lease = await running(store, "r")
    await store.pause_failed_run(lease, FAILURE, reason="exhausted", checkpoint_id="c1", step=1)
    run = await store.get_run("", "r")
    assert (run.status, run.attempt, run.error) == (Q, 1, FAILURE)
    assert await claim_all(store) == []
    await store.resume_run("", "r", by=None)
    (claimed,) = await claim_all(store)
    assert (claimed.reason, claimed.run.attempt) == ("pause", 1)
    assert not (await store.get_run("", "r")).dead_letter


async def test_queued_run_is_cancelled_at_its_start_deadline(
    timed: RunStore, clock: VirtualClock
) -> None:
    await create(timed, "missed", start_at=clock.now() + HOUR, start_timeout=HOUR)
    await create(timed, "met", start_timeout=HOUR)
    met = await claim(timed, "met")
    await timed.retry_run(met, FAILURE, delay=HOUR, failures={}, checkpoint_id=None, step=None)
    clock.advance(2 * HOUR)
    assert [c.run.id for c in await claim_all(timed)] == ["met"]
    assert await timed.claim_run("", "missed", worker="w", lease=LEASE) is None
    assert (await timed.survey("")).overdue == 1
    assert await timed.fire_due("", limit=9) == 1
    assert await timed.fire_due("", limit=9) == 0
    run = await timed.get_run("", "missed")
    assert (run.status, run.cancel_reason) == (C, "start_deadline")


@pytest.mark.parametrize("status", [Q, W])
async def test_run_that_nobody_holds_fails_at_its_deadline(
    timed: RunStore, clock: VirtualClock, status: RunStatus
) -> None:
    lease = await running(timed, "r", timeout=30 * 24 * HOUR)
    wait_id = question()
    if status is W:
        await park(timed, lease, wait_id)
    else:
        await timed.release_run(lease, reason="drain", counts=False)
    clock.advance(30 * 24 * HOUR - timedelta(seconds=1))
    assert await timed.fire_due("", limit=9) == 0
    clock.advance(timedelta(seconds=1))
    assert await timed.fire_due("", limit=9) == 1
    run, letter = await timed.get_run("", "r"), await timed.find_dead_letter("", "r")
    assert letter is not None
    assert (run.status, letter.reason) == (F, "deadline")
    assert letter.cause.type == "agentflow.errors.DeadlineExceededError"
    if status is W:
        assert (await timed.get_wait("", wait_id.wait_id)).status is WaitStatus.EXPIRED
        assert letter.checkpoint_id == "c1"
    again = await timed.requeue_dead_letter("", "r", checkpoint_id=None, by=None)
    assert again.deadline_at == clock.now() + 30 * 24 * HOUR


async def test_running_run_hears_of_its_deadline(timed: RunStore, clock: VirtualClock) -> None:
    await create(timed, "r", timeout=HOUR)
    (claimed,) = await claim_all(timed)
    assert (await begin(timed, claimed)).stop is None
    clock.advance(HOUR)
    assert await timed.fire_due("", limit=9) == 0, "it is left to its holder"
    assert (await timed.extend_leases([claimed.lease], LEASE))["r"].stop == "deadline"
    await timed.extend_leases([claimed.lease], EXPIRED)
    (claimed,) = await claim_all(timed)
    assert (await begin(timed, claimed)).stop == "deadline"


async def test_times_of_starting_and_backoff_go_by_the_clock(
    timed: RunStore, clock: VirtualClock
) -> None:
    await create(timed, "later", start_at=clock.now() + 24 * HOUR)
    assert await claim_all(timed) == []
    clock.advance(24 * HOUR)
    (claimed,) = await claim_all(timed)
    await timed.retry_run(
        claimed.lease, FAILURE, delay=HOUR, failures={}, checkpoint_id=None, step=None
    )
    assert await claim_all(timed) == []
    clock.advance(HOUR)
    assert len(await claim_all(timed)) == 1


async def busy(store: RunStore) -> Lease:
    """Bring a thread to one running run with a queued one behind it."""
    lease = await running(store, "first", thread_id="t")
    await create(store, "second", thread_id="t")
    return lease


async def submit(store: RunStore, on_busy: OnBusy, run_id: str = "new") -> None:
    """Submit another run on the thread."""
    await store.create_run("", spec(run_id, thread_id="t"), on_existing="return", on_busy=on_busy)


async def test_run_that_is_rejected_on_a_busy_thread_leaves_no_row(store: RunStore) -> None:
    await submit(store, "reject", "free")
    with pytest.raises(ThreadBusyError, match="'free'"):
        await submit(store, "reject")
    with pytest.raises(NotFoundError):
        await store.get_run("", "new")
    await finish(store, await claim(store, "free"))
    await submit(store, "reject")


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
async def test_new_run_stops_what_is_on_its_thread_and_follows_it(
    store: RunStore, on_busy: OnBusy
) -> None:
    lease = await busy(store)
    await submit(store, on_busy)
    second = await store.get_run("", "second")
    assert (second.status, second.cancel_reason) == (C, f"{on_busy} by run new")
    assert (await store.extend_leases([lease], LEASE))["first"].stop == "cancel"
    assert await claim_all(store) == [], "never two attempts on one thread"
    await store.finish_cancel(lease)
    (claimed,) = await claim_all(store)
    expected = ("first", "second") if on_busy == "rollback" else ()
    assert (claimed.run.id, claimed.rolled_back) == ("new", expected)
    (cancelled,) = (
        e
        for e in await store.list_events("", "first", after=0, limit=99)
        if e.type == "run.cancelled"
    )
    assert cancelled.data["reason"] == f"{on_busy} by run new"


async def test_waiting_run_is_interrupted_too(store: RunStore) -> None:
    wait_id = question()
    await park(store, await running(store, "r", thread_id="t"), wait_id)
    await submit(store, "interrupt")
    assert (await store.get_run("", "r")).status is C
    assert (await store.get_wait("", wait_id.wait_id)).status is WaitStatus.WITHDRAWN
    assert [c.run.id for c in await claim_all(store)] == ["new"]


async def test_rollback_is_named_until_it_was_done(store: RunStore) -> None:
    await busy(store)
    await submit(store, "rollback")
    await store.cancel_run("", "new", reason=None, by=None)
    await create(store, "last", thread_id="t")
    first = await store.get_run("", "first")
    taken = await _expire_and_cancel(store, first.id)
    assert (await store.get_run("", "first")).status is C
    (claimed,) = await claim_all(store)
    assert (claimed.run.id, claimed.rolled_back) == ("last", ("first", "second"))
    await store.finish_rollback(claimed.lease, claimed.rolled_back)
    with pytest.raises(LeaseLostError):
        await store.finish_rollback(taken, ["first"])
    await store.release_run(claimed.lease, reason="drain", counts=False)
    (claimed,) = await claim_all(store)
    assert claimed.rolled_back == ()
    assert (await types_of_events(store, "first"))[-1] == "run.rolled_back"


async def _expire_and_cancel(store: RunStore, run_id: str) -> Lease:
    run = await store.get_run("", run_id)
    held = Lease(
        tenant="",
        run_id=run_id,
        thread_id=run.thread_id,
        worker="w",
        token=(await store.list_events("", run_id, after=0, limit=9))[1].data["token"],
    )
    await store.extend_leases([held], EXPIRED)
    lease = await claim(store, run_id)
    await store.finish_cancel(lease)
    return lease


async def test_run_that_succeeded_before_it_could_be_stopped_is_not_rolled_back(
    store: RunStore,
) -> None:
    lease = await running(store, "first", thread_id="t")
    await submit(store, "rollback")
    await finish(store, lease)
    (claimed,) = await claim_all(store)
    assert (claimed.run.id, claimed.rolled_back) == ("new", ())


async def test_submissions_that_interrupt_each_other_leave_one_run(
    store: RunStore, database_url: str
) -> None:
    others = [open_store(database_url) for _ in range(3)]
    await asyncio.gather(
        *(
            submit(each, "interrupt", f"r{number}-{at}")
            for number, each in enumerate([store, *others])
            for at in range(4)
        ),
        *(claim_all(each) for each in others),
    )
    page = await store.list_runs("", status=None, graph=None, thread_id="t", limit=99, cursor=None)
    stopped = [r for r in page.items if r.status is C or r.cancel_requested_at is not None]
    assert (len(page.items), len(stopped)) == (16, 15)
    for other in others:
        await other.close()


async def test_nothing_from_before_a_restore_can_write(store: RunStore) -> None:
    held = await running(store, "held")
    await parked(store, "waits")
    await finish(store, done := await running(store, "done"))
    restored = await store.restore(reason="disk lost", by="ada")
    assert (restored.epoch, restored.unfinished) == (1, 2)
    for call in (finish(store, held), store.raise_token(held, above=held.token)):
        with pytest.raises(LeaseLostError):
            await call
    assert (await store.extend_leases([held], LEASE))["held"].lost
    assert await claim_all(store) == []
    with pytest.raises(PausedError, match="agentflow restore --resume"):
        await claim(store, "held")
    for tenant in ("", "acme"):
        await store.create_run(tenant, spec("new", thread_id="n"), on_existing="return")
        assert await _claims_of(store, tenant) == []
    assert await store.resume("", "store", "", by="ada")
    claimed = {c.run.id: c.lease for c in await claim_all(store)}
    assert set(claimed) == {"held", "new"}
    # Whoever was left with a claim of a thread that the backup does not know is behind too.
    assert all(lease.token > 2**32 for lease in claimed.values())
    assert (await store.restore(reason=None, by=None)).epoch == 2
    assert (await store.survey("")).epoch == 2
    assert done.token < 2**32
    log = await store.list_events("", "", after=0, limit=9)
    assert [e.type for e in log if e.type == "store.restored"] == ["store.restored"] * 2


async def test_workers_are_known_until_they_stop(store: RunStore) -> None:
    report = WorkerReport(
        instance="i",
        name="w",
        queues=("default", "mail"),
        graphs=(("g", "1"), ("h", "2")),
        concurrency=10,
        active=3,
        health="draining",
    )
    await store.beat_worker("", report)
    (first,) = await store.list_workers("")
    assert first.report == report
    await store.beat_worker("", report)
    (second,) = await store.list_workers("")
    assert second.started_at == first.started_at
    assert second.beat_at >= first.beat_at
    assert timedelta(0) <= second.silence < timedelta(minutes=1)
    assert await store.list_workers("acme") == ()
    await store.remove_worker("", "i")
    assert await store.list_workers("") == ()


async def test_survey_counts_what_is_there(store: RunStore) -> None:
    lease = await running(store, "expired")
    await store.extend_leases([lease], EXPIRED)
    await bring_to(store, F, "dead")
    await bring_to(store, W, "waits")
    await create(store, "queued", graph="h", queue="mail")
    await store.pause_run("", "queued", reason=None, by=None)
    await store.pause("", "queue", "mail", reason=None, by=None)
    found = await store.survey("")
    assert (found.expired_leases, found.dead_letters, found.paused, found.overdue) == (1, 1, 1, 0)
    assert [(u.graph, u.version, u.queue, u.status, u.count) for u in found.unfinished] == [
        ("g", "1", "default", R, 1),
        ("g", "1", "default", W, 1),
        ("h", "1", "mail", Q, 1),
    ]
    assert [p.name for p in found.pauses] == ["mail"]
    assert abs(found.at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_output_that_cannot_be_stored_changes_nothing(database_url: str) -> None:
    store = open_store(database_url, max_payload=10_000)
    lease = await running(store, "r")
    with pytest.raises(PayloadTooLargeError, match=r"runs\.output.*the limit is 10000 bytes"):
        await finish(store, lease, {"text": "x" * 10_000})
    with pytest.raises(SerializationError):
        await finish(store, lease, {"text": object()})
    assert (await store.get_run("", "r")).status is R
    with pytest.raises(PayloadTooLargeError):
        await create(store, "big", input={"text": "x" * 10_000})
    await finish(store, lease, {"text": "x" * 9_000})
    await store.close()


async def test_failure_is_kept_without_its_excess(store: RunStore) -> None:
    lease = await running(store, "r")
    failure = RunFailure(type="ValueError", message="m" * 10**6, traceback="t" * 10**6 + "end")
    await store.fail_run(lease, failure, reason="exhausted", checkpoint_id=None, step=None)
    error = (await store.get_run("", "r")).error
    assert error is not None
    assert error.traceback is not None
    assert len(error.message) < 17_000
    assert len(error.traceback) < 65_000
    assert error.traceback.endswith("end")


async def test_change_wakes_who_listens_here_and_elsewhere(
    store: RunStore, database_url: str
) -> None:
    other = open_store(database_url)
    heard: dict[str, asyncio.Event] = {name: asyncio.Event() for name in ("here", "there")}
    loop = asyncio.get_running_loop()

    def waking(name: str) -> Any:
        return lambda: loop.call_soon_threadsafe(heard[name].set)

    ends = [store.subscribe("due", waking("here"))]
    if database_url.startswith("postgresql"):
        ends.append(other.subscribe("due", waking("there")))
    else:
        heard["there"].set()  # a file has nobody who could tell
    await other.get_run("", (await create(store, "r")).id)
    async with asyncio.timeout(20):
        while not all(event.is_set() for event in heard.values()):
            # Told again until the listener is there: a hint may be lost.
            await create(store)
            await asyncio.sleep(0.01)
    for end in ends:
        end()
    heard["here"].clear()
    await create(store, "unheard")
    await asyncio.sleep(0)
    assert not heard["here"].is_set()
    await other.close()
