"""Instances of the user's own classes: what is stored of them, and how they are rebuilt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from agentflow.serializer.forms import Ext


def pydantic_state(
    model: BaseModel,
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str], Any]:
    """Return fields, further fields, the names of fields that were set, and private ones."""
    # The raw fields rather than `model_dump`: nested classes stay what they are, and fields that a
    # dump excludes are kept.
    return (
        dict(model.__dict__),
        model.__pydantic_extra__,
        sorted(model.model_fields_set),
        model.__pydantic_private__,
    )


def _build_pydantic(
    cls: type[BaseModel], state: dict[str, Any], extra: Any, fields_set: list[str], private: Any
) -> BaseModel:
    """Rebuild without validating.

    The values were valid when they were stored, and validators may not be pure. A field that was
    added since gets its default; a required one that is missing is an error.
    """
    model = cls.__new__(cls)
    for name in _field_names(cls) - state.keys():
        field = cls.model_fields[name]
        if field.is_required():
            raise ValueError(name)
        state[name] = field.get_default(call_default_factory=True, validated_data=state)
    _set_attribute(model, "__dict__", state)
    _set_attribute(model, "__pydantic_extra__", extra)
    _set_attribute(model, "__pydantic_fields_set__", set(fields_set))
    _set_attribute(model, "__pydantic_private__", private)
    return model


# Models and dataclasses may be frozen, or check what is assigned.
_set_attribute = object.__setattr__


@lru_cache(maxsize=1024)
def _field_names(cls: type[BaseModel]) -> frozenset[str]:
    return frozenset(cls.model_fields)


@lru_cache(maxsize=1024)
def is_plain(cls: type) -> bool:
    """Whether an instance can be made without a constructor that knows more than its fields."""
    try:
        object.__new__(cls)
    except TypeError:
        return False
    return True


def dataclass_state(value: Any) -> dict[str, Any]:
    """Return what a dataclass holds, in fields or beside them."""
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    state = {**{name: getattr(value, name) for name in names}, **getattr(value, "__dict__", {})}
    # With which parameters a generic class was called; for type checkers, and nothing to store.
    state.pop("__orig_class__", None)
    return state


def _build_dataclass(cls: type, state: dict[str, Any]) -> Any:
    """Rebuild without `__init__`, which may have effects; a field added since gets its default."""
    value: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in state:
            continue
        if field.default is not dataclasses.MISSING:
            _set_attribute(value, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            _set_attribute(value, field.name, field.default_factory())
        elif field.init:
            raise ValueError(field.name)
    for name, item in state.items():
        _set_attribute(value, name, item)
    return value


def _build_namedtuple(cls: Any, state: dict[str, Any]) -> Any:
    """Rebuild without the class's own constructor; a field added since gets its default."""
    if state.keys() - set(cls._fields):
        raise ValueError(cls)
    state = {**cls._field_defaults, **state}
    if len(state) < len(cls._fields):
        raise ValueError(cls)
    return tuple.__new__(cls, (state[name] for name in cls._fields))


def _build_enum(cls: Any, value: Any) -> Any:
    return cls(value)


BUILDERS: dict[int, Callable[..., Any]] = {
    Ext.ENUM: _build_enum,
    Ext.PYDANTIC: _build_pydantic,
    Ext.DATACLASS: _build_dataclass,
    Ext.NAMEDTUPLE: _build_namedtuple,
}
