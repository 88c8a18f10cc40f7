"""How an attempt is stopped, and the threads in which it leaves nodes behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest

from agentflow import AgentFlow
from agentflow.control import (
    AttemptControl,
    check_attempt,
    current_attempt,
    entered,
    monotonic,
    shield,
)
from agentflow.errors import LeaseLostError
from agentflow.lease import LeaseKeeper
from agentflow.threads import NodeThreads, on_loop
from agentflow.types import FencingToken, Lease

LEASE = Lease(tenant="", run_id="r", thread_id="t", worker="w", token=FencingToken(7))
FAR = 3600.0


def held(seconds: float = FAR) -> AttemptControl:
    """Return the control of an attempt whose lease holds for so long."""
    control = AttemptControl()
    control.hold(LEASE, until=monotonic() + seconds)
    return control


async def stopped(control: AttemptControl, work: Callable[[], object] | None = None) -> bool:
    """Attach a task that waits for ever, and say whether `work` stopped it."""
    task = asyncio.create_task(asyncio.Event().wait())
    control.attach(task)  # type: ignore[arg-type]  # of whatever result
    await asyncio.sleep(0)
    if work is not None:
        work()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    was_stopped = task.cancelled() or task.cancelling() > 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return was_stopped


@pytest.mark.parametrize(
    ("ask", "at_once"),
    [
        (lambda control: control.drain(), False),
        (lambda control: control.stop("pause"), False),
        (lambda control: control.stop("cancel"), True),
        (lambda control: control.stop("deadline"), True),
        (lambda control: control.lose(), True),
        (lambda control: control.give_up(), True),
    ],
)
async def test_each_request_stops_at_the_next_superstep_and_some_at_once(
    ask: Callable[[AttemptControl], None], at_once: bool
) -> None:
    control = held()
    assert await stopped(control, partial(ask, control)) is at_once
    assert control.run_control.drain_requested
    late = AttemptControl()
    ask(late)
    assert await stopped(late) is at_once, "asked for before there was a task"


async def test_node_that_cleans_up_is_not_interrupted_again_by_the_next_heartbeat() -> None:
    control = held()
    task = asyncio.create_task(asyncio.Event().wait())
    control.attach(task)  # type: ignore[arg-type]  # of whatever result
    await asyncio.sleep(0)
    for _ in range(3):
        control.stop("cancel")
        await asyncio.sleep(0)
    assert task.cancelling() == 1
    await asyncio.gather(task, return_exceptions=True)


def test_everything_is_in_vain_once_the_time_of_the_lease_is_up() -> None:
    with entered(held()):
        check_attempt()
    for control in (held(0), held(), held()):
        control.extend(monotonic())
    ended, lost = held(), held()
    ended.end()
    lost.lose()
    for control in (held(0), ended, lost):
        with entered(control), pytest.raises(LeaseLostError, match="under token 7"):
            check_attempt()
        with entered(control), pytest.raises(LeaseLostError), shield():
            pytest.fail("the section was begun")
    check_attempt()  # outside of an attempt


def test_lease_is_only_ever_extended() -> None:
    control = held(FAR)
    control.extend(monotonic())
    control.hold(LEASE, until=monotonic())
    control.check()


async def test_guard_loses_the_lease_when_its_time_is_up() -> None:
    control = held(0)
    assert await stopped(control, control.look)
    assert control.is_lost


def test_lease_is_lost_in_peace_while_its_event_loop_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that notices watches over other leases as well."""
    control = held()

    async def main() -> asyncio.AbstractEventLoop:
        task = asyncio.ensure_future(asyncio.Event().wait())
        control.attach(task)  # type: ignore[arg-type]  # of whatever result
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    with monkeypatch.context() as patched:
        patched.setattr(loop, "is_closed", lambda: False)  # as it was a moment ago
        control.lose()
    assert control.is_lost


