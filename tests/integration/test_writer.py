"""The one writer of a database: shared commits, separate failures, no caller left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.config import Settings
from agentflow.database import Database
from agentflow.database.futures import Future
from agentflow.database.tables import leases
from agentflow.database.writer import Call, GroupCommitWriter, Operation, Rejected
from agentflow.errors import StoreUnavailableError
from agentflow.failpoints import arm, disarm


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database."""
    opened = Database(database_url, Settings())
    opened.submit(Call(lambda _: None)).result(timeout=30)
    yield opened
    disarm()
    opened.close()


def insert(name: str, error: Exception | None = None) -> Call:
    """Make an operation that writes a row, and then perhaps fails."""

    def run(connection: Connection) -> str:
        row = {"tenant": "", "thread_id": name, "token": 0}
        connection.execute(sa.insert(leases).values(row))
        if error is not None:
            raise error
        return name

    return Call(run)


def names(database: Database) -> list[str]:
    """List the rows that are there."""
    query = sa.select(leases.c.thread_id).order_by(leases.c.thread_id)
    return list(database.read_now(lambda c: c.execute(query).scalars().all()))


def wait(futures: Iterable[Future]) -> None:
    """Wait until all have ended."""
    for future in futures:
        future.wait(timeout=30)


def test_what_is_written_is_not_kept_until_there_is_more(database: Database) -> None:
    is_freed = threading.Event()
    operation = insert("a")
    freed = weakref.ref(operation, lambda _: is_freed.set())
    wait([database.submit(operation)])
    del operation
    assert is_freed.wait(30)
    assert freed() is None


def held(database: Database) -> threading.Event:
    """Keep the writer busy until the event is set, so that what follows is one batch."""
    entered, go_on = threading.Event(), threading.Event()

    def hold(_: Connection) -> None:
        entered.set()
        go_on.wait(30)

    database.submit(Call(hold))
    entered.wait(30)
    return go_on


def commits(action: Any) -> int:
    """Count the commits while `action` runs."""
    counted: list[int] = []
    arm("database.after_commit", lambda: counted.append(1))
    action()
    disarm()
    return len(counted)


def test_what_is_queued_together_is_committed_together_in_order(database: Database) -> None:
    go_on = held(database)
    order: list[str] = []
    futures = []
    for i in range(20):
        operation = insert(f"{i:02}")
        futures.append(database.submit(operation))
        futures[-1].add_done_callback(lambda done: order.append(done.result()))

    def run() -> None:
        go_on.set()
        wait(futures)

    assert commits(run) <= 2, "one for what held the writer, one for all the others"
    assert order == [f"{i:02}" for i in range(20)] == names(database)


def test_operation_that_raises_fails_alone(database: Database) -> None:
    go_on = held(database)
    futures = [
        database.submit(insert("a")),
        database.submit(insert("bad", KeyError("mine"))),
        database.submit(insert("b")),
        database.submit(insert("a")),
        database.submit(insert("c")),
    ]
    go_on.set()
    wait(futures)
    assert isinstance(futures[1].exception(), KeyError)
    assert isinstance(futures[3].exception(), sa.exc.IntegrityError)
    assert [futures[i].result() for i in (0, 2, 4)] == ["a", "b", "c"]
    assert names(database) == ["a", "b", "c"]


def test_operation_that_refuses_costs_the_others_nothing(database: Database) -> None:
    go_on = held(database)
    good = [database.submit(insert(name)) for name in "ab"]
    lost = database.submit(Call(lambda _: Rejected(ValueError("lost a race"))))
    good.append(database.submit(insert("c")))

    def run() -> None:
        go_on.set()
        wait([*good, lost])

    assert commits(run) <= 2
    with pytest.raises(ValueError, match="lost a race"):
        lost.result()
    assert names(database) == ["a", "b", "c"]


def test_commit_that_fails_leaves_nothing_and_fails_its_callers(database: Database) -> None:
    def fail() -> None:
        raise OSError("disk full")

    arm("database.before_commit", fail)
    futures = [database.submit(insert(name)) for name in "ab"]
    for future in futures:
        with pytest.raises(OSError, match="disk full"):
            future.result(timeout=30)
    disarm()
    assert names(database) == []
    assert database.submit(insert("c")).result(timeout=30) == "c"


