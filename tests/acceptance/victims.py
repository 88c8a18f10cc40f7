"""Graphs in processes that may be killed anywhere; run by tests of this folder.

What their nodes do is a line in a file outside, which survives the process as a ledger would.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig

from agentflow import AgentFlow, request_approval
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.failpoints import arm
from tests.integration.graphs import State, chain

WALK = "tests.acceptance.victims:walk"
ASK = "tests.acceptance.victims:ask"
NODES = "abcdef"


def on(thread: str) -> RunnableConfig:
    """Name a thread."""
    return {"configurable": {"thread_id": thread}, "metadata": {"run_id": f"run-{thread}"}}


def done(trace: str) -> list[str]:
    """Return the nodes that were begun, in their order, each as often as it was."""
    path = Path(trace)
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def steps(saver: Saver, trace: str, *, die_in: str = "") -> Any:
    """Make six nodes in a row; one of them may kill its process before it returns."""

    def node(name: str, _: State) -> State:
        _note(trace, name)
        if name == die_in:
            _die()
        return {"log": [name]}

    return chain(*((name, partial(node, name)) for name in NODES)).compile(checkpointer=saver)


def walk(url: str, trace: str, thread: str, options: dict[str, Any]) -> None:
    """Take all steps, unless it is killed: in a node, at a commit or once all is done.

    A commit is named by its failpoint and by how many of its kind have passed with it.
    """
    passed: Counter[str] = Counter()

    def passes(point: str) -> None:
        passed[point] += 1
        if options.get("at") == [point, passed[point]]:
            _die()

    for point in ("database.before_commit", "database.after_commit"):
        arm(point, partial(passes, point))
    with open_checkpointer(url, save=options.get("save", "every_step")) as saver:
        graph = steps(saver, trace, die_in=options.get("die_in", ""))
        graph.invoke({"log": []}, on(thread), durability="sync")
        if options.get("dies_behind"):
            _die()


def interview(trace: str) -> Any:
    """Make three nodes in a row; the second one asks a person."""

    def node(name: str, _: State) -> State:
        _note(trace, name)
        return {"log": [name]}

    def asks(_: State) -> State:
        return {"log": [request_approval({"amount": 5}, title="Pay?").proposal]}

    return chain(("a", partial(node, "a")), ("ask", asks), ("c", partial(node, "c")))


async def ask(url: str, trace: str, run_id: str) -> None:
    """Drive a run to its question, and be killed the moment that anybody can see it."""
    async with AgentFlow(url) as app:
        app.register(interview(trace), name="interview")
        await app.submit("interview", {"log": []}, run_id=run_id)
        await app.drive(run_id)
        _die()


def _note(trace: str, name: str) -> None:
    with Path(trace).open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
