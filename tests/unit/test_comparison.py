"""What of a change can still be reached: the ways through a graph."""

from __future__ import annotations

from typing import Any, Literal

from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from typing_extensions import TypedDict

from agentflow.versions import Frontier, compare, fingerprint_of


class State(TypedDict, total=False):
    """A value."""

    n: int


def plain(_: Any) -> Any:
    """Do nothing."""
    return {}


def changed(_: Any) -> Any:
    """Do something else."""
    return {"n": 1}


def goes(_: Any) -> Command[Literal["c"]]:
    """Lead to a declared node."""
    return Command(goto="c")


def wanders(_: Any) -> Any:
    """Lead nobody knows where."""
    return Command(goto="d")


def form(
    edges: list[tuple[Any, str]],
    *,
    other: str = "",
    branches: dict[str, Any] | None = None,
    **nodes: Any,
) -> Any:
    """Build a graph of `a` to `d`, of which one may have other code; return what is compared."""
    graph: Any = StateGraph(State)
    for name in "abcd":
        graph.add_node(name, changed if name == other else nodes.get(name, plain))
    for start, end in [(START, "a"), *edges]:
        graph.add_edge(start, end)
    for start, branch in (branches or {}).items():
        graph.add_conditional_edges(start, *branch)
    return fingerprint_of(graph.compile()).graph


def ahead(edges: list[tuple[Any, str]], frontier: Frontier, **options: Any) -> set[str]:
    """Return the nodes whose code, if it were changed, would be ahead of a frontier."""
    before = form(edges, **options)
    found = set()
    for name in set("abcd") - set(options):
        changes = compare(before, form(edges, other=name, **options), frontier)
        found |= {change.what for change in changes if change.is_ahead}
    return found


def due(*names: str, done: str = "") -> Frontier:
    """Stand at nodes."""
    return Frontier(due=frozenset(names), done=frozenset(done))


LINE = [("a", "b"), ("b", "c"), ("c", "d"), ("d", END)]


def test_what_leads_on_from_the_frontier_is_ahead() -> None:
    assert ahead(LINE, due("b")) == {"b", "c", "d"}
    assert ahead(LINE, due(done="b")) == {"c", "d"}
    assert ahead([*LINE, ("d", "b")], due("c")) == {"b", "c", "d"}
    assert ahead(LINE, due()) == set()


def test_join_is_ahead_while_one_of_its_nodes_is_missing() -> None:
    edges = [("a", "b"), ("a", "c"), (["b", "c"], "d")]
    assert ahead(edges, due("b", done="c")) == {"b", "d"}


def test_all_ends_of_a_branch_are_ahead_and_everything_if_they_are_not_declared() -> None:
    edges = [("b", END), ("c", END), ("d", END)]
    declared = {"a": (lambda _: "b", ["b", "c"])}
    assert ahead(edges, due("a"), branches=declared) == {"a", "b", "c"}
    unknown = {"a": (lambda _: "b",)}
    assert ahead(edges, due("a"), branches=unknown) == set("abcd")


def test_declared_command_leads_to_its_ends_and_any_other_to_everything() -> None:
    edges = [("b", END), ("c", END), ("d", END)]
    assert ahead(edges, due("a"), a=goes) == {"c"}
    assert ahead(edges, due("a"), a=wanders) == set("bcd")


def test_new_way_counts_as_much_as_the_old_one() -> None:
    before = form([("a", "b"), ("b", END), ("c", END), ("d", END)])
    after = form([("a", "c"), ("b", END), ("c", END), ("d", END)], other="c")
    changes = compare(before, after, due("a"))
    assert {(change.kind, change.what) for change in changes if change.is_ahead} == {
        ("edge_changed", "a"),
        ("code_changed", "c"),
    }


def test_node_of_which_two_have_the_code_was_not_renamed() -> None:
    def named(*names: str) -> Any:
        graph: Any = StateGraph(State)
        for name in names:
            graph.add_node(name, plain)
            graph.add_edge(START, name)
        return fingerprint_of(graph.compile()).graph

    def details(*names: str) -> list[str]:
        changes = compare(named("a", "b"), named(*names), due("a", "b"))
        return [str(change) for change in changes if change.kind == "node_removed"]

    assert details("a", "c") == ["node 'b' was renamed to 'c'"]
    assert details("c", "d") == ["node 'a' is gone", "node 'b' is gone"]
