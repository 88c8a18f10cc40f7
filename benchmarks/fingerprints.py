"""What it costs to tell what a graph is made of: once, when it is registered."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from agentflow.versions import fingerprint_of
from benchmarks.lab import Lab
from benchmarks.results import Result, Row, medians, milliseconds

_NODES = 100
_LIMIT = 0.05
"""Seconds for a graph of so many nodes."""
OURS = "agentflow"


class State(TypedDict, total=False):
    """A value."""

    n: int


async def fingerprint(lab: Lab) -> Result:
    """Compute the fingerprint of a graph of a hundred nodes, each a function of its own."""
    compiled = _graph(lab)
    seconds = []
    for _ in range(lab.rounds):
        began = time.perf_counter()
        made = fingerprint_of(compiled).digest
        seconds.append(time.perf_counter() - began)
        assert made
    figures = {OURS: seconds}
    median = medians(figures)[OURS]
    row = Row(
        workload=f"Fingerprint of a graph of {_NODES} nodes, once per process",
        figure=milliseconds(median),
        ratio=median / _LIMIT,
        required=1,
    )
    return Result(rows=[row], figures={"seconds": figures})


def _graph(lab: Lab) -> Any:
    lines = ["def helper(state):", "    return state.get('n', 0) + 1", ""]
    for number in range(_NODES):
        lines += [
            f"def node_{number}(state):",
            f"    total = helper(state) + {number}",
            "    if total > 1000:",
            "        raise ValueError(f'{total} is too much')",
            "    return {'n': total}",
            "",
        ]
    file = lab.folder / "hundred_nodes.py"
    file.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location("hundred_nodes", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["hundred_nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph: Any = StateGraph(State)
    before = START
    for number in range(_NODES):
        graph.add_node(f"node_{number}", getattr(module, f"node_{number}"))
        graph.add_edge(before, f"node_{number}")
        before = f"node_{number}"
    return graph.compile()
