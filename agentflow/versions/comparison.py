"""The differences between two fingerprints, and which of them a run can still reach."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from langgraph.constants import END, START

from agentflow.errors import ChangeKind

Form = Mapping[str, Any]
"""The graph of a `Fingerprint`, or that of a subgraph in it."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """Where a run stands in a graph."""

    due: frozenset[str] = frozenset()
    """Nodes that are going to run, or to run again: what asks somebody does."""
    done: frozenset[str] = frozenset()
    """Nodes of the same superstep that have finished, and whose writes are still to be applied."""
    inside: Mapping[str, tuple[Frontier, ...]] = field(default_factory=dict)
    """By due nodes with a subgraph, where those stand; a node that is missing has not begun."""


BEGINNING = Frontier(due=frozenset({START}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference between two versions of a graph."""

    kind: ChangeKind
    what: str
    """The node or the channel; those of a subgraph by path, as `outer/inner`."""
    detail: str = ""
    is_ahead: bool
    """Whether the run that it was asked about can still come to it."""

    def __str__(self) -> str:
        """Say what has changed."""
        noun = "channel" if self.kind in _OF_CHANNELS else "node"
        if self.kind == "context_changed":
            where = f" of {self.what.rstrip('/')!r}" if self.what else ""
            return f"the context{where} {self.detail}"
        return f"{noun} {self.what!r} {self.detail or _TEXTS[self.kind]}"


_OF_CHANNELS = frozenset(
    {"channel_added", "channel_removed", "channel_retyped", "default_changed", "reducer_changed"}
)
_TEXTS: Mapping[ChangeKind, str] = {
    "code_changed": "has other code",
    "node_added": "is new",
    "node_removed": "is gone",
    "channel_added": "is new",
    "channel_removed": "is gone",
    "default_changed": "has another default",
}


def compare(old: Form, new: Form, frontier: Frontier) -> tuple[Change, ...]:
    """Return how a graph differs from what it was, as seen from where a run stands.

    A node is ahead if a way leads to it from what is due, in the old graph or in the new one. Where
    it is not declared to what a node leads, it leads to everything. A channel is ahead if any node
    is: each of them may read and write it.
    """
    return tuple(_compare(old, new, frontier, ""))


def compare_from_beginning(old: Form, new: Form) -> tuple[Change, ...]:
    """Return how a graph differs for a run that is about to begin."""
    return compare(old, new, BEGINNING)


def compare_channels(old: Form, new: Form) -> tuple[Change, ...]:
    """Return how a graph differs for a run that has not begun, on a thread that has values.

    It begins at the beginning, so all that it can meet of the past is a value of another type.
    """
    changes = compare(old, new, Frontier())
    return tuple(
        Change(kind=each.kind, what=each.what, detail=each.detail, is_ahead=True)
        if each.kind == "channel_retyped" and "/" not in each.what
        else each
        for each in changes
    )


def _compare(old: Form, new: Form, frontier: Frontier, path: str) -> Iterator[Change]:
    passed, reach = _reach(old, new, frontier)
    yield from _compare_nodes(old["nodes"], new["nodes"], reach, path)
    yield from _compare_channels(old["channels"], new["channels"], path, is_ahead=bool(reach))
    if old["context"] != new["context"]:
        yield Change(
            kind="context_changed",
            what=path,
            detail=f"is {_shown(new['context'])} instead of {_shown(old['context'])}",
            is_ahead=bool(reach),
        )
    for name in sorted(set(old["nodes"]) & set(new["nodes"])):
        before, after = old["nodes"][name].get("graph"), new["nodes"][name].get("graph")
        if before is None or after is None:
            continue
        for place in _places_inside(name, frontier, passed, reach):
            yield from _unique(_compare(before, after, place, f"{path}{name}/"))


def _unique(changes: Iterator[Change]) -> Iterator[Change]:
    yield from dict.fromkeys(changes)


def _places_inside(
    name: str, frontier: Frontier, passed: Collection[str], reach: Collection[str]
) -> tuple[Frontier, ...]:
    """Return where a run stands in a node's subgraph; a merged view if it stands at several."""
    if name in passed:  # it comes to the node anew
        return (BEGINNING,)
    if name not in reach:
        return (Frontier(),)
    places = frontier.inside.get(name, (BEGINNING,))
    return (_merged(places),)


def _merged(places: tuple[Frontier, ...]) -> Frontier:
    inside: dict[str, tuple[Frontier, ...]] = {}
    begins_anew: set[str] = set()
    for place in places:
        for name in place.due:
            if name in place.inside:
                inside[name] = (*inside.get(name, ()), *place.inside[name])
            else:
                begins_anew.add(name)
    return Frontier(
        due=frozenset().union(*(place.due for place in places)),
        done=frozenset().union(*(place.done for place in places)),
        inside={name: found for name, found in inside.items() if name not in begins_anew},
    )


