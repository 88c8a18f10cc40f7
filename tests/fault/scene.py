"""What a fault test works with: a database, its victims, the ledger, and what must hold."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from langgraph.types import PregelTask

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.checkpoint.layout import WHOLE
from agentflow.checkpoint.records import Place as Named
from agentflow.checkpoint.records import unpack_record
from agentflow.checkpoint.rows import CheckpointRow
from agentflow.codec import Codec
from agentflow.config import load_settings
from agentflow.database.engine import make_engine, now, parse_url
from agentflow.database.tables import (
    checkpoints,
    events,
    leases,
    metadata,
    runs,
    threads,
    values,
    workers,
    writes,
)
from agentflow.errors import AlreadyResolvedError, StoreUnavailableError, SupersededError
from agentflow.storage.events import GENESIS, hash_event
from agentflow.storage.payloads import Payloads
from agentflow.types import Run, RunStatus
from tests.fault.forkserver import ForkServer, Victim, _is_stopped_or_ended
from tests.fault.graphs import CALLER, REFUNDS_WORKER, WORKER, register_all
from tests.fault.ledger import Entry, Ledger
from tests.fault.sabotage import Place

LEASE = 1.0
STORE_TIMEOUT = 30.0
LONG = 30.0
"""A lease that nobody has to wait for: of workers that are going to be dead. See `Scene.expire`."""
PATIENCE = 60.0
"""Seconds after which something that has not happened will not happen."""
_LOOK = 0.02
AT_ONCE = 3
"""Victims that run at a time: more would keep each other from their heartbeats on two cores."""

T = TypeVar("T")
_ANYTHING = Codec(unknown="plain")
_PAYLOADS = Payloads(strict=_ANYTHING, lenient=_ANYTHING)


@dataclass
class Scene:
    """One database, or two, with workers on it. `app` belongs to the test."""

    url: str
    ledger: Ledger
    forkserver: ForkServer
    app: AgentFlow
    checkpoints: str = ""
    """Where checkpoints are, if in another database."""
    services_url: str = ""
    """Set where the workers run the refunds example."""
    deciders: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """What people do meanwhile; called at each look."""

    @property
    def saved_url(self) -> str:
        """Where the checkpoints are."""
        return self.checkpoints or self.url

    def worker(
        self,
        *,
        lease: float = LEASE,
        store_timeout: float = STORE_TIMEOUT,
        url: str = "",
        **options: Any,
    ) -> Victim:
        """Start a worker process; see `graphs.worker_main` for the options."""
        if self.services_url:
            where = (url or self.url, self.ledger.address, self.services_url)
            return self.forkserver.spawn(REFUNDS_WORKER, *where, options, env=_env(lease))
        return self._spawn(WORKER, url, _env(lease, store_timeout), (), options)

    def caller(
        self, call: str, run_id: str, *, lease: float = LEASE, url: str = "", **options: Any
    ) -> Victim:
        """Start a process that makes one of the calls of `tests.fault.calls` about a run."""
        return self._spawn(CALLER, url, _env(lease), (call, run_id), options)

    def _spawn(
        self,
        target: str,
        url: str,
        env: dict[str, str],
        what: tuple[str, ...],
        options: dict[str, Any],
    ) -> Victim:
        if self.checkpoints:
            options = {**options, "checkpoints": self.checkpoints}
        where = (url or self.url, self.ledger.address)
        return self.forkserver.spawn(target, *where, *what, options, env=env)

    async def until(self, happened: Callable[[], Awaitable[T | None]], what: str) -> T:
        """Look until something has happened; what people do meanwhile happens too."""
        async with asyncio.timeout(PATIENCE):
            try:
                while True:
                    for decide in self.deciders:
                        await decide()
                    if (found := await happened()) is not None:
                        return found
                    await asyncio.sleep(_LOOK)
            except asyncio.CancelledError:
                output = "\n".join(f"{v}:\n{v.output()}" for v in self.forkserver.victims)
                print(f"waited for {what}; the victims said:\n{output}")
                raise

    async def ended(self, run_ids: Iterable[str]) -> list[Run]:
        """Wait until runs have ended, and return them."""
        return [
            await self.until(partial(self._ended, run_id), f"the end of {run_id}")
            for run_id in run_ids
        ]

    async def parked(self, run_id: str) -> Run:
        """Wait until a run waits for somebody, and return it."""

        async def look() -> Run | None:
            run = await self.app.get_run(run_id)
            return run if run.status is RunStatus.WAITING else None

        return await self.until(look, f"{run_id} to park")

    async def _ended(self, run_id: str) -> Run | None:
        run = await self.app.get_run(run_id)
        return run if run.status.is_ended else None

    async def died(self, victim: Victim) -> None:
        """Wait until a victim was killed by itself, as it had been told to."""

        async def code() -> int | None:
            try:
                return victim.wait(0)
            except TimeoutError:
                return None

        assert await self.until(code, f"the death of {victim}") == -signal.SIGKILL, victim.output()

    async def died_or_ended(self, victim: Victim, run_id: str) -> bool:
        """Wait until a victim has killed itself and say so, or until its run has got past that.

        What is done abreast is not always done in the same number of commits, so that a place which
        one execution has passed may be missing from another.
        """

        async def is_over() -> bool | None:
            if await self._ended(run_id) is not None:
                return True
            return True if _is_stopped_or_ended(victim.pid) else None

        await self.until(is_over, f"the death of {victim}")
        # The last places come after the end of the run.
        with contextlib.suppress(TimeoutError):
            await asyncio.to_thread(victim.wait, 1)
        has_died = victim.returncode is not None
        assert victim.returncode in {None, -signal.SIGKILL}, victim.output()
        victim.kill()
        await self.gone(victim)
        return has_died

    async def gone(self, victim: Victim) -> int:
        """Wait for the end of a victim, and return its exit code."""
        return await asyncio.to_thread(victim.wait, PATIENCE)

    async def stopped(self, victim: Victim) -> None:
        """Wait until a victim has stopped itself, as it had been told to."""

        async def state() -> bool | None:
            return _is_stopped_or_ended(victim.pid) or None

        await self.until(state, f"{victim} to stop itself")

    async def expired(self, run_id: str) -> None:
        """Wait until nobody holds a valid lease of a run, by the database's clock."""

        async def look() -> bool | None:
            return is_lease_over(self.url, run_id) or None

        await self.until(look, f"the end of the lease of {run_id}")

    def entered(self, run_id: str) -> Counter[str]:
        """Count the executions of each node of a run that began."""
        return Counter(e["node"] for e in self.ledger.entries(event="enter", run=run_id))

    async def kill_each(
        self,
        tried: Mapping[str, Place],
        submit: Callable[[str], Awaitable[Any]],
        **options: Any,
    ) -> int:
        """Kill one worker at each place, each with a run of its own; return how many died.

        The run is named as the place is, and so is its queue, so that nobody else takes the run.
        Then the time of their leases is over.
        """
        died: list[str] = []

        async def kill(name: str) -> None:
            await submit(name)
            victim = self.worker(lease=LONG, queues=[name], at=tried[name].plain(), **options)
            if await self.died_or_ended(victim, name):
                died.append(name)

        await few_at_once(kill, list(tried))
        self.expire(tried)
        return len(died)

    def expire(self, run_ids: Iterable[str]) -> None:
        """Let the time of the leases of some runs pass: of those whose workers are dead.

        A worker that lives and holds one of them notices that it has lost it.
        """
        with connected(self.url) as connection:
            held = sa.and_(runs.c.run_id.in_(sorted(run_ids)), runs.c.lease_expires_at.is_not(None))
            connection.execute(sa.update(runs).where(held).values(lease_expires_at=now(connection)))
            connection.commit()

    def silence(self, name: str) -> None:
        """Let time pass in which a worker that is dead says nothing."""
        with connected(self.url) as connection:
            before = now(connection) - timedelta(minutes=2)
            own = sa.update(workers).where(workers.c.name == name)
            assert connection.execute(own.values(beat_at=before)).rowcount == 1
            connection.commit()

    async def stop_each(
        self, tried: Sequence[Place], submit: Callable[[str], Awaitable[Any]], **options: Any
    ) -> list[Victim]:
        """Stop one worker at each place, as `kill_each` kills them, and return them."""
        victims: list[Victim] = []

        async def stop(place: Place) -> None:
            await submit(str(place))
            at = place.plain()
            victim = self.worker(queues=[str(place)], at=at, how="SIGSTOP", **options)
            victims.append(victim)
            await self.stopped(victim)

        await few_at_once(stop, tried)
        return victims


