"""Calls of models and tools, counted outside, with kills between them and inside of one."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import pytest

from agentflow.types import RunStatus
from tests.fault.agent_victims import EFFECTS, TURNS, app_of
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer, Victim
from tests.fault.ledger import Ledger

ENV = {"AGENTFLOW_LEASE": "1"}
DRIVE = "tests.fault.agent_victims:drive"


def calls(ledger: Ledger, run_id: str) -> Counter[tuple[str, int]]:
    """Count the calls of a run, by what was called and in which turn."""
    entries = ledger.entries(run=run_id)
    return Counter((each["event"], each.get("turn", each.get("amount"))) for each in entries)


ONCE = Counter(
    [*(("model", turn) for turn in range(TURNS + 1)), *(("tool", turn) for turn in range(TURNS))]
)


async def gone(victim: Victim) -> int:
    return await asyncio.to_thread(victim.wait)


async def test_calls_whose_outcome_is_durable_are_not_made_again(
    sqlite_url: str, ledger: Ledger, forkserver: ForkServer, sampler: Sampler, tally: Tally
) -> None:
    """Killed after each answer and each result; also those whose ids a model uses again."""
    tried = sampler.some(range(1, EFFECTS + 1), EFFECTS)
    for number in tried:
        run_id = f"after-{number}"
        victim = forkserver.spawn(DRIVE, sqlite_url, run_id, ledger.address, number, env=ENV)
        assert await gone(victim) == -signal.SIGKILL, victim.output()
        assert calls(ledger, run_id).total() == number
    async with app_of(sqlite_url, "reader", ledger.address) as app:
        for number in tried:
            run_id = f"after-{number}"
            victim = forkserver.spawn(DRIVE, sqlite_url, run_id, ledger.address, env=ENV)
            while await gone(victim) != 0:  # the lease of the dead one is still good
                assert "ThreadBusyError" in victim.output()
                victim = forkserver.spawn(DRIVE, sqlite_url, run_id, ledger.address, env=ENV)
            run = await app.get_run(run_id)
            assert run.status is RunStatus.SUCCEEDED, run.error
            assert run.output["messages"][-1].text == "done"
            assert calls(ledger, run_id) == ONCE
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
