"""Processes that are killed while they take a decision back."""

from __future__ import annotations

import signal
from collections import Counter

from agentflow.types import RunStatus
from tests.fault.calls import CALLS
from tests.fault.conftest import Sampler, Tally
from tests.fault.sabotage import MOMENTS, Place
from tests.fault.scene import LONG, Approver, Scene, assert_sound


async def test_process_killed_while_it_reopens_an_approval_leaves_the_old_answer_or_none(
    scene: Scene, sampler: Sampler, tally: Tally
) -> None:
    """Whatever moment it is: nobody goes on with the answer that is being taken back.

    Killed by SIGKILL in each verb of the run store, between which the checkpointer forgets it.
    """
    every = [
        Place(f"RunStore.{verb}", 1, moment)
        for verb in ("claim_reopening", "reopen_wait")
        for moment in MOMENTS
    ]
    tried = {str(place): place for place in sampler.some(every, 4)}
    for name, place in tried.items():
        await scene.app.submit("interview", {"wanted": 2}, run_id=name, queue=name)
        await scene.app.drive(name)
        await CALLS["decide"](scene.app, name)
        await scene.app.drive(name)
        await scene.died(scene.caller("reopen", name, lease=LONG, at=place.plain()))
    scene.expire(tried)
    successor = scene.worker(lease=LONG, queues=list(tried), concurrency=5)
    for name in tried:
        await CALLS["reopen"](scene.app, name)
        await scene.parked(name)
        first, *later = (await scene.app.approvals.list(run_id=name, status=None)).items
        assert first.status == "pending", name
        assert {each.status for each in later} == {"superseded"}, name
    scene.deciders.append(Approver(scene))
    for run in await scene.ended(tried):
        assert run.status is RunStatus.SUCCEEDED, (run.id, run.error)
        assert run.output["log"] == ["0: approve", "1: approve"]
        assert scene.entered(run.id) == {"ask_all": 1}
        log = Counter(event.type for event in await scene.app.list_events(run.id))
        assert log["approval.reopened"] == 1
        assert run.paused_at is None
    assert_sound(scene.url, tried)
    successor.kill(signal.SIGKILL)
    tally(kills=len(tried))
