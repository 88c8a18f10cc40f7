"""Where a run stands, read off a checkpoint by what the graph was when that was saved.

A graph that has lost a node does not list the tasks of that node: only the checkpoint does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.checkpoint.base import Checkpoint

_SENDS = "__pregel_tasks"
_BRANCH = "branch:to:"


def due_nodes(checkpoint: Checkpoint, form: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the nodes of the superstep that a checkpoint stands before.

    Args:
        checkpoint: What was saved.
        form: The graph that saved it; without it only what a `StateGraph` triggers by an edge, or
            sends, is found.
    """
    values = checkpoint["channel_values"]
    found = {str(_node_of(send)) for send in values.get(_SENDS) or ()}
    if form is None:
        names = (name for name in values if name.startswith(_BRANCH))
        candidates = {name.removeprefix(_BRANCH): ({"triggers": [name]}) for name in names}
    else:
        candidates = form["nodes"]
    found |= {
        name
        for name, node in candidates.items()
        if any(_has_fired(checkpoint, name, each, node) for each in node["triggers"])
    }
    return frozenset(found)


def _node_of(send: Any) -> Any:
    # Where a class is not known, what is stored of it comes as plain data.
    return send.get("node") if isinstance(send, Mapping) else getattr(send, "node", send)


def _has_fired(checkpoint: Checkpoint, name: str, trigger: str, node: Mapping[str, Any]) -> bool:
    values, versions = checkpoint["channel_values"], checkpoint["channel_versions"]
    if trigger not in values:
        return False
    if (names := node.get("joins", {}).get(trigger)) is not None:
        arrived = values[trigger]
        if isinstance(arrived, (tuple, list)) and arrived and isinstance(arrived[0], (set, list)):
            arrived = arrived[0]  # of a node that is deferred
        if set(map(str, arrived or ())) != set(names):
            return False
    seen = checkpoint["versions_seen"].get(name, {}).get(trigger)
    version: Any = versions.get(trigger)
    return version is not None and (seen is None or version > seen)
