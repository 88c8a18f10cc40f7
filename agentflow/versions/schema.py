"""Types, reducers and defaults as text that is the same in every process and version of Python."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import sys
import types
from collections.abc import Mapping
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typing_extensions
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from agentflow.versions.source import Sources
from agentflow.versions.syntax import digest

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_DEEPEST = 4
_QUALIFIERS = {
    typing_extensions.Required,
    typing_extensions.NotRequired,
    typing_extensions.ReadOnly,
    Annotated,
}


def type_text(found: Any, inside: tuple[Any, ...] = ()) -> str:
    """Write a type out, with the fields of models, records and enumerations that it names."""
    if (origin := get_origin(found)) is not None:
        return _generic_text(found, origin, inside)
    if isinstance(found, list):
        return f"[{', '.join(type_text(each, inside) for each in found)}]"
    if found is None or found is type(None):
        return "None"
    if found is Any or found is object:
        return "Any"
    if isinstance(found, str):
        return found
    if isinstance(found, type):
        return _class_text(found, inside)
    named = {ForwardRef: "__forward_arg__", TypeVar: "__name__"}.get(type(found))
    return _ADDRESS.sub("", repr(found)) if named is None else str(getattr(found, named))


def _generic_text(found: Any, origin: Any, inside: tuple[Any, ...]) -> str:
    if origin in _QUALIFIERS:
        return type_text(get_args(found)[0], inside)
    if origin is Literal:
        return f"Literal[{', '.join(repr(each) for each in get_args(found))}]"
    texts = [type_text(each, inside) for each in get_args(found)]
    if origin in {Union, types.UnionType}:
        return " | ".join(sorted(texts))
    return f"{_name_of(origin)}[{', '.join(texts)}]"


def _class_text(found: type, inside: tuple[Any, ...]) -> str:
    name = _name_of(found)
    if found in inside or len(inside) > _DEEPEST or _is_library(found):
        return name
    if issubclass(found, enum.Enum):
        return f"{name}({', '.join(f'{each.name}={_value_text(each.value)}' for each in found)})"
    hints = fields_of(found)
    if hints is None:
        return name
    shown = (f"{each}: {type_text(kind, (*inside, found))}" for each, kind in sorted(hints.items()))
    return f"{name}({', '.join(shown)})"


def fields_of(found: Any) -> Mapping[str, Any] | None:
    """Return the fields of a model, a data class or a typed dictionary, with their types."""
    is_model = isinstance(found, type) and issubclass(found, BaseModel)
    if not (is_model or dataclasses.is_dataclass(found) or typing_extensions.is_typeddict(found)):
        return None
    try:
        hints = get_type_hints(found, include_extras=True)
    except Exception:  # noqa: BLE001 -- names that are not there: the user's code
        hints = dict(getattr(found, "__annotations__", {}))
    return {name: kind for name, kind in hints.items() if name not in BaseModel.__annotations__}


def defaults_of(schema: Any, sources: Sources) -> dict[str, str]:
    """Return the defaults of a state's fields as text; of factories, which one it is."""
    found: dict[str, Any] = {}
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, info in schema.model_fields.items():
            if info.default_factory is not None:
                found[name] = info.default_factory
            elif info.default is not PydanticUndefined:
                found[name] = info.default
    elif dataclasses.is_dataclass(schema):
        for each in dataclasses.fields(schema):
            if each.default_factory is not dataclasses.MISSING:
                found[each.name] = each.default_factory
            elif each.default is not dataclasses.MISSING:
                found[each.name] = each.default
    return {name: _default_text(value, sources) for name, value in found.items()}


def reducer_text(reducer: Any, sources: Sources) -> str:
    """Name a reducer; one of the user's own, with the digest of its code."""
    if isinstance(reducer, functools.partial):
        return f"partial({reducer_text(reducer.func, sources)})"
    named = getattr(reducer, "__qualname__", type(reducer).__qualname__)
    module = getattr(reducer, "__module__", "") or ""
    if _is_named_by_module(module):
        return f"{module.lstrip('_').partition('.')[0]}.{named.rpartition('.')[2]}"
    return f"{named.rpartition('.')[2]}#{sources.read(reducer).tag}"


def _default_text(value: Any, sources: Sources) -> str:
    if not callable(value):
        # The text of a value may hold anything; only whether it changes is of interest.
        return digest(_ADDRESS.sub("", _value_text(value)))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    code = sources.read(value) if isinstance(value, types.FunctionType) else None
    return name if code is None else f"{name}#{code.tag}"


def _value_text(value: Any) -> str:
    """Write a value out, of sets in an order that is the same in every process."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(map(_value_text, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_value_text, value))})"
    if isinstance(value, Mapping):
        parts = (f"{_value_text(key)}: {_value_text(each)}" for key, each in value.items())
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}{_value_text(dict(value))}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}
        return f"{type(value).__name__}{_value_text(own)}"
    return repr(value)


def _name_of(found: Any) -> str:
    name = getattr(found, "__qualname__", None) or getattr(found, "_name", None) or repr(found)
    module = getattr(found, "__module__", "") or ""
    if module in {"builtins", "typing", "typing_extensions"}:
        return str(name)
    if _is_named_by_module(module):
        # A library may move its classes between its modules.
        return f"{module.partition('.')[0]}.{name}"
    return f"{module}.{name}"


def _is_library(found: type) -> bool:
    return found.__module__ == "builtins" or _is_named_by_module(found.__module__)


def _is_named_by_module(module: str) -> bool:
    top = module.partition(".")[0]
    libraries = {"agentflow", "langchain", "langchain_core", "langgraph", "pydantic"}
    return top in libraries or (top in sys.stdlib_module_names and top != "__main__")
