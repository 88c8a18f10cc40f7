"""The graphs that a process knows, in all their versions, and the ways between those."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from agentflow.budgets import Budget
from agentflow.checkpoint import Retention
from agentflow.drive import RegisteredGraph, check_nodes
from agentflow.errors import InvalidInputError, UnknownGraphError
from agentflow.retry import LangGraphRetryPolicy, RetryPolicy
from agentflow.types import Duration, Route, Run, to_timedelta
from agentflow.versions import (
    ChangePolicy,
    CodeChangedWarning,
    GraphMigration,
    fingerprint_of,
    redefined_in_main,
)

Graph = StateGraph[Any, Any, Any, Any] | Pregel[Any, Any, Any, Any]
Migrate = Callable[[dict[str, Any]], Mapping[str, Any]]
_WHOLE = 2**64


@dataclass(slots=True)
class Registry:
    """Graphs by name and version, in the order in which they were registered."""

    graphs: dict[tuple[str, str], RegisteredGraph] = field(default_factory=dict)
    migrations: dict[tuple[str, str, str], GraphMigration] = field(default_factory=dict)

    def copy(self) -> Registry:
        """Return another registry with the same content."""
        return Registry(dict(self.graphs), dict(self.migrations))

    def register(
        self,
        graph: Graph,
        *,
        name: str,
        version: str,
        retry: RetryPolicy | LangGraphRetryPolicy | None,
        node_retry: Mapping[str, RetryPolicy | LangGraphRetryPolicy] | None,
        node_timeout: Mapping[str, Duration] | None,
        node_version: Mapping[str, str] | None,
        queue: str,
        budgets: tuple[Budget, ...],
        context: Callable[[Run], Any] | None,
        input_schema: Any,
        retention: Retention | None,
        on_cancel: Callable[[Run], Any] | None,
        on_change: Any,
    ) -> None:
        """See `AgentFlow.register`."""
        if not isinstance(graph, (StateGraph, Pregel)):
            raise InvalidInputError("graph", ("must be a StateGraph or a compiled graph",))
        if not name or not version:
            raise InvalidInputError("graph", ("name, version: must not be empty",))
        if (name, version) in self.graphs:
            raise InvalidInputError(
                "graph", (f"name: {name!r} version {version!r} is registered already",)
            )
        compiled = graph.compile() if isinstance(graph, StateGraph) else graph
        check_nodes(
            compiled,
            node_retry=node_retry or {},
            node_timeout=node_timeout or {},
            node_version=node_version or {},
        )
        self.graphs[name, version] = RegisteredGraph(
            graph=compiled,
            name=name,
            version=version,
            queue=queue,
            budgets=budgets,
            retry=RetryPolicy.of(retry),
            node_retry={node: RetryPolicy.of(each) for node, each in (node_retry or {}).items()},
            node_timeouts={
                node: to_timedelta(each).total_seconds()
                for node, each in (node_timeout or {}).items()
            },
            on_cancel=on_cancel,
            context=context,
            input_schema=input_schema,
            retention=retention,
            fingerprint=fingerprint_of(compiled, versions=node_version),
            on_change=ChangePolicy.of(on_change),
        )

    def find(self, name: str, version: str | None) -> RegisteredGraph:
        """Return a graph; without a version, the one that was registered last.

        Raises:
            UnknownGraphError: It is not registered.
        """
        for (known, known_version), registered in reversed(self.graphs.items()):
            if known == name and version in {None, known_version}:
                return registered
        names = tuple(f"{known}@{number}" for known, number in self.graphs)
        raise UnknownGraphError(name, version, names)

    def versions_of(self, name: str) -> list[str]:
        """Return the versions of a graph, newest first."""
        return [version for known, version in reversed(self.graphs) if known == name]

    def has_choice(self, name: str) -> bool:
        """Whether there is more than one version of a graph."""
        return len(self.versions_of(name)) > 1

    def choose(self, name: str, run_id: str, routes: Sequence[Route]) -> RegisteredGraph:
        """Return the version for a new run: by its id, the same wherever it is asked.

        A share of the ids belongs to each version that has a route. The others belong to the newest
        version without one; so does what is routed to a version that is not registered here.
        """
        known = self.versions_of(name)
        shares = {route.version: route.share for route in routes if route.version in known}
        digest = hashlib.sha256(f"{name}\x1f{run_id}".encode()).digest()
        place = int.from_bytes(digest[:8]) / _WHOLE
        for version in sorted(shares):
            if place < shares[version]:
                return self.graphs[name, version]
            place -= shares[version]
        rest = [version for version in known if version not in shares]
        return self.find(name, rest[0] if rest else None)

    def add_migration(
        self,
        graph: str,
        from_version: str,
        to_version: str,
        *,
        nodes: Mapping[str, str] | None,
        channels: Mapping[str, str] | None,
        ask_again: bool,
    ) -> Callable[[Migrate], Migrate]:
        """See `AgentFlow.migration`."""
        key = (graph, from_version, to_version)
        if from_version == to_version or key in self.migrations:
            raise InvalidInputError(
                "migration",
                (f"{graph!r} from {from_version!r} to {to_version!r}: is none, or there already",),
            )

        def add(function: Migrate) -> Migrate:
            if inspect.iscoroutinefunction(function):
                raise InvalidInputError(
                    "migration", ("function: must be a plain one, which is not async",)
                )
            self.migrations[key] = GraphMigration(
                graph=graph,
                from_version=from_version,
                to_version=to_version,
                function=function,
                nodes=dict(nodes or {}),
                channels=dict(channels or {}),
                ask_again=ask_again,
            )
            return function

        return add

    def way(self, graph: str, from_version: str, to_version: str) -> list[GraphMigration] | None:
        """Return the shortest chain of migrations between two versions; `None` if there is none."""
        ways: dict[str, list[GraphMigration]] = {from_version: []}
        waiting = [from_version]
        while waiting:
            here = waiting.pop(0)
            if here == to_version:
                return ways[here]
            for (name, start, end), each in self.migrations.items():
                if name == graph and start == here and end not in ways:
                    ways[end] = [*ways[here], each]
                    waiting.append(end)
        return None


def warn_if_redefined(registered: RegisteredGraph) -> None:
    """Warn of nodes whose functions, in a notebook, were defined again since."""
    if stale := redefined_in_main(registered.fingerprint.functions):
        names = ", ".join(map(repr, sorted(stale)))
        warnings.warn(
            f"{names} of __main__ changed after graph {registered.name!r} version "
            f"{registered.version!r} was registered: build the graph again and register it in a "
            "new app, under a new version if runs wait for it; or move its functions into a module",
            CodeChangedWarning,
            stacklevel=3,
        )