def test_even_an_exit_in_an_operation_leaves_nobody_waiting(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(_: Connection) -> None:
        raise SystemExit

    go_on = held(database)
    futures = [database.submit(Call(leave)), database.submit(insert("a"))]
    go_on.set()
    wait(futures)
    assert "the writer failed" in caplog.text
    assert database.submit(insert("b")).result(timeout=30) == "b"


def test_writer_that_no_thread_can_be_had_for_is_started_by_the_next_operation(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Database(sqlite_url, Settings())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            opened.submit(insert("refused"))
    assert opened.submit(insert("second")).result(timeout=30) == "second"
    assert names(opened) == ["second"], "what was refused is not written behind its caller's back"
    opened.close()


def refuse(_: threading.Thread) -> None:
    """Fail as a process does that has all the threads it may have."""
    raise RuntimeError("can't start new thread")


def test_closing_writes_what_is_queued_and_refuses_what_comes_later(database_url: str) -> None:
    database = Database(database_url, Settings())
    go_on = held(database)
    futures = [database.submit(insert(name)) for name in "abc"]
    closing = threading.Thread(target=database.close)
    closing.start()
    go_on.set()
    closing.join(30)
    assert [future.result(timeout=1) for future in futures] == ["a", "b", "c"]
    with pytest.raises(StoreUnavailableError, match="it was closed"):
        database.submit(insert("d"))
    database.close()
    again = Database(database_url, Settings())
    assert names(again) == ["a", "b", "c"]
    again.close()


def test_callback_that_raises_does_not_stop_the_others(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = held(database)
    first, second = database.submit(insert("a")), database.submit(insert("b"))
    called: list[Future] = []

    def fail(_: Future) -> None:
        raise ValueError

    first.add_done_callback(fail)
    first.add_done_callback(called.append)
    go_on.set()
    wait([first, second])
    assert called == [first]
    assert "a callback of a future failed" in caplog.text


def test_future_that_has_not_ended_in_time_says_so(database: Database) -> None:
    go_on = held(database)
    waiting = database.submit(insert("a"))
    with pytest.raises(TimeoutError):
        waiting.result(timeout=0.01)
    go_on.set()
    assert waiting.result(timeout=30) == "a"


FORK = """
import os, sys
from agentflow.checkpoint import open_checkpointer
from langgraph.checkpoint.base import empty_checkpoint

def put(saver, thread):
    config = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
    saver.put(config, empty_checkpoint(), {"source": "input", "step": -1}, {})

saver = open_checkpointer(sys.argv[1])
put(saver, "before")
child = os.fork()
if child == 0:
    put(saver, "child")
    assert {t.config["configurable"]["thread_id"] for t in saver.list(None)} >= {"before", "child"}
    saver.close()
    os._exit(0)
put(saver, "parent")
_, status = os.waitpid(child, 0)
assert status == 0, status
threads = {t.config["configurable"]["thread_id"] for t in saver.list(None)}
assert threads == {"before", "child", "parent"}, threads
saver.close()
"""


@pytest.mark.slow
def test_parent_and_child_of_a_fork_both_write(database_url: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, database_url]
    subprocess.run(command, check=True, timeout=60, cwd=Path.cwd())


def test_child_of_a_fork_closes_what_it_inherits_of_a_file(sqlite_url: str) -> None:
    program = f"""
import asyncio
{FORK.partition("child = ")[0]}
def opened():
    asyncio.run(saver.aget_tuple({{"configurable": {{"thread_id": "before"}}}}))
    descriptors = [f"/proc/self/fd/{{each}}" for each in os.listdir("/proc/self/fd")]
    names = [os.readlink(each) for each in descriptors if os.path.exists(each)]
    return sum(name.endswith(".db") for name in names)

before = opened()
child = os.fork()
if child == 0:
    put(saver, "child")
    os._exit(opened() - before)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
saver.close()
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, sqlite_url], check=True, timeout=60
    )


def test_child_of_a_fork_waits_for_no_lock_that_its_parent_held(sqlite_url: str) -> None:
    program = f"""
import faulthandler, threading
from contextlib import ExitStack
{FORK.partition("child = ")[0]}
held, go_on = threading.Event(), threading.Event()

def hold():
    with ExitStack() as locks:
        for kept in (saver._intake, saver._intake.states, saver._intake.known):
            locks.enter_context(kept._lock)
        held.set()
        go_on.wait(30)

holder = threading.Thread(target=hold)
holder.start()
held.wait(30)
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(20, exit=True)
    saver.delete_thread("before")
    put(saver, "child")
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
go_on.set()
holder.join()
saver.close()
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, sqlite_url], check=True, timeout=60
    )


def test_many_event_loops_wait_for_one_writer(database: Database) -> None:
    ended = []

    async def wait_for_some() -> None:
        futures = [database.submit(Call(lambda _: None)) for _ in range(3)]
        await asyncio.gather(*map(database.settled, futures))

    def work() -> None:
        for _ in range(100):
            asyncio.run(asyncio.wait_for(wait_for_some(), 30))
        ended.append(threading.get_ident())

    # So that threads are interrupted wherever they can be.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert len(ended) == len(threads)


def test_locked_file_is_waited_for_once_by_a_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    transact = GroupCommitWriter._transact

    def counted(writer: GroupCommitWriter, batch: Sequence[Operation], **how: Any) -> list[Any]:
        attempts.append(len(batch))
        return transact(writer, batch, **how)

    database = Database(
        f"sqlite:///{tmp_path}/a.db", Settings(store_timeout=timedelta(seconds=0.5))
    )
    assert database.submit(insert("before")).result(timeout=30) == "before"
    monkeypatch.setattr(GroupCommitWriter, "_transact", counted)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as rival:
        rival.execute("BEGIN IMMEDIATE")
        futures = [database.submit(insert(f"{n}")) for n in range(20)]
        errors = [future.exception(timeout=30) for future in futures]
        rival.execute("ROLLBACK")
    assert all(isinstance(error, StoreUnavailableError) for error in errors)
    assert sum(attempts) == 20
    assert len(attempts) <= 2, "one for what came first, one for all that waited behind it"
    assert database.submit(insert("later")).result(timeout=30) == "later"
    database.close()


def test_child_that_was_forked_inside_a_call_is_told_so(tmp_path: Path) -> None:
    program = """
import os, sys
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.database.writer import Call
from agentflow.errors import StoreUnavailableError
import threading
database = Database(sys.argv[1], Settings())
entered, go_on = threading.Event(), threading.Event()
future = database.submit(Call(lambda _: (entered.set(), go_on.wait(30))))
entered.wait(30)
child = os.fork()
if child == 0:
    try:
        database.submit(Call(lambda _: None))
    except StoreUnavailableError as error:
        os._exit(7 if "forked while" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
go_on.set()
future.result(timeout=30)
child = os.fork()
if child == 0:
    database.submit(Call(lambda _: None)).result(timeout=30)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    url = f"sqlite:///{tmp_path}/a.db"
    subprocess.run([sys.executable, "-c", program, url], check=True, timeout=60)
