"""Checks what `submit` is given, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from datetime import datetime
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typing_extensions
from langgraph.types import Command
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from agentflow.drive import RegisteredGraph
from agentflow.errors import InvalidInputError
from agentflow.storage import OnExisting

_QUALIFIERS = {
    typing_extensions.Required,
    typing_extensions.NotRequired,
    typing_extensions.ReadOnly,
}
_CONFIG_KEYS = {"configurable", "recursion_limit", "tags"}


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a submission."""

    config: dict[str, Any]
    metadata: dict[str, Any]


def check_options(
    *,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
    start_at: datetime | None,
    on_existing: str,
) -> Options:
    """Check the options of a submission.

    Raises:
        InvalidInputError: Names every option that is malformed.
    """
    found: list[str] = []
    settings = dict(config or {})
    unknown = sorted(set(settings) - _CONFIG_KEYS)
    if unknown:
        allowed = ", ".join(sorted(_CONFIG_KEYS))
        found.append(f"config: unknown keys {', '.join(unknown)} (allowed: {allowed})")
    configurable = settings.get("configurable", {})
    if not isinstance(configurable, Mapping):
        found.append("config.configurable: must be a mapping")
    else:
        found += [
            f"config.configurable.{key}: is set by agentflow"
            for key in configurable
            if key in {"thread_id", "checkpoint_id", "checkpoint_ns"} or str(key).startswith("__")
        ]
    limit = settings.get("recursion_limit", 1)
    if not isinstance(limit, int) or limit < 1:
        found.append("config.recursion_limit: must be a positive integer")
    if any(not isinstance(key, str) for key in metadata or {}):
        found.append("metadata: keys must be text")
    if "run_id" in (metadata or {}):
        found.append("metadata.run_id: is set by agentflow")
    if start_at is not None and start_at.tzinfo is None:
        found.append("start_at: must have a time zone")
    if on_existing not in get_args(OnExisting):
        found.append(f"on_existing: must be one of {', '.join(get_args(OnExisting))}")
    if found:
        raise InvalidInputError("submission", tuple(found))
    return Options(config=settings, metadata=dict(metadata or {}))


def check_input(registered: RegisteredGraph, value: Any) -> None:
    """Check an input against the schema given at registration, or else the graph's own.

    Raises:
        InvalidInputError: Names each place that does not fit, without its content.
    """
    subject = f"input for graph {registered.name!r}"
    if isinstance(value, Command):
        raise InvalidInputError(
            subject, ("a Command is not an input; decide the approval instead",)
        )
    if value is None:
        raise InvalidInputError(subject, ("must not be empty",))
    if registered.input_schema is not None:
        _check_type(registered.input_schema, value, subject)
        return
    schema = getattr(getattr(registered.graph, "builder", None), "input_schema", None)
    if schema is None:
        return
    if isinstance(schema, type) and (issubclass(schema, BaseModel) or is_dataclass(schema)):
        _check_type(schema, value, subject)
    elif isinstance(value, Mapping):
        _check_keys(schema, value, subject)
    elif not isinstance(schema, type) or _is_typed_dict(schema) or not isinstance(value, schema):
        raise InvalidInputError(subject, ("must be a mapping of the graph's input keys",))


def _check_keys(schema: Any, value: Mapping[str, Any], subject: str) -> None:
    """Check a partial state: known keys, of the declared types; LangGraph takes an empty one too.

    A key with a reducer takes whatever its reducer takes, so its type is not checked.
    """
    hints = get_type_hints(schema, include_extras=True)
    if not hints:
        return
    unknown = sorted(str(key) for key in value if key not in hints)
    found = [f"{key}: the graph has no such input key" for key in unknown]
    for key, item in value.items():
        hint = _unqualified(hints.get(key))
        if hint is None or getattr(hint, "__metadata__", None):
            continue
        try:
            _check_type(hint, item, subject, key)
        except InvalidInputError as exc:
            found += exc.problems
    if found:
        raise InvalidInputError(subject, tuple(found))


def _check_type(schema: Any, value: Any, subject: str, prefix: str = "") -> None:
    try:
        config = None if _has_own_config(schema) else ConfigDict(arbitrary_types_allowed=True)
        adapter: TypeAdapter[Any] = TypeAdapter(_checkable(schema), config=config)
        adapter.validate_python(value)
    except ValidationError as exc:
        problems = tuple(
            f"{'.'.join(str(part) for part in (prefix, *error['loc']) if part != '') or 'value'}: "
            f"{error['msg']}"
            for error in exc.errors(include_input=False, include_url=False, include_context=False)
        )
        raise InvalidInputError(subject, problems) from None
    except (PydanticUserError, TypeError, NameError):
        # The annotation is not one that can be checked; the graph will judge the value itself.
        return


def _unqualified(hint: Any) -> Any:
    """Return what stands inside `Required`, `NotRequired` and `ReadOnly`."""
    while get_origin(hint) in _QUALIFIERS:
        (hint,) = get_args(hint)
    return hint


def _checkable(hint: Any) -> Any:
    """Return a type with each `typing.TypedDict` in it as `typing_extensions.TypedDict`.

    Pydantic takes only the latter before Python 3.12.
    """
    if _is_typed_dict(hint):
        keys = {
            name: _checkable(item)
            for name, item in get_type_hints(hint, include_extras=True).items()
        }
        return typing_extensions.TypedDict(hint.__name__, keys, total=hint.__total__)  # type: ignore[operator]  # mypy knows only literal definitions
    origin, arguments = get_origin(hint), get_args(hint)
    if not any(_is_typed_dict(argument) for argument in arguments):
        return hint
    parts = tuple(_checkable(argument) for argument in arguments)
    if origin in {Union, UnionType}:
        return Union[parts]  # noqa: UP007 -- built at run time
    return origin[parts] if origin is not None else hint


def _has_own_config(schema: Any) -> bool:
    is_class = isinstance(schema, type)
    return is_class and (
        issubclass(schema, BaseModel) or is_dataclass(schema) or _is_typed_dict(schema)
    )


def _is_typed_dict(schema: Any) -> bool:
    return hasattr(schema, "__total__") and hasattr(schema, "__required_keys__")
