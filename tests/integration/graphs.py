"""Small graphs that several tests drive, and the state that they share."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

Node = Any
"""Whatever `add_node` takes; its own annotation lists overloads that no alias can follow."""


class State(TypedDict, total=False):
    """A log that only grows, and one value that is replaced."""

    log: Annotated[list[Any], operator.add]
    value: Any


def chain(*nodes: tuple[str, Node]) -> StateGraph[State, None, State, State]:
    """Build a graph that runs the nodes one after another."""
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    before = START
    for name, node in nodes:
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph


def fan(*nodes: tuple[str, Node], then: Node | None = None) -> StateGraph[Any, None, Any, Any]:
    """Build a graph that runs the nodes in one superstep, and perhaps one after them."""
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    for name, node in nodes:
        graph.add_node(name, node)
        graph.add_edge(START, name)
    if then is not None:
        graph.add_node("then", then)
        graph.add_edge([name for name, _ in nodes], "then")
    return graph


def logs(entry: Any) -> Node:
    """Make a node that appends to the log."""
    return lambda _: {"log": [entry]}


def asks(question: Any) -> Node:
    """Make a node that asks one question and logs the answer."""
    return lambda _: {"log": [(question, interrupt(question))]}


def ask_twice(state: State) -> State:
    """Ask about ten dollars, then about a million."""
    first = interrupt("refund $10?")
    second = interrupt("wire $1M?")
    return {"log": [first, second]}
