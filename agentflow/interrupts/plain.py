"""Plain data: the JSON-like form in which questions and answers are shown, hashed and stored.

It owns the conversion, its inverse for typed proposals, and the canonical text that is hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, NoReturn
from uuid import UUID

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_jsonable_python

from agentflow.errors import SerializationError

_DEEPEST = 100
"""Levels of nesting; more is a cycle, or nothing that a person could review."""
_FRAME = 10
"""Levels that a record around the data may add when it is hashed or sent as a whole."""
_PLAIN = frozenset({str, int, bool, type(None)})
"""Classes of values that are plain as they are; what is derived from them may not be."""
_TEXTUAL = (date, time, timedelta, Decimal, UUID, PurePath, bytes)
"""Values with one well-known text form in JSON; pydantic reads each back from it."""


def to_plain(value: Any, path: str = "", *, lenient: bool = False) -> Any:
    """Turn a value into dicts with text keys, lists, text, numbers, booleans and `None`.

    Args:
        value: JSON-like data, in which pydantic models, dataclasses, enums, sets, times, decimals
            and UUIDs may stand.
        path: Where the value stands, for the error.
        lenient: Show what has no plain form by its type instead of refusing it. For questions of
            graphs that are not ours to refuse, never for what is handed back to a node.

    Raises:
        SerializationError: A part has no plain form that could be read back: NaN, keys that are
            not text, other classes, or nesting without an end.
    """
    return _plain(value, path, lenient, _DEEPEST)


def rebuild(cls: type[Any], data: Any) -> Any:
    """Build an instance of `cls` from plain data; `pydantic.ValidationError` if it does not fit.

    It reads JSON text, not Python values, since strict models accept the text form of a time or
    a decimal from JSON only. Names and aliases are both known, as `to_plain` writes names.
    """
    return TypeAdapter(cls).validate_json(canonical(data), by_alias=True, by_name=True)


def typed(value: Any) -> type[Any] | None:
    """Return the class that a proposal has to be rebuilt as, or `None` for data that is plain."""
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        return type(value)
    return None


def canonical(value: Any) -> str:
    """Return the one JSON text of plain data: sorted keys, no spaces, text as it is.

    Raises:
        SerializationError: The data is not plain.
    """
    plain = _plain(value, "", lenient=False, room=_DEEPEST + _FRAME)
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON, in hex."""
    # Half of a surrogate pair can come from a model's broken output; it is hashed as it is.
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any, path: str, lenient: bool, room: int) -> Any:  # noqa: FBT001, C901, PLR0912 - one branch per kind
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Enum):
        return _plain(value.value, path, lenient, room)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return str(value) if lenient else _refuse(value, path, "JSON has no NaN and no infinity")
    if not room:
        return "…" if lenient else _refuse(value, path, "it is nested too deeply, or in itself")
    if kind is not dict and isinstance(value, BaseModel):
        return _plain(_model(value, path, lenient), path, lenient, room - 1)
    if kind is not dict and typed(value):
        value = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    if isinstance(value, (dict, Mapping)):
        return {
            (name := _key(key, path, lenient)): _plain(
                item, f"{path}.{name}" if path else name, lenient, room - 1
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]", lenient, room - 1) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        # A set has another order in every process; sorted, it hashes the same on replay.
        return sorted((_plain(item, path, lenient, room - 1) for item in value), key=canonical)
    if isinstance(value, _TEXTUAL):
        return _text(value, path, lenient)
    hint = "give JSON-like data, a pydantic model or a dataclass"
    return _name(value) if lenient else _refuse(value, path, hint)


def _model(value: BaseModel, path: str, lenient: bool) -> Any:  # noqa: FBT001 - passed down
    try:
        if not lenient:
            # In a field of type `Any`, pydantic's JSON form turns NaN into `None` without a word.
            _check_finite(value.model_dump(round_trip=True, warnings="none"), path)
        # Computed fields are left out: a model that forbids extras could not be rebuilt.
        return value.model_dump(mode="json", round_trip=True, warnings="none")
    except ValueError as error:  # pydantic's own, or a plain one for a model inside itself
        if lenient:
            return _name(value)
        raise SerializationError(_type(value), path, "a field of it has no JSON form") from error


def _check_finite(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(value, path, "JSON has no NaN and no infinity")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            _check_finite(item, f"{path}[{index}]")


def _text(value: Any, path: str, lenient: bool) -> Any:  # noqa: FBT001 - passed down
    try:
        return to_jsonable_python(value)
    except ValueError as error:
        if lenient:
            return _name(value)
        raise SerializationError(_type(value), path, "it has no JSON form") from error


def _key(key: object, path: str, lenient: bool) -> str:  # noqa: FBT001 - passed down
    key = key.value if isinstance(key, Enum) else key
    if isinstance(key, str):
        return str.__str__(key)
    if lenient:
        return repr(key) if isinstance(key, (int, float, tuple, type(None))) else _name(key)
    return _refuse(key, path, "keys must be text")


def _refuse(value: object, path: str, hint: str) -> NoReturn:
    raise SerializationError(_type(value), path, hint)


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _name(value: object) -> str:
    return f"<{_type(value)}>"
