"""The small examples print what they are meant to show."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import nightly_tasks, order_saga, prebuilt_agent, research_agent

ROOT = Path(__file__).parents[2]


async def test_research_agent_asks_for_more_before_it_spends_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await research_agent.main()
    asked, done, answer = capsys.readouterr().out.splitlines()
    assert asked == "waiting: cost 0.010 of 0.010"
    assert done == "succeeded: 5 calls of the model for 0.025"
    assert answer.startswith("Tea comes from")


async def test_order_that_cannot_be_shipped_is_undone_in_reverse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await order_saga.main()
    assert capsys.readouterr().out.splitlines() == [
        "failed, compensated",
        "reserved kettle",
        "charged 40",
        "refunded 40",
        "released kettle",
    ]


async def test_prebuilt_agent_sends_what_was_approved(capsys: pytest.CaptureFixture[str]) -> None:
    await prebuilt_agent.main()
    assert capsys.readouterr().out.splitlines() == [
        "waiting: send_mail {'to': 'bo@example.com', 'text': 'You are FIRED!'}",
        "succeeded: I have written to Bo.",
        "bo@example.com: Shall we talk?",
    ]


async def test_nightly_tasks_go_on_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = await nightly_tasks.tonight()
    assert capsys.readouterr().out.splitlines() == [
        "fetch",
        "clean",
        "load",
        "{'fetch': 'success', 'clean': 'success', 'load': 'failure', 'report': 'skipped'}",
    ]
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-m", "examples.nightly_tasks", "--from-snapshot"],
        input=snapshot,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "load",
        "report",
        "{'fetch': 'success', 'clean': 'success', 'load': 'success', 'report': 'success'}",
        "3 rows [[1, 2, 3]]",
    ]
