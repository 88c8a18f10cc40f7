"""Tasks whose process is killed, and snapshots that another process continues."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from typing import Any

from agentflow import AgentFlow
from agentflow.tasks import read_snapshot
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer
from tests.fault.ledger import Ledger
from tests.fault.task_victims import DEPENDENCIES

RUN = sorted(DEPENDENCIES.keys() - {"refused"})
"""`refused` depends on what fails."""
ENV = {"AGENTFLOW_LEASE": "1"}


def outcome(snapshot: str) -> dict[str, Any]:
    """Return all of a snapshot but when things happened."""
    results: dict[str, dict[str, Any]] = json.loads(snapshot)
    return {
        name: {key: value for key, value in each.items() if not key.endswith("_at")}
        for name, each in results.items()
    }


def end(ledger: Ledger, run_id: str) -> dict[str, Any]:
    (entry,) = ledger.entries(event="end", run=run_id)
    return outcome(entry["snapshot"])


async def executed(
    ledger: Ledger, forkserver: ForkServer, url: str, run_id: str, concurrency: int | None = None
) -> None:
    victim = forkserver.spawn(
        "tests.fault.task_victims:execute", url, run_id, ledger.address, concurrency, env=ENV
    )
    assert await asyncio.to_thread(victim.wait) == 0, victim.output()


async def test_tasks_that_had_succeeded_before_a_kill_are_not_run_again(
    sqlite_url: str, ledger: Ledger, forkserver: ForkServer, sampler: Sampler, tally: Tally
) -> None:
    """Killed inside of each task, once it has done its work and nobody knows."""
    await executed(ledger, forkserver, sqlite_url, "twin")
    tried = sampler.some(RUN, 3)
    for name in tried:
        ledger.hold(task=name, run=name)
        victim = forkserver.spawn(
            "tests.fault.task_victims:execute", sqlite_url, name, ledger.address, env=ENV
        )
        await asyncio.to_thread(ledger.wait_for, task=name, run=name)
        async with AgentFlow(sqlite_url) as app:
            durable = await read_snapshot(app, name)
        victim.kill(signal.SIGKILL)
        await asyncio.to_thread(victim.wait)
        ledger.release(run=name)
        await executed(ledger, forkserver, sqlite_url, name)
        assert end(ledger, name) == end(ledger, "twin")
        entered = Counter(entry["task"] for entry in ledger.entries(event="enter", run=name))
        assert entered.keys() == set(RUN)
        assert entered[name] == 2
        # What ran beside it may have had no result yet; what had one is left alone.
        assert max((entered[task] for task in durable), default=0) <= 1
        assert durable.keys() >= set(DEPENDENCIES[name])
    tally(kills=len(tried))


async def test_snapshot_of_every_moment_leads_another_process_to_the_same_end(
    sqlite_url: str, ledger: Ledger, forkserver: ForkServer
) -> None:
    await executed(ledger, forkserver, sqlite_url, "run", concurrency=1)
    (last,) = ledger.entries(event="end", run="run")
    moments = [
        "{}",
        *(entry["moment"] for entry in ledger.entries(event="enter", run="run")),
        last["snapshot"],
    ]
    distinct = list(dict.fromkeys(moments))
    assert len(distinct) == len(RUN) + 1
    victim = forkserver.spawn("tests.fault.task_victims:hydrate", distinct, ledger.address)
    assert await asyncio.to_thread(victim.wait) == 0, victim.output()
    ends = [entry for entry in ledger.entries(event="end") if entry["run"] != "run"]
    assert [outcome(entry["snapshot"]) for entry in ends] == [end(ledger, "run")] * len(distinct)
    for moment, entry in zip(distinct, ends, strict=True):
        entered = {each["task"] for each in ledger.entries(event="enter", run=entry["run"])}
        done = {name for name, each in json.loads(moment).items() if each["status"] == "success"}
        assert not entered & done


async def test_effect_of_a_task_that_was_killed_behind_it_does_not_happen_again(
    sqlite_url: str, ledger: Ledger, forkserver: ForkServer
) -> None:
    target = "tests.fault.task_victims:charge_once"
    ledger.hold(event="after")
    victim = forkserver.spawn(target, sqlite_url, "r", ledger.address, env=ENV)
    await asyncio.to_thread(ledger.wait_for, event="after")
    victim.kill(signal.SIGKILL)
    await asyncio.to_thread(victim.wait)
    ledger.release()
    successor = forkserver.spawn(target, sqlite_url, "r", ledger.address, env=ENV)
    assert await asyncio.to_thread(successor.wait) == 0, successor.output()
    assert Counter(each["event"] for each in ledger.entries()) == {
        "charge": 1,
        "after": 2,
        "end": 1,
    }
    assert end(ledger, "r")["pay"]["data"] == "charged"
