"""Calls of models and tools, counted outside, with kills between them and inside of one."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from typing import Any

import pytest

from agentflow.types import RunStatus
from tests.fault.agent_victims import BRANCHES, MOST, TOOLS, TURNS, app_of
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer, Victim
from tests.fault.ledger import Ledger

ENV = {"AGENTFLOW_LEASE": "1"}
DRIVE = "tests.fault.agent_victims:drive"


def calls(ledger: Ledger, run_id: str) -> Counter[tuple[str, Any]]:
    """Count the calls of a run, by what was called and in which turn."""
    entries = ledger.entries(run=run_id)
    return Counter((each["event"], each.get("turn", each.get("amount"))) for each in entries)


def once(turns: int) -> Counter[tuple[str, Any]]:
    """Return the calls of a run that calls a tool in so many turns, and then answers."""
    models, tools = range(turns + 1), range(turns)
    return Counter([*(("model", turn) for turn in models), *(("tool", turn) for turn in tools)])


async def gone(victim: Victim) -> int:
    return await asyncio.to_thread(victim.wait)


@pytest.mark.parametrize(("graph", "turns"), [("agent", TURNS), ("prebuilt", TOOLS)])
async def test_calls_whose_outcome_is_durable_are_not_made_again(
    sqlite_url: str,
    ledger: Ledger,
    forkserver: ForkServer,
    sampler: Sampler,
    tally: Tally,
    graph: str,
    turns: int,
) -> None:
    """Killed after each answer and each result; also those whose ids a model uses again."""
    effects = 2 * turns + 1
    tried = sampler.some(range(1, effects + 1), effects)
    for number in tried:
        run_id = f"after-{number}"
        victim = forkserver.spawn(DRIVE, sqlite_url, run_id, ledger.address, number, graph, env=ENV)
        assert await gone(victim) == -signal.SIGKILL, victim.output()
        assert calls(ledger, run_id).total() == number
    async with app_of(sqlite_url, "reader", ledger.address) as app:
        for number in tried:
            run_id = f"after-{number}"
            again = (DRIVE, sqlite_url, run_id, ledger.address, None, graph)
            victim = forkserver.spawn(*again, env=ENV)
            while await gone(victim) != 0:  # the lease of the dead one is still good
                assert "ThreadBusyError" in victim.output()
                victim = forkserver.spawn(*again, env=ENV)
            run = await app.get_run(run_id)
            assert run.status is RunStatus.SUCCEEDED, run.error
            assert run.output["messages"][-1].text == "done"
            assert calls(ledger, run_id) == once(turns)
    tally(kills=len(tried))


@pytest.mark.parametrize("kind", ["idempotent", "other"])
async def test_tool_that_was_killed_within_its_call_is_called_again_only_if_it_may(
    sqlite_url: str, ledger: Ledger, forkserver: ForkServer, kind: str
) -> None:
    event = "look" if kind == "idempotent" else "tool"
    ledger.hold(event=event, amount=0)
    victim = forkserver.spawn(DRIVE, sqlite_url, kind, ledger.address, env=ENV)
    await asyncio.to_thread(ledger.wait_for, event=event, run=kind)
    victim.kill()
    await gone(victim)
    ledger.release()
    async with app_of(sqlite_url, kind, ledger.address) as app, app.worker():
        if kind == "other":
            run = await app.wait(kind, until="parked", timeout=30)
            assert run.status is RunStatus.WAITING
            assert calls(ledger, kind)[event, 0] == 1
            (asked,) = (await app.approvals.list(run_id=kind)).items
            assert asked.request.proposal["arguments"] == {"args": {"amount": 0}}
            said = {"happened": True, "outcome": "charged, says the bank"}
            await app.approvals.decide(asked.id, {"type": "respond", "value": said}, by="alice")
        run = await app.wait(kind, timeout=30)
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert calls(ledger, kind)[event, 0] == (2 if kind == "idempotent" else 1)
    assert calls(ledger, kind)[event, 1] == 1
    if kind == "other":
        assert run.output["messages"][2].text == "charged, says the bank"


async def test_fifty_branches_keep_to_their_budget_although_their_process_is_killed(
    database_url: str, ledger: Ledger, forkserver: ForkServer
) -> None:
    victim = forkserver.spawn(
        DRIVE, database_url, "r", ledger.address, MOST // 2, "branches", env=ENV
    )
    assert await gone(victim) == -signal.SIGKILL, victim.output()
    done = calls(ledger, "r")
    assert done.total() <= MOST
    async with app_of(database_url, "r", ledger.address) as app, app.worker():
        run = await app.wait("r", until="parked", timeout=60)
        assert run.status is RunStatus.WAITING, run.error
        # What was under way is not known to have come to nothing, and counts.
        assert calls(ledger, "r").total() <= MOST
        (asked,) = (await app.approvals.list(run_id="r")).items
        assert asked.request.proposal["used"] >= MOST
        decision = {"type": "respond", "value": {"more": BRANCHES}}
        await app.approvals.decide(asked.id, decision, by="alice")
        run = await app.wait("r", timeout=60)
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert len(run.output["log"]) == BRANCHES
    found = calls(ledger, "r")
    assert len(found) == BRANCHES
    assert found.total() - BRANCHES <= MOST, "only what was under way is asked again"
