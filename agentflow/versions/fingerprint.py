"""The fingerprint of a graph: what of it a run that has begun relies on.

A fingerprint is plain data, which is stored and compared; its digest names it. Two processes make
the same one of the same graph, whatever their version of Python and their hash seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from langgraph.channels import (
    BinaryOperatorAggregate,
    DeltaChannel,
    NamedBarrierValue,
    NamedBarrierValueAfterFinish,
    Topic,
)
from langgraph.channels.base import BaseChannel
from langgraph.constants import END, START
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from agentflow.errors import InvalidInputError, UnknownVersionError
from agentflow.versions.schema import defaults_of, reducer_text, type_text
from agentflow.versions.source import Code, Sources
from agentflow.versions.syntax import digest

FORM = 1
"""The version of the stored form."""
_INNER = ("branch:to:", "join:")
"""How the channels are named by which LangGraph's nodes trigger each other."""
_BARRIERS = (NamedBarrierValue, NamedBarrierValueAfterFinish)
_NAMED = 16


@dataclass(frozen=True)
class Fingerprint:
    """What a graph is made of, as plain data."""

    graph: Mapping[str, Any]
    """By `nodes`, `channels`, `context` and `mode`; a node with a subgraph has its own `graph`."""
    main: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """By node, functions that stand in `__main__`; not stored, and not part of the digest."""
    functions: Mapping[str, str] = field(default_factory=dict, compare=False)
    """All functions that stand in `__main__`, and what each of them said; not stored either."""

    @cached_property
    def text(self) -> str:
        """What is stored."""
        return _text({"form": FORM, "graph": self.graph})

    @cached_property
    def digest(self) -> str:
        """Its name: short, and the same for equal ones only."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:_NAMED]

    @classmethod
    def of_text(cls, text: str, where: str) -> Fingerprint:
        """Load what was stored.

        Raises:
            UnknownVersionError: A newer program made it.
            InvalidInputError: It is no fingerprint.
        """
        try:
            stored = json.loads(text)
            form, graph = stored["form"], stored["graph"]
            known = {name: graph[name] for name in ("nodes", "channels", "context", "mode")}
        except (ValueError, TypeError, KeyError) as exc:
            raise InvalidInputError("fingerprint", (f"{where}: is none",)) from exc
        if form != FORM:
            raise UnknownVersionError(form, FORM, where)
        return cls(known)


def fingerprint_of(
    graph: Pregel[Any, Any, Any, Any],
    *,
    versions: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Compute the fingerprint of a compiled graph.

    Args:
        graph: The graph.
        versions: For nodes that are known by a version instead of by their code; those of a
            subgraph by path, as `outer/inner`. A node's `metadata["version"]` says the same.
    """
    maker = _Maker(Sources(), dict(versions or {}))
    return Fingerprint(maker.graph(graph, "", ()), maker.main, maker.sources.main)


def _text(form: Mapping[str, Any]) -> str:
    return json.dumps(form, sort_keys=True, separators=(",", ":"))


