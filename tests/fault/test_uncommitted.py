"""A put and a claim that meet in the database: whichever is first, exactly one order holds.

One of them was executed and is not committed when the other arrives. Or it waits in the server when
its worker is stopped or killed: on PostgreSQL a put is one statement that commits by itself, so the
server may commit it after its worker is gone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, cast

import pytest
import sqlalchemy as sa
from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.codec import Codec
from agentflow.config import load_settings
from agentflow.database import Database
from agentflow.database.connections import Connections
from agentflow.database.engine import now, parse_url
from agentflow.database.futures import Future
from agentflow.database.session import Session
from agentflow.database.tables import checkpoints, runs, threads, values, writes
from agentflow.database.writer import Operation, Rejected
from agentflow.errors import ConflictError, FencedError, StoreUnavailableError
from agentflow.types import FencingToken, Lease, RunStatus
from tests.fault.conftest import Tally
from tests.fault.forkserver import Victim
from tests.fault.scene import (
    Scene,
    assert_sound,
    connected,
    durable_nodes,
    read_everything,
    read_rows,
    read_thread_rows,
)
from tests.fault.test_kills import INPUT, OUTPUT
from tests.fault.test_zombies import given_back, logged, outlived

End = Literal["committed", "rolled-back"]
Act = Callable[[Saver], None]
BOTH_ENDS = pytest.mark.parametrize("end", ["committed", "rolled-back"])
ON_POSTGRES = pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
GONE = pytest.mark.parametrize("gone", ["killed", "stopped"])
THREAD: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
PATIENCE = 30.0
LONG = timedelta(seconds=60)


def lease(token: int) -> Lease:
    return Lease(
        tenant="", run_id="r", thread_id="t", worker=f"w{token}", token=FencingToken(token)
    )


async def put(saver: Saver, token: int, step: int) -> None:
    await saver.with_lease(lease(token)).aput(THREAD, empty_checkpoint(), {"step": step}, {})


def put_under_one(saver: Saver) -> None:
    saver.with_lease(lease(1)).put(THREAD, empty_checkpoint(), {"step": 1}, {})


def claim_under_two(saver: Saver) -> None:
    assert asyncio.run(saver.acquire(lease(2))) == 2


def steps(url: str) -> list[int]:
    saved = read_thread_rows(url, checkpoints, ["t"])
    return [row.step for row in sorted(saved, key=lambda row: row.seq)]


@pytest.fixture
async def saver(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Saver]:
    """A checkpointer with a thread that is leased under token 1 and has one checkpoint."""
    monkeypatch.setenv("AGENTFLOW_LEASE", "60")  # and with it, how long Postgres waits for a row
    async with open_checkpointer(database_url) as opened:
        await opened.acquire(lease(1))
        await put(opened, 1, step=0)
        yield opened


class Another:
    """Somebody else's connection, on which something is executed and not committed yet."""

    def __init__(self, url: str, *, is_alone: bool) -> None:
        """Open a transaction: one of puts alone, or that of a batch with several operations."""
        self._connections = Connections(parse_url(url), load_settings())
        self._is_alone = is_alone
        self._executed, self._is_over = threading.Event(), threading.Event()
        self._end: End = "rolled-back"
        self._error: BaseException | None = None

    @contextmanager
    def executes(self, act: Act) -> Iterator[None]:
        """Execute something, and keep the transaction open until `end` or the end of the block."""
        thread = threading.Thread(target=self._serve, args=(act,), daemon=True)
        thread.start()
        try:
            assert self._executed.wait(PATIENCE)
            yield
        finally:
            self._is_over.set()
            thread.join()
        assert self._error is None

    def end(self, how: End) -> None:
        """Commit the transaction, or roll it back."""
        self._end = how
        self._is_over.set()

    def _serve(self, act: Act) -> None:
        def transact(session: Session) -> None:
            act(saver_in(session))
            self._executed.set()
            self._is_over.wait(PATIENCE)
            if self._end == "rolled-back":
                raise _RolledBack

        def transact_alone(session: Session) -> None:
            with session.transaction():
                transact(session)

        try:
            if self._is_alone:
                self._connections.run_committing(transact_alone)
            else:
                with self._connections.writing() as session:
                    transact(session)
        except _RolledBack:
            pass
        except BaseException as error:  # noqa: BLE001 -- the test fails with it
            self._error = error
        finally:
            self._executed.set()
            self._connections.end_writing()
            self._connections.dispose()


class _RolledBack(Exception):  # noqa: N818 -- wanted
    pass