async def test_leases_that_no_thread_can_be_had_for_are_kept_once_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = timedelta(seconds=FAR)
    async with AgentFlow("memory://") as app:
        with LeaseKeeper(app._store, lease=length, heartbeat=length) as keeper:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", refuse)
                with pytest.raises(RuntimeError, match="new thread"):
                    keeper.hold(LEASE, AttemptControl(), since=monotonic())
            control = AttemptControl()
            task = asyncio.create_task(asyncio.Event().wait())
            control.attach(task)  # type: ignore[arg-type]  # of whatever result
            keeper.hold(LEASE, control, since=monotonic() - FAR)
            await asyncio.wait([task], timeout=FAR)
            assert control.is_lost


async def test_attempt_that_ends_late_leaves_its_lease_to_the_next_one() -> None:
    length = timedelta(seconds=FAR)
    ended, control = AttemptControl(), AttemptControl()
    async with AgentFlow("memory://") as app:
        with LeaseKeeper(app._store, lease=length, heartbeat=length) as keeper:
            for each in (ended, control):
                keeper.hold(LEASE, each, since=monotonic())
            keeper.drop(LEASE, ended)
            task = asyncio.create_task(asyncio.Event().wait())
            control.attach(task)  # type: ignore[arg-type]  # of whatever result
            control.watch(uuid4(), "node", 0)
            await asyncio.wait([task], timeout=FAR)
            assert task.cancelled(), "nobody looks after it"


def refuse(_: threading.Thread) -> None:
    """Fail as a process does that has all the threads it may have."""
    raise RuntimeError("can't start new thread")


async def test_node_that_no_thread_can_be_had_for_is_not_called_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    with on_loop(1) as threads, entered(held()):
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                threads.submit(called.append, "refused")
        await asyncio.to_thread(called.append, "second")
    assert called == ["second"]


async def test_call_of_a_node_that_takes_too_long_is_what_stops_the_attempt() -> None:
    control, looks, call, other = held(), [], UUID(int=1), UUID(int=2)
    control.on_change(lambda: looks.append(control.next_look))
    control.watch(call, "fast", 0)
    control.watch(other, "slow", 0)
    control.unwatch(call)
    assert len(looks) == 2
    assert looks[1] <= monotonic()
    assert await stopped(control, control.look)
    assert control.overdue is not None
    assert control.overdue.node == "slow"
    assert not control.is_over, "the lease holds, so that the outcome can be written"


@pytest.mark.parametrize("reason", ["cancel", "deadline"])
async def test_shielded_section_is_finished_before_the_attempt_stops(reason: str) -> None:
    control, done = held(), []

    async def node() -> None:
        async with shield():
            control.stop(reason)  # type: ignore[arg-type]  # one of its two
            await asyncio.sleep(0)
            with shield():
                await asyncio.sleep(0)
            done.append("section")
        done.append("after")

    with entered(control):
        task = asyncio.create_task(node())
    control.attach(task)
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert done == ["section"]


async def test_shield_does_not_hold_up_the_loss_of_the_lease() -> None:
    control = held()
    with entered(control), shield():
        assert await stopped(control, control.lose)


async def test_thread_of_a_node_knows_its_attempt_and_hears_of_its_end() -> None:
    begun, go_on = threading.Event(), threading.Event()
    told: list[AttemptControl | str | None] = []

    def node() -> None:
        told.append(current_attempt())
        begun.set()
        go_on.wait()
        try:
            check_attempt()
        except LeaseLostError as exc:
            told.append(exc.run_id)

    control = held()
    with on_loop(1) as threads, entered(control):
        waiting = asyncio.ensure_future(asyncio.to_thread(node))
        await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), begun.wait)
        assert threads.abandoned() == 0
        control.end()
        threads.forsake(control)
        assert threads.abandoned() == 1
        go_on.set()
        await waiting
    assert told == [control, "r"]