@dataclass(slots=True)
class _Maker:
    sources: Sources
    versions: dict[str, str]
    main: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def graph(
        self, graph: Pregel[Any, Any, Any, Any], path: str, around: tuple[Any, ...]
    ) -> dict[str, Any]:
        nodes = {name: self._node(graph, name, path, around) for name in sorted(graph.nodes)}
        is_state, defaults = isinstance(graph, CompiledStateGraph), {}
        if isinstance(graph, CompiledStateGraph):
            _connect(graph, nodes)
            defaults = defaults_of(graph.builder.state_schema, self.sources)
        else:
            _connect_by_channels(graph, nodes)
        return {
            "nodes": nodes,
            "channels": {
                name: self._channel(channel, defaults.get(name))
                for name, channel in sorted(graph.channels.items())
                if not _is_inner(name, is_state=is_state)
            },
            "context": type_text(graph.context_schema) if graph.context_schema else None,
            "mode": repr(graph.checkpointer) if isinstance(graph.checkpointer, bool) else None,
        }

    def _node(
        self, graph: Pregel[Any, Any, Any, Any], name: str, path: str, around: tuple[Any, ...]
    ) -> dict[str, Any]:
        node, full = graph.nodes[name], f"{path}{name}"
        own = [] if name == START else [node.bound]
        if isinstance(graph, CompiledStateGraph):
            own += [each.path for _, each in sorted(graph.builder.branches[name].items())]
        code = self.sources.read(*(each for each in own if not isinstance(each, Pregel)))
        if code.main:
            self.main[full] = code.main
        version = self.versions.get(full) or (node.metadata or {}).get("version")
        inner = next((each for each in node.subgraphs if isinstance(each, Pregel)), None)
        around = (*around, graph)
        made: dict[str, Any] = {
            "code": f"version {version}" if version else self._code(code, inner, full, around),
            "triggers": sorted(node.triggers),
            "joins": {
                trigger: sorted(map(str, channel.names))
                for trigger in sorted(node.triggers)
                if isinstance(channel := graph.channels.get(trigger), _BARRIERS)
            },
            "to": [],
            # Whether it may go on to anything: what it returns nobody declared.
            "open": "Command" in code.names or not code.has_source,
        }
        if inner is not None and inner not in around:
            made["graph"] = self.graph(inner, f"{full}/", around)
            # What a subgraph's node says to its parent is not known here either.
            made["open"] |= any(each["commands"] for each in made["graph"]["nodes"].values())
        made["commands"] = "Command" in code.names
        return made

    def _code(self, code: Code, inner: Any, full: str, around: tuple[Any, ...]) -> str:
        """Return the tag of a node's code, with graphs of which LangGraph does not know."""
        others = [each for each in code.graphs if each is not inner and each not in around]
        forms = [self.graph(each, f"{full}/", around) for each in others]
        return digest("\n".join([code.tag, *map(_text, forms)])) if forms else code.tag

    def _channel(self, channel: Any, default: str | None) -> dict[str, Any]:
        if not isinstance(channel, BaseChannel):  # a managed value
            return {"kind": "managed", "type": type_text(channel)}
        made: dict[str, Any] = {
            "kind": type(channel).__name__,
            "type": type_text(channel.ValueType),
        }
        if isinstance(channel, BinaryOperatorAggregate):
            made["reducer"] = reducer_text(channel.operator, self.sources)
        elif isinstance(channel, DeltaChannel):
            made["reducer"] = reducer_text(channel.reducer, self.sources)
        elif isinstance(channel, Topic):
            made["reducer"] = "accumulated" if channel.accumulate else "replaced"
        if default is not None:
            made["default"] = default
        return made


def _connect(
    graph: CompiledStateGraph[Any, Any, Any, Any], nodes: dict[str, dict[str, Any]]
) -> None:
    """Say where nodes lead, as a `StateGraph` was told."""
    builder = graph.builder
    leads: dict[str, set[str]] = {name: set() for name in nodes}
    pairs = [*builder.edges]
    pairs += [(start, end) for starts, end in builder.waiting_edges for start in starts]
    for start, end in pairs:
        leads[start].add(end)
    for start, branches in builder.branches.items():
        for branch in branches.values():
            nodes[start]["open"] |= branch.ends is None
            leads[start] |= set((branch.ends or {}).values())
    for name, spec in builder.nodes.items():
        if spec.ends:
            leads[name] |= set(spec.ends)
            # What a node with declared ends returns is known; what its subgraph does is not.
            undeclared = any(each.ends is None for each in builder.branches[name].values())
            nodes[name]["open"] &= undeclared or "graph" in nodes[name]
        if spec.error_handler_node is not None:
            leads[name].add(spec.error_handler_node)
        if spec.defer:
            nodes[name]["deferred"] = True
    for name, ends in leads.items():
        nodes[name]["to"] = sorted(map(str, ends))


def _is_inner(name: str, *, is_state: bool) -> bool:
    if name.startswith("__pregel_"):
        return True
    return is_state and (name == START or name.startswith(_INNER))


def _connect_by_channels(
    graph: Pregel[Any, Any, Any, Any], nodes: dict[str, dict[str, Any]]
) -> None:
    """Say where nodes lead that trigger each other by what they write."""
    from langgraph.pregel._write import ChannelWrite

    readers: dict[str, set[str]] = {}
    for name, node in graph.nodes.items():
        for trigger in node.triggers:
            readers.setdefault(trigger, set()).add(name)
    for name, node in graph.nodes.items():
        ends: set[str] = set()
        for writer in node.flat_writers:
            written = [getattr(each, "channel", None) for each in getattr(writer, "writes", ())]
            static = ChannelWrite.get_static_writes(writer)
            written += [channel for channel, *_ in static or ()]
            if not written or None in written:
                nodes[name]["open"] = True
            for channel in written:
                ends |= readers.get(channel or "", set())
                if channel == END:
                    ends.add(END)
        nodes[name]["to"] = sorted(ends)
