"""Random histories of a run store: each backend does what the model does, at every step.

`AGENTFLOW_TEST_EXAMPLES` is how many histories there are on each database; with it they are others
each time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agentflow.errors import (
    AlreadyResolvedError,
    IllegalTransitionError,
    LeaseLostError,
    NotDeadLetterError,
    SupersededError,
    ThreadBusyError,
)
from agentflow.storage import OnBusy, RowDamage
from agentflow.storage.sql import SqlRunStore
from agentflow.types import Decision, FencingToken, Lease, NewWait, PauseScope, new_id
from tests.conformance.run_model import BACKOFF, WAYS, C, F, Model, ModelRun, Q, R, S, W
from tests.conformance.runs import EXPIRED, FAILURE, LEASE, REQUEST, open_store, question, spec

T = TypeVar("T")
EXAMPLES = int(os.environ.get("AGENTFLOW_TEST_EXAMPLES", "0"))
MINUTE = timedelta(minutes=1)
GRAPHS = ("g", "h")
SCOPES: tuple[tuple[PauseScope, str], ...] = (("all", ""), ("graph", "g"), ("queue", "default"))

mostly = st.sampled_from((True, True, True, False))
index = st.integers(min_value=0, max_value=50)
THREADS = ("s", "t", "u")
Timeouts = tuple[timedelta | None, timedelta | None]
minutes = st.none() | st.integers(min_value=1, max_value=3).map(lambda number: number * MINUTE)


class Backend:
    """A store that all histories share, each with a tenant of its own."""

    def __init__(self, url: str) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)
        self.runner = asyncio.Runner()
        self.store: SqlRunStore = self.run(self._open(url))

    async def _open(self, url: str) -> SqlRunStore:
        return open_store(url, clock=self)

    def now(self) -> datetime:
        return self.time

    def run(self, call: Awaitable[T]) -> T:
        async def wait() -> T:
            return await call

        return self.runner.run(wait())

    async def damages(self, tenant: str) -> list[RowDamage]:
        found = self.store.find_damages(tenant=tenant)
        return [damage async for verified in found for damage in verified.damages]

    def close(self) -> None:
        self.run(self.store.close())
        self.runner.close()


class RunStoreMachine(RuleBasedStateMachine):
    """Does the same to a store and to the model, and compares."""

    backend: Backend

    @initialize()
    def begin(self) -> None:
        self.tenant = new_id()
        self.model = Model(now=self.backend.time)
        self.instances = 0
        for number, thread in enumerate(THREADS):
            self.submit_one(thread, "enqueue", priority=number % 2)

    def do(self, verb: str, *args: Any, **named: Any) -> Any:
        return self.backend.run(getattr(self.backend.store, verb)(*args, **named))

    def refused(self, kind: type[Exception], verb: str, *args: Any, **named: Any) -> None:
        with pytest.raises(kind):
            self.do(verb, *args, **named)

    def pick(self, number: int, *statuses: Any) -> ModelRun | None:
        found = self.model.of(*statuses)
        return found[number % len(found)] if found else None

    def held(self, number: int) -> ModelRun | None:
        found = [run for run in self.model.of(R) if self.model.is_held(run)]
        return found[number % len(found)] if found else None

    # What people do

    @rule(
        thread=st.sampled_from(THREADS),
        on_busy=st.sampled_from(("enqueue", "reject", "interrupt", "rollback")),
        priority=st.integers(min_value=0, max_value=1),
        graph=st.sampled_from(GRAPHS),
        timeouts=st.tuples(minutes, minutes),
    )
    def submit(
        self, thread: str, on_busy: OnBusy, priority: int, graph: str, timeouts: Timeouts
    ) -> None:
        self.submit_one(thread, on_busy, priority, graph, timeouts)

    def submit_one(
        self,
        thread: str,
        on_busy: OnBusy,
        priority: int = 0,
        graph: str = "g",
        timeouts: Timeouts = (None, None),
    ) -> None:
        name, now = f"r{len(self.model.runs)}", self.model.now
        start_timeout, timeout = timeouts
        made = spec(
            name,
            thread_id=thread,
            priority=priority,
            graph=graph,
            start_timeout=start_timeout,
            timeout=timeout,
        )
        options: dict[str, Any] = {"on_existing": "return", "on_busy": on_busy}
        busy = self.model.busy(thread)
        if busy and on_busy == "reject":
            self.refused(ThreadBusyError, "create_run", self.tenant, made, **options)
            return
        self.do("create_run", self.tenant, made, **options)
        for run in busy if on_busy != "enqueue" else ():
            self._cancel(run)
            run.rollback = "pending" if on_busy == "rollback" else run.rollback
        self.model.runs[name] = ModelRun(
            id=name,
            thread=thread,
            seq=len(self.model.runs),
            priority=priority,
            graph=graph,
            available_at=now,
            start_deadline=None if start_timeout is None else now + start_timeout,
            deadline=None if timeout is None else now + timeout,
            timeout=timeout,
        )

    def _cancel(self, run: ModelRun) -> None:
        if run.status is R:
            run.is_cancelling = True
        elif run.status is not C:
            run.cancel()

    @precondition(lambda self: self.model.runs)
    @rule(number=index)
    def cancel(self, number: int) -> None:
        run = self.pick(number, *self._all())
        assert run is not None
        call = ("cancel_run", self.tenant, run.id)
        if run.status in {S, F}:
            self.refused(IllegalTransitionError, *call, reason=None, by=None)
            return
        self.do(*call, reason=None, by=None)
        self._cancel(run)

    @staticmethod
    def _all() -> tuple[Any, ...]:
        return (Q, R, W, S, F, C)

    @precondition(lambda self: self.model.runs)
    @rule(number=index, is_resume=mostly)
    def pause_or_resume_run(self, number: int, is_resume: bool) -> None:
        run = self.pick(number, *self._all())
        assert run is not None
        named: dict[str, Any] = {"by": None} if is_resume else {"reason": None, "by": None}
        call = ("resume_run" if is_resume else "pause_run", self.tenant, run.id)
        if run.status.is_ended:
            self.refused(IllegalTransitionError, *call, **named)
            return
        self.do(*call, **named)
        if not is_resume:
            run.is_paused = True
        elif run.is_paused:
            if run.is_paused_by_failure:
                run.clear()
            run.is_paused = run.is_paused_by_failure = False

    @rule(scope=st.sampled_from(SCOPES), is_resume=mostly)
    def pause_or_resume(self, scope: tuple[PauseScope, str], is_resume: bool) -> None:
        if is_resume:
            was_paused = self.do("resume", self.tenant, *scope, by=None)
            assert was_paused is (scope in self.model.paused)
            self.model.paused.discard(scope)
        else:
            self.do("pause", self.tenant, *scope, reason=None, by=None)
            self.model.paused.add(scope)

    @precondition(lambda self: any(run.waits for run in self.model.runs.values()))
    @rule(number=index)
    def decide(self, number: int) -> None:
        waits = [
            (run, wait, was) for run in self.model.runs.values() for wait, was in run.waits.items()
        ]
        run, wait, was = waits[number % len(waits)]
        named: dict[str, Any] = {
            "by": "ada",
            "comment": None,
            "version": None,
            "idempotency_key": None,
            "request": REQUEST,
        }
        decision = Decision(type="approve")
        if was != "pending":
            kind = AlreadyResolvedError if was == "resolved" else SupersededError
            self.refused(kind, "resolve_wait", self.tenant, wait, decision, **named)
            return
        self.do("resolve_wait", self.tenant, wait, decision, **named)
        run.waits[wait] = "resolved"
        if run.status is W:
            run.status, run.available_at = Q, self.model.now

    @precondition(lambda self: self.model.of(S, F, C, Q))
    @rule(number=index, is_discard=st.booleans())
    def requeue_or_discard(self, number: int, is_discard: bool) -> None:
        run = self.pick(number, S, F, C, Q)
        assert run is not None
        name = "discard_dead_letter" if is_discard else "requeue_dead_letter"
        named = {"by": None, ("reason" if is_discard else "checkpoint_id"): None}
        if not run.is_dead:
            self.refused(NotDeadLetterError, name, self.tenant, run.id, **named)
            return
        self.do(name, self.tenant, run.id, **named)
        run.is_dead = False
        if not is_discard:
            run.clear()
            run.status, run.available_at = Q, self.model.now
            run.deadline = None if run.timeout is None else self.model.now + run.timeout

    # What workers do

    @rule(limit=st.integers(min_value=1, max_value=4))
    def claim(self, limit: int) -> None:
        self._claim(limit)

    @rule(limit=st.integers(min_value=1, max_value=4), is_isolated=mostly)
    def claim_and_die(self, limit: int, is_isolated: bool) -> None:
        """A worker claims runs, begins to drive them, and is killed, by one of them or not."""
        runs = self._claim(limit)
        for run in runs:
            self._start(run, "p" if run.progress is None else run.progress)
            if run.is_isolated and not is_isolated:
                self.do("end_isolation", run.lease)
                run.is_isolated, run.pardoned = False, run.losses
        if runs and not is_isolated:
            # Its isolation is over: the same worker may claim more.
            runs += self._claim(limit, instance=runs[0].instance)
        self.do("extend_leases", [run.lease for run in runs], EXPIRED)
        for run in runs:
            run.is_expired = True

    def _claim(self, limit: int, instance: str | None = None) -> list[ModelRun]:
        self.instances += 1
        instance = instance or f"{self.tenant} {self.instances}"
        expected = self.model.claimable(limit)
        reasons = {run.id: run.status for run in expected}
        claimed = self.do(
            "claim_runs",
            self.tenant,
            worker="w",
            instance=instance,
            queues=["default"],
            graphs=[(graph, "1") for graph in GRAPHS],
            limit=limit,
            lease=LEASE,
        )
        assert [each.run.id for each in claimed] == [run.id for run in expected]
        for each, run in zip(claimed, expected, strict=True):
            assert run.lease is None or each.lease.token > run.lease.token
            assert (each.reason == "recovery") is (reasons[run.id] is R)
            assert (each.isolation is not None) is self.model.is_suspect(run)
            assert set(each.rolled_back) == self.model.rolled_back(run.thread)
            self.model.claim(run, instance, each.lease)
            if each.rolled_back:
                self.do("finish_rollback", each.lease, each.rolled_back)
                for name in each.rolled_back:
                    self.model.runs[name].rollback = "done"
        return expected

    @precondition(lambda self: self.model.of(R))
    @rule(number=index, progress=st.sampled_from(("p", "q")))
    def start(self, number: int, progress: str) -> None:
        if (run := self.held(number)) is not None:
            self._start(run, progress)

    def _start(self, run: ModelRun, progress: str) -> None:
        reason = "recovery" if run.losses else "start"
        begun = self.do(
            "start_attempt",
            run.lease,
            progress=progress,
            reason=reason,
            checkpoint_id=None,
            step=None,
            traceparent=None,
        )
        self.model.start(run, progress, reason)
        assert (begun.attempt, begun.losses, begun.is_isolated) == (
            run.attempt,
            run.losses,
            run.is_isolated,
        )

    @precondition(lambda self: self.model.of(R))
    @rule(number=index, is_stale=st.booleans(), how=st.sampled_from(WAYS))
    def settle(self, number: int, is_stale: bool, how: str) -> None:
        """End an attempt in one of all ways, under its lease or under one from before."""
        run = self.pick(number, R)
        assert run is not None
        lease = run.lease
        assert lease is not None
        if is_stale:
            lease = replace(lease, token=FencingToken(lease.token - 1))
        asked = question(len(run.waits), checkpoint_id=new_id())
        call = self._settling(how, lease, asked)
        if is_stale or run.is_expired:
            with pytest.raises(LeaseLostError):
                self.backend.run(call())
        else:
            self.backend.run(call())
            run.settle(how, self.model.now, asked.wait_id)

    def _settling(self, how: str, lease: Lease, asked: NewWait) -> Callable[[], Awaitable[Any]]:
        store = self.backend.store
        at: dict[str, Any] = {"checkpoint_id": None, "step": None}
        backoff: dict[str, Any] = {"delay": BACKOFF, "failures": {}}
        return {
            "park": lambda: store.park_run(lease, [asked], **at),
            "finish": lambda: store.finish_run(lease, {"n": 1}, **at),
            "fail": lambda: store.fail_run(lease, FAILURE, reason="exhausted", **at),
            "retry": lambda: store.retry_run(lease, FAILURE, **backoff, **at),
            "release": lambda: store.release_run(lease, reason="drain", counts=False),
            "cancel": lambda: store.finish_cancel(lease),
            "hold": lambda: store.pause_failed_run(lease, FAILURE, reason="exhausted", **at),
        }[how]

    @precondition(lambda self: self.model.of(R))
    @rule(is_death=st.booleans(), number=index)
    def beat_or_die(self, is_death: bool, number: int) -> None:
        """Extend the leases of one instance, or let them expire together."""
        run = self.pick(number, R)
        assert run is not None
        runs = [other for other in self.model.of(R) if other.instance == run.instance]
        report = self.do(
            "extend_leases", [other.lease for other in runs], EXPIRED if is_death else LEASE
        )
        for other in runs:
            assert report[other.id].lost is other.is_expired
            if not other.is_expired:
                assert report[other.id].stop == self.model.stop_of(other)
                other.is_expired = is_death

    # What time does

    @rule(length=st.integers(min_value=1, max_value=90))
    def wait(self, length: int) -> None:
        self.backend.time += timedelta(seconds=length)
        self.model.now = self.backend.time

    @rule()
    def fire(self) -> None:
        assert self.do("fire_due", self.tenant, limit=100) == self.model.fire()

    # What holds

    @invariant()
    def store_is_as_the_model(self) -> None:
        if not hasattr(self, "model") or not self.model.runs:
            return
        page = self.do(
            "list_runs",
            self.tenant,
            status=None,
            graph=None,
            thread_id=None,
            limit=1000,
            cursor=None,
        )
        for run in page.items:
            expected = self.model.runs[run.id]
            assert (
                run.status,
                run.attempt,
                run.losses,
                run.claims,
                run.dead_letter,
                run.paused_at is not None,
                run.deadline_at,
            ) == (
                expected.status,
                expected.attempt,
                expected.losses,
                expected.claims,
                expected.is_dead,
                expected.is_paused,
                expected.deadline,
            ), run.id
        running = [run.thread_id for run in page.items if run.status is R]
        assert len(running) == len(set(running)), "never two attempts on one thread"

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        letters = self.do(
            "list_dead_letters", self.tenant, graph=None, reason=None, limit=1000, cursor=None
        )
        assert {x.run_id for x in letters.items} == {r.id for r in self.model.of(F) if r.is_dead}
        for run in self.model.runs.values():
            log = self.do("list_events", self.tenant, run.id, after=0, limit=1000)
            assert [event.seq for event in log] == list(range(1, len(log) + 1))
            ends = [e for e in log if e.type in {"run.succeeded", "run.failed", "run.cancelled"}]
            starts = [event for event in log if event.type == "run.requeued"]
            assert len(ends) == len(starts) + run.status.is_ended, "one end for each beginning"
        assert self.backend.run(self.backend.damages(self.tenant)) == []


def _machine(url: str) -> None:
    backend = Backend(url)
    machine = type("Machine", (RunStoreMachine,), {"backend": backend})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES or 10,
                stateful_step_count=40,
                deadline=None,
                database=None,
                derandomize=not EXAMPLES,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        backend.close()


def test_store_in_memory_does_what_the_model_does() -> None:
    _machine("memory://")


def test_store_does_what_the_model_does(database_url: str) -> None:
    _machine(database_url)