class Approver:
    """Approves whatever is asked; called at each look, as one of a scene's `deciders`."""

    def __init__(self, scene: Scene) -> None:
        """Look at the runs of a scene."""
        self._scene = scene

    async def __call__(self) -> None:
        """Look once."""
        for approval in (await self._scene.app.approvals.list()).items:
            # Of a commit whose outcome stayed unknown the next look tells: a person would look too.
            with contextlib.suppress(AlreadyResolvedError, SupersededError, StoreUnavailableError):
                await self._scene.app.approvals.decide(approval.id, "approve", by="alice")


async def logged(scene: Scene, **facts: Any) -> list[Entry]:
    """Wait for an entry of the ledger."""

    async def look() -> list[Entry] | None:
        return scene.ledger.entries(**facts) or None

    return await scene.until(look, f"an entry with {facts}")


async def stay(scene: Scene, _worker: Victim, name: str) -> None:
    """Leave a worker in a node that is held."""
    await logged(scene, run=name, event="enter")


async def drain(scene: Scene, worker: Victim, name: str) -> None:
    """Tell a worker to go while it is in a node, which then goes on."""
    await logged(scene, run=name, event="enter")
    worker.kill(signal.SIGTERM)
    scene.ledger.release(run=name)


async def cancel(scene: Scene, worker: Victim, name: str) -> None:
    """Cancel a run while its worker is in a node."""
    await logged(scene, run=name, event="enter")
    await scene.app.cancel(name)


