"""Pruning in batches: of any size, killed between two, beside a running graph; and what it takes.

The rules of what goes and what stays are in `agentflow.testing.savers`.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from agentflow import AgentFlow
from agentflow.checkpoint import Retention, Saver, marking, open_checkpointer, pruning, steps
from agentflow.checkpoint.audit import Damage
from agentflow.errors import InvalidInputError
from agentflow.failpoints import arm, disarm
from agentflow.testing.savers import DeletionSuite, DeltaChannelSuite, RetentionSuite
from agentflow.testing.savers.calls import at, checkpoint, dumped, ids, load, plain, put_list
from agentflow.testing.savers.deltas import line, of_run, run
from agentflow.testing.savers.graphs import CONFIG, Graph, asks, chain, logs
from tests.integration.cli import fresh_cli
from tests.integration.offloaded import Later

TABLES = ("checkpoints", "values", "writes", "anchors")
WORDS = [f"{number} " * 40 for number in range(1000)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing fit into one batch or one page."""
    monkeypatch.setattr(steps, "BATCH_ROWS", 2)
    monkeypatch.setattr(pruning, "_DETACHED", 1)
    monkeypatch.setattr(pruning, "_PAGE", 3)
    monkeypatch.setattr(marking, "_MIN_WINDOW", 2)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    disarm()


@pytest.mark.usefixtures("small_batches")
class TestSmallBatches(DeletionSuite, DeltaChannelSuite, RetentionSuite):
    """What goes and what stays does not depend on the size of a batch."""

    @pytest.fixture(autouse=True)
    def _file(self, sqlite_url: str) -> None:
        self.url = sqlite_url

    def open(self) -> AbstractContextManager[Saver]:
        return self.open_another()

    def open_another(self, *, verify_deltas: bool = False) -> AbstractContextManager[Saver]:
        return open_checkpointer(self.url, verify_deltas=verify_deltas)


class KilledError(Exception):
    """Stands for a process that ends within a batch."""


def kill_at(number: int) -> Callable[[], None]:
    """Make what ends the call in its batch of this number, before it commits."""
    passed = 0

    def pass_by() -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            raise KilledError

    return pass_by


def rows_of(url: str) -> dict[str, int]:
    """Count the rows of each table."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return {
            table: connection.execute(f"SELECT count(*) FROM agentflow_{table}").fetchone()[0]
            for table in TABLES
        }


CALLS: dict[str, Callable[[Saver], Any]] = {
    "prune": lambda saver: saver.prune(["t"]),
    "keep_last": lambda saver: saver.sweep(Retention(keep_last=4)),
    "runs": lambda saver: saver.delete_for_runs(["r0", "r2"]),
    "newest": lambda saver: saver.delete_for_runs(["r2", "r3"]),
    "all runs": lambda saver: saver.delete_for_runs(["r0", "r1", "r2", "r3"]),
    "delete": lambda saver: saver.prune(["t"], strategy="delete"),
}


def states(saver: Saver) -> dict[str, bytes]:
    """Return what all checkpoints show of all channels, with their writes."""
    return {
        each.config["configurable"]["checkpoint_id"]: dumped(
            [each.values, plain(load(saver, each.config["configurable"]["checkpoint_id"]))[4]]  # type: ignore[index]
        )
        for each in line(saver).get_state_history(CONFIG)
    }


async def damages(saver: Saver) -> list[Damage]:
    """Return what is not as it was stored."""
    return [damage async for audited in saver.verify() for damage in audited.damages]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("call", CALLS)
def test_call_that_is_killed_anywhere_leaves_the_thread_whole(sqlite_url: str, call: str) -> None:
    with open_checkpointer(sqlite_url) as saver:
        graph = line(saver)
        for turn in range(4):
            run(graph, {"log": [f"input {turn}"]}, of_run(f"r{turn}"))
        for place in (3, 8):
            run(graph, None, of_run("r3", list(graph.get_state_history(CONFIG))[place].config))
        saver.copy_thread("t", "undisturbed")
        before = states(saver)
        saver.copy_thread("t", "kept")
        killed = 0
        for number in range(1, 100):
            arm("checkpoint.pruned_batch", kill_at(number))
            try:
                CALLS[call](saver)
            except KilledError:
                killed += 1
                left = states(saver)
                assert left == {name: before[name] for name in left}
                assert asyncio.run(damages(saver)) == []
            else:
                break
        disarm()
        CALLS[call](saver)
        left = states(saver)
        assert left == {name: before[name] for name in left}
        assert asyncio.run(damages(saver)) == []
        assert killed > 1 or call == "delete"
        saver.delete_thread("kept")
        saver.delete_thread("undisturbed")
        ended = rows_of(sqlite_url)
    assert ended["checkpoints"] == len(left)
    with open_checkpointer(sqlite_url) as saver:
        saver.delete_thread("t")
    assert rows_of(sqlite_url) == dict.fromkeys(TABLES, 0)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("killed_at", [1, 3, 1000])
def test_values_that_nobody_needs_are_gone_after_the_second_call(
    sqlite_url: str, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that deleted the checkpoints may have ended before it came to their values."""
    with open_checkpointer(sqlite_url) as saver:
        for number in range(20):
            config: Any = load(saver).config if number else None
            put_list(saver, f"c{number}", config, [f"{number} {word}" for word in WORDS[:20]])
        with monkeypatch.context() as patched:
            calls = kill_at(killed_at)

            def bury(*_: Any) -> bool:
                calls()
                raise KilledError

            patched.setattr(marking, "_bury", bury)
            with pytest.raises(KilledError):
                saver.prune(["t"])
        assert rows_of(sqlite_url)["checkpoints"] == 1
        assert rows_of(sqlite_url)["values"] == 20
        saver.sweep(Retention(keep_last=1))
        assert rows_of(sqlite_url) == {"checkpoints": 1, "values": 1, "writes": 0, "anchors": 1}


