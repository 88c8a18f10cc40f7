"""The states and graphs of the database of the first version; `database_v1` writes with them.

Whoever continues what is in that database does it with these graphs. It names the classes of this
module, which therefore keep their names, fields and nodes.
"""

from __future__ import annotations

import asyncio
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, NotRequired, TypedDict

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.pregel import Pregel
from langgraph.types import Send, interrupt
from pydantic import BaseModel, PrivateAttr

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.checkpoint import Saver

Graph = StateGraph[Any, Any, Any, Any]


@dataclass
class Outside:
    """The world that nodes touch: whether it works, and what they have done in it."""

    is_up: bool = True
    is_deadly: bool = False
    """Whether the process that pays is killed."""
    calls: list[str] = field(default_factory=list)
    fetched: asyncio.Event = field(default_factory=asyncio.Event)


class Level(StrEnum):
    """A closed set of text."""

    LOW = "low"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Order:
    """A dataclass, which is also a proposal."""

    number: str
    amount: int
    items: tuple[str, ...] = ()


class Customer(BaseModel):
    """A model with a nested dataclass, an extra key and a private attribute."""

    model_config = {"extra": "allow"}

    name: str
    level: Level = Level.LOW
    orders: list[Order] = []
    _seen: int = PrivateAttr(default=0)


class Chat(MessagesState):
    """A conversation, with a channel that changes once and one that changes with each turn."""

    topic: NotRequired[str]
    turns: Annotated[int, operator.add]


class Entry(TypedDict):
    """What both subgraphs are given."""

    entry: str


class Counted(Entry):
    """The state of a subgraph that remembers its earlier calls."""

    count: Annotated[int, operator.add]


class Answered(Entry, total=False):
    """The state of the subgraphs that ask."""

    answer: str


class Parent(Entry, total=False):
    """The state around the subgraphs."""

    count: int
    answer: str


class Log(TypedDict, total=False):
    """A log that only grows, and the host of a task."""

    log: Annotated[list[Any], operator.add]
    host: str


class Survey(BaseModel):
    """A state that is a pydantic model."""

    answers: Annotated[list[tuple[str, Any]], operator.add] = []
    by: Customer | None = None


class Pair(TypedDict, total=False):
    """The channels of the checkpoints that are put by hand."""

    x: Any
    y: Any


class Things(TypedDict, total=False):
    """One channel for each kind of value."""

    order: Order
    customer: Customer
    levels: dict[Level, list[Level]]
    messages: list[Any]
    pair: tuple[Any, ...]
    numbers: set[int]
    frozen: frozenset[tuple[int, int]]
    by_number: dict[int, str]
    raw: bytes
    at: datetime
    price: Decimal
    text: str
    nothing: None


class Refund(TypedDict):
    """What the runs work on."""

    order: Order
    customer: NotRequired[Customer]
    log: NotRequired[Annotated[list[Any], operator.add]]
    outcome: NotRequired[str]


def _fold(state: list[Any], writes: Sequence[list[Any]]) -> list[Any]:
    """Append all writes."""
    return [*state, *(entry for write in writes for entry in write)]


class Journal(TypedDict):
    """A list of which the checkpoints hold the additions, and every fourth time all of it."""

    entries: Annotated[list[Any], DeltaChannel(_fold, snapshot_frequency=4)]
    last: NotRequired[str]


ORDER = Order("A-17", 40, ("tea", "milk"))
CUSTOMER = Customer.model_validate(
    {"name": "ada", "level": Level.HIGH, "orders": [ORDER], "phone": ("0", "1")}
)
CUSTOMER._seen = 3
CALL = {"name": "weather", "args": {"city": "Rome"}, "id": "call-1"}
THINGS: Things = {
    "order": ORDER,
    "customer": CUSTOMER,
    "levels": {Level.LOW: [], Level.HIGH: [Level.LOW, Level.HIGH]},
    "messages": [SystemMessage("be brief", id="s"), HumanMessage("hi", id="h")],
    "pair": (1, ("two", (3.0,)), []),
    "numbers": {3, 1, 2},
    "frozen": frozenset({(1, 2), (3, 4)}),
    "by_number": {1: "one", -2: "minus two"},
    "raw": b"\x00\xff",
    "at": datetime(2026, 5, 4, 3, 2, 1, 999999, tzinfo=UTC),
    "price": Decimal("10.10"),
    "text": "naïve \x00 \ud800",
    "nothing": None,
}


def _chain(state: Any, *nodes: tuple[str, Any], **schemas: Any) -> Graph:
    """Build a graph that runs the nodes one after another."""
    graph: Graph = StateGraph(state, **schemas)
    before = START
    for name, node in nodes:
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph


def chat() -> Graph:
    """Build a conversation that looks up the weather when it is asked for it."""

    def answer(state: Chat) -> dict[str, Any]:
        position = len(state["messages"])
        last = state["messages"][-1]
        if isinstance(last, HumanMessage) and "weather" in last.text:
            return {"messages": [AIMessage("", tool_calls=[CALL], id=f"m{position}")]}
        return {"messages": [AIMessage(f"re: {last.text}", id=f"m{position}")], "turns": 1}

    def look_up(state: Chat) -> dict[str, Any]:
        position = len(state["messages"])
        found = ToolMessage("sunny", tool_call_id="call-1", name="weather", id=f"m{position}")
        return {"messages": [found], "topic": "weather"}

    def route(state: Chat) -> str:
        return "look_up" if getattr(state["messages"][-1], "tool_calls", None) else END

    graph: Graph = StateGraph(Chat)
    graph.add_node("answer", answer)
    graph.add_node("look_up", look_up)
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", route, ["look_up", END])
    graph.add_edge("look_up", "answer")
    return graph


