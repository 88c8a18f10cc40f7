"""What nodes, budgets and tasks stored in their first version is still read, and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from langgraph.types import Command

from agentflow.budgets import Ask, Usage
from agentflow.drive.allowances import to_wait
from agentflow.nodes.outcomes import from_stored, to_stored
from agentflow.tasks.results import read_results

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "nodes-v1.json").read_text(encoding="utf-8")
)


def test_command_of_a_tool() -> None:
    command = Command(graph=Command.PARENT, update={"seen": ["tea"]}, goto="next")
    assert to_stored(command) == GOLDEN["command"]
    assert from_stored(GOLDEN["command"]) == command


def test_usage_of_a_model() -> None:
    assert Usage(**GOLDEN["model_usage"]) == Usage(tokens=100, cost=0.01, model_calls=2)


def test_question_for_more() -> None:
    ask = Ask(scope="run", limit="tokens", base=500.0, allowed=700.0, used=712.0, number=1)
    wait = to_wait(ask)
    assert (wait.kind, wait.request.proposal) == ("budget", GOLDEN["budget_question"])


def test_snapshot_of_tasks() -> None:
    results = read_results(GOLDEN["snapshot"])
    assert {name: each.to_plain() for name, each in results.items()} == GOLDEN["snapshot"]