class _InSession:
    """A database whose operations are executed at once, in a transaction that is open."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def submit(self, operation: Operation) -> Future:
        (outcome,) = type(operation).run(self._session, [operation])
        if isinstance(outcome, Rejected):
            operation.future.settle(error=outcome.error)
        else:
            operation.future.settle(outcome)
        return operation.future

    enqueue = submit

    def push(self, operation: Operation) -> None:
        assert operation.future.done()

    async def settled(self, future: Future) -> Any:
        return future.result()


def saver_in(session: Session) -> Saver:
    """Return a saver that executes what it is told in a transaction, and commits nothing."""
    return Saver(cast("Database", _InSession(session)), codec=Codec())


@pytest.fixture(params=[True, False], ids=["alone", "in-company"])
def another(request: pytest.FixtureRequest, saver: Saver, database_url: str) -> Another:
    """Somebody else, who executes a put or a claim in either kind of transaction."""
    return Another(database_url, is_alone=request.param)


@BOTH_ENDS
async def test_claim_that_meets_an_uncommitted_put_waits_for_its_end(
    saver: Saver, another: Another, database_url: str, end: End
) -> None:
    with another.executes(put_under_one):
        claim = asyncio.create_task(saver.acquire(lease(2)))
        await waiting(database_url, claim)
        another.end(end)
        assert await claim == 2
    expected = [0, 1] if end == "committed" else [0]
    assert steps(database_url) == expected
    with pytest.raises(FencedError):
        await put(saver, 1, step=2)
    assert steps(database_url) == expected
    await put(saver, 2, step=3)
    assert steps(database_url) == [*expected, 3]


@BOTH_ENDS
async def test_put_that_meets_an_uncommitted_claim_waits_for_its_end(
    saver: Saver, another: Another, database_url: str, end: End
) -> None:
    """It was planned from a remembered state of the thread, which holds no longer, or does."""
    with another.executes(claim_under_two):
        late = asyncio.create_task(put(saver, 1, step=1))
        await waiting(database_url, late)
        another.end(end)
        if end == "committed":
            with pytest.raises(FencedError):
                await late
        else:
            await late
    assert steps(database_url) == ([0] if end == "committed" else [0, 1])
    (thread,) = read_rows(database_url, threads)
    assert thread.token == (2 if end == "committed" else 1)


@BOTH_ENDS
async def test_put_that_meets_an_uncommitted_put_follows_it_or_is_refused(
    saver: Saver, another: Another, database_url: str, end: End
) -> None:
    """Both are made under the same lease, from the same head: one line comes of it."""
    found = await saver.aget_tuple(THREAD)
    assert found is not None
    with another.executes(put_under_one):
        second = asyncio.create_task(
            saver.with_lease(lease(1)).aput(found.config, empty_checkpoint(), {"step": 2}, {})
        )
        await waiting(database_url, second)
        another.end(end)
        if end == "committed":
            with pytest.raises(ConflictError):
                await second
        else:
            await second
    assert steps(database_url) == ([0, 1] if end == "committed" else [0, 2])


def put_writes_too_late(saver: Saver) -> None:
    config = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "c"}}
    saver.with_lease(lease(1)).put_writes(cast("Any", config), [("log", ["late"])], "late")


def release(saver: Saver) -> None:
    asyncio.run(saver.release(lease(1)))


def delete(saver: Saver) -> None:
    saver.with_lease(lease(1)).delete_thread("t")


@pytest.mark.parametrize(
    "act", [put_under_one, put_writes_too_late, claim_under_two, release, delete]
)
@pytest.mark.parametrize("first", [put_under_one, claim_under_two])
async def test_whoever_waits_too_long_fails_by_name_and_changes_nothing(
    saver: Saver, database_url: str, act: Act, first: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = Another(database_url, is_alone=True)
    monkeypatch.setenv("AGENTFLOW_LEASE", "1")
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "0.5")
    before = read_all(database_url)
    with open_checkpointer(database_url) as impatient, another.executes(first):
        with pytest.raises(StoreUnavailableError) as raised:
            await asyncio.to_thread(act, impatient)
        assert raised.value.outcome in {"contended", "not_written"}
        another.end("rolled-back")
    assert read_all(database_url) == before


def read_all(url: str) -> list[Any]:
    return [read_rows(url, table) for table in (threads, checkpoints, values, writes)]


async def waiting(url: str, action: asyncio.Task[Any]) -> None:
    """Wait until an action waits for the transaction that is open."""
    if url.startswith("postgresql"):
        await asyncio.to_thread(_until_blocked, url)
    else:
        # Who waits for a SQLite file does so in its own process, and cannot be seen from here.
        await asyncio.wait([action], timeout=0.3)
    assert not action.done()


def _until_blocked(url: str) -> None:
    _until(url, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")


def _until(url: str, is_so: str) -> None:
    until = time.monotonic() + PATIENCE
    with connected(url) as connection:
        while not connection.execute(sa.text(is_so)).scalar_one():
            connection.rollback()
            assert time.monotonic() < until, is_so
            time.sleep(0.005)


@ON_POSTGRES
@GONE
async def test_statement_that_is_committed_after_its_worker_is_gone_counts(
    scene: Scene, tally: Tally, gone: str
) -> None:
    """Nobody hears of the commit, but what it saved is not executed again."""
    victim = await leaving_b(scene)
    with connected(scene.url) as connection:
        connection.execute(sa.select(threads).with_for_update())
        await sent(scene, victim, gone)
        assert "b" not in await durable_nodes(scene.app, "run")
    await asyncio.to_thread(_until_idle, scene.url)
    assert "b" in await durable_nodes(scene.app, "run")
    outlast(scene.url, "run")
    await ends_well(scene, victim, gone, left="cd")
    tally(**{"kills" if gone == "killed" else "zombies": 1})


@ON_POSTGRES
@GONE
async def test_statement_that_is_executed_after_a_claim_changes_nothing(
    scene: Scene, tally: Tally, gone: str
) -> None:
    """It was sent before the claim was committed, and waited for it in the server."""
    victim = await leaving_b(scene)
    outlast(scene.url, "run")
    follower = await scene.app._store.claim_run("", "run", worker="new", lease=LONG)
    assert follower is not None

    def acquire(saver: Saver) -> None:
        assert asyncio.run(saver.acquire(follower.lease)) == 2

    another = Another(scene.url, is_alone=True)
    with another.executes(acquire):
        await sent(scene, victim, gone)
        another.end("committed")
    await asyncio.to_thread(_until_idle, scene.url)
    assert "b" not in await durable_nodes(scene.app, "run")
    outlast(scene.url, "run")
    await ends_well(scene, victim, gone, left="bcd")
    saved = read_thread_rows(scene.url, checkpoints, ["run"])
    assert Counter(row.attempt for row in saved) == {"1": 3, "3": 3}
    tally(**{"kills" if gone == "killed" else "zombies": 1})


async def leaving_b(scene: Scene) -> Victim:
    """Return a worker that is about to leave node `b`, and then saves what the node has written.

    It is patient: it waits for a row for two seconds, and does not hear of its lease.
    """
    await scene.app.submit("linear", INPUT, run_id="run")
    scene.ledger.hold(run="run", node="b", event="leave")
    victim = scene.worker(lease=20, deaf=True)
    await logged(scene, run="run", node="b", event="leave")
    return victim


async def sent(scene: Scene, victim: Victim, gone: str) -> None:
    """Let the worker go on until its statement waits in the server, and no further."""
    scene.ledger.release()
    await asyncio.to_thread(_until_blocked, scene.url)
    victim.stop()
    if gone == "killed":
        victim.kill()
        victim.wait()


async def ends_well(scene: Scene, victim: Victim, gone: str, *, left: str) -> None:
    """Let another worker execute what is left of the run, and the stopped one all that it wants."""
    scene.worker()
    (run,) = await scene.ended(["run"])
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, OUTPUT)
    await given_back(scene, ["run"])
    before = read_everything(scene.url, ["run"])
    if gone == "stopped":
        await outlived(scene, [victim])
        assert "attempt was fenced" in victim.output()
    assert read_everything(scene.url, ["run"]) == before
    entered = scene.ledger.entries(event="enter", run="run")
    assert [e["node"] for e in entered if e["pid"] != victim.pid] == list(left)
    assert_sound(scene.url, ["run"])


def outlast(url: str, run_id: str) -> None:
    """Let the lease of a run be over, although it was a long one."""
    with connected(url) as connection:
        over = now(connection) - timedelta(seconds=1)
        of_run = sa.update(runs).where(runs.c.run_id == run_id)
        connection.execute(of_run.values(lease_expires_at=over))
        connection.commit()


def _until_idle(url: str) -> None:
    """Wait until the server executes nothing that it was sent."""
    _until(
        url,
        "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() "
        "AND state = 'active' AND pid <> pg_backend_pid()",
    )
