"""A checkpoint of one version of a graph as one of another: values, nodes, channels, what is due.

A migration is a function of values. It is called twice, on copies, and both have to return the
same: what it reads of a clock or of chance would otherwise be in the state of some runs for good.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from langgraph.checkpoint.base import Checkpoint
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.types import Send
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from agentflow.versions.frontier import due_nodes

_SENDS = "__pregel_tasks"
_BRANCH, _JOIN = "branch:to:", "join:"


class TransformationError(Exception):
    """Why a checkpoint cannot become one of another version; told as a `MigrationError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphMigration:
    """How a run gets from one version of a graph to another."""

    graph: str
    from_version: str
    to_version: str
    function: Callable[[dict[str, Any]], Mapping[str, Any]]
    """Takes the values of the state, and returns those of the other version."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """What nodes are called from then on; what is due there is due under the new name."""
    channels: Mapping[str, str] = field(default_factory=dict)
    """What channels are called from then on; they are renamed before `function` is called."""
    ask_again: bool = False
    """Whether open questions are superseded and asked again, instead of staying as they are."""


@dataclass(frozen=True, slots=True)
class Names:
    """What nodes and channels are called after several migrations."""

    nodes: Mapping[str, str]
    channels: Mapping[str, str]

    def node(self, name: str) -> str:
        """Return a node's new name."""
        return self.nodes.get(name, name)

    @classmethod
    def of(cls, steps: Sequence[GraphMigration]) -> Names:
        """Compose the names of migrations."""
        nodes: dict[str, str] = {}
        channels: dict[str, str] = {}
        for step in steps:
            for known, new in ((nodes, step.nodes), (channels, step.channels)):
                reached = set(known.values())  # before this step, in which names may change places
                for name, current in list(known.items()):
                    known[name] = new.get(current, current)
                for name, current in new.items():
                    if name not in reached:
                        known.setdefault(name, current)
        return cls(nodes, channels)


def transform(
    checkpoint: Checkpoint,
    steps: Sequence[GraphMigration],
    graph: Pregel[Any, Any, Any, Any],
    *,
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    whole: Mapping[str, Any],
    next_version: Callable[[Any, None], Any],
) -> Checkpoint:
    """Return a checkpoint as the graph after some migrations would have made it.

    Args:
        checkpoint: What was saved, which is left as it is.
        steps: The migrations, in order.
        graph: The graph after the last of them.
        old: What the graph was when it was saved, if that is known.
        new: What it is.
        whole: The values of channels of which the checkpoint has only changes.
        next_version: The version of a channel that follows one.

    Raises:
        TransformationError: It cannot.
    """
    names = Names.of(steps)
    found = {name: v for name, v in checkpoint["channel_values"].items() if name not in whole}
    values = {name: value for name, value in found.items() if not _is_inner(name)} | dict(whole)
    inner = {name: value for name, value in found.items() if _is_inner(name)}
    migrated = _migrate(values, steps)
    apart = {name: value for name, value in found.items() if name != _SENDS}
    pulled = due_nodes(Checkpoint(**{**checkpoint, "channel_values": apart}), old)
    _validate(migrated, graph, {names.node(name) for name in pulled})
    rename = Renaming(names, new["nodes"])
    kept = {rename.channel(name): rename.value(name, value) for name, value in inner.items()}
    before = {rename.channel(name): value for name, value in found.items()}
    after = {**kept, **migrated}
    left_out = {*before, *map(rename.channel, whole)} - set(after)
    versions = {rename.channel(name): v for name, v in checkpoint["channel_versions"].items()}
    following = next_version(max(versions.values(), default=None), None)
    for name in {*versions, *after}:
        if name in after:
            if name not in versions or not _is_unchanged(before.get(name), after[name]):
                # Or whoever copies the checkpoint would take the value from before.
                versions[name] = following
        elif name in left_out or not (_is_inner(name) or name in graph.channels):
            # A version without a value has LangGraph look for one in earlier checkpoints.
            del versions[name]
    made = Checkpoint(**checkpoint)
    made["channel_values"] = after
    made["channel_versions"] = versions
    made["versions_seen"] = {
        names.node(node): {rename.channel(name): v for name, v in seen.items()}
        for node, seen in checkpoint["versions_seen"].items()
    }
    if checkpoint.get("updated_channels"):
        made["updated_channels"] = sorted(
            {rename.channel(name) for name in checkpoint["updated_channels"] or ()}
        )
    _check_due(checkpoint, made, names, old, new)
    return made


def _migrate(values: Mapping[str, Any], steps: Sequence[GraphMigration]) -> dict[str, Any]:
    current = dict(values)
    for step in steps:
        arrow = f"the migration from {step.from_version!r} to {step.to_version!r}"
        for name in step.channels:
            if step.channels[name] in current and step.channels[name] not in step.channels:
                raise TransformationError(
                    f"{arrow} renames channel {name!r} to {step.channels[name]!r}, which is there"
                )
        current = {step.channels.get(name, name): value for name, value in current.items()}
        returned = []
        for _ in range(2):
            try:
                returned.append(step.function(copy.deepcopy(current)))
            except Exception as exc:
                raise TransformationError(f"{arrow} raised {type(exc).__name__}") from exc
        for each in returned:
            if not isinstance(each, Mapping):
                raise TransformationError(
                    f"{arrow} returned {type(each).__name__}; it must return the new values"
                )
        if (path := _difference(returned[0], returned[1])) is not None:
            raise TransformationError(
                f"{arrow} is not pure: called twice with the same values, it returned different "
                f"ones at {path}"
            )
        current = dict(returned[0])
    return current


def _difference(first: Any, second: Any, path: str = "") -> str | None:
    """Return the path at which two values differ."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in {**first, **second}:
            if (name in first) != (name in second):
                return f"{path}{name}"
            if (found := _difference(first[name], second[name], f"{path}{name}.")) is not None:
                return found
        return None
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return path.rstrip(".") or "the top"
        for number, pair in enumerate(zip(first, second, strict=True)):
            if (found := _difference(*pair, f"{path}{number}.")) is not None:
                return found
        return None
    return None if _equal(first, second) else path.rstrip(".") or "the top"


def _equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second) or repr(first) == repr(second)
    except Exception:  # noqa: BLE001 -- the user's own values
        return repr(first) == repr(second)


def _is_unchanged(before: Any, after: Any) -> bool:
    """Whether a value needs no version of its own: 5 is equal to 5.0, and another value."""
    try:
        return bool(before == after) and type(before) is type(after) and repr(before) == repr(after)
    except Exception:  # noqa: BLE001 -- the user's own values
        return False


def _validate(
    values: Mapping[str, Any], graph: Pregel[Any, Any, Any, Any], due: Collection[str]
) -> None:
    """Check that the graph has such channels, and that what is due can take the values."""
    problems: list[str] = []
    for name, value in values.items():
        channel = graph.channels.get(name)
        if channel is None or isinstance(channel, type):
            problems.append(f"{name}: there is no such channel")
        elif (adapter := _adapter(channel.ValueType)) is not None:
            problems += _problems(adapter, value, name)
    if isinstance(graph, CompiledStateGraph):
        specs = (graph.builder.nodes.get(name) for name in due)
        for schema in dict.fromkeys(spec.input_schema for spec in specs if spec is not None):
            problems += _problems_of_node(values, schema)
    if problems:
        told = "; ".join(dict.fromkeys(problems))
        raise TransformationError(f"the migrated state is invalid: {told}")


def _problems_of_node(values: Mapping[str, Any], schema: Any) -> list[str]:
    """Return why LangGraph could not make a node's input; a typed dictionary it takes as it is."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        # By the names that channels have, not by aliases.
        given = {name: values[name] for name in schema.model_fields if name in values}
        return _problems(TypeAdapter(schema), given)
    if is_dataclass(schema):
        return [
            f"{each.name}: Field required"
            for each in fields(schema)
            if each.name not in values and each.default is each.default_factory is MISSING
        ]
    return []


def _adapter(kind: Any) -> TypeAdapter[Any] | None:
    """Return what checks values of a type; `None` for a type that cannot be checked."""
    with suppress(Exception):
        try:
            return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:
            return TypeAdapter(kind)  # it has a configuration of its own
    return None


def _problems(adapter: TypeAdapter[Any], value: Any, *path: str) -> list[str]:
    try:
        adapter.validate_python(value)
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False, include_context=False)
        return [f"{'.'.join([*path, *map(str, each['loc'])])}: {each['msg']}" for each in errors]
    except Exception as exc:  # noqa: BLE001 -- a validator of the user's
        return [f"{'.'.join(path) or 'state'}: its validation raised {type(exc).__name__}"]
    return []


def _is_inner(name: str) -> bool:
    return name.startswith((_BRANCH, _JOIN)) or (name.startswith("__") and name != "__root__")


class Renaming:
    """Renames channels and what is in them, also those by which nodes are triggered."""

    def __init__(self, names: Names, nodes: Mapping[str, Any]) -> None:
        """Rename for the graph with these nodes, as of its fingerprint."""
        self._names = names
        self._joins = {
            (target, frozenset(arrived)): trigger
            for target, node in nodes.items()
            for trigger, arrived in node["joins"].items()
        }

    def channel(self, name: str) -> str:
        """Return the new name of a channel."""
        if name.startswith(_BRANCH):
            return f"{_BRANCH}{self._names.node(name.removeprefix(_BRANCH))}"
        if name.startswith(_JOIN):
            starts, _, end = name.removeprefix(_JOIN).rpartition(":")
            key = (self._names.node(end), frozenset(map(self._names.node, starts.split("+"))))
            return str(self._joins.get(key, name))
        return self._names.channels.get(name, name)

    def write(self, name: str, value: Any) -> tuple[str, Any]:
        """Return what a node has written, as the new graph would have had it written."""
        if name.startswith(_JOIN) and isinstance(value, str):
            value = self._names.node(value)
        return self.channel(name), value

    def value(self, name: str, value: Any) -> Any:
        """Return what is in a channel that triggers nodes."""
        if name == _SENDS:
            return [
                Send(self._names.node(each.node), each.arg) if isinstance(each, Send) else each
                for each in value
            ]
        if name.startswith(_JOIN) and isinstance(value, set):
            return {self._names.node(each) for each in value}
        return value


def _check_due(
    before: Checkpoint,
    after: Checkpoint,
    names: Names,
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any],
) -> None:
    """See that exactly what was due still is."""
    wanted = {names.node(name) for name in due_nodes(before, old)}
    unknown = sorted(wanted - set(new["nodes"]))
    if unknown:
        raise TransformationError(
            f"node {unknown[0]!r} is due, and the new version has none of that name; say what it "
            f"became: @app.migration(..., nodes={{{unknown[0]!r}: ...}})"
        )
    found = due_nodes(after, new)
    if found != wanted:
        missing = ", ".join(sorted(wanted ^ found))
        raise TransformationError(f"what is due cannot be carried over for: {missing}")
