"""Nodes that behave badly, and workers on machines that do: the victims' side."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, StateGraph

from agentflow import AgentFlow, RetryPolicy
from agentflow.types import SystemClock
from tests.fault.graphs import Graph, Options, _work, worker_main
from tests.fault.ledger import record

WORKER = "tests.fault.misbehaviour:bad_worker_main"
WRONG_CLOCK_WORKER = "tests.fault.misbehaviour:wrong_clock_worker_main"
ATTEMPTS = 2
HUGE = 50 * 1024 * 1024


class State(TypedDict, total=False):
    """What a node is given and makes."""

    input: str
    made: Any


class MuteError(Exception):
    """An error that fails when it is asked what it is."""

    def __str__(self) -> str:
        raise RuntimeError("not even that")

    __repr__ = __str__


def _exit(_: State) -> State:
    os._exit(3)


def _exit_in_a_thread(_: State) -> State:
    threading.Thread(target=os._exit, args=(3,)).start()
    threading.Event().wait()
    return {}


def _segfault(_: State) -> State:
    ctypes.string_at(0)
    return {}


def _fail_mutely(_: State) -> State:
    raise MuteError


def _make_huge(_: State) -> State:
    return {"made": os.urandom(HUGE)}


def _make_unstorable(_: State) -> State:
    return {"made": threading.Lock()}


def _behave(_: State) -> State:
    return {"made": "well"}


NODES: dict[str, Callable[[State], State]] = {
    "exit": _exit,
    "exit_in_a_thread": _exit_in_a_thread,
    "segfault": _segfault,
    "fail_mutely": _fail_mutely,
    "make_huge": _make_huge,
    "make_unstorable": _make_unstorable,
    "behave": _behave,
}


def register_bad(app: AgentFlow, ledger: str = "") -> None:
    """Register one graph for each node, under its name."""
    for name, node in NODES.items():
        app.register(
            _graph(ledger, name, node),
            name=name,
            retry=RetryPolicy(initial_interval=0.01, max_attempts=ATTEMPTS),
        )


def _graph(ledger: str, name: str, node: Callable[[State], State]) -> Graph:
    def before(state: State, config: RunnableConfig) -> State:
        record(ledger, event="enter", run=config["metadata"]["run_id"], node="before")
        return {}

    def bad(state: State, config: RunnableConfig) -> State:
        record(ledger, event="enter", run=config["metadata"]["run_id"], node=name)
        return node(state)

    graph: Graph = StateGraph(State)
    graph.add_node("before", before)
    graph.add_node(name, bad)
    graph.add_edge(START, "before")
    graph.add_edge("before", name)
    return graph


async def bad_worker_main(url: str, ledger: str, options: Options) -> None:
    """Be a worker for the graphs of this module."""
    async with AgentFlow(url) as app:
        register_bad(app, ledger)
        await _work(app, options)


async def wrong_clock_worker_main(url: str, ledger: str, offset: float, options: Options) -> None:
    """Be a worker on a machine whose clock is wrong by so many seconds."""
    true_time, true_time_ns, true_now = time.time, time.time_ns, SystemClock.now

    def now(self: SystemClock) -> datetime:
        return true_now(self) + timedelta(seconds=offset)

    time.time = lambda: true_time() + offset
    time.time_ns = lambda: true_time_ns() + int(offset * 1e9)
    SystemClock.now = now  # type: ignore[method-assign]  # the machine's clock
    await worker_main(url, ledger, options)
