"""Small graphs whose nodes tell the ledger what they do, and the processes that run them.

A node records that it was entered before it does anything and that it is left after it has done
everything, each with the process that it ran in: the tests count executions there.
"""

from __future__ import annotations

import asyncio
import operator
import os
import signal
from collections.abc import Callable
from typing import Annotated, Any, NotRequired, Protocol, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph

from agentflow import AgentFlow, effect, effect_context
from agentflow.checkpoint import pruning
from agentflow.interrupts import request_approval
from agentflow.lease import LeaseKeeper
from agentflow.retry import RetryPolicy
from examples.refunds.client import ServiceClient
from examples.refunds.graph import build_graph
from examples.refunds.observer import Observer
from examples.refunds.script import chat_model
from tests.fault.ledger import arecord, find, record
from tests.fault.sabotage import Place, Sabotage

WORKER = "tests.fault.graphs:worker_main"
REFUNDS_WORKER = "tests.fault.graphs:refunds_worker_main"
CALLER = "tests.fault.graphs:caller_main"
LINEAR = ("a", "b", "c", "d")
BRANCHES = ("left", "middle", "right")
GRAPHS = (
    *("linear", "single", "fan_out", "nested", "loop", "questions", "interview"),
    *("poison", "flaky", "broken", "stubborn", "payments", "trip"),
)
"""Every graph of this module, by the name of its method."""

Graph = StateGraph[Any, None, Any, Any]


