"""A registered graph, with what its runs need that cannot be stored with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from langgraph.pregel import Pregel
from langgraph.types import TimeoutPolicy

from agentflow.budgets import Budget
from agentflow.checkpoint import Retention
from agentflow.errors import InvalidInputError
from agentflow.retry import RetryPolicies, RetryPolicy
from agentflow.types import Duration, Run, to_timedelta
from agentflow.versions import ChangePolicy, Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredGraph:
    """A graph under a name and version, with what its runs need."""

    graph: Pregel[Any, Any, Any, Any]
    name: str
    version: str
    queue: str
    retry: RetryPolicy
    node_retry: Mapping[str, RetryPolicy] = field(default_factory=dict)
    """For nodes with a policy of their own."""
    context: Callable[[Run], Any] | None
    input_schema: Any
    retention: Retention | None = None
    """How long the threads of its runs are kept, if not as all others."""
    on_cancel: Callable[[Run], Any] | None = None
    """Called, and awaited, before a run that is being driven ends as cancelled."""
    budgets: Sequence[Budget] = ()
    """What its runs and their threads may use."""
    node_timeouts: Mapping[str, float] = field(default_factory=dict)
    """Seconds that a call of a node may take, by the node's name."""
    fingerprint: Fingerprint
    on_change: ChangePolicy = field(default_factory=ChangePolicy)
    """What is done about runs that began on what the graph was before."""

    @property
    def policies(self) -> RetryPolicies:
        """What new runs are stored with."""
        return RetryPolicies(graph=self.retry, nodes=self.node_retry)

    async def make_context(self, run: Run) -> Any:
        """Rebuild what cannot be stored, for one attempt."""
        return None if self.context is None else await _called(self.context, run)

    async def tell_cancelled(self, run: Run) -> None:
        """Call the hook for a run that is being cancelled."""
        if self.on_cancel is not None:
            await _called(self.on_cancel, run)

    def time_limits(self) -> dict[str, float]:
        """Return the seconds after which a call of a node is given up, by the node's name.

        LangGraph stops a node with a timeout of its own, unless it blocks the event loop; with as
        much time again, that is found out.
        """
        limits = {
            name: _longest(node.timeout) * 2
            for name, node in self.graph.nodes.items()
            if node.timeout is not None and node.timeout.run_timeout is not None
        }
        return {**limits, **self.node_timeouts}


def check_nodes(
    graph: Pregel[Any, Any, Any, Any],
    *,
    node_retry: Mapping[str, Any],
    node_timeout: Mapping[str, Duration],
    node_version: Mapping[str, str],
) -> None:
    """Check what is said of single nodes.

    Raises:
        InvalidInputError: There is no such node, or a time that cannot be meant.
    """
    subgraphs = [each for _, each in graph.get_subgraphs(recurse=True) if isinstance(each, Pregel)]
    nodes = set(graph.nodes).union(*(each.nodes for each in subgraphs))
    found = [
        f"{option}: the graph has no node {name!r}"
        for option, given in (("node_retry", node_retry), ("node_timeout", node_timeout))
        for name in given
        if name not in nodes
    ]
    paths = set(graph.nodes)
    for ns, each in graph.get_subgraphs(recurse=True):
        if isinstance(each, Pregel):
            paths |= {f"{ns.replace('|', '/')}/{name}" for name in each.nodes}
    found += [
        f"node_version: the graph has no node {name!r}; one of a subgraph is 'outer/inner'"
        for name in node_version
        if name not in paths
    ]
    found += [
        f"node_timeout: must be above 0 for node {name!r}"
        for name, timeout in node_timeout.items()
        if to_timedelta(timeout) <= timedelta(0)
    ]
    if found:
        raise InvalidInputError("graph", tuple(found))


def _longest(policy: TimeoutPolicy) -> float:
    seconds = policy.run_timeout
    assert isinstance(seconds, float)  # LangGraph has turned it into seconds
    return seconds


async def _called(function: Callable[[Run], Any], run: Run) -> Any:
    made = function(run)
    return await made if inspect.isawaitable(made) else made
