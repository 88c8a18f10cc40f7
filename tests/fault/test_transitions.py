"""A process that dies, or loses its connection, at each verb by which something becomes durable.

The verbs are read off the ports, so one that is added and that nobody is killed at fails the suite
until there is a scenario in which a process comes to it. Whatever becomes of that process, whoever
called repeats the call, a successor takes the run over, and all of it ends once.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from agentflow.checkpoint import Saver
from agentflow.checkpoint.rows import RETIRED
from agentflow.database.tables import checkpoints, runs, threads, values, writes
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
    cancel,
    drain,
    few_at_once,
    read_rows,
    read_thread_rows,
)
from tests.proxy import Proxy
from tests.servers import PostgresServer

Act = Callable[[Scene, "Scenario", str], Awaitable[None]]
Tried = Mapping[str, tuple[str, Moment]]
"""Name of a run to the verb of its scenario, and the moment at which its process is struck."""

SHORT = 3.0
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
    """A lost run on a thread of which the checkpointer knows a later claim than the run store."""
    saver = scene.app._saver
    assert isinstance(saver, Saver)
    await lost(scene, scenario, name)
    lease = Lease(tenant="", run_id=name, thread_id=name, worker="restored", token=FencingToken(50))
    await saver.acquire(lease)
    await saver.release(lease)


async def lost(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run whose worker is gone, and its lease over."""
    await submitted(scene, scenario, name)
    claimed = await scene.app._store.claim_run(
        "", name, worker="lost", lease=timedelta(seconds=LONG)
    )
    assert claimed is not None
    scene.expire([name])


