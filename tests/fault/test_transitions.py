"""A process that dies, or loses its connection, at each verb by which something becomes durable.

The verbs are read off the ports, so one that is added and that nobody is killed at fails the suite
until there is a scenario in which a process comes to it. Whatever becomes of that process, whoever
called repeats the call, a successor takes the run over, and all of it ends once.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from agentflow.checkpoint import Saver
from agentflow.checkpoint.rows import RETIRED
from agentflow.database.tables import checkpoints, threads, values, writes
from agentflow.errors import StoreUnavailableError
from agentflow.types import FencingToken, Lease, Run, RunStatus
from tests.fault.calls import CALLS, INPUTS
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import Victim
from tests.fault.graphs import LINEAR
from tests.fault.sabotage import MOMENTS, ROW_VERBS, VERBS, Moment, Place
from tests.fault.scene import (
    LONG,
    Approver,
    Scene,
    assert_sound,
    few_at_once,
    logged,
    read_rows,
    read_thread_rows,
)
from tests.proxy import Proxy
from tests.servers import PostgresServer

Act = Callable[[Scene, "Scenario", str], Awaitable[None]]
Tried = Mapping[str, tuple[str, Moment]]
"""Name of a run to the verb of its scenario, and the moment at which its process is struck."""

SHORT = 1.0
"""A lease whose heartbeats, or whose end, somebody waits for."""


async def submitted(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run that a worker of its own is going to find."""
    await scene.app.submit(scenario.graph, INPUTS[scenario.graph], run_id=name, queue=name)


async def nothing(scene: Scene, scenario: Scenario, name: str) -> None:
    """Nothing before."""


