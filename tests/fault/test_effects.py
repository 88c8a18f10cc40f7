"""Effects of killed and stopped workers, counted outside: none twice, none lost.

What a person is asked about an effect in doubt is answered by what the ledger has. A payment, which
is not idempotent, happens once; a notification, which is, may be repeated under the same key. A
question of the graph's own stands between two payments in the same node.
"""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from agentflow.errors import AlreadyResolvedError, SupersededError
from agentflow.types import Approval, RunStatus
from tests.fault.conftest import Sampler, Tally
from tests.fault.graphs import LINEAR
from tests.fault.sabotage import MOMENTS, Moment, Place
from tests.fault.scene import LONG, Scene, assert_sound, logged, places

LOG = ["told", "deposit", "approve", "rest"]


class Witness:
    """Approves what a graph asks, and says of effects in doubt what the ledger knows."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.asked: list[Approval] = []

    async def __call__(self) -> None:
        for approval in (await self._scene.app.approvals.list()).items:
            decision: Any = "approve"
            if approval.kind == "effect":
                self.asked.append(approval)
                decision = {"type": "respond", "value": await self._say(approval)}
            with contextlib.suppress(AlreadyResolvedError, SupersededError):
                await self._scene.app.approvals.decide(approval.id, decision, by="witness")

    async def _say(self, approval: Approval) -> dict[str, Any]:
        arguments = approval.request.proposal["arguments"]
        event = "booked" if approval.graph == "trip" else "paid"
        if "effect" in arguments:  # a compensation names what it undoes
            arguments = (await self._scene.app.effects.get(arguments["effect"])).arguments
            event = "unbooked"
        what = arguments["what"]
        found = self._scene.ledger.entries(event=event, run=arguments["run"], key=what)
        return {"happened": bool(found), "outcome": what}


async def submit(scene: Scene, name: str) -> None:
    await scene.app.submit("payments", {"input": "x"}, run_id=name, queue=name)


def payments(scene: Scene, run: str) -> Counter[str]:
    return Counter(e["key"] for e in scene.ledger.entries(event="paid", run=run))


async def test_worker_killed_around_an_effect_pays_once(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    witness = Witness(scene)
    scene.deciders.append(witness)
    every = [
        Place(f"RunStore.{verb}", number, moment)
        for verb in ("begin_effect", "finish_effect")
        for number in (1, 2, 3)
        for moment in MOMENTS
    ]
    tried = {str(place): place for place in sampler.some(every, 4)}
    assert await kill_and_settle(scene, tried) == len(tried)
    tally(kills=len(tried), doubts=len({each.id for each in witness.asked}))


async def test_worker_killed_at_random_places_pays_once(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    """Anywhere at all, as the dice fall: five hundred times in a full run."""
    witness = Witness(scene)
    scene.deciders.append(witness)
    await submit(scene, "twin")
    twin = scene.worker(lease=LONG, queues=["twin"], reports=True)
    await scene.ended(["twin"])
    twin.kill(signal.SIGTERM)
    assert await scene.gone(twin) == 0, twin.output()
    found = places(scene.ledger.entries(event="place", pid=twin.pid))
    dice, kills = sampler.dice(), 0
    count = 500 if sampler.is_full else 3
    for begin in range(0, count, 50):
        numbers = range(begin, min(begin + 50, count))
        kills += await kill_and_settle(scene, {f"r{n}": dice.choice(found) for n in numbers})
    tally(kills=kills, doubts=len({each.id for each in witness.asked}))


async def kill_and_settle(scene: Scene, tried: Mapping[str, Place]) -> int:
    """Kill a worker at each place, have another one go on, and count what was paid."""
    kills = await scene.kill_each(tried, lambda name: submit(scene, name))
    successor = scene.worker(lease=LONG, queues=list(tried), concurrency=5)
    for run in await scene.ended(tried):
        assert run.status is RunStatus.SUCCEEDED, (run.id, run.error)
        assert sorted(run.output["log"]) == sorted(LOG), run.id
        assert payments(scene, run.id) == {"deposit": 1, "rest": 1}, run.id
        told = scene.ledger.entries(event="told", run=run.id)
        assert len({entry["key"] for entry in told}) == 1, run.id
    assert_sound(scene.url, tried)
    successor.kill()
    return kills


async def test_call_that_happened_unheard_of_is_not_repeated(scene: Scene) -> None:
    witness = Witness(scene)
    scene.deciders.append(witness)
    scene.ledger.hold(event="paid", run="unheard", key="deposit")
    await submit(scene, "unheard")
    victim = scene.worker(lease=LONG, queues=["unheard"])
    await logged(scene, event="paid", run="unheard")
    victim.kill(signal.SIGKILL)
    await scene.gone(victim)
    scene.expire(["unheard"])
    scene.worker(lease=LONG, queues=["unheard"])
    (run,) = await scene.ended(["unheard"])
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert payments(scene, "unheard") == {"deposit": 1, "rest": 1}
    assert all(each.request.proposal["worker_is_gone"] for each in witness.asked)
    assert all("its process has ended" in (e.request.description or "") for e in witness.asked)
    assert {each.request.proposal["name"] for each in witness.asked}
    assert_sound(scene.url, ["unheard"])


async def test_worker_stopped_before_the_call_does_not_call_when_it_goes_on(scene: Scene) -> None:
    scene.deciders.append(Witness(scene))
    await submit(scene, "stopped")
    place = Place("RunStore.begin_effect", 3, "after")
    victim = scene.worker(queues=["stopped"], at=place.plain(), how="SIGSTOP")
    await scene.stopped(victim)
    await scene.expired("stopped")
    scene.worker(lease=LONG, queues=["stopped"])
    (run,) = await scene.ended(["stopped"])
    before = scene.ledger.entries(pid=victim.pid)
    canary = await scene.app.submit("single", {"input": "x"}, queue=f"canary-{victim.pid}")
    victim.kill(signal.SIGCONT)
    await scene.ended([canary.id])
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert payments(scene, "stopped") == {"deposit": 1, "rest": 1}
    own = [e for e in scene.ledger.entries(pid=victim.pid) if e.get("run") == "stopped"]
    assert own == [e for e in before if e.get("run") == "stopped"]
    victim.kill(signal.SIGKILL)


async def test_outcome_of_a_call_that_somebody_denied_raises_the_alarm(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be prevented: the worker was stopped inside of the call, past its last check."""
    scene.ledger.hold(event="paid", run="denied", key="deposit")
    await submit(scene, "denied")
    # Nothing else of it writes when it stops: who is stopped inside a transaction keeps the file.
    inside = Place("node", 1, "after").plain()
    victim = scene.worker(queues=["denied"], at=inside, how="SIGSTOP", deaf=True)
    await scene.until(lambda: notified(scene, "denied"), "the notification")
    scene.ledger.release(event="paid", run="denied", key="deposit")
    await scene.stopped(victim)
    await scene.expired("denied")
    second = scene.worker(lease=LONG, queues=["denied"])
    await scene.parked("denied")
    (asked,) = (await scene.app.approvals.list(run_id="denied")).items
    assert asked.kind == "effect"
    assert asked.request.proposal["safe_at"] is not None
    assert "Do not answer before" in (asked.request.description or "")
    assert asked.request.proposal["worker_seen_at"] is not None
    assert not asked.request.proposal["worker_is_gone"]  # it is stopped
    assert "Its last sign of life came at" in (asked.request.description or "")
    no = {"type": "respond", "value": {"happened": False}}
    await scene.app.approvals.decide(asked.id, no, by="hasty")
    assert "before it is safe" in caplog.text
    await logged_twice(scene)
    victim.kill(signal.SIGCONT)

    async def alarmed() -> bool | None:
        events = await scene.app.list_events("denied")
        return any(event.type == "effect.late_outcome" for event in events) or None

    await scene.until(alarmed, "the late outcome")
    effects = (await scene.app.effects.list(run_id="denied")).items
    assert any(each.late and each.late[0]["value"] == "deposit" for each in effects)
    run = await scene.app.get_run("denied")
    assert run.paused_at is not None
    second.kill(signal.SIGKILL)
    victim.kill(signal.SIGKILL)