async def test_abandoned_threads_take_no_room_from_others() -> None:
    """All threads hang in an attempt that is over; the next node runs all the same."""
    with on_loop(50) as threads:
        go_on = threading.Event()
        entered_count = threading.Semaphore(0)

        def hang() -> None:
            entered_count.release()
            go_on.wait()

        over = held()
        with entered(over):
            hanging = [asyncio.ensure_future(asyncio.to_thread(hang)) for _ in range(50)]
        await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.get_running_loop().run_in_executor(None, entered_count.acquire)
        with entered(held()):
            queued = asyncio.ensure_future(asyncio.to_thread(lambda: "ran"))
            await asyncio.sleep(0)
            over.end()
            threads.forsake(over)
            assert threads.abandoned() == 50
            assert await asyncio.wait_for(queued, 30) == "ran"
        go_on.set()
        await asyncio.gather(*hanging)


async def test_node_that_was_cancelled_before_its_thread_began_is_not_called() -> None:
    with on_loop(1) as threads:
        go_on = threading.Event()
        called: list[UUID] = []
        size = threads._size
        with entered(held()):
            busy = [asyncio.ensure_future(asyncio.to_thread(go_on.wait)) for _ in range(size)]
            late = asyncio.ensure_future(asyncio.to_thread(called.append, uuid4()))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        go_on.set()
        await asyncio.gather(*busy)
        with entered(held()):
            await asyncio.to_thread(lambda: None)
        assert called == []


class _Overtaken(threading.Condition):
    """Lets whoever submits go on only when a thread has made the call and come back."""

    def __init__(self) -> None:
        super().__init__()
        self._submitter = threading.get_ident()
        self._entries = 0
        self._is_back = threading.Event()

    def __enter__(self) -> bool:
        is_entered = super().__enter__()
        if threading.get_ident() != self._submitter:
            self._entries += 1
            if self._entries > 1:
                self._is_back.set()
        return is_entered

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)  # type: ignore[arg-type]  # handed on
        if threading.get_ident() == self._submitter:
            self._is_back.wait()


async def test_node_that_raises_before_its_submitter_goes_on_is_heard_of() -> None:
    """As one that asks somebody does, at once."""

    def ask() -> None:
        raise LookupError("asked")

    with on_loop(1) as threads, entered(held()):
        threads._changed = _Overtaken()
        asked = threads.submit(ask)
    assert isinstance(asked.exception(), LookupError)


def test_event_loop_ends_although_a_node_never_does() -> None:
    go_on = threading.Event()

    async def main() -> NodeThreads:
        control = held()
        with on_loop(1) as threads, entered(control):
            hanging = asyncio.ensure_future(asyncio.to_thread(go_on.wait))
            await asyncio.sleep(0)
            hanging.cancel()
        assert await asyncio.to_thread(lambda: 1) == 1
        return threads

    threads = asyncio.run(main())
    with pytest.raises(RuntimeError, match="after its event loop"), entered(held()):
        threads.submit(int)
    go_on.set()


async def test_guard_looks_after_nodes_however_long_a_lease_is() -> None:
    """No thread can wait for as long as that."""
    control = AttemptControl()
    async with AgentFlow("memory://") as app:
        with LeaseKeeper(app._store, lease=timedelta.max, heartbeat=timedelta.max) as keeper:
            guard = keeper._threads[-1]
            keeper.hold(LEASE, control, since=monotonic())
            waiting = keeper._changed._waiters  # type: ignore[attr-defined]  # Python's own
            while guard.is_alive() and not waiting:  # noqa: ASYNC110 -- a thread's condition
                await asyncio.sleep(0)
            assert guard.is_alive()
            task = asyncio.create_task(asyncio.Event().wait())
            control.attach(task)  # type: ignore[arg-type]  # of whatever result
            control.watch(uuid4(), "node", 0)
            await asyncio.wait([task], timeout=FAR)
            assert task.cancelled()