async def driven(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run that has been driven to its end, or to where it asks somebody."""
    await submitted(scene, scenario, name)
    await scene.app.drive(name)


async def held(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run that is going to be stuck in its first node."""
    scene.ledger.hold(run=name, event="enter")
    await submitted(scene, scenario, name)


async def behind(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run on a thread of which the checkpointer knows a later claim than the run store does."""
    saver = scene.app._saver
    assert isinstance(saver, Saver)
    lease = Lease(tenant="", run_id=name, thread_id=name, worker="restored", token=FencingToken(50))
    await saver.acquire(lease)
    await saver.release(lease)
    await submitted(scene, scenario, name)


async def drain(scene: Scene, victim: Victim, name: str) -> None:
    """Tell the worker to go while it is in a node."""
    await logged(scene, run=name, event="enter")
    victim.kill(signal.SIGTERM)
    scene.ledger.release(run=name)


async def cancel(scene: Scene, victim: Victim, name: str) -> None:
    """Cancel the run while its worker is in a node."""
    await logged(scene, run=name, event="enter")
    await scene.app.cancel(name)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How a process comes to a verb, and how the run ends that this is about."""

    graph: str = "linear"
    call: str = ""
    """One of `CALLS`; without it the process is a worker."""
    prepare: Act = submitted
    during: Callable[[Scene, Victim, str], Awaitable[None]] | None = None
    """What somebody else does while the process runs."""
    status: RunStatus = RunStatus.SUCCEEDED
    lease: float = LONG

    batch_rows: int = 200
    """How many rows are deleted in one transaction."""

    def start(
        self, scene: Scene, name: str, place: Place, how: str = "SIGKILL", url: str = ""
    ) -> Victim:
        """Start the process that is going to be struck."""
        lease = self.lease if how == "SIGKILL" else SHORT
        options = {"at": place.plain(), "how": how, "batch_rows": self.batch_rows}
        start = partial(scene.caller, self.call, name) if self.call else scene.worker
        return start(url=url, lease=lease, queues=[name], **options)

    async def repeat(self, scene: Scene, name: str) -> None:
        """Call again, as whoever got no answer would."""
        if self.call:
            await CALLS[self.call](scene.app, name)


SCENARIOS: dict[str, Scenario] = {
    "create_run": Scenario(graph="single", call="submit", prepare=nothing),
    "claim_runs": Scenario(),
    "claim_run": Scenario(call="drive"),
    "raise_token": Scenario(prepare=behind),
    "extend_leases": Scenario(prepare=held, lease=SHORT),
    "start_attempt": Scenario(),
    "park_run": Scenario(graph="questions"),
    "finish_run": Scenario(),
    "retry_run": Scenario(graph="flaky"),
    "fail_run": Scenario(graph="broken", status=RunStatus.FAILED),
    "release_run": Scenario(prepare=held, during=drain),
    "finish_cancel": Scenario(prepare=held, during=cancel, status=RunStatus.CANCELLED, lease=SHORT),
    "cancel_run": Scenario(call="cancel", status=RunStatus.CANCELLED),
    "resolve_wait": Scenario(graph="questions", call="decide", prepare=driven),
}
ROW_SCENARIOS: dict[str, Scenario] = {
    "apply": Scenario(),
    "set_lease": Scenario(),
    "remove": Scenario(call="prune", prepare=driven),
    "remove_values": Scenario(call="prune", prepare=driven),
    "retire": Scenario(call="delete_thread", prepare=driven, batch_rows=5),
    "remove_some": Scenario(call="delete_thread", prepare=driven),
    "forget_retired": Scenario(call="delete_thread", prepare=driven, batch_rows=5),
}
ELSEWHERE = {
    "rotate_keys": "integration/test_key_rotation.py",
    "rewrite": "integration/test_key_rotation.py",
}
"""Verbs that have tests of their own, in which a process is killed there."""


def test_every_transition_of_both_ports_has_a_process_that_is_killed_there() -> None:
    assert set(SCENARIOS) | set(ELSEWHERE) >= set(VERBS)
    assert set(ROW_SCENARIOS) | set(ELSEWHERE) >= set(ROW_VERBS)
    tests = Path(__file__).parents[1]
    assert all("SIGKILL" in (tests / name).read_text() for name in ELSEWHERE.values())


async def test_process_killed_at_each_transition_leaves_nothing_undone(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    tried = {
        f"{moment}-{verb}": (verb, moment)
        for verb in SCENARIOS
        for moment in sampler.some(MOMENTS, 1)
    }

    async def kill(name: str) -> None:
        verb, moment = tried[name]
        scenario = SCENARIOS[verb]
        await scenario.prepare(scene, scenario, name)
        victim = scenario.start(scene, name, Place(f"RunStore.{verb}", 1, moment))
        if scenario.during is not None:
            await scenario.during(scene, victim, name)
        await scene.died(victim)

    await few_at_once(kill, list(tried))
    scene.expire(tried)
    await everything_ends(scene, tried)
    tally(kills=len(tried))


@pytest.mark.postgres
async def test_connection_lost_at_each_transition_leaves_nothing_undone(
    postgres_scene: Scene, postgres_server: PostgresServer, sampler: Sampler, tally: Tally
) -> None:
    """Cut before the commit, or after it and before the reply; the process itself goes on."""
    scene = postgres_scene
    harms: tuple[Literal["cut", "lose"], ...] = ("cut", "lose")
    every = [(verb, harm) for verb in SCENARIOS for harm in harms]
    tried: dict[str, tuple[str, Moment]] = {}
    with ExitStack() as stack:

        async def cut(what: tuple[str, Literal["cut", "lose"]]) -> None:
            verb, harm = what
            name, scenario = f"{harm}-{verb}", SCENARIOS[verb]
            tried[name] = (verb, "uncommitted" if harm == "cut" else "committed")
            await scenario.prepare(scene, scenario, name)
            proxy = stack.enter_context(Proxy(postgres_server.port))
            place = Place(f"RunStore.{verb}", 1, "uncommitted")
            victim = scenario.start(scene, name, place, proxy.harm(harm), proxy.url(scene.url))
            if scenario.during is not None:
                await scenario.during(scene, victim, name)
            await scene.until(_truth(lambda: proxy.was_asked), f"the harm done to {name}")
            if scenario.call:
                await scene.gone(victim)

        await few_at_once(cut, sampler.some(every, 8))
        await everything_ends(scene, tried)
        # Before its wire is gone, or it would wait for that.
        for victim in scene.forkserver.victims:
            victim.kill()
    tally(connections_lost=len(tried))


def _truth(look: Callable[[], bool]) -> Callable[[], Awaitable[bool | None]]:
    async def see() -> bool | None:
        return look() or None

    return see


async def everything_ends(scene: Scene, tried: Tried) -> None:
    """Let everybody repeat what they did, and a successor take over what is left."""
    scene.ledger.release()
    scene.deciders.append(Approver(scene))
    for name, (verb, _) in tried.items():
        with suppress(StoreUnavailableError):
            await SCENARIOS[verb].repeat(scene, name)
    scene.worker(lease=LONG, queues=list(tried), concurrency=10)
    for run in await scene.ended(tried):
        verb, _ = tried[run.id]
        assert run.status is SCENARIOS[verb].status, (run.id, run.error)
        await assert_told_once(scene, run)
        most = 3 if run.graph == "flaky" else 2
        assert max(scene.entered(run.id).values(), default=0) <= most, run.id
    assert_sound(scene.url, tried, saved=scene.saved_url)


async def assert_told_once(scene: Scene, run: Run) -> None:
    """Hold the audit log of a run against what can only happen once."""
    log = Counter(event.type for event in await scene.app.list_events(run.id))
    assert log["run.submitted"] == 1
    assert log["approval.requested"] == log["approval.resolved"] == (run.graph == "questions")
    letter = await scene.app._store.find_dead_letter("", run.id)
    assert (letter is not None) == run.dead_letter == (run.status is RunStatus.FAILED)


async def test_process_killed_at_each_change_of_checkpoints_leaves_nothing_undone(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    moments: tuple[Moment, ...] = ("before", "after")
    tried = {
        f"{moment}-{verb}": (verb, moment)
        for verb in ROW_SCENARIOS
        for moment in sampler.some(moments, 1)
    }
    log = [f"{node}({letter * 20_000})" for letter in "xy" for node in LINEAR]

    async def kill(name: str) -> None:
        verb, moment = tried[name]
        scenario = ROW_SCENARIOS[verb]
        # Two runs of a thread: what the first one was given is in no checkpoint of the second one.
        for number, letter in enumerate("xy"):
            run_id, given = (f"{name}-before", name)[number], {"input": letter * 20_000}
            await scene.app.submit("linear", given, run_id=run_id, thread_id=name, queue=name)
            if number == 0 or scenario.prepare is driven:
                await scene.app.drive(run_id)
        victim = scenario.start(scene, name, Place(f"Rows.{verb}", 1, moment))
        await scene.died(victim)

    await few_at_once(kill, list(tried))
    scene.expire(tried)
    scene.worker(lease=LONG, queues=list(tried), concurrency=10)
    assert {run.status for run in await scene.ended(tried)} == {RunStatus.SUCCEEDED}
    for name, (verb, _) in tried.items():
        call = ROW_SCENARIOS[verb].call
        await ROW_SCENARIOS[verb].repeat(scene, name)
        count = 0 if call == "delete_thread" else 1 if call == "prune" else 12
        assert len(read_thread_rows(scene.url, checkpoints, [name])) == count, name
        if call == "delete_thread":
            assert read_thread_rows(scene.url, values, [name]) == [], name
            assert read_thread_rows(scene.url, writes, [name]) == [], name
        else:
            assert (await scene.app.state(name)).values["log"] == log, name
    assert read_rows(scene.url, threads, threads.c.tenant == RETIRED) == []
    kept = [name for name, (verb, _) in tried.items() if not ROW_SCENARIOS[verb].call]
    assert_sound(scene.url, [*kept, *(f"{name}-before" for name in kept)])
    tally(kills=len(tried))


async def test_victim_passes_the_points_of_a_verb_in_order(scene: Scene) -> None:
    """Or what is called uncommitted might be committed, and nobody would notice."""
    for moment in MOMENTS:
        name = f"order-{moment}"
        await scene.app.submit("single", {"input": "x"}, run_id=name, queue=name)
        victim = scene.worker(
            lease=LONG, queues=[name], at=Place("RunStore.finish_run", 1, moment).plain()
        )
        await scene.died(victim)
        run = await scene.app.get_run(name)
        is_durable = moment in {"committed", "after"}
        assert (run.status is RunStatus.SUCCEEDED) == is_durable, moment