class TracingNode(Protocol):
    """A node as LangGraph calls it: by these names."""

    def __call__(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        """Return what is written to the state."""
        ...


Options = dict[str, Any]


class Trace(TypedDict):
    """What a run was given, and what its nodes made of it, in order."""

    input: str
    log: Annotated[NotRequired[list[str]], operator.add]


class Count(TypedDict):
    """A run that does the same thing `wanted` times."""

    wanted: int
    log: Annotated[NotRequired[list[str]], operator.add]


class Nodes:
    """Makes nodes that report to one ledger."""

    def __init__(self, ledger: str, sabotage: Sabotage | None, kill_at: int | None) -> None:
        """Report to `ledger`; a `tick` numbered `kill_at` kills its process."""
        self._ledger = ledger
        self._sabotage = sabotage
        self._kill_at = kill_at

    def linear(self) -> Graph:
        """Return four nodes in a row."""
        graph: Graph = StateGraph(Trace)
        for before, name in zip((START, *LINEAR), LINEAR, strict=False):
            graph.add_node(name, self._tracing(name))
            graph.add_edge(before, name)
        graph.add_edge(LINEAR[-1], END)
        return graph

    def single(self) -> Graph:
        """Return one node."""
        graph: Graph = StateGraph(Trace)
        graph.add_node("a", self._tracing("a"))
        graph.add_edge(START, "a")
        return graph

    def fan_out(self) -> Graph:
        """Return one node, three abreast after it, and one that joins them."""
        graph: Graph = StateGraph(Trace)
        for name in ("plan", *BRANCHES, "join"):
            graph.add_node(name, self._tracing(name))
        graph.add_edge(START, "plan")
        for name in BRANCHES:
            graph.add_edge("plan", name)
        graph.add_edge(list(BRANCHES), "join")
        return graph

    def nested(self) -> Graph:
        """Return a subgraph of two nodes between two others."""
        inner: Graph = StateGraph(Trace)
        inner.add_node("x", self._tracing("x"))
        inner.add_node("y", self._tracing("y"))
        inner.add_edge(START, "x")
        inner.add_edge("x", "y")
        outer: Graph = StateGraph(Trace)
        outer.add_node("first", self._tracing("first"))
        outer.add_node("inner", inner.compile())
        outer.add_node("last", self._tracing("last"))
        outer.add_edge(START, "first")
        outer.add_edge("first", "inner")
        outer.add_edge("inner", "last")
        return outer

    def loop(self) -> Graph:
        """Return one node that is executed `wanted` times, a superstep each."""
        return self._loop("tick", self._tick)

    def questions(self) -> Graph:
        """Return one node that asks a person, `wanted` times, a superstep each."""
        return self._loop("ask", self._ask)

    def interview(self) -> Graph:
        """Return one node that asks a person `wanted` times before it is done."""
        graph = StateGraph(Count)
        graph.add_node("ask_all", self._ask_all)
        graph.add_edge(START, "ask_all")
        return graph

    def poison(self) -> Graph:
        """Return one node that kills its worker each time."""
        graph: Graph = StateGraph(Trace)
        graph.add_node("drink", self._drink)
        graph.add_edge(START, "drink")
        return graph

    def flaky(self) -> Graph:
        """Return one node that fails the first time that it is executed for a run."""
        graph: Graph = StateGraph(Trace)
        graph.add_node("try", self._try)
        graph.add_edge(START, "try")
        return graph

    def broken(self) -> Graph:
        """Return one node that fails for good."""
        graph: Graph = StateGraph(Trace)
        graph.add_node("break", self._break)
        graph.add_edge(START, "break")
        return graph

    def stubborn(self) -> Graph:
        """Return one node that fails, in a graph that is paused instead of given up."""
        graph: Graph = StateGraph(Trace)
        graph.add_node("balk", self._balk)
        graph.add_edge(START, "balk")
        return graph

    def payments(self) -> Graph:
        """Return a node that pays, asks, and pays again, and one beside it that notifies."""
        graph: Graph = StateGraph(Trace)
        graph.add_node("pay", self._pay)
        graph.add_node("notify", self._notify)
        graph.add_edge(START, "pay")
        graph.add_edge(START, "notify")
        return graph

    def _pay(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        run = config["metadata"]["run_id"]
        pay = effect(key=lambda _, what: f"pay-{what}", timeout=60)(self._charge)
        first = pay(run, "deposit")
        answer = request_approval({"of": run}, title="Pay the rest?")
        return {"log": [first, answer.type, pay(run, "rest")]}

    async def _notify(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        run = config["metadata"]["run_id"]
        notify = effect(on_in_doubt="retry")(self._tell)
        return {"log": [await notify(run)]}

    def trip(self) -> Graph:
        """Return four bookings in a row, each of which can be undone, and a node that fails."""
        book = effect(compensate=self._unbook, name="fault:book")(self._book)

        def booking(what: str) -> TracingNode:
            def node(state: Trace, config: RunnableConfig) -> dict[str, Any]:
                return {"log": [book(config["metadata"]["run_id"], what)]}

            return node

        graph: Graph = StateGraph(Trace)
        for before, name in zip((START, *LINEAR), LINEAR, strict=False):
            graph.add_node(name, booking(name))
            graph.add_edge(before, name)
        graph.add_node("break", self._break)
        graph.add_edge(LINEAR[-1], "break")
        return graph

    def _book(self, run: str, what: str) -> str:
        record(self._ledger, event="booked", run=run, key=what, pid=os.getpid())
        return what

    def _unbook(self, outcome: str, run: str) -> None:
        record(self._ledger, event="unbooked", run=run, key=outcome, pid=os.getpid())

    def _charge(self, run: str, what: str) -> str:
        record(self._ledger, event="paid", run=run, key=what, pid=os.getpid())
        if self._sabotage is not None:
            self._sabotage.meet("node", "after")
        return what

    async def _tell(self, run: str) -> str:
        key = effect_context().idempotency_key
        await arecord(self._ledger, event="told", run=run, key=key, pid=os.getpid())
        return "told"

    def _loop(self, name: str, node: Callable[..., dict[str, Any]]) -> Graph:
        graph = StateGraph(Count)
        graph.add_node(name, node)
        graph.add_edge(START, name)
        graph.add_conditional_edges(
            name, lambda state: END if len(state["log"]) >= state["wanted"] else name
        )
        return graph

    def _tracing(self, name: str) -> TracingNode:
        def node(state: Trace, config: RunnableConfig) -> dict[str, Any]:
            run = config["metadata"]["run_id"]
            self._enter(run, name)
            made = f"{name}({state['input']})"
            self._leave(run, name)
            return {"log": [made]}

        return node

    def _tick(self, state: Count, config: RunnableConfig) -> dict[str, Any]:
        run, number = config["metadata"]["run_id"], len(state.get("log", []))
        self._enter(run, "tick", number=number)
        if number == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._leave(run, "tick", number=number)
        return {"log": [str(number)]}

    def _ask(self, state: Count, config: RunnableConfig) -> dict[str, Any]:
        number = len(state.get("log", []))
        answer = request_approval({"number": number}, title=f"Question {number}")
        run = config["metadata"]["run_id"]
        self._enter(run, "ask", number=number, approved=answer.proposal)
        self._leave(run, "ask", number=number)
        return {"log": [f"{number}: {answer.type}"]}

    def _ask_all(self, state: Count, config: RunnableConfig) -> dict[str, Any]:
        log = []
        for number in range(state["wanted"]):
            answer = request_approval({"number": number}, title=f"Question {number}")
            log.append(f"{number}: {answer.type}")
        self._enter(config["metadata"]["run_id"], "ask_all")
        return {"log": log}

    def _drink(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        self._enter(config["metadata"]["run_id"], "drink")
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def _try(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        run = config["metadata"]["run_id"]
        self._enter(run, "try")
        if len(find(self._ledger, event="enter", run=run, node="try")) == 1:
            raise RuntimeError("the first time, always")
        self._leave(run, "try")
        return {"log": [f"try({state['input']})"]}

    def _break(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        self._enter(config["metadata"]["run_id"], "break")
        raise NotImplementedError

    def _balk(self, state: Trace, config: RunnableConfig) -> dict[str, Any]:
        self._enter(config["metadata"]["run_id"], "balk")
        raise RuntimeError("no")

    def _enter(self, run: str, node: str, **facts: Any) -> None:
        record(self._ledger, event="enter", run=run, node=node, pid=os.getpid(), **facts)
        if self._sabotage is not None:
            self._sabotage.meet("node", "before")

    def _leave(self, run: str, node: str, **facts: Any) -> None:
        record(self._ledger, event="leave", run=run, node=node, pid=os.getpid(), **facts)
        if self._sabotage is not None:
            self._sabotage.meet("node", "after")


def register_all(
    app: AgentFlow,
    ledger: str = "",
    *,
    sabotage: Sabotage | None = None,
    kill_at: int | None = None,
) -> None:
    """Register every graph of this module under the name of its method."""
    nodes = Nodes(ledger, sabotage, kill_at)
    policies = {"stubborn": RetryPolicy(max_attempts=1, on_exhausted="pause")}
    for name in GRAPHS:
        policy = policies.get(name, RetryPolicy(initial_interval=0.05))
        app.register(getattr(nodes, name)(), name=name, retry=policy)


def register_refunds(app: AgentFlow, _ledger: str = "", *, services: ServiceClient) -> None:
    """Register the refunds example, whose nodes are reported to its services."""
    graph = build_graph(chat_model(), services).compile()
    app.register(graph.with_config(callbacks=[Observer(services)]), name="refund")


async def worker_main(url: str, ledger: str, options: Options) -> None:
    """Be a worker for the graphs of this module; a victim's entry."""
    sabotage = _sabotage(ledger, options)
    async with AgentFlow(url, checkpoints=options.get("checkpoints")) as app:
        register_all(app, ledger, sabotage=sabotage, kill_at=options.get("kill_at"))
        await _work(app, options)


async def caller_main(url: str, ledger: str, call: str, run_id: str, options: Options) -> None:
    """Be somebody who submits, decides or cancels: make one call of `tests.fault.calls`."""
    from tests.fault.calls import CALLS

    # So that a small thread is deleted as a large one would be.
    pruning.BATCH_ROWS = options.get("batch_rows", pruning.BATCH_ROWS)
    sabotage = _sabotage(ledger, options)
    async with AgentFlow(url, checkpoints=options.get("checkpoints")) as app:
        register_all(app, ledger, sabotage=sabotage)
        await CALLS[call](app, run_id)


async def refunds_worker_main(url: str, ledger: str, services_url: str, options: Options) -> None:
    """Be a worker for the refunds example; a victim's entry."""
    _sabotage(ledger, options)
    services = ServiceClient(services_url)
    async with AgentFlow(url, checkpoints=options.get("checkpoints")) as app:
        register_refunds(app, services=services)
        await _work(app, options)
    await services.aclose()


def _sabotage(ledger: str, options: Options) -> Sabotage | None:
    if options.get("deaf"):
        # Neither heartbeat nor watch: nothing but the fence tells this worker that it is late.
        LeaseKeeper._extend = _no_heartbeat  # type: ignore[assignment,method-assign]  # a plain function
        LeaseKeeper._safe_until = _for_ever  # type: ignore[assignment,method-assign]  # likewise
    company = options.get("company", False)
    if options.get("reports"):
        sabotage = Sabotage(ledger, company=company)
    elif "at" in options:
        at, how = Place(**options["at"]), options.get("how", "SIGKILL")
        sabotage = Sabotage(ledger, at=at, how=how, company=company)
    else:
        return None
    sabotage.arm()
    return sabotage


async def _no_heartbeat(_keeper: LeaseKeeper, _held: object) -> None:
    return


def _for_ever(_keeper: LeaseKeeper, _since: float) -> float:
    return float("inf")


async def _work(app: AgentFlow, options: Options) -> None:
    worker = app.worker(
        concurrency=options.get("concurrency", 1),
        # And one of its own, in which a test can hand a run to this very process.
        queues=[*options.get("queues", ["default"]), f"canary-{os.getpid()}"],
        name=options.get("name"),
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()