def say(position: int, text: str) -> dict[str, Any]:
    """Make a person's turn of the chat, as the message at `position`."""
    return {"messages": [HumanMessage(text, id=f"m{position}")]}


def subgraphs(outside: Outside) -> Graph:
    """Build a graph around a subgraph that remembers, and one that asks, two levels down."""

    def think(state: Answered) -> dict[str, Any]:
        outside.calls.append(f"think {state['entry']}")
        return {"answer": "…"}

    counter = _chain(Counted, ("count", lambda _: {"count": 1}), input_schema=Entry)
    inner = _chain(Answered, ("ask", lambda state: {"answer": interrupt(f"{state['entry']}?")}))
    asker = _chain(Answered, ("think", think), ("inner", inner.compile()))
    return _chain(
        Parent, ("counter", counter.compile(checkpointer=True)), ("asker", asker.compile())
    )


def fetches(outside: Outside) -> Graph:
    """Build a graph that fetches from two hosts in one superstep; one of them may be down."""

    async def fetch(state: Log) -> dict[str, Any]:
        host = state["host"]
        outside.calls.append(host)
        if host == "shaky" and not outside.is_up:
            await outside.fetched.wait()
            raise ConnectionError("shaky is down")
        outside.fetched.set()
        return {"log": [("fetched", host)]}

    graph = _chain(Log, ("plan", lambda _: {"log": ["plan"]}))
    graph.add_node("fetch", fetch)
    graph.add_node("join", lambda _: {"log": ["join"]})
    hosts = ("steady", "shaky")
    graph.add_conditional_edges("plan", lambda _: [Send("fetch", {"host": h}) for h in hosts])
    graph.add_edge("fetch", "join")
    return graph


def questions(outside: Outside) -> Graph:
    """Build a graph that asks two questions in one superstep."""

    def asks(name: str) -> Any:
        def ask(state: Survey) -> dict[str, Any]:
            outside.calls.append(name)
            return {"answers": [(name, interrupt({"question": name, "to": state.by}))]}

        return ask

    graph: Graph = StateGraph(Survey)
    for name in ("left", "right"):
        graph.add_node(name, asks(name))
        graph.add_edge(START, name)
    graph.add_node("end", lambda state: {"answers": [("in all", len(state.answers))]})
    graph.add_edge(["left", "right"], "end")
    return graph


def letters() -> Graph:
    """Build a graph that logs a, b and c."""
    return _chain(Log, *((name, lambda _, name=name: {"log": [name]}) for name in "abc"))


def pair() -> Graph:
    """Build a graph that goes on from checkpoints that were put by hand."""
    return _chain(Pair, ("change", lambda state: {"x": (state["x"], "changed")}))


def things() -> Graph:
    """Build a graph that stores every kind of value, and then changes two of them."""
    first = {**THINGS, "by_number": {}, "text": "first"}
    return _chain(
        Things,
        ("fill", lambda _: first),
        ("change", lambda _: {"by_number": THINGS["by_number"], "text": THINGS["text"]}),
    )


def totals(saver: Saver, outside: Outside) -> Pregel[Any, Any, Any, Any]:
    """Build a function of the functional API: it adds doubled numbers to what it had before."""

    @task
    async def double(value: int) -> int:
        outside.calls.append(f"double {value}")
        return value * 2

    @entrypoint(checkpointer=saver)
    async def add_up(values: list[int], *, previous: int | None = None) -> Any:
        total = (previous or 0) + sum([await double(value) for value in values])
        if interrupt({"save": total}) == "no":
            return entrypoint.final(value="not saved", save=previous)
        return entrypoint.final(value=f"total {total}", save=total)

    return add_up


def journal() -> Graph:
    """Build a graph whose state is kept as changes."""
    return _chain(
        Journal,
        ("note", lambda state: {"entries": [("noted", len(state["entries"]))], "last": "note"}),
    )


def refund(outside: Outside) -> Graph:
    """Build the graph of most runs: quote, ask a person, pay."""

    def quote(state: Refund) -> dict[str, Any]:
        outside.calls.append("quote")
        return {"log": [("quoted", state["order"].amount)]}

    def approve(state: Refund) -> dict[str, Any]:
        answer = request_approval(state["order"], title=f"Refund {state['order'].number}")
        outside.calls.append(answer.type)
        return {"order": answer.proposal, "log": [(answer.type, answer.by)]}

    def pay(state: Refund) -> dict[str, Any]:
        outside.calls.append("pay")
        if outside.is_deadly:
            os._exit(9)
        return {"outcome": f"paid {state['order'].amount} for {state['order'].number}"}

    return _chain(Refund, ("quote", quote), ("approve", approve), ("pay", pay))


def charge(outside: Outside) -> Graph:
    """Build a graph whose second node fails while the world is down."""

    def reserve(_: Refund) -> dict[str, Any]:
        outside.calls.append("reserve")
        return {"log": ["reserved"]}

    def take(_: Refund) -> dict[str, Any]:
        outside.calls.append("take")
        if not outside.is_up:
            raise ConnectionError("the bank is down")
        return {"outcome": "charged"}

    return _chain(Refund, ("reserve", reserve), ("take", take))


def register(app: AgentFlow, outside: Outside) -> None:
    """Make the graphs of the runs known."""
    app.register(refund(outside), name="refund")
    twice = RetryPolicy(max_attempts=2, initial_interval=0, jitter=False)
    app.register(charge(outside), name="charge", version="2", retry=twice)


def input_of(run_id: str) -> Refund:
    """Return what a run was submitted with."""
    return {"order": Order(run_id, 40, ("tea", "milk")), "customer": CUSTOMER, "log": []}