def _reach(old: Form, new: Form, frontier: Frontier) -> tuple[frozenset[str], frozenset[str]]:
    """Return the nodes that are come to anew from the frontier, and those with what is due."""
    nodes = (old["nodes"], new["nodes"])
    everything = frozenset(nodes[0]) | frozenset(nodes[1]) - {START}
    found: set[str] = set()
    waiting = list(frontier.due | frontier.done)
    while waiting:
        name = waiting.pop()
        for known in nodes:
            node = known.get(name)
            if node is None:
                continue
            ends = everything if node["open"] else frozenset(node["to"])
            new_ones = ends - found - {END}
            found |= new_ones
            waiting += new_ones
    anew = frozenset(found - {START})
    return anew, anew | frontier.due


def _compare_nodes(old: Form, new: Form, reach: Collection[str], path: str) -> Iterator[Change]:
    gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    renamed = _renamed(old, new, gone, added)
    for name in gone:
        heir = renamed.get(name)
        detail = "" if heir is None else f"was renamed to {path + heir!r}"
        yield Change(kind="node_removed", what=path + name, detail=detail, is_ahead=name in reach)
    for name in added:
        if name not in renamed.values():
            # Whoever comes to it comes from a node that now leads elsewhere, which is told.
            yield Change(kind="node_added", what=path + name, is_ahead=False)
    for name in sorted(set(old) & set(new)):
        before, after, is_ahead = old[name], new[name], name in reach
        if before["code"] != after["code"] or ("graph" in before) != ("graph" in after):
            yield Change(
                kind="code_changed",
                what=path + name,
                detail=_code(before, after),
                is_ahead=is_ahead,
            )
        elif "graph" in before and before["graph"]["mode"] != after["graph"]["mode"]:
            yield Change(
                kind="code_changed",
                what=path + name,
                is_ahead=is_ahead,
                detail="keeps the state of its subgraph in another way",
            )
        if (wiring := _rewired(before, after, renamed)) is not None:
            yield Change(kind="edge_changed", what=path + name, detail=wiring, is_ahead=is_ahead)


def _code(before: Form, after: Form) -> str:
    versions = [each["code"].removeprefix("version ") for each in (before, after)]
    if all(each["code"].startswith("version ") for each in (before, after)):
        return f"has version {versions[1]!r} instead of {versions[0]!r}"
    if ("graph" in before) != ("graph" in after):
        return "has a subgraph now" if "graph" in after else "has no subgraph any more"
    return "has other code"


def _rewired(before: Form, after: Form, renamed: Mapping[str, str]) -> str | None:
    """Say how a node is connected otherwise; not that another one has a new name."""
    ends = sorted(renamed.get(name, name) for name in before["to"])
    if ends != after["to"] or before["open"] != after["open"]:
        return f"leads to {_ends(after)} instead of {_ends(before)}"
    joins = [
        sorted(
            sorted(renamed.get(name, name) for name in names) for names in node["joins"].values()
        )
        for node in (before, after)
    ]
    plain = [set(node["triggers"]) - set(node["joins"]) for node in (before, after)]
    if joins[0] != joins[1] or plain[0] != plain[1]:
        return f"waits for {_joined(after)} instead of {_joined(before)}"
    if before.get("deferred") != after.get("deferred"):
        return "is deferred" if after.get("deferred") else "is not deferred any more"
    return None


def _ends(node: Form) -> str:
    names = ["the end" if each == END else repr(each) for each in node["to"]]
    if node["open"]:
        names.append("anything")
    return " or ".join(names) or "nothing"


def _joined(node: Form) -> str:
    joins = [" and ".join(map(repr, names)) for _, names in sorted(node["joins"].items())]
    return ", or for ".join(joins) or "any one node"


def _renamed(old: Form, new: Form, gone: Collection[str], added: Collection[str]) -> dict[str, str]:
    """Find new nodes that are what another one was, if there is but one for each."""
    found: dict[str, str] = {}
    for name in gone:
        heirs = [each for each in added if new[each]["code"] == old[name]["code"]]
        rivals = [each for each in gone if old[each]["code"] == old[name]["code"]]
        if len(heirs) == len(rivals) == 1:
            found[name] = heirs[0]
    return found


def _compare_channels(old: Form, new: Form, path: str, *, is_ahead: bool) -> Iterator[Change]:
    for name in sorted(set(old) | set(new)):
        before, after, what = old.get(name), new.get(name), path + name
        if before is None:
            yield Change(kind="channel_added", what=what, is_ahead=is_ahead)
        elif after is None:
            yield Change(kind="channel_removed", what=what, is_ahead=is_ahead)
        else:
            if (before["kind"], before["type"]) != (after["kind"], after["type"]):
                yield Change(
                    kind="channel_retyped",
                    what=what,
                    detail=_retyped(before, after),
                    is_ahead=is_ahead,
                )
            if before.get("reducer") != after.get("reducer"):
                yield Change(
                    kind="reducer_changed",
                    what=what,
                    is_ahead=is_ahead,
                    detail=f"has the reducer {_reducer(after)} instead of {_reducer(before)}",
                )
            if before.get("default") != after.get("default"):
                yield Change(kind="default_changed", what=what, is_ahead=is_ahead)


def _retyped(before: Form, after: Form) -> str:
    if before["type"] != after["type"]:
        return f"has the type {after['type']} instead of {before['type']}"
    return f"is a {after['kind']} instead of a {before['kind']}"


def _reducer(channel: Form) -> str:
    return str(channel.get("reducer") or "none")


def _shown(context: str | None) -> str:
    return "none" if context is None else context
