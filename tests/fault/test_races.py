"""Workers that want the same runs: each run goes to one of them, and none of them starves."""

from __future__ import annotations

import asyncio
from collections import Counter

from agentflow.types import RunStatus
from tests.fault.conftest import Tally
from tests.fault.scene import Scene, assert_sound

RUNS = 200
FAIR_SHARE = 20


async def test_two_workers_race_for_runs_and_each_run_is_executed_by_one(
    scene: Scene, tally: Tally
) -> None:
    workers = [scene.worker(concurrency=5, lease=10) for _ in range(2)]
    run_ids = [f"run-{number}" for number in range(RUNS)]
    await asyncio.gather(
        *(scene.app.submit("single", {"input": name}, run_id=name) for name in run_ids)
    )
    for run in await scene.ended(run_ids):
        assert run.status is RunStatus.SUCCEEDED
        assert run.output["log"] == [f"a({run.id})"]
        assert run.claims == 1
    entries = scene.ledger.entries(event="enter")
    assert Counter(e["run"] for e in entries) == dict.fromkeys(run_ids, 1)
    shares = Counter(e["pid"] for e in entries)
    assert set(shares) == {worker.pid for worker in workers}
    assert min(shares.values()) >= FAIR_SHARE, shares
    assert_sound(scene.url, run_ids)
    tally(runs=RUNS, smallest_share=min(shares.values()))
