"""Releases of one program, one after another, and processes that run them."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import signal
from pathlib import Path
from typing import Annotated, Any

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict

from agentflow import AgentFlow, request_approval
from agentflow.failpoints import arm
from tests.fault.ledger import record
from tests.fault.sabotage import Place, Sabotage

WORKER = "tests.fault.deploys:worker_main"
MOVER = "tests.fault.deploys:mover_main"


class Refund(TypedDict, total=False):
    """A refund, as of release 1."""

    amount: float
    log: Annotated[list[str], operator.add]


class Payment(TypedDict, total=False):
    """A refund, as of release 2."""

    cents: int
    currency: str
    log: Annotated[list[str], operator.add]


Node = Any
"""Whatever `add_node` takes; its own annotation lists overloads that no alias can follow."""


class Release:
    """What one release of the program registers."""

    def __init__(self, number: int, ledger: str) -> None:
        """Report nodes to `ledger`."""
        self._number = number
        self._ledger = ledger

    def register(self, app: AgentFlow) -> None:
        """Register what this release has."""
        if self._number == 1:
            app.register(self._nested("under"), name="nested", version="1")
            app.register(self._graph("approve", "pay", Refund), name="refund", version="1")
            return
        app.register(self._nested("below"), name="nested", version="2")
        app.migration("nested", from_="1", to="2", nodes={"under": "below"})(lambda values: values)
        last = "transfer" if self._number == 3 else "pay"
        app.register(self._graph("manager", last, Payment), name="refund", version="2")
        app.migration(
            "refund", from_="1", to="2", nodes={"approve": "manager"}, channels={"amount": "cents"}
        )(in_cents)

    def _graph(
        self, approver: str, payer: str, schema: Any
    ) -> CompiledStateGraph[Any, Any, Any, Any]:
        graph: StateGraph[Any, None, Any, Any] = StateGraph(schema)
        graph.add_node("check", self._checks() if self._number == 4 else self._reports("check"))
        graph.add_node("notify", self._reports("notify"))
        graph.add_node(approver, self._asks())
        graph.add_node(payer, self._reports("pay"))
        graph.add_edge(START, "check")
        graph.add_edge("check", "notify")
        graph.add_edge("check", approver)
        graph.add_edge(["notify", approver], payer)
        graph.add_edge(payer, END)
        return graph.compile()

    def _nested(self, name: str) -> CompiledStateGraph[Any, Any, Any, Any]:
        inner: StateGraph[Any, None, Any, Any] = StateGraph(Refund)
        inner.add_node("check", self._reports("check"))
        inner.add_node("approve", self._asks())
        inner.add_node("notify", self._reports("notify"))
        inner.add_edge(START, "check")
        inner.add_edge("check", "approve")
        inner.add_edge("approve", "notify")
        outer: StateGraph[Any, None, Any, Any] = StateGraph(Refund)
        outer.add_node(name, inner.compile())
        outer.add_node("pay", self._reports("pay"))
        outer.add_edge(START, name)
        outer.add_edge(name, "pay")
        return outer.compile()

    def _reports(self, step: str) -> Node:
        def node(state: Any, config: RunnableConfig) -> dict[str, Any]:
            del state
            run = config["metadata"]["run_id"]
            record(self._ledger, run=run, step=step, release=self._number)
            return {"log": [step]}

        return node

    def _checks(self) -> Node:
        """Release 4 checks in another way than all before."""

        def node(state: Any) -> dict[str, Any]:
            return {"log": ["check"]} if state else {}

        return node

    def _asks(self) -> Node:
        def node(state: Any, config: RunnableConfig) -> dict[str, Any]:
            del config
            amount = state.get("cents") or state.get("amount")
            answer = request_approval({"amount": amount}, title="Refund")
            return {"log": [answer.type]}

        return node


def in_cents(values: dict[str, Any]) -> dict[str, Any]:
    """Bring a refund of version 1 to version 2."""
    return {**values, "cents": round(values["cents"] * 100), "currency": "EUR"}


async def worker_main(url: str, ledger: str, release: int) -> None:
    """Be a worker of a release; a victim's entry."""
    async with AgentFlow(url) as app:
        Release(release, ledger).register(app)
        worker = app.worker(concurrency=2, name=f"release-{release}")
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()


async def mover_main(
    url: str, ledger: str, run_id: str, file: str, at: dict[str, Any] | str
) -> None:
    """Migrate a run, or import it from a file, and be killed at a place; a victim's entry."""
    if isinstance(at, str):
        arm(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    else:
        Sabotage(ledger, at=Place(**at)).arm()
    async with AgentFlow(url) as app:
        Release(2, ledger).register(app)
        if file:
            await app.import_run(_read(file))
        else:
            await app.migrate_run(run_id)


def _read(file: str) -> Any:
    return json.loads(Path(file).read_text())
