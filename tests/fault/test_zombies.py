"""A worker that was stopped past its lease and continues: its writes are refused.

Another worker has taken its run over and ended it meanwhile. Afterwards not one row of the run is
other than before the zombie continued.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import Saver
from agentflow.database.tables import checkpoints, threads
from agentflow.errors import FencedError, LeaseLostError
from agentflow.journal import NewEffect
from agentflow.storage import RunStore
from agentflow.types import Lease, RunFailure, RunStatus
from tests.fault.calls import INPUTS
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import Victim
from tests.fault.graphs import LINEAR
from tests.fault.sabotage import VERBS, Place
from tests.fault.scene import (
    AT_ONCE,
    LEASE,
    LONG,
    Scene,
    assert_sound,
    cancel,
    drain,
    logged,
    read_everything,
    read_rows,
    read_thread_rows,
    stay,
)
from tests.fault.test_kills import INPUT, OUTPUT, survey

SHORT = timedelta(milliseconds=50)
AN_HOUR = timedelta(hours=1)
FAILURE = RunFailure(type="tests.Zombie", message="too late")


@dataclass
class Late:
    """What a worker holds that does not know that it was replaced."""

    store: RunStore
    saver: Saver
    lease: Lease

    @property
    def thread(self) -> Any:
        return {"configurable": {"thread_id": self.lease.thread_id, "checkpoint_ns": ""}}

    async def put(self) -> None:
        await self.saver.aput(self.thread, empty_checkpoint(), {"step": 9}, {})

    async def put_sync(self) -> None:
        self.saver.put(self.thread, empty_checkpoint(), {"step": 9}, {})

    async def put_writes(self) -> None:
        await self.saver.aput_writes(await self._head(), [("log", ["late"])], "late")

    async def put_writes_sync(self) -> None:
        self.saver.put_writes(await self._head(), [("log", ["late"])], "late")

    async def delete_thread(self) -> None:
        await self.saver.adelete_thread(self.lease.thread_id)

    async def start_attempt(self) -> None:
        await self.store.start_attempt(
            self.lease,
            progress="p",
            reason="start",
            checkpoint_id=None,
            step=None,
            traceparent=None,
        )

    async def finish_run(self) -> None:
        await self.store.finish_run(self.lease, {"late": True}, checkpoint_id=None, step=None)

    async def park_run(self) -> None:
        await self.store.park_run(self.lease, [], checkpoint_id=None, step=None)

    async def retry_run(self) -> None:
        await self.store.retry_run(
            self.lease, FAILURE, delay=SHORT, failures={}, checkpoint_id=None, step=None
        )

    async def fail_run(self) -> None:
        await self.store.fail_run(
            self.lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None
        )

    async def pause_failed_run(self) -> None:
        await self.store.pause_failed_run(
            self.lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None
        )

    async def end_isolation(self) -> None:
        await self.store.end_isolation(self.lease)

    async def finish_rollback(self) -> None:
        await self.store.finish_rollback(self.lease, ["run"])

    async def migrate_run(self) -> None:
        await self.store.migrate_run(
            self.lease,
            version="2",
            fingerprint="f",
            checkpoint_id=None,
            waits=[],
            has_work=True,
            by=None,
        )

    async def begin_effect(self) -> None:
        new = NewEffect(
            id="late",
            scope="run",
            key="late",
            name="tests:late",
            arguments={},
            ns="",
            task_id="",
            node="",
            on_in_doubt="ask",
        )
        await self.store.begin_effect(self.lease, new)

    async def release_run(self) -> None:
        await self.store.release_run(self.lease, reason="drain", counts=False)

    async def finish_cancel(self) -> None:
        await self.store.finish_cancel(self.lease)

    async def raise_token(self) -> None:
        await self.store.raise_token(self.lease, above=self.lease.token)

    async def _head(self) -> Any:
        found = await self.saver.aget_tuple(self.thread)
        assert found is not None
        return found.config


OF_THE_THREAD = (
    Late.put,
    Late.put_sync,
    Late.put_writes,
    Late.put_writes_sync,
    Late.delete_thread,
)
OF_THE_RUN = (
    Late.start_attempt,
    Late.finish_run,
    Late.park_run,
    Late.retry_run,
    Late.fail_run,
    Late.pause_failed_run,
    Late.migrate_run,
    Late.begin_effect,
    Late.end_isolation,
    Late.finish_rollback,
    Late.release_run,
    Late.finish_cancel,
    Late.raise_token,
)


def test_every_verb_that_takes_a_lease_is_one_of_these() -> None:
    takes_lease = {
        verb
        for verb in VERBS
        if "lease" in list(inspect.signature(getattr(RunStore, verb)).parameters)[1:2]
    }
    # What a call has done is kept whoever made it; see the conformance suite.
    assert takes_lease - {"finish_effect"} == {verb.__name__ for verb in OF_THE_RUN}


@pytest.mark.parametrize("is_ended", [False, True], ids=["taken-over", "ended-by-the-other"])
async def test_replaced_worker_is_refused_by_every_verb(
    scene: Scene, tally: Tally, is_ended: bool
) -> None:
    late = await replaced(scene, is_ended=is_ended)
    before = read_everything(scene.url, ["run"])
    for verb in OF_THE_THREAD:
        with pytest.raises(FencedError):
            await verb(late)
    for verb in OF_THE_RUN:
        with pytest.raises(LeaseLostError):
            await verb(late)
    assert read_everything(scene.url, ["run"]) == before
    tally(refused=len(OF_THE_THREAD) + len(OF_THE_RUN))


async def test_replaced_worker_cannot_extend_its_lease(scene: Scene) -> None:
    late = await replaced(scene, is_ended=False)
    before = read_everything(scene.url, ["run"])
    report = await late.store.extend_leases([late.lease], AN_HOUR)
    assert report["run"].lost
    assert read_everything(scene.url, ["run"]) == before


async def test_replaced_worker_cannot_take_the_thread_back(scene: Scene) -> None:
    late = await replaced(scene, is_ended=False)
    before = read_everything(scene.url, ["run"])
    assert await late.saver.acquire(late.lease) > late.lease.token
    await late.saver.release(late.lease)
    assert read_everything(scene.url, ["run"]) == before


async def replaced(scene: Scene, *, is_ended: bool) -> Late:
    """Return a lease on `run`, with a checkpoint made under it, after another has followed it."""
    store: RunStore = scene.app._store
    saver = scene.app._saver
    assert isinstance(saver, Saver)
    await scene.app.submit("linear", INPUT, run_id="run")
    claimed = await store.claim_run("", "run", worker="old", lease=timedelta(seconds=0.5))
    assert claimed is not None
    late = Late(store, saver.with_lease(claimed.lease), claimed.lease)
    await saver.acquire(claimed.lease)
    await late.put()
    await scene.expired("run")
    follower = await store.claim_run("", "run", worker="new", lease=AN_HOUR)
    assert follower is not None
    assert follower.lease.token > claimed.lease.token
    await saver.acquire(follower.lease)
    if is_ended:
        await store.finish_run(follower.lease, OUTPUT, checkpoint_id=None, step=None)
        await saver.release(follower.lease)
    return late


@dataclass(frozen=True)
class Path:
    """How a worker comes to write something, where it is stopped then, and what is left to do."""

    kind: str
    graph: str = "linear"
    status: RunStatus = RunStatus.SUCCEEDED
    during: Callable[[Scene, Victim, str], Awaitable[None]] | None = None
    deaf: bool = True
    """Whether it has no heartbeat that might tell it of anything."""

    async def follow(self, scene: Scene, zombie: Victim) -> None:
        """Do what others do while the worker is in a node, if anything."""
        if self.during is not None:
            await self.during(scene, zombie, "run")


PATHS = {
    "heartbeat": Path("RunStore.extend_leases", deaf=False, during=stay),
    "put": Path("Saver.aput"),
    "put_writes": Path("Saver.aput_writes"),
    "park": Path("RunStore.park_run", "questions", RunStatus.WAITING),
    "finish": Path("RunStore.finish_run"),
    "retry": Path("RunStore.retry_run", "flaky"),
    "fail": Path("RunStore.fail_run", "broken", RunStatus.FAILED),
    "release": Path("RunStore.release_run", during=drain),
    "cancel": Path("RunStore.finish_cancel", status=RunStatus.CANCELLED, during=cancel, deaf=False),
    "thread-release": Path("Saver.release"),
}


@pytest.mark.parametrize("path", PATHS)
async def test_worker_that_was_stopped_before_it_wrote_is_refused(
    scene: Scene, tally: Tally, path: str
) -> None:
    """Whatever it was about to write: by the fence, or, where it has a heartbeat, by that."""
    tried = PATHS[path]
    if tried.during is not None:
        scene.ledger.hold(run="run", event="enter")
    await scene.app.submit(tried.graph, INPUTS[tried.graph], run_id="run")
    place = Place(tried.kind, 1, "before")
    zombie = scene.worker(
        lease=LONG if tried.deaf else 3 * LEASE, deaf=tried.deaf, at=place.plain(), how="SIGSTOP"
    )
    await tried.follow(scene, zombie)
    await scene.stopped(zombie)
    scene.ledger.release()
    scene.expire(["run"])
    scene.worker(lease=LONG)

    async def is_settled() -> bool | None:
        return (await scene.app.get_run("run")).status is tried.status or None

    await scene.until(is_settled, f"the run to be {tried.status}")
    await given_back(scene, ["run"])
    before = read_everything(scene.url, ["run"])
    zombie.resume()

    async def is_refused() -> bool | None:
        said = zombie.output()
        return ("attempt was fenced" in said or "lease lost" in said) or None

    await scene.until(is_refused, "the zombie to notice")
    zombie.kill()
    zombie.wait()
    assert read_everything(scene.url, ["run"]) == before
    assert max(scene.entered("run").values(), default=0) <= 2
    tally(zombies=1, refused=1)


@pytest.mark.parametrize("company", [False, True], ids=["alone", "in-company"])
@pytest.mark.parametrize("deaf", [False, True], ids=["with-heartbeat", "without-heartbeat"])
async def test_stopped_worker_that_continues_changes_nothing(
    scene: Scene, sampler: Sampler, tally: Tally, deaf: bool, company: bool
) -> None:
    """Wherever it was stopped; without a heartbeat only the fence tells it that it is late.

    In company, where each commit holds something else as well, it is stopped inside transactions
    of Postgres that have written the checkpoint.
    """
    tried = sampler.some(await stoppable(scene, deaf=deaf, company=company), 5)
    zombies = await scene.stop_each(
        tried,
        lambda name: scene.app.submit("linear", INPUT, run_id=name, queue=name),
        deaf=deaf,
        company=company,
    )
    run_ids = [str(place) for place in tried]
    scene.worker(queues=run_ids, concurrency=10)
    for run in await scene.ended(run_ids):
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, OUTPUT), run.id
    await given_back(scene, run_ids)
    before = read_everything(scene.url, run_ids)
    for begin in range(0, len(zombies), AT_ONCE):
        await outlived(scene, zombies[begin : begin + AT_ONCE])
    assert read_everything(scene.url, run_ids) == before
    for place in tried:
        again = scene.entered(str(place))
        assert set(again) == set(LINEAR)
        assert max(again.values()) <= 2
    assert_sound(scene.url, run_ids)
    pids = {zombie.pid for zombie in zombies}
    went_on = sum("fenced" in z.output() or "lease lost" in z.output() for z in zombies)
    assert went_on > 0, "no zombie tried anything"
    left = Counter(e["pid"] in pids for e in scene.ledger.entries(event="leave"))
    tally(zombies=len(zombies), refused=went_on, nodes_left_by_zombies=left[True])


async def test_worker_stopped_inside_a_node_finishes_it_in_vain(scene: Scene) -> None:
    """The node goes on after SIGCONT, as the ledger shows; what it returns reaches no one."""
    await scene.app.submit("linear", INPUT, run_id="run")
    scene.ledger.hold(run="run", node="b", event="enter")
    zombie = scene.worker(deaf=True)
    await logged(scene, run="run", node="b")
    zombie.stop()
    scene.ledger.release()
    scene.worker()
    (run,) = await scene.ended(["run"])
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, OUTPUT)
    await given_back(scene, ["run"])
    before = read_everything(scene.url, ["run"])
    await outlived(scene, [zombie])
    assert scene.ledger.entries(event="leave", run="run", node="b", pid=zombie.pid)
    assert "attempt was fenced" in zombie.output()
    assert read_everything(scene.url, ["run"]) == before
    assert scene.entered("run") == {"a": 1, "b": 2, "c": 1, "d": 1}
    saved = read_thread_rows(scene.url, checkpoints, ["run"])
    assert len(saved) == 6
    assert Counter(c.attempt for c in saved)["1"] == 3, "b, c and d are the successor's"


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_statement_that_ran_but_was_not_committed_when_the_claim_arrived(
    scene: Scene, moment: Any, tally: Tally
) -> None:
    """On Postgres the claim gets through and the transaction is gone; SQLite lets it commit first.

    A SQLite file stays locked while its writer is stopped, so there the claim comes after SIGCONT.
    The worker is in company: alone, a put is one statement that commits by itself. What becomes of
    that one when its worker is stopped meanwhile stands in `test_uncommitted`.
    """
    middle = Place("insert", 4, moment)
    (zombie,) = await scene.stop_each(
        [middle],
        lambda name: scene.app.submit("linear", INPUT, run_id=name, queue=name),
        deaf=True,
        company=True,
    )
    run_id = str(middle)
    scene.worker(queues=[run_id])
    await scene.expired(run_id)
    if scene.url.startswith("sqlite"):
        zombie.resume()
    (run,) = await scene.ended([run_id])
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, OUTPUT)
    if scene.url.startswith("postgresql"):
        await given_back(scene, [run_id])
        before = read_everything(scene.url, [run_id])
        await outlived(scene, [zombie])
        assert read_everything(scene.url, [run_id]) == before
        saved = read_thread_rows(scene.url, checkpoints, [run_id])
        assert len(saved) == 6
        assert Counter(row.attempt for row in saved)["1"] == 3, "all others are a successor's"
    assert_sound(scene.url, [run_id])
    assert max(scene.entered(run_id).values()) <= 2
    tally(zombies=1)


async def stoppable(scene: Scene, *, deaf: bool, company: bool) -> list[Place]:
    """Return the places at which a stopped worker leaves the database to the others.

    Postgres ends the session of one that was stopped inside a transaction. A SQLite file stays
    locked, so there only the places outside of transactions are left; of a node or of a verb,
    whether something is being written meanwhile cannot be known.
    """
    # How many puts become durable by one call of the rows is a matter of time.
    found = [
        place
        for place in await survey(scene, "linear", company=company)
        if not place.kind.startswith("Rows.")
    ]
    if scene.url.startswith("postgresql"):
        return found
    inside = {"insert"} if deaf else {"insert", "node"}
    return [
        place
        for place in found
        if (place.moment == "after" and place.kind not in inside and "." not in place.kind)
        # What is put alone, and beside no heartbeat, is decided on before its transaction begins.
        or (deaf and not company and (place.kind, place.moment) == ("insert", "before"))
    ]


async def given_back(scene: Scene, run_ids: list[str]) -> None:
    """Wait until the threads of ended runs are free: that follows the end in another commit."""

    async def free() -> bool | None:
        rows = read_rows(scene.url, threads, threads.c.thread_id.in_(run_ids))
        return not any(row.is_leased for row in rows) or None

    await scene.until(free, "the threads to be given back")


async def outlived(scene: Scene, zombies: list[Victim]) -> None:
    """Let zombies continue until they have done all that they wanted to: each executes a new run.

    They drive one run at a time, so they are through with the old one by then, and still alive.
    """
    names = {f"canary-{zombie.pid}": zombie.pid for zombie in zombies}
    for name in names:
        await scene.app.submit("single", {"input": name}, run_id=name, queue=name)
    for zombie in zombies:
        zombie.resume()
    for run in await scene.ended(names):
        assert run.status is RunStatus.SUCCEEDED, run.error
        entries = scene.ledger.entries(event="enter", run=run.id)
        assert {entry["pid"] for entry in entries} == {names[run.id]}
    for zombie in zombies:
        zombie.kill()
        zombie.wait()
