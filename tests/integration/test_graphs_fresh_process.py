"""State of the user's own classes, saved by one process and resumed by another, a fresh one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig

from agentflow.checkpoint import open_checkpointer

SHOP = '''
"""A shop: its classes, its graph, and a program that answers its question."""

import enum
import json
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, NamedTuple, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, interrupt
from pydantic import BaseModel, PrivateAttr


class Level(enum.StrEnum):
    LOW = "low"
    HIGH = "high"


class Address(NamedTuple):
    street: str
    number: int


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    price: Decimal
    tags: frozenset[str] = frozenset()


class Customer(BaseModel):
    class Kind(enum.Enum):
        PERSON = 1
        FIRM = ("firm", 2)

    name: str
    level: Level
    kind: Kind
    address: Address
    _visits: int = PrivateAttr(default=0)


@dataclass
class Order:
    customer: Customer
    lines: list[Line] = field(default_factory=list)
    history: dict[Level, tuple[Line, ...]] = field(default_factory=dict)


class State(TypedDict, total=False):
    order: Order
    level: Level
    customers: dict[int, Customer]
    messages: Annotated[list[AnyMessage], add_messages]


def make(state: State) -> State:
    customer = Customer(
        name="ada", level=Level.HIGH, kind=Customer.Kind.FIRM, address=Address("Main Street", 7)
    )
    customer._visits = 3
    line = Line("tea", Decimal("1.10"), frozenset({"hot"}))
    call = {"name": "price", "args": {"of": "tea"}, "id": "1"}
    return {
        "order": Order(customer, [line], {Level.LOW: (line,)}),
        "level": Level.LOW,
        "customers": {1: customer},
        "messages": [
            AIMessage("", tool_calls=[call], id="m1"),
            ToolMessage("1.10", tool_call_id="1", id="m2"),
        ],
    }


def ask(state: State) -> State:
    order = state["order"]
    answer = interrupt({"customer": order.customer, "lines": order.lines})
    order.customer._visits += 1
    return {"order": Order(order.customer, [*order.lines, answer]), "level": Level.HIGH}


def check(state: State) -> State:
    order, customer = state["order"], state["order"].customer
    assert type(order) is Order and type(customer) is Customer
    assert customer.level is Level.HIGH and customer.kind is Customer.Kind.FIRM
    assert customer.address == Address("Main Street", 7) and type(customer.address) is Address
    tea, milk = order.lines
    assert tea == Line("tea", Decimal("1.10"), frozenset({"hot"}))
    assert milk == Line("milk", Decimal(2))
    assert state["level"] is Level.HIGH and type(state["customers"][1]) is Customer
    assert [type(each) for each in state["messages"]] == [AIMessage, ToolMessage]
    assert state["messages"][0].tool_calls[0]["args"] == {"of": "tea"}
    return {}


graph = StateGraph(State)
graph.add_sequence([("make", make), ("ask", ask), ("check", check)])
graph.add_edge(START, "make")
graph.add_edge("check", END)


def main(url: str, thread: str) -> None:
    from agentflow.checkpoint import open_checkpointer

    with open_checkpointer(url) as saver:
        compiled = graph.compile(checkpointer=saver)
        config = {"configurable": {"thread_id": thread}}
        (asked,) = compiled.get_state(config).interrupts
        assert type(asked.value["customer"]) is Customer
        answer = Line("milk", Decimal(2))
        result = compiled.invoke(Command(resume={asked.id: answer}), config)
        history = list(compiled.get_state_history(config))
    visits = result["order"].customer._visits
    print(json.dumps({"visits": visits, "next": [each.next for each in history]}))


if __name__ == "__main__":
    import shop  # by its name, so that its classes are the ones that were saved

    shop.main(*sys.argv[1:])
'''


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The user's module, imported in this process for the length of the test."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    module = importlib.import_module("shop")
    monkeypatch.setitem(sys.modules, "shop", module)
    return module


@pytest.mark.slow
def test_fresh_process_resumes_with_the_users_own_classes(
    database_url: str, shop: ModuleType, tmp_path: Path
) -> None:
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    with open_checkpointer(database_url) as saver:
        graph: Any = shop.graph.compile(checkpointer=saver)
        assert "__interrupt__" in graph.invoke({}, config)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "shop.py"), database_url, "t"],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {"visits": 4, "next": [[], ["check"], ["ask"], ["make"], ["__start__"]]}
    with open_checkpointer(database_url) as saver:
        graph = shop.graph.compile(checkpointer=saver)
        state = graph.get_state(config)
        assert state.values["order"].lines[-1] == shop.Line("milk", shop.Decimal(2))