@pytest.mark.usefixtures("small_batches")
def test_graph_runs_while_its_thread_is_pruned(sqlite_url: str) -> None:
    async def both() -> tuple[Any, Any]:
        async with open_checkpointer(sqlite_url) as saver, open_checkpointer(sqlite_url) as other:
            graph, is_over = _counting(saver), asyncio.Event()
            await graph.ainvoke({"log": WORDS[:30]}, CONFIG, durability="sync")

            async def prune() -> int:
                number = 0
                while not is_over.is_set():
                    await other.aprune(["t"])
                    number += 1
                return number

            async def drive() -> Any:
                for _ in range(8):
                    output = await graph.ainvoke({"log": ["more"]}, CONFIG, durability="sync")
                is_over.set()
                return output

            output, pruned = await asyncio.gather(drive(), prune())
            assert pruned > 1
            await saver.aprune(["t"])
            return output, await graph.aget_state(CONFIG)

    output, state = asyncio.run(both())
    expected = [*WORDS[:30], *_LETTERS, *(["more", *_LETTERS] * 8)]
    assert output["log"] == state.values["log"] == expected
    with open_checkpointer(sqlite_url) as saver:
        assert load(saver).checkpoint["channel_values"]["log"] == expected
        assert len(list(saver.list(at()))) == 1


_LETTERS = list("abcdefgh")


def _counting(saver: Saver) -> Graph:
    return chain(*((name, logs(name)) for name in _LETTERS)).compile(checkpointer=saver)


def fill(saver: Saver, count: int) -> None:
    """Put a line of checkpoints with a list that grows and a value that is new each time."""

    async def put_all() -> None:
        config: Any = at()
        words: list[str] = []
        puts = []
        for number in range(count):
            words = [*words[-40:], WORDS[number % 1000]] if number % 50 == 0 else words
            name = f"c{number:06}"
            version = f"{number:06}"
            made = checkpoint(name, {"x": version, "y": version}, x=words, y=f"{number} " * 40)
            puts.append(saver.aput(config, made, {}, {"x": version, "y": version}))
            config = at(name)
            if len(puts) == 500:
                await asyncio.gather(*puts)
                puts.clear()
        await asyncio.gather(*puts)

    asyncio.run(put_all())


