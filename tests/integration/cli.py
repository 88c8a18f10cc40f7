"""What the tests of the command line share: an app, and a command line with a database of its own.

This module is the app that the commands are given: `--app tests.integration.cli:app`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from typer.testing import CliRunner

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.budgets import Budget
from agentflow.cli.program import program
from agentflow.nodes import durable_model
from agentflow.testing import ScriptedChatModel
from agentflow.types import Approval, Run, RunStatus

REPOSITORY = Path(__file__).parents[2]
APP = "tests.integration.cli:app"
HOSTILE = "pay 10\u202e000\u202c EUR\u200b"


class State(TypedDict, total=False):
    proposal: Any
    decided: Any


def _ask(state: State) -> State:
    result = request_approval(state["proposal"], title="Refund")
    return {
        "decided": {"type": result.type, "proposal": result.proposal, "message": result.message}
    }


def _ask_about_calls(state: State) -> State:
    calls = [{"name": name, "args": {"amount": 10}} for name in state["proposal"]]
    configs = [
        {"action_name": name, "allowed_decisions": ["approve", "edit", "reject"]}
        for name in state["proposal"]
    ]
    return {"decided": interrupt({"action_requests": calls, "review_configs": configs})}


def _echo(state: State) -> State:
    return {"decided": state["proposal"]}


def _fail(state: State) -> State:
    raise ValueError("the node says no")


async def _call_models(state: State) -> State:
    model = durable_model(ScriptedChatModel(script=["fine"]))
    return {"decided": [(await model.ainvoke(each)).text for each in state["proposal"]]}


def _graph(node: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    return builder


app = AgentFlow("sqlite:///never-used.db")
app.register(_graph(_ask), name="refund")
app.register(_graph(_ask_about_calls), name="calls")
app.register(_graph(_echo), name="echo")
app.register(_graph(_call_models), name="models", budget=Budget(model_calls=1, on_exceeded="ask"))
app.register(_graph(_fail), name="fail", retry=RetryPolicy(max_attempts=1))

not_an_app = {"name": "app"}


class Unlucky(AgentFlow):
    """A user's app with a fault of its own."""

    def with_url(self, url: str) -> AgentFlow:
        raise RuntimeError("a fault\nwith details that stay out of sight")


unlucky = Unlucky("sqlite:///never-used.db")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """The command line with a database of its own."""

    url: str

    def __call__(self, *args: str, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(program, [*args, "--db", self.url], input=stdin)
        return Result(result.exit_code, result.stdout, result.stderr)

    def ok(self, *args: str, stdin: str | None = None) -> Result:
        result = self(*args, stdin=stdin)
        assert result.code == 0, result
        return result

    def data(self, *args: str) -> Any:
        return json.loads(self.ok(*args, "-o", "json").out)

    def submit(self, graph: str, proposal: Any, *args: str) -> str:
        given = json.dumps({"proposal": proposal})
        return self.ok("run", "submit", graph, "--input", given, "--app", APP, *args).out.strip()

    def drive(self, run_id: str) -> Run:
        async def drive() -> Run:
            async with app.with_url(self.url) as here:
                return await here.drive(run_id)

        return asyncio.run(drive())

    def run(self, run_id: str) -> Run:
        async def get() -> Run:
            async with AgentFlow(self.url) as here:
                return await here.get_run(run_id)

        return asyncio.run(get())

    def approval(self, approval_id: str) -> Approval:
        async def get() -> Approval:
            async with AgentFlow(self.url) as here:
                return await here.approvals.get(approval_id)

        return asyncio.run(get())

    def pending(self, graph: str = "refund", proposal: Any = 10) -> Approval:
        """Submit a run, drive it to its question and return that."""
        run_id = self.submit(graph, proposal)
        assert self.drive(run_id).status is RunStatus.WAITING
        (approval,) = self.data("approval", "list", "--run-id", run_id)
        return self.approval(approval["id"])


def fresh_cli(url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a command line that is told nothing by the environment, until the test ends."""
    for name in ("AGENTFLOW_DB_URL", "AGENTFLOW_APP", "AGENTFLOW_DEBUG"):
        # Set before it is deleted, so that whatever a command sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "2")
    return Cli(url)


def start(*args: str, cwd: Path = REPOSITORY, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agentflow", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=30)
    return Result(process.returncode, out, err)