async def notified(scene: Scene, run_id: str) -> bool | None:
    effects = (await scene.app.effects.list(run_id=run_id)).items
    return any(e.on_in_doubt == "retry" and e.ended_at for e in effects) or None


async def logged_twice(scene: Scene) -> None:
    async def look() -> bool | None:
        return len(scene.ledger.entries(event="paid", run="denied")) == 2 or None

    await scene.until(look, "the second payment")


@pytest.mark.timeout(1800)  # all of it, in a full run
async def test_worker_killed_while_it_undoes_a_run_undoes_all_of_it_in_order(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    """Killed at each of the bookings and at each of what undoes them."""
    scene.deciders.append(Witness(scene))
    every = [
        Place(f"RunStore.{verb}", number, moment)
        for verb in ("begin_effect", "finish_effect")
        for number in range(1, 2 * len(LINEAR) + 1)
        for moment in MOMENTS
    ]
    undoing = [place for place in every if place.number > len(LINEAR)]
    tried = {str(p): p for p in (every if sampler.is_full else sampler.some(undoing, 3))}
    kills = await scene.kill_each(
        tried, lambda name: scene.app.submit("trip", {"input": "x"}, run_id=name, queue=name)
    )
    scene.worker(lease=LONG, queues=list(tried), concurrency=5)
    for run in await scene.ended(tried):
        assert (run.status, run.saga) == (RunStatus.FAILED, "compensated"), run.id
        found = scene.ledger.entries(run=run.id)
        for event, order in (("booked", LINEAR), ("unbooked", LINEAR[::-1])):
            assert [e["key"] for e in found if e["event"] == event] == list(order), run.id
    assert kills == len(tried)
    assert_sound(scene.url, tried)
    tally(kills=kills)


@pytest.mark.parametrize("moment", ["uncommitted", "committed"])
async def test_process_killed_while_it_prunes_effects_has_done_so_or_not(
    scene: Scene, moment: Moment
) -> None:
    await scene.app.submit("trip", {"input": "x"}, run_id=moment)
    await scene.app.drive(moment)
    await scene.app.dead_letters.discard(moment)
    at = Place("RunStore.prune_effects", 1, moment)
    await scene.died(scene.caller("prune_effects", moment, at=at.plain()))
    left = len((await scene.app.effects.list(run_id=moment)).items)
    assert left == (8 if moment == "uncommitted" else 0)
    assert await scene.gone(scene.caller("prune_effects", moment)) == 0
    assert (await scene.app.effects.list(run_id=moment)).items == ()


@pytest.mark.parametrize("moment", ["uncommitted", "committed"])
async def test_process_killed_while_it_resolves_an_effect_has_done_so_or_not(
    scene: Scene, moment: Moment
) -> None:
    witness = Witness(scene)
    scene.deciders.append(witness)
    await submit(scene, moment)
    place = Place("RunStore.begin_effect", 3, "after")
    await scene.died(scene.worker(lease=LONG, queues=[moment], at=place.plain()))
    scene.deciders.clear()
    scene.expire([moment])
    worker = scene.worker(lease=LONG, queues=[moment])
    await scene.parked(moment)
    at = Place("RunStore.resolve_effect", 1, moment)
    await scene.died(scene.caller("resolve_effect", moment, at=at.plain()))
    scene.deciders.append(witness)
    (run,) = await scene.ended([moment])
    assert run.status is RunStatus.SUCCEEDED
    assert payments(scene, moment) == {"deposit": 1, "rest": 1}
    worker.kill(signal.SIGKILL)
