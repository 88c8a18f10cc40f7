"""Recovery that goes wrong itself: killed again, raced for, or taken for somebody else's."""

from __future__ import annotations

import signal
from collections import Counter
from functools import partial

from agentflow.types import RunStatus
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import Victim
from tests.fault.graphs import LINEAR
from tests.fault.sabotage import Place
from tests.fault.scene import (
    LONG,
    Scene,
    assert_sound,
    logged,
    read_everything,
)
from tests.fault.test_kills import INPUT, OUTPUT, settle, survey
from tests.fault.test_zombies import given_back

RUNS = 20
ONCE = Counter(LINEAR)


async def test_run_whose_recovery_is_killed_too_ends_as_its_twin(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    """The second worker dies at any of the places that a recovery has, early or late in it."""
    found = await survey(scene)
    dice = sampler.dice()
    early = [place for place in found if place.number == 1]
    first = sampler.some(found, 5)
    tried = {f"{place}+{dice.choice(early)}": place for place in first}
    kills = await scene.kill_each(
        tried, lambda name: scene.app.submit("linear", INPUT, run_id=name, queue=name)
    )
    seconds = {str(place): place for place in early}
    again = {name: seconds[name.partition("+")[2]] for name in tried}
    unfinished = [name for name in tried if not (await scene.app.get_run(name)).status.is_ended]
    second_kills = await scene.kill_each({name: again[name] for name in unfinished}, _nothing)
    assert second_kills > 0, "no recovery was killed"
    lost = await settle(scene, tried, twin="twin", was_recovered=True)
    for name in unfinished:
        log = Counter(event.type for event in await scene.app.list_events(name))
        assert log["run.started"] <= 1
        # One resume for each attempt that came so far, and none that is told twice.
        claims = (await scene.app.get_run(name)).claims
        assert log["run.started"] + log["run.resumed"] <= claims <= 3
    tally(kills=kills + second_kills, executed_again=lost)


async def _nothing(_name: str) -> None:
    """The run is there already."""


async def test_two_successors_that_find_the_same_runs_share_them(
    scene: Scene, tally: Tally
) -> None:
    run_ids = [f"run-{number}" for number in range(RUNS)]
    scene.ledger.hold(node="b", event="enter")
    for name in run_ids:
        await scene.app.submit("linear", INPUT, run_id=name)
    first = scene.worker(lease=LONG, concurrency=RUNS)

    async def all_are_inside() -> bool | None:
        return len(scene.ledger.entries(node="b", event="enter")) == RUNS or None

    await scene.until(all_are_inside, "all runs to be in their second node")
    first.kill()
    await scene.gone(first)
    scene.ledger.release()
    successors = [scene.worker(lease=LONG, concurrency=RUNS) for _ in range(2)]
    # Both are there, idle, when the leases end.
    await scene.app.submit("single", INPUT, run_id="canary")
    await scene.ended(["canary"])
    scene.expire(run_ids)
    for run in await scene.ended(run_ids):
        assert (run.status, run.output, run.claims) == (RunStatus.SUCCEEDED, OUTPUT, 2), run.id
        assert scene.entered(run.id) == ONCE + Counter("b"), run.id
        events = await scene.app.list_events(run.id)
        assert [e.data["reason"] for e in events if e.type == "run.resumed"] == ["recovery"]
        assert sum(e.type == "run.recovered" for e in events) == 1
    entries = scene.ledger.entries(event="enter")
    pids = {e["pid"] for e in entries if e["node"] == "d"}
    assert pids <= {successor.pid for successor in successors}
    assert_sound(scene.url, run_ids)
    tally(kills=1, recovered=RUNS)


async def test_process_under_the_name_of_a_dead_one_does_not_inherit_its_lease(
    scene: Scene,
) -> None:
    """As a pod that comes back under its old name: it waits for the lease as everybody does."""
    await scene.app.submit("linear", INPUT, run_id="run")
    scene.ledger.hold(run="run", node="b", event="enter")
    dead = scene.worker(lease=LONG, name="pod-0")
    await logged(scene, run="run", node="b")
    dead.kill()
    await scene.gone(dead)
    scene.ledger.release()
    scene.worker(lease=LONG, name="pod-0")
    await scene.app.submit("single", INPUT, run_id="canary")
    await scene.ended(["canary"])
    run = await scene.app.get_run("run")
    assert (run.status, run.claims) == (RunStatus.RUNNING, 1)
    assert scene.entered("run") == {"a": 1, "b": 1}
    scene.expire(["run"])
    (run,) = await scene.ended(["run"])
    assert (run.status, run.claims) == (RunStatus.SUCCEEDED, 2)
    assert scene.entered("run") == ONCE + Counter("b")
    assert_sound(scene.url, ["run"])


async def test_stopped_process_is_refused_although_its_successor_has_its_name(
    scene: Scene, tally: Tally
) -> None:
    await scene.app.submit("linear", INPUT, run_id="run")
    zombie = scene.worker(
        lease=LONG,
        name="pod-0",
        deaf=True,
        at=Place("Saver.aput", 3, "before").plain(),
        how="SIGSTOP",
    )
    await scene.stopped(zombie)
    scene.expire(["run"])
    scene.worker(lease=LONG, name="pod-0")
    (run,) = await scene.ended(["run"])
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, OUTPUT)
    await given_back(scene, ["run"])
    before = read_everything(scene.url, ["run"])
    zombie.resume()
    await scene.until(partial(_said, zombie, "attempt was fenced"), "the zombie to notice")
    zombie.kill()
    await scene.gone(zombie)
    assert read_everything(scene.url, ["run"]) == before
    assert_sound(scene.url, ["run"])
    tally(zombies=1, refused=1)


async def _said(victim: Victim, words: str) -> bool | None:
    return words in victim.output() or None


async def test_run_goes_over_from_a_draining_process_to_a_new_one_at_once(
    scene: Scene, tally: Tally
) -> None:
    """As in a deploy, under the same name: nothing is executed twice, and no lease waited for."""
    run_ids = [f"run-{number}" for number in range(4)]
    scene.ledger.hold(node="b", event="enter")
    for name in run_ids:
        await scene.app.submit("linear", INPUT, run_id=name)
    old = scene.worker(lease=LONG, concurrency=4, name="pod-0")
    for name in run_ids:
        await logged(scene, run=name, node="b")
    new = scene.worker(lease=LONG, concurrency=4, name="pod-0")
    old.kill(signal.SIGTERM)
    # The new one takes what the draining one leaves alone.
    await scene.app.submit("single", INPUT, run_id="canary")
    await scene.ended(["canary"])
    assert {e["pid"] for e in scene.ledger.entries(run="canary")} == {new.pid}
    scene.ledger.release()
    assert await scene.gone(old) == 0, old.output()
    for run in await scene.ended(run_ids):
        assert (run.status, run.output, run.claims) == (RunStatus.SUCCEEDED, OUTPUT, 2), run.id
        events = await scene.app.list_events(run.id)
        assert [e.data["reason"] for e in events if e.type == "run.resumed"] == ["drain"]
        entered = scene.ledger.entries(run=run.id, event="enter")
        assert [(e["node"], e["pid"]) for e in entered] == [
            *(("a", old.pid), ("b", old.pid)),
            *(("c", new.pid), ("d", new.pid)),
        ]
    assert_sound(scene.url, run_ids)
    tally(drained=len(run_ids))
