"""`agentflow effect`: what runs have done outside, on the command line."""

from __future__ import annotations

import asyncio

import pytest

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.errors import OutcomeUnknownError
from agentflow.types import Run, RunStatus
from tests.integration.cli import Cli, fresh_cli
from tests.integration.graphs import State, chain


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


@effect
async def _fetch() -> int:
    return 1


@effect(timeout=30)
async def _pay(amount: int) -> int:
    raise OutcomeUnknownError


async def _node(state: State) -> State:
    await _fetch()
    return {"log": [await _pay(7)]}


async def _drive(url: str) -> Run:
    async with AgentFlow(url) as app:
        app.register(chain(("a", _node)), name="g", retry=RetryPolicy(max_attempts=1))
        await app.submit("g", {"log": []}, run_id="r", on_existing="return")
        return await app.drive("r")


def test_effect_in_doubt_is_found_shown_and_resolved(cli: Cli) -> None:
    assert asyncio.run(_drive(cli.url)).status is RunStatus.WAITING
    assert len(cli.data("effect", "list", "--run-id", "r")) == 2
    (done,) = cli.data("effect", "list", "--status", "succeeded")
    (doubtful,) = cli.data("effect", "list", "--in-doubt")
    assert done["id"] != doubtful["id"]
    assert cli("effect", "list", "--status", "lost").code == 2
    shown = cli.ok("effect", "show", doubtful["id"])
    assert '"amount": 7' in shown.out
    assert f"do not resolve it before {doubtful['intended_at']}" in shown.err
    said = ("effect", "resolve", doubtful["id"], "--by", "ada", "--yes")
    assert cli(*said).code == 2, "whether it happened has to be said"
    assert cli(*said, "--did-not-happen", "--outcome", "9").code == 2
    told = cli.ok(*said, "--happened", "--outcome", "9")
    assert "WARNING" not in told.err, "the attempt that has asked is over"
    assert cli.data("effect", "list", "--in-doubt") == []
    assert cli(*said, "--did-not-happen").code == 4, "it is known by now"
    assert asyncio.run(_drive(cli.url)).output == {"log": [9]}
