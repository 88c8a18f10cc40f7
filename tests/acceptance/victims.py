"""Graphs in processes that may be killed anywhere; run by tests of this folder.

What their nodes do is a line in a file outside, which survives the process as a ledger would.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig

from agentflow import AgentFlow, request_approval
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.failpoints import arm
from tests.integration.graphs import State, chain, fan

WALK = "tests.acceptance.victims:walk"
ASK = "tests.acceptance.victims:ask"
FAN = "tests.acceptance.victims:fan_out"
HOST = "tests.acceptance.victims:host"
NODES = "abcdef"
ABREAST = ("left", "middle", "slow")


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


def branches(saver: Saver, trace: str, *, die_when_alone: bool = False) -> Any:
    """Make three nodes abreast, and one behind them.

    The slow one may kill its process, once what the others have written is durable.
    """

    def node(name: str, _: State) -> State:
        _note(trace, name)
        while die_when_alone and name == "slow":
            found = saver.get_tuple(on("t"))
            if found is not None and len(found.pending_writes or ()) >= len(ABREAST) - 1:
                _die()
        return {"log": [name]}

    named = [(name, partial(node, name)) for name in ABREAST]
    return fan(*named, then=partial(node, "then")).compile(checkpointer=saver)


def fan_out(url: str, trace: str) -> None:
    """Be killed when all branches but one are done."""
    with open_checkpointer(url) as saver:
        branches(saver, trace, die_when_alone=True).invoke({"log": []}, on("t"), durability="sync")


async def host(url: str, trace: str, folder: str, options: dict[str, Any]) -> None:
    """Be a machine whose own disk is a folder; drive what there is, or die in a node."""
    os.chdir(folder)
    tempfile.tempdir = None  # the fork server may have asked for another one
    assert tempfile.gettempdir() == folder

    def node(name: str, _: State) -> State:
        _note(trace, name)
        Path(f"scratch-{name}").write_text("of the node's own", encoding="utf-8")
        if name == options.get("die_in"):
            _die()
        return {"log": [name]}

    async with AgentFlow(url) as app:
        app.register(chain(*((name, partial(node, name)) for name in NODES)), name="g")
        handle = await app.submit("g", {"log": []}, run_id="r")
        async with app.worker():
            await handle.result(timeout=60)


def _note(trace: str, name: str) -> None:
    with Path(trace).open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
