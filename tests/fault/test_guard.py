"""A worker that was stopped past its lease begins nothing when it continues, taken over or not."""

from __future__ import annotations

import signal

import pytest

from agentflow.types import RunStatus
from tests.fault.graphs import LINEAR
from tests.fault.sabotage import Place
from tests.fault.scene import Scene, assert_sound


@pytest.mark.parametrize("number", [1, 3])
async def test_stopped_worker_begins_no_node_although_nobody_has_taken_its_run(
    scene: Scene, number: int
) -> None:
    """Nobody has a higher token, so that nothing but its own clock tells it that it is late."""
    await scene.app.submit("linear", {"input": "x"}, run_id="r")
    place = Place("node", number, "after")
    victim = scene.worker(lease=2, at=place.plain(), how="SIGSTOP")
    await scene.stopped(victim)
    await scene.expired("r")
    victim.kill(signal.SIGCONT)
    (run,) = await scene.ended(["r"])
    assert run.status is RunStatus.SUCCEEDED
    (resumed,) = (e for e in await scene.app.list_events("r") if e.type == "run.resumed")
    # The writes of the node in which it was stopped are made in vain as well.
    assert resumed.data["step"] == number - 1
    executed = scene.entered("r")
    assert executed == {name: 1 + (name == LINEAR[number - 1]) for name in LINEAR}
    assert_sound(scene.url, ["r"])
