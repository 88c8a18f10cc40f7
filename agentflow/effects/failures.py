"""Exceptions of calls: what is kept of one, and how it is raised again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from agentflow.codec import Codec
from agentflow.errors import EffectFailedError, SerializationError
from agentflow.interrupts.plain import to_plain
from agentflow.journal import Effect, EffectFailure

_MESSAGE = 16_000
_SIZE = 1_000_000
"""How large what an exception carries may be, as text; more is not kept."""


def describe(error: Exception, *, is_final: bool = False) -> EffectFailure:
    """Return what is kept of an exception, which is user code: not even its text need be there."""
    try:
        message = str(error)[:_MESSAGE].encode("utf-8", "backslashreplace").decode()
    except Exception:  # noqa: BLE001 -- user code
        message = "<no text: its str raises>"
    cls = type(error)
    args = _storable(list(error.args))
    return EffectFailure(
        type=f"{cls.__module__}:{cls.__qualname__}",
        message=message,
        args=None if args is None else tuple(args),
        state=_storable({k: v for k, v in vars(error).items() if not k.startswith("__")}),
        is_final=is_final,
    )


def rebuild(effect: Effect, codec: Codec) -> Exception:
    """Return the exception that an effect raised in an earlier attempt.

    Its class is looked for among the modules that are imported already, if the allow-list has it.
    Where there is none, or not all of the exception could be kept, an `EffectFailedError` stands
    for it.
    """
    failure = effect.failure
    assert failure is not None
    cls = find_class(failure, codec)
    if cls is None or failure.args is None or failure.state is None:
        return EffectFailedError(effect.id, effect.name, failure.type)
    try:
        error = cls.__new__(cls, *failure.args)
        error.args = failure.args
        vars(error).update(failure.state)
    except Exception:  # noqa: BLE001 -- user code
        return EffectFailedError(effect.id, effect.name, failure.type)
    return error


def find_class(failure: EffectFailure, codec: Codec) -> type[Exception] | None:
    """Return the class of an exception, if it is imported and allowed; Python's own are."""
    module, _, name = failure.type.partition(":")
    if module != "builtins" and not codec.allows(failure.type):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _storable(value: Any) -> Any:
    """Return a value as plain data, if it is that already: it is to come back as it was."""
    try:
        plain = to_plain(value)
    except SerializationError:
        return None
    is_small = _size(plain, _SIZE) <= _SIZE
    return plain if is_small and _is_plain(value) else None


def _size(plain: Any, most: int) -> int:
    """Return about how large plain data is; no more is counted than is too much."""
    if isinstance(plain, Mapping):
        plain = [part for item in plain.items() for part in item]
    if isinstance(plain, str):
        return len(plain)
    size = 1
    for each in plain if isinstance(plain, list) else ():
        size += _size(each, most)
        if size > most:
            break
    return size


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in {str, int, float, bool}
