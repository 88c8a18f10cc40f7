"""A graph that stands still wherever a test wants it to, and the changes of a deploy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict

ORDER = ("plan", "loop", "ask", "sub", "last")
"""The nodes on the way, `loop` twice; `sub` has `first` and `second` in it."""
called: list[str] = []
"""Nodes that were called, in order."""
_rounds = 2


def longest(before: str, after: str) -> str:
    """Reduce by another rule."""
    return max(before or "", after or "", key=len)


class State(BaseModel):
    """What the graph remembers."""

    log: Annotated[list[str], operator.add] = []
    rounds: int = 0
    stop: str = ""
    note: str = ""


class Added(State):
    """Has a channel more."""

    more: str = "new"


class Removed(BaseModel):
    """Lacks `note`."""

    log: Annotated[list[str], operator.add] = []
    rounds: int = 0
    stop: str = ""


class Retyped(State):
    """Has another type of `note`."""

    note: int | str = ""  # type: ignore[assignment]  # that is the point of it


class Reduced(State):
    """Has a reducer for `note`."""

    note: Annotated[str, longest] = ""


class Defaulted(State):
    """Has another default of `note`."""

    note: str = "none"


class Context(TypedDict, total=False):
    """What is not stored."""

    user: str


def _step(name: str) -> Callable[[Any], Any]:
    def step(state: Any) -> dict[str, Any]:
        called.append(name)
        if state.stop == name and not (name == "loop" and state.rounds == 0):
            interrupt(f"go on at {name}?")
        return {"log": [name], "rounds": state.rounds + (name == "loop")}

    return step


def _other(name: str) -> Callable[[Any], Any]:
    step = _step(name)

    def changed(state: Any) -> Any:
        """Differ in code, not in what it does."""
        return step(state)

    return changed


def _again(state: Any) -> str:
    return "loop" if state.rounds < _rounds else "on"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a version of the graph differs in."""

    schema: type = State
    names: Mapping[str, str] = field(default_factory=dict)
    """New names of nodes."""
    changed: frozenset[str] = frozenset()
    """Nodes with other code."""
    without: str = ""
    """A node that is passed by."""
    extra: str = ""
    """A node that stands behind this one."""
    skip: bool = False
    """Whether `ask` leads to the last node at once."""
    flat: bool = False
    """Whether `sub` is a plain node."""
    context: Any = None

    def build(self) -> CompiledStateGraph[Any, Any, Any, Any]:
        """Build the graph."""
        graph: Any = StateGraph(self.schema, context_schema=self.context)
        inner: Any = StateGraph(self.schema)
        compiled: CompiledStateGraph[Any, Any, Any, Any] = self._line(
            ORDER, graph, self._line(("first", "second"), inner)
        ).compile()
        return compiled

    def _node(self, name: str) -> Callable[[Any], Any]:
        return (_other if name in self.changed else _step)(name)

    def _line(self, names: tuple[str, ...], graph: Any, inner: Any = None) -> Any:
        kept = [name for name in names if name != self.without]
        for name in kept:
            is_graph = name == "sub" and not self.flat
            node = inner.compile() if is_graph else self._node(name)
            graph.add_node(self.names.get(name, name), node)
        if self.extra in kept:
            graph.add_node("extra", _step("extra"))
            kept.insert(kept.index(self.extra) + 1, "extra")
        called_ = [self.names.get(name, name) for name in kept]
        graph.add_edge(START, called_[0])
        for before, after in zip(called_, [*called_[1:], END], strict=True):
            if before == self.names.get("loop", "loop"):
                graph.add_conditional_edges(before, _again, {"loop": before, "on": after})
            elif self.skip and before == "ask":
                graph.add_edge(before, "last")
            else:
                graph.add_edge(before, after)
        return graph


STANDS = ("plan", "loop", "ask", "second", "last")
"""Where a run may stand: at each of them it asks."""
PLACE = {"plan": 0, "loop": 1, "ask": 2, "sub": 3, "first": 3, "second": 3.5, "last": 4}
"""How far that is."""


def ahead_of(name: str) -> frozenset[str]:
    """Return the places from which a node can still be come to."""
    return frozenset(stand for stand in STANDS if PLACE[stand] <= PLACE[name])


ALWAYS = frozenset(STANDS)
CHANGES: Mapping[str, tuple[Shape, str, frozenset[str]]] = {
    # name: the version, the kind of change, and from where it is ahead
    **{
        f"rename {name}": (Shape(names={name: f"{name}_now"}), "node_removed", ahead_of(name))
        for name in ("plan", "loop", "ask", "last")
    },
    "rename in subgraph": (Shape(names={"first": "begin"}), "node_removed", ahead_of("first")),
    "rename subgraph": (Shape(names={"sub": "under"}), "node_removed", ahead_of("second")),
    **{
        f"remove {name}": (Shape(without=name), "node_removed", ahead_of(name))
        for name in ("plan", "ask", "last")
    },
    "remove in subgraph": (Shape(without="first"), "node_removed", ahead_of("first")),
    "remove subgraph": (Shape(without="sub"), "node_removed", ahead_of("second")),
    "flatten subgraph": (Shape(flat=True), "code_changed", ahead_of("second")),
    **{
        f"code of {name}": (Shape(changed=frozenset({name})), "code_changed", ahead_of(name))
        for name in ("plan", "loop", "ask", "first", "second", "last")
    },
    "add behind plan": (Shape(extra="plan"), "edge_changed", ahead_of("plan")),
    "add behind ask": (Shape(extra="ask"), "edge_changed", ahead_of("ask")),
    "add in subgraph": (Shape(extra="first"), "edge_changed", ahead_of("first")),
    "rewire ask": (Shape(skip=True), "edge_changed", ahead_of("ask")),
    "add channel": (Shape(schema=Added), "channel_added", ALWAYS),
    "remove channel": (Shape(schema=Removed), "channel_removed", ALWAYS),
    "type": (Shape(schema=Retyped), "channel_retyped", ALWAYS),
    "reducer": (Shape(schema=Reduced), "reducer_changed", ALWAYS),
    "default": (Shape(schema=Defaulted), "default_changed", ALWAYS),
    "context": (Shape(context=Context), "context_changed", ALWAYS),
}
