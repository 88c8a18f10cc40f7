"""Checks what `submit` is given, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import typing_extensions
from langgraph.types import Command
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from agentflow.drive import RegisteredGraph
from agentflow.errors import InvalidInputError
from agentflow.journal import EffectStatus
from agentflow.storage import OnBusy, OnExisting
from agentflow.types import Duration, PauseScope, RunStatus, WaitStatus, to_timedelta

_Status = TypeVar("_Status", RunStatus, WaitStatus, EffectStatus)

_QUALIFIERS = {
    typing_extensions.Required,
    typing_extensions.NotRequired,
    typing_extensions.ReadOnly,
}
_MAX_PRIORITY = 2**31 - 1
_MAX_LENGTH = timedelta(days=365_000)
_LENGTH = "must be a timedelta or seconds, above 0 and within a thousand years"
_SCHEMAS = 256
"""How many types it is remembered of how they are checked: to find out takes most of a check."""
_CONFIG_KEYS = {"configurable", "recursion_limit", "tags"}


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a submission."""

    config: dict[str, Any]
    metadata: dict[str, Any]
    timeouts: dict[str, timedelta | None]


def check_options(
    *,
    config: Any,
    metadata: Any,
    start_at: Any,
    on_existing: Any,
    on_busy: Any = "enqueue",
    priority: Any = 0,
    timeouts: Mapping[str, Any] | None = None,
    names: Mapping[str, Any] | None = None,
) -> Options:
    """Check the options of a submission.

    `names` are those that must be text, if given, `timeouts` those that must be lengths of time.

    Raises:
        InvalidInputError: Names every option that is malformed.
    """
    found = [
        f"{option}: must be text, not empty and without NUL"
        for option, name in (names or {}).items()
        if name is not None and not _is_name(name)
    ]
    if not isinstance(priority, int) or abs(priority) > _MAX_PRIORITY:
        found.append(f"priority: must be an integer between {-_MAX_PRIORITY} and {_MAX_PRIORITY}")
    if start_at is not None and (not isinstance(start_at, datetime) or start_at.tzinfo is None):
        found.append("start_at: must have a time zone")
    if on_existing not in get_args(OnExisting):
        found.append(f"on_existing: must be one of {', '.join(get_args(OnExisting))}")
    if on_busy not in get_args(OnBusy):
        found.append(f"on_busy: must be one of {', '.join(get_args(OnBusy))}")
    lengths = {name: _length(value) for name, value in (timeouts or {}).items()}
    found += [
        f"{name}: {_LENGTH}"
        for name, value in (timeouts or {}).items()
        if value is not None and lengths[name] is None
    ]
    found += _config_problems({} if config is None else config)
    found += _metadata_problems({} if metadata is None else metadata)
    if found:
        raise InvalidInputError("submission", tuple(found))
    return Options(config=dict(config or {}), metadata=dict(metadata or {}), timeouts=lengths)


def _length(value: Any) -> timedelta | None:
    """Return a length of time, `None` if it is none."""
    if isinstance(value, bool) or not isinstance(value, (timedelta, int, float)):
        return None
    try:
        length = to_timedelta(value)
    except (OverflowError, ValueError):
        return None
    return length if timedelta(0) < length < _MAX_LENGTH else None


def member(kind: type[_Status], value: _Status | str | None) -> _Status | None:
    """Return a status that may be given as text.

    Raises:
        InvalidInputError: There is no such status.
    """
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError as exc:
        allowed = ", ".join(each.value for each in kind)
        raise InvalidInputError("status", (f"must be one of: {allowed}",)) from exc


def pause_scope(graph: str | None, queue: str | None) -> tuple[PauseScope, str]:
    """Return what a graph or a queue, or neither, stands for.

    Raises:
        InvalidInputError: Both are given, or one is not a name.
    """
    if graph is not None and queue is not None:
        raise InvalidInputError("pause", ("give a graph or a queue, not both",))
    name = graph if graph is not None else queue
    if name is None:
        return "all", ""
    scope: PauseScope = "queue" if graph is None else "graph"
    if not _is_name(name):
        raise InvalidInputError("pause", (f"{scope}: must be text, not empty and without NUL",))
    return scope, name


