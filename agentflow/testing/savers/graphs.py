"""The small graphs that the suites drive, on the saver under test and on LangGraph's own."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Annotated, Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}
Graph = Any
"""A compiled graph; its four type parameters say nothing here."""


class State(TypedDict, total=False):
    """A log that only grows, and one value that is replaced."""

    log: Annotated[list[Any], operator.add]
    value: Any


def _joined(left: list[Any], right: Collection[list[Any]]) -> list[Any]:
    return left + [item for each in right for item in each]


def _merged(left: dict[str, Any], right: Collection[dict[str, Any]]) -> dict[str, Any]:
    merged = dict(left)
    for each in right:
        merged |= each
    return merged


class DeltaState(TypedDict, total=False):
    """What LangGraph keeps as deltas: each node's writes, and now and then the whole value."""

    log: Annotated[list[Any], DeltaChannel(_joined, snapshot_frequency=3)]
    notes: Annotated[dict[str, Any], DeltaChannel(_merged, dict, snapshot_frequency=1000)]
    value: Any


def chain(*nodes: tuple[str, Any], state: type = State) -> StateGraph[Any, None, Any, Any]:
    """Build a graph that runs the nodes one after another."""
    graph: StateGraph[Any, None, Any, Any] = StateGraph(state)
    before = START
    for name, node in nodes:
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph


def letters(*names: str) -> StateGraph[Any, None, Any, Any]:
    """Build a chain whose nodes log their names."""
    return chain(*((name, logs(name)) for name in names))


def logs(entry: Any) -> Any:
    """Make a node that appends to the log."""
    return lambda _: {"log": [entry]}


def asks(question: Any) -> Any:
    """Make a node that asks one question and logs the answer."""
    return lambda _: {"log": [f"{question} {interrupt(question)}"]}


def shape(graph: Graph, config: RunnableConfig = CONFIG) -> list[tuple[Any, ...]]:
    """Return what the history of a thread says, but for ids and times."""
    return [
        (
            each.values,
            each.next,
            each.metadata.get("source"),
            each.metadata.get("step"),
            [asked.value for asked in each.interrupts],
        )
        for each in graph.get_state_history(config)
    ]
