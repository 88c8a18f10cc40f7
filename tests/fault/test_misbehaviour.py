"""Nodes that take their process with them, or hand back what nobody can store."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from agentflow.types import RunStatus
from tests.fault.conftest import Tally
from tests.fault.forkserver import ForkServer, Victim
from tests.fault.graphs import LINEAR, register_all
from tests.fault.ledger import Ledger
from tests.fault.misbehaviour import ATTEMPTS, WORKER, WRONG_CLOCK_WORKER, register_bad
from tests.fault.scene import Scene, assert_sound, open_scene

LONG = 30.0
"""A lease that no test waits for the end of."""
HOUR = 3600.0


@pytest.fixture
async def bad_scene(
    sqlite_url: str, ledger: Ledger, forkserver: ForkServer
) -> AsyncIterator[Scene]:
    """A database with the graphs of `tests.fault.misbehaviour`."""
    async with open_scene(sqlite_url, ledger, forkserver, register_bad) as opened:
        yield opened


def start(scene: Scene, *arguments: object, lease: float, **options: object) -> Victim:
    env = {"AGENTFLOW_LEASE": str(lease), "AGENTFLOW_POLL_INTERVAL": "0.05"}
    target = WRONG_CLOCK_WORKER if arguments else WORKER
    address = scene.ledger.address
    return scene.forkserver.spawn(target, scene.url, address, *arguments, options, env=env)


@pytest.mark.parametrize(
    ("graph", "code"),
    [("exit", 3), ("exit_in_a_thread", 3), ("segfault", -signal.SIGSEGV)],
)
async def test_node_that_ends_its_process_ends_in_the_dead_letter_and_others_do_not(
    bad_scene: Scene, tally: Tally, graph: str, code: int
) -> None:
    scene = bad_scene
    await scene.app.submit(graph, {"input": "x"}, run_id="bad")
    await scene.app.submit("behave", {"input": "x"}, run_id="good")
    for _ in range(ATTEMPTS):
        victim = start(scene, lease=1)

        async def ended(victim: Victim = victim) -> int | None:
            try:
                return victim.wait(0)
            except TimeoutError:
                return None

        assert await scene.until(ended, "the end of the worker") == code, victim.output()
    start(scene, lease=1)
    bad, good = await scene.ended(["bad", "good"])
    assert (bad.status, good.status) == (RunStatus.FAILED, RunStatus.SUCCEEDED)
    assert bad.error is not None
    assert bad.error.type == "agentflow.errors.AttemptsExhaustedError"
    assert scene.entered("bad") == {"before": 1, graph: ATTEMPTS}
    assert scene.entered("good") == {"before": 1, "behave": 1}
    assert_sound(scene.url, ["bad", "good"])
    tally(kills=ATTEMPTS)


async def test_what_cannot_be_stored_or_said_fails_its_run_by_name_and_no_other(
    bad_scene: Scene,
) -> None:
    """All of them at once in one worker, which goes on."""
    scene = bad_scene
    names = ["fail_mutely", "make_huge", "make_unstorable", "behave"]
    for name in names:
        await scene.app.submit(name, {"input": "x"}, run_id=name)
    start(scene, lease=LONG, concurrency=len(names))
    mute, huge, unstorable, good = await scene.ended(names)
    assert good.status is RunStatus.SUCCEEDED
    for run, error in (
        (mute, "tests.fault.misbehaviour.MuteError"),
        (huge, "agentflow.errors.PayloadTooLargeError"),
        (unstorable, "agentflow.errors.SerializationError"),
    ):
        assert (run.status, run.dead_letter) == (RunStatus.FAILED, True), run.id
        assert run.error is not None
        assert run.error.type == error
        state = await scene.app.state(run.id)
        assert state.values["input"] == "x", "the state is what it was"
    assert mute.error is not None
    assert mute.error.message == "<no text: its str raises>"
    assert scene.entered("fail_mutely") == {"before": 1, "fail_mutely": ATTEMPTS}
    assert_sound(scene.url, names)


@pytest.mark.parametrize("offset", [HOUR, -HOUR])
async def test_worker_whose_clock_is_an_hour_off_neither_steals_nor_loses_a_run(
    postgres_url: str, ledger: Ledger, forkserver: ForkServer, offset: float, tally: Tally
) -> None:
    async with open_scene(postgres_url, ledger, forkserver, register_all) as scene:
        ids = [f"run-{number}" for number in range(12)]
        for name in ids:
            await scene.app.submit("linear", {"input": name}, run_id=name)
        start(scene, offset, lease=LONG, concurrency=2)
        scene.worker(lease=LONG, concurrency=2)
        for run in await scene.ended(ids):
            assert run.status is RunStatus.SUCCEEDED
            assert scene.entered(run.id) == dict.fromkeys(LINEAR, 1)
            assert run.claims == 1
        pids = Counter(entry["pid"] for entry in ledger.entries(event="enter"))
        assert len(pids) == 2, "both have worked"
        assert_sound(scene.url, ids)
    tally(runs=len(ids))