async def paused(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run that is paused."""
    await submitted(scene, scenario, name)
    await CALLS["pause_run"](scene.app, name)


async def in_paused_queue(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run in a queue that is paused."""
    await submitted(scene, scenario, name)
    await CALLS["pause_queue"](scene.app, name)


async def suspected(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run that has lost two workers, and is driven in isolation from now on."""
    await lost(scene, scenario, name)
    claimed = await scene.app._store.claim_run(
        "", name, worker="lost", lease=timedelta(seconds=LONG)
    )
    assert claimed is not None
    scene.expire([name])


async def rolling_back(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run whose thread held another one that waited for somebody, and is to be undone."""
    await scene.app.submit(
        "questions", INPUTS["questions"], run_id=f"{name}-undone", thread_id=name, queue=name
    )
    await scene.app.drive(f"{name}-undone")
    await scene.app.submit(
        scenario.graph,
        INPUTS[scenario.graph],
        run_id=name,
        thread_id=name,
        queue=name,
        on_busy="rollback",
    )


async def late(scene: Scene, scenario: Scenario, name: str) -> None:
    """A run that nobody has started in time."""
    await scene.app.submit(
        scenario.graph, INPUTS[scenario.graph], run_id=name, queue=name, start_timeout=0.001
    )


async def leave(scene: Scene, victim: Victim, name: str) -> None:
    """Tell the worker to go after its run has ended."""
    await scene.ended([name])
    victim.kill(signal.SIGTERM)


async def cancel_when_paused(scene: Scene, name: str) -> None:
    """Cancel the run once it is paused."""

    async def is_paused() -> bool | None:
        run = await scene.app.get_run(name)
        return True if run.paused_at and run.status is RunStatus.QUEUED else None

    await scene.until(is_paused, f"{name} to be paused")
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
    after: Callable[[Scene, str], Awaitable[None]] | None = None
    """What somebody does in the end, so that the run may end."""
    status: RunStatus = RunStatus.SUCCEEDED
    lease: float = LONG

    is_alone: bool = False
    """Whether it is to happen while no other process may do the same for everybody."""
    batch_rows: int = 200
    """How many rows are deleted in one transaction."""

    def start(
        self, scene: Scene, name: str, place: Place, how: str = "SIGKILL", url: str = ""
    ) -> Victim:
        """Start the process that is going to be struck."""
        options: dict[str, Any] = {
            "at": place.plain(),
            "how": how,
            "batch_rows": self.batch_rows,
        }
        start = partial(scene.caller, self.call, name) if self.call else scene.worker
        return start(url=url, lease=self.lease, queues=[name], **options)

    async def repeat(self, scene: Scene, name: str) -> None:
        """Call again, as whoever got no answer would."""
        if self.call:
            await CALLS[self.call](scene.app, name)


def _call(name: str) -> Callable[[Scene, str], Awaitable[None]]:
    async def call(scene: Scene, run_id: str) -> None:
        await CALLS[name](scene.app, run_id)

    return call


SCENARIOS: dict[str, Scenario] = {
    # By verb; what stands behind a plus is done in the same transaction.
    "create_fingerprint": Scenario(graph="single", call="submit", prepare=nothing),
    "route_graph": Scenario(call="route"),
    "create_run": Scenario(graph="single", call="submit", prepare=nothing),
    "claim_runs": Scenario(),
    "claim_run": Scenario(call="drive"),
    "raise_token": Scenario(call="cancel", prepare=behind, status=RunStatus.CANCELLED),
    "extend_leases": Scenario(prepare=held, lease=SHORT),
    "start_attempt": Scenario(graph="flaky"),
    "park_run": Scenario(graph="questions"),
    "finish_run": Scenario(),
    "retry_run": Scenario(graph="flaky"),
    "fail_run": Scenario(graph="broken", status=RunStatus.FAILED),
    "release_run": Scenario(prepare=held, during=drain),
    "finish_cancel": Scenario(prepare=held, during=cancel, status=RunStatus.CANCELLED, lease=SHORT),
    "cancel_run": Scenario(call="cancel", status=RunStatus.CANCELLED),
    "resolve_wait": Scenario(graph="questions", call="decide", prepare=driven),
    "resolve_wait+claim": Scenario(graph="questions", call="decide_beside", prepare=driven),
    "create_run+claim": Scenario(graph="single", call="submit_beside", prepare=nothing),
    "pause_run": Scenario(call="pause_run", after=_call("resume_run")),
    "resume_run": Scenario(call="resume_run", prepare=paused),
    "pause": Scenario(call="pause_queue", after=_call("resume_queue")),
    "resume": Scenario(call="resume_queue", prepare=in_paused_queue),
    "pause_failed_run": Scenario(
        graph="stubborn", after=cancel_when_paused, status=RunStatus.CANCELLED
    ),
    "fire_due": Scenario(call="fire_due", prepare=late, status=RunStatus.CANCELLED, is_alone=True),
    "requeue_dead_letter": Scenario(
        graph="broken", call="requeue", prepare=driven, status=RunStatus.FAILED
    ),
    "discard_dead_letter": Scenario(
        graph="broken", call="discard", prepare=driven, status=RunStatus.FAILED
    ),
    "beat_worker": Scenario(),
    "remove_worker": Scenario(during=leave),
    "end_isolation": Scenario(prepare=suspected),
    "finish_rollback": Scenario(prepare=rolling_back),
}
ROW_SCENARIOS: dict[str, Scenario] = {
    # By verb; what stands behind a plus is done in the same transaction.
    "apply": Scenario(),
    "set_lease": Scenario(),
    "remove": Scenario(call="prune", prepare=driven),
    "remove_values": Scenario(call="prune", prepare=driven),
    "retire": Scenario(call="delete_thread", prepare=driven, batch_rows=5),
    "remove_some": Scenario(call="delete_thread", prepare=driven),
    "forget_retired": Scenario(call="delete_thread", prepare=driven, batch_rows=5),
}
ELSEWHERE = {
    "claim_migration": "fault/test_deploys.py",
    "migrate_run": "fault/test_deploys.py",
    "import_run": "fault/test_deploys.py",
    "rotate_keys": "integration/test_key_rotation.py",
    "rewrite": "integration/test_key_rotation.py",
    "restore": "fault/test_transitions.py",
    "raise_tokens": "fault/test_transitions.py",
    "refer": "fault/test_object_kills.py",
    "abandon": "fault/test_object_kills.py",
    "forget_objects": "fault/test_object_kills.py",
    "claim_reopening": "fault/test_reopening.py",
    "reopen_wait": "fault/test_reopening.py",
    "begin_effect": "fault/test_effects.py",
    "finish_effect": "fault/test_effects.py",
    "prune_effects": "fault/test_effects.py",
    "resolve_effect": "fault/test_effects.py",
}
"""Verbs that have tests of their own, in which a process is killed there."""
EVERYTHING: dict[str, Any] = {
    "worker": "w",
    "queues": ["default"],
    "graphs": [("single", "1")],
    "limit": 10,
    "lease": timedelta(seconds=LONG),
}


def test_every_transition_of_both_ports_has_a_process_that_is_killed_there() -> None:
    assert set(SCENARIOS) | set(ELSEWHERE) >= set(VERBS)
    assert set(ROW_SCENARIOS) | set(ELSEWHERE) >= set(ROW_VERBS)
    tests = Path(__file__).parents[1]
    assert all("SIGKILL" in (tests / name).read_text() for name in ELSEWHERE.values())


def _place(verb: str, moment: Moment) -> Place:
    return Place(f"RunStore.{verb.partition('+')[0]}", 1, moment)


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
        victim = scenario.start(scene, name, _place(verb, moment))
        if scenario.during is not None:
            await scenario.during(scene, victim, name)
        await scene.died(victim)

    await apart_from_others(kill, [(name, verb) for name, (verb, _) in tried.items()])
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

        async def cut(name: str) -> None:
            verb, harm = chosen[name]
            scenario = SCENARIOS[verb]
            tried[name] = (verb, "uncommitted" if harm == "cut" else "committed")
            await scenario.prepare(scene, scenario, name)
            proxy = stack.enter_context(Proxy(postgres_server.port))
            place = _place(verb, "uncommitted")
            victim = scenario.start(scene, name, place, proxy.harm(harm), proxy.url(scene.url))
            if scenario.during is not None:
                await scenario.during(scene, victim, name)
            await scene.until(_truth(lambda: proxy.was_asked), f"the harm done to {name}")
            if scenario.call:
                await scene.gone(victim)

        chosen = {f"{harm}-{verb}": (verb, harm) for verb, harm in sampler.some(every, 8)}
        await apart_from_others(cut, [(name, verb) for name, (verb, _) in chosen.items()])
        scene.expire(tried)
        await everything_ends(scene, tried)
        # Before its wire is gone, or it would wait for that.
        for victim in scene.forkserver.victims:
            victim.kill()
    tally(connections_lost=len(tried))


async def apart_from_others(
    act: Callable[[str], Awaitable[None]], each: Sequence[tuple[str, str]]
) -> None:
    """Act on each name, and first, one by one, on those whose verb is to be alone."""
    alone = [name for name, verb in each if SCENARIOS[verb].is_alone]
    for name in alone:
        await act(name)
    await few_at_once(act, [name for name, _ in each if name not in alone])


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
    for name, (verb, _) in tried.items():
        if (after := SCENARIOS[verb].after) is not None:
            await after(scene, name)
    for run in await scene.ended(tried):
        verb, _ = tried[run.id]
        assert run.status is SCENARIOS[verb].status, (run.id, run.error)
        await assert_told_once(scene, run, verb)
        most = 3 if run.graph == "flaky" else 2
        assert max(scene.entered(run.id).values(), default=0) <= most, run.id
        if verb == "finish_rollback":
            await assert_undone(scene, f"{run.id}-undone", run)
    whole = [name for name, (verb, _) in tried.items() if verb != "finish_rollback"]
    assert_sound(scene.url, whole, saved=scene.saved_url)


async def assert_undone(scene: Scene, undone: str, by: Run) -> None:
    """Hold a thread of which one run was undone against what the other one has made of it."""
    log = Counter(event.type for event in await scene.app.list_events(undone))
    assert log["run.cancelled"] == log["run.rolled_back"] == 1
    saved = read_thread_rows(scene.saved_url, checkpoints, [by.thread_id])
    assert {row.run_id for row in saved} == {by.id}
    assert (await scene.app.state(by.id)).values == by.output


async def assert_told_once(scene: Scene, run: Run, verb: str) -> None:
    """Hold the audit log of a run against what can only happen once."""
    log = Counter(event.type for event in await scene.app.list_events(run.id))
    assert log["run.submitted"] == 1
    assert log["approval.requested"] == log["approval.resolved"] == (run.graph == "questions")
    assert log["run.requeued"] == (verb == "requeue_dead_letter")
    assert log["dead_letter.discarded"] == (verb == "discard_dead_letter")
    assert log["run.rolled_back"] == 0, "that is told of the other run"
    is_dead = run.status is RunStatus.FAILED and verb != "discard_dead_letter"
    letter = await scene.app._store.find_dead_letter("", run.id)
    assert (letter is not None) == run.dead_letter == is_dead, run.id


async def test_store_whose_restore_is_killed_is_restored_by_the_next_call(
    scene: Scene, tally: Tally
) -> None:
    """Whatever moment it is: nothing is claimed before somebody lets it go on."""
    store = scene.app._store
    tried = [Place("RunStore.restore", 1, moment) for moment in MOMENTS]
    tried += [Place("Rows.raise_tokens", 1, moment) for moment in ("before", "after")]
    for place in tried:
        name = str(place)
        await scene.app.submit("single", {"input": "x"}, run_id=name)
        before = (await store.survey("")).epoch
        await scene.died(scene.caller("restore", name, at=place.plain()))
        # The tokens of the checkpointer are raised first, to no harm if there it ends.
        is_durable = place.moment in {"committed", "after"} and "RunStore" in place.kind
        assert (await store.survey("")).epoch == before + is_durable
        if not is_durable:
            await CALLS["restore"](scene.app, name)
        assert (await store.survey("")).epoch == before + 1
        assert await store.claim_runs("", **EVERYTHING) == []
        assert await store.resume("", "store", "", by="alice")
        await scene.app.drive(name)
        assert scene.entered(name) == {"a": 1}, place
    tally(kills=len(tried))


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


@pytest.mark.postgres
async def test_connection_is_cut_before_the_commit_and_lost_after_it(
    postgres_scene: Scene, postgres_server: PostgresServer
) -> None:
    """Or what is called cut and lost might both be the one or the other."""
    scene = postgres_scene
    harms: tuple[Literal["cut", "lose"], ...] = ("cut", "lose")
    for harm in harms:
        with Proxy(postgres_server.port) as proxy:
            victim = scene.caller(
                "submit",
                harm,
                url=proxy.url(scene.url),
                at=Place("RunStore.create_run", 1, "uncommitted").plain(),
                how=proxy.harm(harm),
            )
            assert await scene.gone(victim) == 1, "the caller was told that all is well"
        found = read_rows(scene.url, runs, runs.c.run_id == harm)
        assert len(found) == (harm == "lose"), harm
