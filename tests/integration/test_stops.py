"""Attempts that are stopped: by time, by a lost lease, by people, and by their worker's end."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from typing import Any

import pytest

from agentflow import AgentFlow, RetryPolicy, request_approval, shield
from agentflow.errors import InvalidInputError, LeaseLostError
from agentflow.types import AuditEvent, Run
from agentflow.worker import Worker
from tests.integration.graphs import State, asks, chain, fan, logs

AT_ONCE = RetryPolicy(initial_interval=0, jitter=False, max_attempts=2)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on an empty database."""
    async with AgentFlow(database_url) as opened:
        yield opened


class Stuck:
    """A node that runs in a thread and does not return before it is told to."""

    def __init__(self, *, times: int = 99, then: Callable[[], Any] = lambda: None) -> None:
        self.calls = 0
        self.entered = asyncio.Event()
        self.go_on = threading.Event()
        self.left = threading.Semaphore(0)
        self.said: list[Any] = []
        self._times = times
        self._then = then
        self._loop = asyncio.get_running_loop()

    def __call__(self, state: State) -> State:
        self.calls += 1
        if self.calls <= self._times:
            self._loop.call_soon_threadsafe(self.entered.set)
            self.go_on.wait()
            try:
                self.said.append(self._then())
            except Exception as exc:  # noqa: BLE001 -- what it says is looked at
                self.said.append(exc)
            self.left.release()
        return {"log": ["late" if self.calls <= self._times else "in time"]}

    async def finish(self, calls: int = 1) -> list[Any]:
        """Let the calls return, and say what they met afterwards."""
        self.go_on.set()
        for _ in range(calls):
            await asyncio.to_thread(self.left.acquire)
        return self.said


class Waits:
    """An async node that waits for ever, or as a shielded section for a while."""

    def __init__(self, section: Callable[[], Any] | None = None) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.done: list[str] = []
        self._section = section

    async def __call__(self, state: State) -> State:
        self.entered.set()
        try:
            if self._section is not None:
                async with self._section():
                    await self.go_on.wait()
                    self.done.append("section")
                self.done.append("after")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return {}


async def types(app: AgentFlow, run_id: str) -> list[str]:
    return [event.type for event in await app.list_events(run_id)]


async def until(app: AgentFlow, run_id: str, kind: str) -> AuditEvent:
    """Wait for an event of a run."""
    async with asyncio.timeout(30):
        async for event in app.events(run_id):
            if event.type == kind:
                return event
    raise AssertionError(f"{run_id} ended without {kind}")


@asynccontextmanager
async def running(
    app: AgentFlow, **options: Any
) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
    """Run a worker as `agentflow worker` does, whose end can be waited for."""
    worker = app.worker(**options)
    task = asyncio.create_task(worker.run())
    try:
        yield worker, task
    finally:
        worker.stop()
        await task


async def test_thread_that_is_too_slow_is_left_behind_and_its_late_result_dropped(
    app: AgentFlow,
) -> None:
    stuck = Stuck(times=1, then=lambda: request_approval("too late"))
    app.register(
        chain(("a", logs("a")), ("slow", stuck)),
        name="g",
        retry=AT_ONCE,
        node_timeout={"slow": 0.2},
    )
    async with running(app) as (worker, _):
        handle = await app.submit("g", {})
        retried = await until(app, handle.id, "run.retried")
        assert retried.data["error"] == "langgraph.errors.NodeTimeoutError"
        assert retried.data["node"] == "slow"
        assert await handle.result(timeout=30) == {"log": ["a", "in time"]}
        assert worker.stats().abandoned == 1
        before = await app.list_events(handle.id)
        (said,) = await stuck.finish()
        assert isinstance(said, LeaseLostError)
        assert await app.list_events(handle.id) == before
        assert (await handle.state()).values == {"log": ["a", "in time"]}


async def test_langgraphs_timeout_of_an_async_node_fails_the_attempt_and_counts(
    app: AgentFlow,
) -> None:
    waits = Waits()
    graph = chain(("a", logs("a")))
    graph.add_node("b", waits, timeout=0.1)
    graph.add_edge("a", "b")
    app.register(graph, name="g", retry=AT_ONCE)
    await app.submit("g", {}, run_id="r")
    run = await app.drive("r")
    assert (run.status, run.claims) == ("failed", AT_ONCE.max_attempts)
    assert run.error is not None
    assert (run.error.type, run.error.node) == ("langgraph.errors.NodeTimeoutError", "b")


