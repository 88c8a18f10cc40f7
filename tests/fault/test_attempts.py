"""Attempts are counted at claim and forgiven with progress: the work ends, the poison does too."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import suppress
from functools import partial

import pytest

from agentflow.retry import RetryPolicy
from agentflow.types import RunStatus
from tests.fault.conftest import Tally
from tests.fault.forkserver import Victim
from tests.fault.scene import LONG, Scene, assert_sound

APPROVALS = 50
KILLS = 20
MAX_ATTEMPTS = RetryPolicy().max_attempts


@pytest.mark.parametrize("graph", ["questions", "interview"])
async def test_fifty_approvals_in_one_run_end_in_success(
    scene: Scene, tally: Tally, graph: str
) -> None:
    """Each in a superstep of its own (`questions`), or all asked by one node (`interview`)."""
    scene.worker(lease=10)
    await scene.app.submit(graph, {"wanted": APPROVALS}, run_id="patient")
    for number in range(APPROVALS):
        run = await scene.parked("patient")
        (asked,) = (await scene.app.approvals.list(run_id="patient")).items
        assert asked.request.proposal == {"number": number}
        assert run.attempt == 0, "a run that waits has used up no attempt"
        decision = "reject" if number % 7 == 3 else "approve"
        await scene.app.approvals.decide(asked.id, decision, by="alice")
    (run,) = await scene.ended(["patient"])
    assert run.status is RunStatus.SUCCEEDED
    assert run.output["log"] == [
        f"{number}: {'reject' if number % 7 == 3 else 'approve'}" for number in range(APPROVALS)
    ]
    assert run.claims == APPROVALS + 1
    executed = scene.entered("patient")
    assert executed == ({"ask": APPROVALS} if graph == "questions" else {"ask_all": 1})
    assert_sound(scene.url, ["patient"])
    tally(approvals=APPROVALS)


async def test_twenty_kills_with_progress_between_them_end_in_success(
    scene: Scene, tally: Tally
) -> None:
    await scene.app.submit("loop", {"wanted": KILLS + 2}, run_id="unlucky")
    for number in range(KILLS):
        await scene.died(scene.worker(lease=LONG, kill_at=number))
        scene.expire(["unlucky"])
    scene.worker(lease=LONG)
    (run,) = await scene.ended(["unlucky"])
    assert run.status is RunStatus.SUCCEEDED
    assert run.output["log"] == [str(number) for number in range(KILLS + 2)]
    numbers = [e["number"] for e in scene.ledger.entries(event="enter", run="unlucky")]
    assert numbers == sorted(numbers), "what was saved is not executed again"
    executed = Counter(numbers)
    assert all(executed[number] >= 2 for number in range(KILLS))
    assert run.claims > KILLS
    assert await scene.app._store.find_dead_letter("", "unlucky") is None
    assert_sound(scene.url, ["unlucky"])
    tally(kills=KILLS)


async def test_node_that_kills_its_worker_each_time_ends_in_the_dead_letter(
    scene: Scene, tally: Tally
) -> None:
    """And the runs that were queued beside it end well."""
    others = [f"other-{number}" for number in range(4)]
    await scene.app.submit("poison", {"input": "x"}, run_id="poison")
    for name in others:
        await scene.app.submit("linear", {"input": name}, run_id=name)
    for _ in range(MAX_ATTEMPTS):
        await scene.died(scene.worker(lease=LONG))
        scene.expire(["poison"])
    scene.worker(lease=LONG)
    (run, *rest) = await scene.ended(["poison", *others])
    assert run.status is RunStatus.FAILED
    assert run.dead_letter
    assert run.error is not None
    assert run.error.type == "agentflow.errors.AttemptsExhaustedError"
    assert scene.entered("poison") == {"drink": MAX_ATTEMPTS}
    letter = await scene.app._store.find_dead_letter("", "poison")
    assert letter is not None
    assert letter.cause == run.error
    for other in rest:
        assert other.status is RunStatus.SUCCEEDED
        assert scene.entered(other.id) == dict.fromkeys("abcd", 1)
    assert_sound(scene.url, ["poison", *others])
    tally(kills=MAX_ATTEMPTS)


async def test_poison_does_not_use_up_the_attempts_of_its_neighbours(
    scene: Scene, tally: Tally
) -> None:
    """Runs that were driven beside it, and had no time for progress, are not to blame."""
    neighbours = [f"neighbour-{number}" for number in range(3)]
    scene.ledger.hold(node="a", event="enter")
    for name in neighbours:
        await scene.app.submit("linear", {"input": name}, run_id=name)
    await scene.app.submit("poison", {"input": "x"}, run_id="poison")

    async def is_dead(victim: Victim) -> bool | None:
        """Say whether a worker was killed; `False` once the poison is no more."""
        with suppress(TimeoutError):
            assert victim.wait(0) == -signal.SIGKILL, victim.output()
            return True
        return False if (await scene.app.get_run("poison")).status.is_ended else None

    kills = 0
    while await scene.until(
        partial(is_dead, scene.worker(concurrency=10, lease=2)), "death or its end"
    ):
        kills += 1
        scene.expire(["poison", *neighbours])
    # Until it is under suspicion there is nobody in particular to blame.
    assert MAX_ATTEMPTS <= kills <= MAX_ATTEMPTS + 2
    (poisoned,) = await scene.ended(["poison"])
    assert (poisoned.status, poisoned.dead_letter) == (RunStatus.FAILED, True)
    waiting = [await scene.app.get_run(name) for name in neighbours]
    assert max(run.losses for run in waiting) >= 2, "they have paid with their workers"
    scene.ledger.release()
    for run in await scene.ended(neighbours):
        assert run.status is RunStatus.SUCCEEDED
    assert_sound(scene.url, ["poison", *neighbours])
    tally(kills=kills)