def check_worker(
    concurrency: int, queues: Sequence[str], sweep_every: Duration | None
) -> timedelta | None:
    """Check how a worker is to work, and return how often it sweeps.

    Raises:
        InvalidInputError: Names each option that is out of range.
    """
    found = []
    if not (isinstance(concurrency, int) and concurrency >= 1):  # type: ignore[redundant-expr]  # user code made it
        found.append("concurrency: must be a whole number, at least 1")
    # A text would be a queue for each of its letters.
    if isinstance(queues, str) or not queues or not all(map(_is_name, queues)):
        found.append('queues: must be a list of names that is not empty, as ["default"]')
    every = _length(sweep_every)
    if sweep_every is not None and every is None:
        found.append(f"sweep_every: {_LENGTH}")
    if found:
        raise InvalidInputError("worker", tuple(found))
    return every


def check_share(graph: str, version: str, share: float | None) -> None:
    """Check a route.

    Raises:
        InvalidInputError: It is none.
    """
    found = [
        f"{option}: must be text, not empty and without NUL"
        for option, name in (("graph", graph), ("version", version))
        if not _is_name(name)
    ]
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 <= share <= 1):
        found.append("share: must be between 0 and 1, or None for none")
    if found:
        raise InvalidInputError("route", tuple(found))


def _config_problems(config: Any) -> list[str]:
    if not isinstance(config, Mapping):
        return ["config: must be a mapping"]
    found = []
    unknown = sorted(str(key) for key in config if key not in _CONFIG_KEYS)
    if unknown:
        allowed = ", ".join(sorted(_CONFIG_KEYS))
        found.append(f"config: unknown keys {', '.join(unknown)} (allowed: {allowed})")
    configurable = config.get("configurable", {})
    if not isinstance(configurable, Mapping):
        found.append("config.configurable: must be a mapping")
    elif any(not isinstance(key, str) for key in configurable):
        found.append("config.configurable: keys must be text")
    else:
        found += [
            f"config.configurable.{key}: is set by agentflow"
            for key in configurable
            if key in {"thread_id", "checkpoint_id", "checkpoint_ns"} or key.startswith("__")
        ]
    tags = config.get("tags", [])
    if not isinstance(tags, (list, tuple)) or not all(isinstance(tag, str) for tag in tags):
        found.append("config.tags: must be a list of text")
    limit = config.get("recursion_limit", 1)
    if type(limit) is not int or limit < 1:
        found.append("config.recursion_limit: must be a positive integer")
    return found


def _metadata_problems(metadata: Any) -> list[str]:
    if not isinstance(metadata, Mapping):
        return ["metadata: must be a mapping"]
    if any(not isinstance(key, str) for key in metadata):
        return ["metadata: keys must be text"]
    return ["metadata.run_id: is set by agentflow"] if "run_id" in metadata else []


def check_wait(until: str, timeout: Any) -> None:
    """Check what is waited for, and for how long.

    Raises:
        InvalidInputError: Names the option that is none.
    """
    found = []
    if until not in {"ended", "parked"}:
        found.append("until: must be ended or parked")
    is_number = isinstance(timeout, (int, float)) and not math.isnan(timeout)
    if not (timeout is None or is_number or isinstance(timeout, timedelta)):
        found.append("timeout: must be a timedelta or seconds")
    if found:
        raise InvalidInputError("wait", tuple(found))


def _is_name(value: object) -> bool:
    if not isinstance(value, str) or value == "" or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a character, which no database takes
        return False
    return True


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
    hints = _hints(schema)
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
        adapter = _adapter(schema) if _is_hashable(schema) else _make_adapter(schema)
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


@lru_cache(maxsize=_SCHEMAS)
def _hints(schema: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(schema, include_extras=True)


@lru_cache(maxsize=_SCHEMAS)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return _make_adapter(schema)


def _make_adapter(schema: Any) -> TypeAdapter[Any]:
    config = None if _has_own_config(schema) else ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(_checkable(schema), config=config)


def _is_hashable(schema: Any) -> bool:
    """Whether a type can be looked up; `Annotated` with a dictionary cannot."""
    try:
        hash(schema)
    except TypeError:
        return False
    return True


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