def peak_of_pruning(url: str, count: int) -> int:
    """Return the bytes that pruning so many checkpoints needs at its peak."""
    with open_checkpointer(url) as saver:
        fill(saver, count)
    with open_checkpointer(url) as saver:
        load(saver)
        gc.collect()
        tracemalloc.start()
        saver.prune(["t"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert ids(saver.list(at())) == [f"c{count - 1:06}"]
    assert rows_of(url)["values"] <= 50
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path: Any) -> None:
    # What is kept for the whole process, such as the text of statements, is made by the first call.
    peak_of_pruning(f"sqlite:///{tmp_path / 'first'}.db", 600)
    few = peak_of_pruning(f"sqlite:///{tmp_path / 'few'}.db", 1_500)
    many = peak_of_pruning(f"sqlite:///{tmp_path / 'many'}.db", 9_000)
    assert many <= 1.3 * few, (few, many)


@pytest.mark.parametrize("strategy", ["keep_latest", "delete"])
def test_transaction_touches_a_bounded_number_of_rows(
    sqlite_url: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[dict[str, int]] = []
    with open_checkpointer(sqlite_url) as saver:
        fill(saver, 1_500)
        counts.append(rows_of(sqlite_url))
        step = saver._intake.step

        def watched(*given: Any) -> Any:
            future = step(*given)
            future.wait()
            counts.append(rows_of(sqlite_url))
            return future

        monkeypatch.setattr(saver._intake, "step", watched)
        saver.prune(["t"], strategy=strategy)
    changes = [
        {table: before[table] - now[table] for table in TABLES} for before, now in pairwise(counts)
    ]
    assert max(each["checkpoints"] for each in changes) == steps.BATCH_ROWS
    assert all(abs(number) <= steps.BATCH_ROWS for each in changes for number in each.values())
    assert counts[-1]["checkpoints"] == (1 if strategy == "keep_latest" else 0)


def test_large_checkpoints_are_deleted_a_few_at_a_time(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BATCH_BYTES", 10_000)
    sizes: list[int] = []
    arm("checkpoint.pruned_batch", lambda: sizes.append(1))
    filling: Any = {"filling": "-" * 5_000}
    with open_checkpointer(sqlite_url, compress=False) as saver:
        config: Any = at()
        for number in range(20):
            made = checkpoint(f"c{number:02}", {"x": number}, x=b"-" * 100)
            saver.put(config, made, filling, {"x": number})
            config = at(f"c{number:02}")
        saver.prune(["t"])
        assert len(sizes) > 15
        assert ids(saver.list(at())) == ["c19"]


async def test_app_sweeps_only_threads_whose_runs_have_ended(sqlite_url: str) -> None:
    async with AgentFlow(sqlite_url) as app:
        app.register(chain(("a", logs("a"))), name="plain")
        app.register(chain(("a", logs("a"))), name="kept", retention=Retention(keep_last=3))
        app.register(chain(("a", asks("ok?"))), name="asking")
        for name in ("plain", "kept", "asking"):
            handle = await app.submit(name, {"log": []}, thread_id=name)
            await app.drive(handle.id)
        handle = await app.submit("plain", {"log": []}, thread_id="queued again")
        await app.drive(handle.id)
        await app.submit("plain", {"log": []}, thread_id="queued again")
        assert (await app.sweep()).swept == ()
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as raw:
            ((before,),) = raw.execute("SELECT input FROM agentflow_runs WHERE thread_id = 'plain'")
            put = "UPDATE agentflow_runs SET input = ? WHERE thread_id = 'plain'"
            with raw:
                raw.execute(put, [b""])
            unread = await app.sweep(Retention(keep_last=1), dry_run=True)
            assert (unread.swept, unread.spared) == ((), {"damaged": 1})
            with raw:
                raw.execute(put, [before])
        said = await app.sweep(Retention(keep_last=1), dry_run=True)
        done = await app.sweep(Retention(keep_last=1))
        assert [(each.thread_id, each.checkpoints) for each in done.swept] == [("plain", 2)]
        assert said.swept == done.swept
        assert done.threads == 4


async def test_worker_sweeps_by_itself_if_it_is_told_how_often(sqlite_url: str) -> None:
    is_swept = asyncio.Event()
    async with AgentFlow(sqlite_url) as app:
        app.register(chain(("a", logs("a"))), name="g", retention=Retention(keep_last=1))
        handle = await app.submit("g", {"log": []}, thread_id="t")
        await app.drive(handle.id)
        assert len([each async for each in app.checkpointer.alist(at())]) == 3
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(is_swept.set)

        arm("checkpoint.pruned_batch", tell)
        async with app.worker(sweep_every=timedelta(milliseconds=1)):
            async with asyncio.timeout(30):
                await is_swept.wait()
        assert len([each async for each in app.checkpointer.alist(at())]) == 1
        for wrong in (0, timedelta(-1), "1h", float("nan")):
            with pytest.raises(InvalidInputError, match="sweep_every"):
                app.worker(sweep_every=wrong)  # type: ignore[arg-type]  # what people write


async def test_retention_may_be_given_when_opening(sqlite_url: str) -> None:
    keep = Retention(keep_last=2)
    async with (
        open_checkpointer(sqlite_url, retention=keep) as saver,
        open_checkpointer(sqlite_url) as other,
    ):
        graph = chain(("a", logs("a")), ("b", logs("b"))).compile(checkpointer=saver)
        for name in ("one", "two"):
            await graph.ainvoke({"log": []}, at(thread=name))
        with pytest.raises(InvalidInputError, match="retention: is missing"):
            await other.asweep()
        with pytest.raises(InvalidInputError, match="retention: is missing"):
            await asyncio.to_thread(other.sweep)
        assert (await saver.asweep(thread_ids=["one"])).checkpoints == 2
        assert saver.sweep(Retention(keep_last=4)).checkpoints == 0
        async with AgentFlow(sqlite_url, checkpoints=saver) as app:
            assert (await app.sweep()).checkpoints == 2


@pytest.mark.parametrize("keep", [Retention(keep_last=1), Retention(ttl=1)])
def test_damaged_thread_is_let_be_and_the_others_are_swept(
    sqlite_url: str, keep: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpointer(sqlite_url) as saver:
        graph = chain(("a", logs("a")), ("b", logs("b"))).compile(checkpointer=saver)
        for name in ("one", "two", "three"):
            graph.invoke({"log": []}, at(thread=name))
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection, connection:
        damage = (
            "UPDATE agentflow_checkpoints SET data = zeroblob(99) WHERE thread = "
            "(SELECT id FROM agentflow_threads WHERE thread_id = 'two')"
        )
        count = connection.execute(damage).rowcount
        of_it = "SELECT count(*) FROM agentflow_checkpoints WHERE data = zeroblob(99)"
        with open_checkpointer(sqlite_url) as saver:
            connection.commit()
            for dry_run in (True, False):
                report = saver.sweep(keep, dry_run=dry_run, clock=Later(timedelta(days=1)))
                assert [each.thread_id for each in report.swept] == ["one", "three"]
                assert report.spared == {"damaged": 1}
        assert connection.execute(of_it).fetchone() == (count,)
    result = fresh_cli(sqlite_url, monkeypatch)("sweep", "--keep-last", "1")
    assert (result.code, "1 thread could not be read" in result.err) == (1, True)


async def test_app_with_a_foreign_checkpointer_cannot_be_swept() -> None:
    async with AgentFlow("memory://", checkpoints=InMemorySaver()) as app:
        with pytest.raises(InvalidInputError, match="open_checkpointer"):
            await app.sweep(Retention(keep_last=1))


@pytest.mark.parametrize("strategy", ["keep_latest", "delete"])
def test_transaction_reads_no_more_of_a_longer_thread(
    tmp_path: Any, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in instructions of SQLite's machine, of which every row that is passed takes some."""

    def most(count: int) -> int:
        url = f"sqlite:///{tmp_path / str(count)}.db"
        steps: list[int] = []
        with open_checkpointer(url) as saver:
            fill(saver, count)
            step = saver._intake.step

            def counted(thread: Any, function: Any) -> Any:
                def run(rows: Any) -> Any:
                    raw = rows._session._raw
                    passed = 0

                    def pass_by() -> None:
                        nonlocal passed
                        passed += 1

                    raw.set_progress_handler(pass_by, 100)
                    outcome = function(rows)
                    raw.set_progress_handler(None, 0)
                    steps.append(passed)
                    return outcome

                return step(thread, run)

            with monkeypatch.context() as patched:
                patched.setattr(saver._intake, "step", counted)
                saver.prune(["t"], strategy=strategy)
        return max(steps)

    assert most(2_400) <= 1.5 * most(800)