async def test_worker_with_too_many_stuck_threads_drains_and_asks_to_be_replaced(
    app: AgentFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_MAX_ABANDONED", "1")
    async with AgentFlow(app.url) as strict:
        stuck = Stuck()
        strict.register(chain(("slow", stuck)), name="g", retry=AT_ONCE, node_timeout={"slow": 0.1})
        strict.register(chain(("a", logs("a"))), name="quick")
        async with running(strict) as (worker, task):
            handle = await strict.submit("g", {})
            assert (await handle.wait(timeout=30)).status == "failed"
            await asyncio.wait_for(asyncio.shield(task), 30)
            stats = worker.stats()
            assert (stats.health, stats.abandoned) == ("overloaded", 2)
            left = await strict.submit("quick", {})
        await stuck.finish(2)
        assert await left.status() == "queued"
        async with strict.worker():
            assert await left.result(timeout=30) == {"log": ["a"]}


async def test_loop_that_a_node_blocks_costs_the_run_its_lease(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing here can stop it; another worker goes on, and what it wrote is refused."""
    monkeypatch.setenv("AGENTFLOW_LEASE", "2")
    blocks, again = threading.Event(), threading.Event()

    async def block(state: State) -> State:
        if again.is_set():
            return {"log": ["elsewhere"]}
        again.set()
        blocks.wait()
        return {"log": ["blocked"]}

    async with AgentFlow(database_url) as app:
        app.register(chain(("a", block)), name="g", node_timeout={"a": 0.1})
        handle = await app.submit("g", {})

        def elsewhere() -> Run:
            async def drive() -> Run:
                async with AgentFlow(database_url) as other:
                    other.register(chain(("a", block)), name="g")
                    async with other.worker():
                        return await other.wait(handle.id, timeout=30)

            again.wait()
            try:
                return asyncio.run(drive())
            finally:
                blocks.set()

        with_other_loop: list[Run] = []
        thread = threading.Thread(target=lambda: with_other_loop.append(elsewhere()))
        thread.start()
        async with app.worker():
            run = await handle.wait(timeout=30)
        thread.join()
        assert with_other_loop[0].output == run.output == {"log": ["elsewhere"]}


async def test_attempt_stops_before_its_lease_ends_although_the_heartbeat_is_stuck(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_LEASE", "4")
    waits = Waits()
    async with AgentFlow(sqlite_url) as app:
        app.register(chain(("a", waits)), name="g")
        async with app.worker():
            handle = await app.submit("g", {})
            await waits.entered.wait()
            # Whatever is written waits for this: the heartbeat hangs in the store.
            lock = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
            with closing(lock):
                lock.execute("BEGIN IMMEDIATE")
                await asyncio.wait_for(waits.cancelled.wait(), 30)
                query = "SELECT status, lease_expires_at FROM agentflow_runs"
                status, expires_at = lock.execute(query).fetchone()
            assert status == "running"
            assert time.time() < expires_at / 1e6, "it held to the last"
            waits.entered.clear()
            await asyncio.wait_for(waits.entered.wait(), 30)
            await handle.cancel()
            await handle.wait(timeout=30)
    log = [event async for event in app_events(sqlite_url, handle.id)]
    assert [e.data["reason"] for e in log if e.type == "run.resumed"] == ["recovery"]


async def app_events(url: str, run_id: str) -> AsyncIterator[AuditEvent]:
    async with AgentFlow(url) as app:
        for event in await app.list_events(run_id):
            yield event


@pytest.mark.parametrize("in_thread", [False, True])
async def test_cancelled_run_finishes_its_shielded_section_first(
    app: AgentFlow, in_thread: bool
) -> None:
    waits = Waits(shield)
    told: list[tuple[str, str]] = []
    begun, go_on, done = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def in_a_thread(state: State) -> State:
        with shield():
            loop.call_soon_threadsafe(begun.set)
            go_on.wait()
            done.append("section")
        return {}

    async def hook(run: Run) -> None:
        told.append((run.id, str((await app.get_run(run.id)).status)))

    node: Any = in_a_thread if in_thread else waits
    app.register(chain(("a", node), ("b", logs("b"))), name="g", on_cancel=hook)
    async with app.worker():
        handle = await app.submit("g", {})
        await (begun if in_thread else waits.entered).wait()
        await handle.cancel(by="ada")
        with pytest.raises(TimeoutError):
            await handle.wait(timeout=0.5)
        assert told == []
        (go_on if in_thread else waits.go_on).set()
        assert (await handle.wait(timeout=30)).status == "cancelled"
    assert (done if in_thread else waits.done) == ["section"]
    assert told == [(handle.id, "running")]
    assert (await types(app, handle.id))[-2:] == ["run.cancel_requested", "run.cancelled"]


async def test_hook_that_fails_does_not_keep_a_run_from_being_cancelled(app: AgentFlow) -> None:
    def hook(run: Run) -> None:
        raise ZeroDivisionError

    waits = Waits()
    app.register(chain(("a", waits)), name="g", on_cancel=hook)
    async with app.worker():
        handle = await app.submit("g", {})
        await waits.entered.wait()
        await handle.cancel()
        assert (await handle.wait(timeout=30)).status == "cancelled"
    assert waits.cancelled.is_set()


async def test_drain_gives_slow_nodes_up_within_the_grace_period(
    app: AgentFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_GRACE", "2")
    async with AgentFlow(app.url) as hasty:
        stuck, waits = Stuck(times=1), Waits()
        hasty.register(chain(("a", logs("a")), ("b", stuck)), name="thread")
        hasty.register(chain(("a", logs("a")), ("b", waits)), name="async")
        async with running(hasty) as (worker, task):
            handles = [await hasty.submit(name, {}) for name in ("thread", "async")]
            await stuck.entered.wait()
            await waits.entered.wait()
            worker.stop()
            await asyncio.wait_for(task, 30)
        for handle in handles:
            run = await handle.run()
            assert (run.status, run.attempt) == ("queued", 0)
            released = (await hasty.list_events(handle.id))[-1]
            assert (released.type, released.data["reason"]) == ("run.released", "drain")
        async with hasty.worker():
            assert await handles[0].result(timeout=30) == {"log": ["a", "in time"]}
            await handles[1].cancel()
            await handles[1].wait(timeout=30)
        await stuck.finish()
        assert (await handles[0].state()).values == {"log": ["a", "in time"]}


async def test_many_threads_at_once_are_no_fewer_than_the_runs(app: AgentFlow) -> None:
    """Twelve runs, each in a node that waits for the eleven others, in threads."""
    meeting = threading.Barrier(12, timeout=30)

    def meet(state: State) -> State:
        meeting.wait()
        return {"log": ["met"]}

    app.register(chain(("a", meet)), name="g")
    async with app.worker(concurrency=12):
        handles = [await app.submit("g", {}) for _ in range(12)]
        for handle in handles:
            assert await handle.result(timeout=60) == {"log": ["met"]}


async def test_timeouts_and_policies_of_unknown_nodes_are_refused(app: AgentFlow) -> None:
    graph = fan(("a", logs("a")), ("b", asks("ok?")), then=logs("end"))
    for options, named in (
        ({"node_timeout": {"typo": 1}}, "node_timeout: .*'typo'"),
        ({"node_timeout": {"a": 0}}, "above 0 for node 'a'"),
        ({"node_retry": {"typo": RetryPolicy()}}, "node_retry: .*'typo'"),
    ):
        with pytest.raises(InvalidInputError, match=named):
            app.register(graph, name="g", **options)
    app.register(graph, name="g", node_timeout={"a": timedelta(seconds=1)})


async def test_node_has_a_retry_policy_of_its_own(app: AgentFlow) -> None:
    def fail(state: State) -> State:
        raise ConnectionError

    app.register(
        chain(("a", fail)),
        name="g",
        retry=RetryPolicy(initial_interval=0, max_attempts=9),
        node_retry={"a": AT_ONCE},
    )
    await app.submit("g", {}, run_id="r")
    assert (await app.drive("r")).claims == AT_ONCE.max_attempts


async def test_policy_is_that_of_the_submission_whatever_is_registered_later(
    app: AgentFlow,
) -> None:
    def fail(state: State) -> State:
        raise ConnectionError

    app.register(chain(("a", fail)), name="g", retry=AT_ONCE)
    await app.submit("g", {}, run_id="r")
    async with AgentFlow(app.url) as later:
        later.register(chain(("a", fail)), name="g", retry=RetryPolicy(max_attempts=9))
        assert (await later.drive("r")).claims == AT_ONCE.max_attempts


async def test_run_whose_attempts_are_used_up_is_paused_if_so_wanted(app: AgentFlow) -> None:
    calls = []

    def fail(state: State) -> State:
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionError
        return {"log": ["mended"]}

    policy = RetryPolicy(initial_interval=0, max_attempts=2, on_exhausted="pause")
    app.register(chain(("a", fail)), name="g", retry=policy)
    async with app.worker():
        handle = await app.submit("g", {})
        paused = await until(app, handle.id, "run.paused")
        assert paused.data["reason"] == "exhausted"
        run = await handle.run()
        assert (run.status, run.dead_letter, len(calls)) == ("queued", False, 2)
        assert run.paused_at is not None
        await app._store.resume_run("", handle.id, by="ada")
        assert await handle.result(timeout=30) == {"log": ["mended"]}
