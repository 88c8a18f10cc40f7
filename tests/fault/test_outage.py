"""A database server that is stopped under load, at once and for a while: all of it goes on.

The server is shut down as PostgreSQL's `immediate` mode does it: every session is cut in the middle
of whatever it was doing, nothing is written any more, and the next start recovers from the log.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from agentflow.errors import StoreUnavailableError
from agentflow.tasks import Task, TaskCall, TaskRunner
from agentflow.types import RunStatus
from tests.fault.conftest import IS_FULL, Tally
from tests.fault.forkserver import ForkServer
from tests.fault.graphs import LINEAR
from tests.fault.ledger import Ledger
from tests.fault.scene import Approver, Scene, assert_sound, open_scene
from tests.fault.test_kills import assert_approvals_were_used_once
from tests.servers import PostgresServer

pytestmark = pytest.mark.postgres

OUTAGE = 30.0 if IS_FULL else 2.0
"""Seconds for which the server is away: longer than a lease."""
RUNS = 60 if IS_FULL else 24
ABREAST = 6
"""Runs that are unfinished at a time."""
GIVEN = {"linear": {"input": "x"}, "loop": {"wanted": 6}, "questions": {"wanted": 2}}
LOGS = {
    "linear": [f"{node}(x)" for node in LINEAR],
    "loop": [str(number) for number in range(6)],
    "questions": [f"{number}: approve" for number in range(2)],
}


@pytest.fixture(scope="module")
def own_server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server of these tests' own."""
    with PostgresServer() as opened:
        yield opened


@pytest.fixture
async def stoppable_scene(
    own_server: PostgresServer,
    ledger: Ledger,
    forkserver: ForkServer,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Scene]:
    """A scene on a server that the test may stop; the test itself waits for it patiently."""
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", str(3 * OUTAGE + 30))
    url = own_server.url(own_server.create_database())
    async with open_scene(url, ledger, forkserver) as scene:
        scene.deciders.append(Approver(scene))
        yield scene
        # Before the server is, or they would wait for it.
        forkserver.kill_all()


class Load:
    """Keeps runs coming, whatever the database does; what it does not hear of it repeats."""

    def __init__(self, scene: Scene) -> None:
        self.accepted: dict[str, str] = {}
        """Run id to graph: those whose `submit` has returned."""
        self.repeated = 0
        self._scene = scene

    async def submit_all(self) -> None:
        turn = asyncio.Semaphore(ABREAST)
        async with asyncio.TaskGroup() as group:
            for number in range(RUNS):
                group.create_task(self._submit(f"run-{number}", turn))

    async def _submit(self, run_id: str, turn: asyncio.Semaphore) -> None:
        graph = sorted(GIVEN)[int(run_id.rpartition("-")[2]) % len(GIVEN)]
        async with turn:
            while run_id not in self.accepted:
                try:
                    await self._scene.app.submit(graph, GIVEN[graph], run_id=run_id)
                except StoreUnavailableError:
                    self.repeated += 1
                else:
                    self.accepted[run_id] = graph
            await self._scene.ended([run_id])


@pytest.mark.timeout(300 + 10 * OUTAGE)
@pytest.mark.parametrize("patience", [3 * OUTAGE + 30, OUTAGE / 4], ids=["waited-for", "given-up"])
async def test_server_that_is_stopped_under_load_and_comes_back_loses_and_doubles_nothing(
    stoppable_scene: Scene, own_server: PostgresServer, tally: Tally, patience: float
) -> None:
    """Whether the workers wait for it that long, or give up what they were doing."""
    scene = stoppable_scene
    workers = [scene.worker(concurrency=4, store_timeout=patience) for _ in range(2)]
    load = Load(scene)
    loading = asyncio.create_task(load.submit_all())

    async def is_under_way() -> bool | None:
        return len(scene.ledger.entries(event="leave")) >= RUNS or None

    await scene.until(is_under_way, "the load to be under way")
    before = set(load.accepted)
    ended_before = {
        run.id for run in (await scene.app.list_runs(limit=RUNS)).items if run.status.is_ended
    }
    await asyncio.to_thread(own_server.stop, immediately=True)
    await asyncio.sleep(OUTAGE)  # how long it lasts, not a synchronisation
    assert all(not worker.has_ended() for worker in workers), "a worker has given up"
    await asyncio.to_thread(own_server.start)
    await loading
    unfinished = before - ended_before
    assert unfinished, "nothing was going on when the server stopped"
    executed = Counter((e["run"], e["node"], e.get("number")) for e in _entered(scene))
    for run in await scene.ended(load.accepted):
        assert run.status is RunStatus.SUCCEEDED, (run.id, run.error)
        assert run.output["log"] == LOGS[run.graph], run.id
        most = max(count for (run_id, *_), count in executed.items() if run_id == run.id)
        # A node is executed again only by another attempt, and only if it was not durable.
        assert most <= run.claims, run.id
        await assert_approvals_were_used_once(scene, run.id)
    assert_sound(scene.url, load.accepted)
    tally(
        runs=RUNS,
        unfinished_when_it_stopped=len(unfinished),
        executed_again=sum(count - 1 for count in executed.values()),
    )


async def test_tasks_go_on_where_they_were_when_their_server_was_stopped(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside of a task, and not waited for: only what was not durable is run again."""
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "0.5")
    monkeypatch.setenv("AGENTFLOW_LEASE", "1")
    url = own_server.url(own_server.create_database())
    ran: Counter[str] = Counter()

    async def work(call: TaskCall) -> str:
        ran[call.name] += 1
        if call.name == "parse" and ran["parse"] == 1:
            await asyncio.to_thread(own_server.stop, immediately=True)
        return call.name

    tasks = [
        Task(name="fetch", run=work),
        Task(name="parse", run=work, dependencies=["fetch"]),
        Task(name="load", run=work, dependencies=["parse"]),
    ]
    try:
        with pytest.raises(StoreUnavailableError):
            await TaskRunner(tasks, url=url, run_id="r").execute()
    finally:
        await asyncio.to_thread(own_server.start)
    results = await TaskRunner(tasks, url=url, run_id="r").execute()
    assert {name: each.data for name, each in results.items()} == {each: each for each in results}
    assert ran == {"fetch": 1, "parse": 2, "load": 1}


def _entered(scene: Scene) -> list[dict[str, object]]:
    return scene.ledger.entries(event="enter")