@asynccontextmanager
async def open_scene(
    url: str,
    ledger: Ledger,
    forkserver: ForkServer,
    register: Callable[[AgentFlow, str], None] = register_all,
    *,
    checkpoints: str = "",
) -> AsyncIterator[Scene]:
    """Open the test's own app on the database."""
    async with AgentFlow(url, checkpoints=checkpoints or None) as app:
        register(app, ledger.address)
        yield Scene(url, ledger, forkserver, app, checkpoints)


def _env(lease: float, store_timeout: float = STORE_TIMEOUT) -> dict[str, str]:
    return {
        "AGENTFLOW_LEASE": str(lease),
        "AGENTFLOW_POLL_INTERVAL": "0.05",
        "AGENTFLOW_STORE_TIMEOUT": str(store_timeout),
    }


async def few_at_once(act: Callable[[T], Awaitable[None]], each: Sequence[T]) -> None:
    """Act on each, on a few of them at a time."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def take_turn(item: T) -> None:
        async with turn:
            await act(item)

    async with asyncio.TaskGroup() as group:
        for item in each:
            group.create_task(take_turn(item))


async def durable_tasks(app: AgentFlow, run: Run) -> list[PregelTask]:
    """Return the tasks of a run that left something durable: a result, or a question.

    Those of subgraphs are among them.
    """
    registered = app._registry.find(run.graph, run.version)
    graph = registered.graph.copy(update={"checkpointer": app._saver})
    of_thread: Any = {"configurable": {"thread_id": run.thread_id}}
    spaces = {
        found.config["configurable"]["checkpoint_ns"] async for found in app._saver.alist(of_thread)
    }
    found: dict[str, PregelTask] = {}
    for ns in sorted(spaces):
        thread: Any = {"configurable": {"thread_id": run.thread_id, "checkpoint_ns": ns}}
        async for state in graph.aget_state_history(thread):
            if (state.metadata or {}).get("run_id") == run.id:
                for task in state.tasks:
                    if task.result is not None or task.interrupts:
                        found.setdefault(task.id, task)
    return list(found.values())


async def durable_nodes(app: AgentFlow, run_id: str) -> Counter[str]:
    """Count the executions of a run's nodes whose writes are durable: none may be repeated."""
    tasks = await durable_tasks(app, await app.get_run(run_id))
    return Counter(task.name for task in tasks if task.result is not None)


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """Open a connection past agentflow."""
    engine = make_engine(parse_url(url), load_settings())
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def read_rows(url: str, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> list[sa.Row[Any]]:
    """Read a table past agentflow."""
    with connected(url) as connection:
        return list(connection.execute(sa.select(table).where(*conditions)))


def read_thread_rows(url: str, table: sa.Table, thread_ids: Iterable[str]) -> list[sa.Row[Any]]:
    """Read what a table of the checkpointer's holds of some threads."""
    return read_rows(url, table, table.c.thread.in_(_numbers(url, thread_ids)))


def _numbers(url: str, thread_ids: Iterable[str]) -> dict[int, str]:
    named = read_rows(url, threads, threads.c.thread_id.in_(sorted(thread_ids)))
    return {row.id: row.thread_id for row in named}


def read_everything(url: str, run_ids: Iterable[str]) -> dict[str, list[Any]]:
    """Return every row that belongs to some runs or to their threads."""
    ids = set(run_ids)
    thread_ids = {row.thread_id for row in read_rows(url, runs, runs.c.run_id.in_(ids))}
    wanted = {"thread": set(_numbers(url, thread_ids)), "thread_id": thread_ids, "run_id": ids}
    found = {}
    for table in metadata.sorted_tables:
        column = next((table.c[name] for name in wanted if name in table.c), None)
        if column is not None:
            rows = read_rows(url, table, column.in_(wanted[column.name]))
            found[table.name] = sorted(map(repr, rows))
    return found


def is_lease_over(url: str, run_id: str) -> bool:
    """Whether the lease of a run has expired or was given up."""
    with connected(url) as connection:
        row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one()
        return row.lease_expires_at is None or row.lease_expires_at <= now(connection)


def assert_sound(url: str, run_ids: Iterable[str], *, saved: str = "") -> None:
    """Hold what is stored of ended runs against the invariants that need no knowledge of the graph.

    One outcome for each run, or one for each time that it was requeued; an unbroken chain of audit
    events; checkpoints of a thread that form one line in each namespace, and can all be read;
    fencing tokens that only grow along it; numbers of which none is given twice or left out; no
    value that no checkpoint has; and no writes for a checkpoint that already had a successor.

    Args:
        url: Where the runs are.
        run_ids: Which of them.
        saved: Where their checkpoints are, if in another database.
    """
    saved = saved or url
    ids = sorted(run_ids)
    stored = read_rows(url, runs, runs.c.run_id.in_(ids))
    assert [row.run_id for row in sorted(stored, key=lambda row: row.run_id)] == ids
    thread_ids = {row.thread_id for row in stored}
    _assert_one_outcome_each(stored, read_rows(url, events, events.c.run_id.in_(ids)))
    claimed = read_rows(url, leases, leases.c.thread_id.in_(thread_ids))
    tokens = {row.thread_id: row.token for row in claimed}
    kept: dict[str, dict[int, list[Any]]] = {}
    for table in (checkpoints, values, writes):
        by_thread = kept[table.name] = defaultdict(list)
        for row in read_thread_rows(saved, table, thread_ids):
            by_thread[row.thread].append(row)
    with open_checkpointer(saved) as saver:
        for thread in read_rows(saved, threads, threads.c.thread_id.in_(thread_ids)):
            line = sorted(kept[checkpoints.name][thread.id], key=lambda row: row.seq)
            stretches, log = kept[values.name][thread.id], kept[writes.name][thread.id]
            _assert_lines(thread, line, tokens[thread.thread_id])
            found = saver.list({"configurable": {"thread_id": thread.thread_id}})
            assert [c.checkpoint["id"] for c in found] == [c.checkpoint_id for c in line[::-1]]
            numbers = [row.seq for row in [*line, *log]]
            numbers += [value.series for value in stretches if value.start == 0]
            assert sorted(numbers) == list(range(1, thread.seq + 1)), thread.thread_id
            _assert_values_fit(thread.thread_id, line, stretches)
            _assert_none_late(thread.thread_id, line, log)


def _assert_lines(thread: Any, found: Sequence[Any], token: int) -> None:
    """Hold the checkpoints of a thread, in order, against one another."""
    for line in _by_namespace(found).values():
        parents = [None, *(c.checkpoint_id for c in line[:-1])]
        assert [c.parent_id for c in line] == parents, f"{thread.thread_id} branches"
        assert line[0].parent_writes is None
    written = [int(c.attempt) for c in found]
    assert written == sorted(written), f"the tokens of {thread.thread_id} fall: {written}"
    if written:
        assert 0 < written[0] <= written[-1] <= thread.token <= token


def _by_namespace(found: Iterable[Any]) -> dict[str, list[Any]]:
    lines: dict[str, list[Any]] = defaultdict(list)
    for checkpoint in found:
        lines[checkpoint.ns].append(checkpoint)
    return lines


def _assert_values_fit(thread_id: str, line: Sequence[Any], stretches: Sequence[Any]) -> None:
    """Hold the values of a thread against the checkpoints that name them."""
    reach: dict[int, int] = {}
    for checkpoint in line:
        row = CheckpointRow(*checkpoint)
        record = unpack_record(_ANYTHING, row, Named("", thread_id, row.ns))
        for _, stored, _ in record.layout.values():
            for part in stored if isinstance(stored, tuple) else ():
                reach[part.series] = max(part.length, reach.get(part.series, WHOLE))
    ends: dict[int, int] = {}
    for value in sorted(stretches, key=lambda row: (row.series, row.start)):
        assert value.start == ends.get(value.series, 0), f"{thread_id}: a stretch is missing"
        context = Named("", thread_id, "").context_of_value(value.series, value.start)
        kept = _ANYTHING.loads(value.data, context=context)
        ends[value.series] = WHOLE if reach[value.series] == WHOLE else value.start + len(kept)
    assert ends == reach, thread_id


def _assert_none_late(thread_id: str, line: Sequence[Any], log: Sequence[Any]) -> None:
    """Hold the log of writes against the line.

    What the input wrote may be durable before its checkpoint, or without it; but nothing is written
    for a checkpoint that has a successor.
    """
    successors = {
        c.checkpoint_id: n.seq
        for each in _by_namespace(line).values()
        for c, n in itertools.pairwise(each)
    }
    for write in log:
        end = successors.get(write.checkpoint_id)
        assert end is None or write.seq < end, f"{thread_id}: a write came late"


def _assert_one_outcome_each(stored: Sequence[Any], log: Sequence[Any]) -> None:
    ends = {f"run.{status}" for status in RunStatus if status.is_ended}
    for run in stored:
        chain = sorted((e for e in log if e.run_id == run.run_id), key=lambda e: e.seq)
        assert [e.seq for e in chain] == list(range(1, len(chain) + 1)), run.run_id
        previous = GENESIS
        for event in chain:
            assert event.prev_hash == previous
            assert event.hash == hash_event(event, _PAYLOADS)
            previous = event.hash
        assert run.event_hash == previous
        requeued = sum(e.type == "run.requeued" for e in chain)
        expected = [*["run.failed"] * requeued, f"run.{run.status}"]
        assert [e.type for e in chain if e.type in ends] == expected, run.run_id


def places(entries: Iterable[Entry]) -> list[Place]:
    """Return the places that a worker reported, in order."""
    return [Place(e["kind"], e["number"], e["moment"]) for e in entries]
