"""Turns values into MessagePack bytes and back, exactly or not at all.

What comes back equals what went in: tuples stay tuples, enums stay enums, dictionary keys keep
their type, Python's own mappings what they are. Another subclass of a builtin container, text or
number comes back as that builtin, which compares equal. What could not be loaded back is refused
when it is written, with its path and its type; the alternative is a run that can no longer be
resumed, found out days later.

Stored data never causes an import. A class is found by name among the modules that this process has
imported already, and only if the allow-list names it; there is no pickle.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import ormsgpack
from langgraph.types import Send
from pydantic import BaseModel

from agentflow.errors import BlockedTypeError, SerializationError
from agentflow.serializer.classes import BUILDERS, dataclass_state, is_plain, pydantic_state
from agentflow.serializer.forms import (
    DECODERS,
    ENCODERS,
    Ext,
    RefusedError,
    ndarray_state,
    path_flavour,
)

AllowList = Literal["imported"] | Collection[type | str]
"""Which classes may be stored: those whose module is imported, or exactly the given ones.

A text names a class as `module:Name`. Builtin types, LangGraph's and LangChain's own classes are
always allowed.
"""

_OPTIONS = (
    ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_PASSTHROUGH_BIG_INT
)
# What a subclass of a builtin comes back as.
_BUILTINS: tuple[type[Any], ...] = (str, int, float, list, dict, tuple, bytes)
_MAX_DEPTH = 200
_MAX_PATH = 120

# Imported by this program whenever such a value is met, so that a fresh process can load messages
# before the user's code has touched them. The list is ours; the data does not choose from it.
_KNOWN_MODULES = frozenset(
    {
        "langchain_core.messages.ai",
        "langchain_core.messages.chat",
        "langchain_core.messages.function",
        "langchain_core.messages.human",
        "langchain_core.messages.modifier",
        "langchain_core.messages.system",
        "langchain_core.messages.tool",
        "langchain_core.documents.base",
        "langgraph.types",
    }
)


class _Pairs:
    """A dictionary on its way to `Ext.MAP`."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs


class _Text:
    """Text on its way to `Ext.TEXT`."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


class _Unknown(dict[str, Any]):
    """An object of a class that is not known here, which may be a key or stand in a set."""

    def __hash__(self) -> int:  # type: ignore[override]  # nobody changes it
        return hash((self["type"], repr(self["value"])))


class Serializer:
    """Values to bytes and back, under one allow-list."""

    def __init__(
        self, *, allow: AllowList = "imported", unknown: Literal["refuse", "plain"]
    ) -> None:
        """Set what may be stored, and what to do with a stored class that is not known here.

        Args:
            allow: Classes that may be written and built.
            unknown: `refuse` raises `BlockedTypeError`; `plain` gives
                `{"type": "module:Name", "value": ...}`, for reading without the user's code.
        """
        self.allow = allow
        self._names = None if allow == "imported" else frozenset(map(_allowed_name, allow))
        self._unknown = unknown
        self._checked: dict[type, str] = {}
        self._places: dict[str, tuple[str, str] | None] = {}
        """Where stored classes are, by name; `None` for those that are not allowed."""

    def with_allowed(self, extra: Collection[type | str]) -> Serializer:
        """Return a serializer that allows `extra` as well."""
        if self.allow == "imported":
            return self
        return Serializer(allow=[*self.allow, *extra], unknown=self._unknown)

    def dumps(self, value: Any, *, where: str = "") -> bytes:
        """Encode a value.

        Raises:
            SerializationError: Some part of it could not be loaded back; names the path and type.
        """
        try:
            return self._pack(value)
        except (TypeError, ValueError, RefusedError, RecursionError) as exc:
            raise self._explain(value, where) from exc

    def loads(self, data: bytes, *, where: str = "") -> Any:
        """Decode what `dumps` made.

        Raises:
            BlockedTypeError: A class in it is not imported here, or not allowed.
        """
        return self._unpack(data, where)

    def _pack(self, value: Any) -> bytes:
        try:
            return ormsgpack.packb(value, default=self._default, option=_OPTIONS)
        except TypeError as exc:
            # The fast path knows text keys and valid Unicode only; all else is rewritten once.
            if not str(exc).startswith(("Dict key must", "string contains surrogates")):
                raise
            return ormsgpack.packb(_rewrite(value), default=self._default, option=_OPTIONS)

    def _ext(self, code: Ext, payload: Any) -> ormsgpack.Ext:
        return ormsgpack.Ext(int(code), self._pack(payload))

    def _default(self, value: Any) -> Any:
        cls = type(value)
        encoder = ENCODERS.get(cls)
        if encoder is not None:
            code, encode = encoder
            return self._ext(code, encode(value))
        if cls is _Pairs:
            return self._ext(Ext.MAP, [list(pair) for pair in value.pairs])
        if cls is _Text:
            return ormsgpack.Ext(int(Ext.TEXT), value.raw)
        if cls in {set, frozenset}:
            # Sorted by their bytes, so that equal sets have equal bytes.
            items = sorted(self._pack(item) for item in value)
            code = Ext.SET if cls is set else Ext.FROZENSET
            return self._ext(code, items)
        return self._default_class(value, cls)

    def _default_class(self, value: Any, cls: type) -> Any:
        if isinstance(value, BaseException):
            raise RefusedError("an exception cannot be rebuilt; store its type and text instead")
        if isinstance(value, enum.Enum):
            return self._ext(Ext.ENUM, [self._name(cls), self._enum_value(value)])
        if isinstance(value, BaseModel):
            return self._ext(Ext.PYDANTIC, [self._name(cls), *pydantic_state(value)])
        if dataclasses.is_dataclass(value):
            name = self._name(cls)
            if not is_plain(cls):
                raise RefusedError("a dataclass that is also a builtin; keep that in a field")
            return self._ext(Ext.DATACLASS, [name, dataclass_state(value)])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = {name: getattr(value, name) for name in value._fields}
            return self._ext(Ext.NAMEDTUPLE, [self._name(cls), fields])
        if isinstance(value, pathlib.PurePath):
            return self._ext(Ext.PATH, [path_flavour(value), str(value)])
        if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            return self._ext(Ext.NDARRAY, ndarray_state(value))
        base = next((builtin for builtin in _BUILTINS if isinstance(value, builtin)), None)
        if base is None:
            raise RefusedError(_hint_for(cls))
        return base(value)

    def _name(self, cls: type) -> str:
        """Return `module:Name` if the class may be stored, by the rule that loading will apply."""
        name = self._checked.get(cls)
        if name is None:
            name = f"{cls.__module__}:{cls.__qualname__}"
            if "<locals>" in name or _find(cls.__module__, cls.__qualname__) is not cls:
                raise RefusedError(
                    "the class cannot be found by its name; define it at the top of a module"
                )
            if not self.allows(name):
                raise RefusedError(f'not in the allow-list; add allow=["{name}"]')
            self._checked[cls] = name
        return name

    def _enum_value(self, member: enum.Enum) -> Any:
        """Return the value by which loading will find a member."""
        cls, value = type(member), member.value
        if type(value) not in {str, int, bytes}:
            # One that is equal to no copy of itself, such as NaN, would be looked for in vain.
            try:
                is_found = cls(self._unpack(self._pack(value), "")) is member
            except ValueError:
                is_found = False
            if not is_found:
                raise RefusedError("its class does not find this member by its value")
        return value

    def allows(self, name: str) -> bool:
        """Whether the allow-list has a class, as `module:qualname`."""
        if self._names is None or name in self._names:
            return True
        return name.partition(":")[0].startswith(("langchain_core.", "langgraph.", "agentflow."))

    def _explain(self, value: Any, where: str) -> SerializationError:
        """Find the offending part again, this time with its path."""
        path, part, hint = self._offender(value, "", 0)
        if len(path) > _MAX_PATH:
            path = f"{path[:_MAX_PATH]}…"
        return SerializationError(_type_name(part), path, hint, where)

    def _offender(self, value: Any, path: str, depth: int) -> tuple[str, Any, str]:
        hint = "it cannot be stored; replace it with plain data"
        if depth > _MAX_DEPTH:
            return path, value, "nested too deeply, or it contains itself"
        for step, child in _children(value):
            try:
                self._pack(child)
            except (TypeError, ValueError, RefusedError, RecursionError):
                return self._offender(child, path + step, depth + 1)
        try:
            self._pack(value)
        except RefusedError as exc:
            hint = exc.hint
        except (TypeError, ValueError, RecursionError) as exc:
            cause = exc.__cause__ or exc.__context__
            if isinstance(cause, RefusedError):
                hint = cause.hint
            elif "Recursion" in str(exc):
                hint = "nested too deeply, or it contains itself"
            elif type(value).__module__ != "builtins" or isinstance(value, BaseException):
                hint = self._class_hint(value)
        return path, value, hint

    def _class_hint(self, value: Any) -> str:
        try:
            self._default(value)
        except RefusedError as exc:
            return exc.hint
        except (TypeError, ValueError, RecursionError):
            pass
        return _hint_for(type(value))

    def _unpack(self, data: bytes, where: str) -> Any:
        reading = _Reading(self, where)
        try:
            return reading.unpack(data)
        except ValueError:
            if reading.failure is None:
                raise
        # The library says only that the hook failed; callers need to know how.
        raise reading.failure

    def find_class(self, name: str, where: str) -> type | None:
        """Find a stored class by its name; `None` if it may be shown as plain data instead.

        Raises:
            BlockedTypeError: It is not imported here, or not allowed.
        """
        place = self._places.get(name)
        if place is None:
            module, _, qualname = name.partition(":")
            if module in _KNOWN_MODULES and module not in sys.modules:
                __import__(module)
            place = self._places[name] = (module, qualname) if self.allows(name) else None
        # Looked up each time: in a notebook the class of that name may be a new one.
        cls = _find(*place) if place else None
        if isinstance(cls, type):
            return cls
        if self._unknown == "plain":
            return None
        raise BlockedTypeError(name, where, "not imported" if place else "not in the allow-list")


class _Reading:
    """One value that is being decoded."""

    __slots__ = ("_serializer", "_where", "failure")

    def __init__(self, serializer: Serializer, where: str) -> None:
        self._serializer = serializer
        self._where = where
        self.failure: Exception | None = None

    def unpack(self, data: bytes) -> Any:
        return ormsgpack.unpackb(data, ext_hook=self._hook)

    def _hook(self, code: int, payload: bytes) -> Any:
        try:
            if code == Ext.TEXT:
                return payload.decode("utf-8", "surrogatepass")
            value = ormsgpack.unpackb(payload, ext_hook=self._hook)
            builder = BUILDERS.get(code)
            if builder is not None:
                return self._build_class(builder, value)
            return self._build(code, value)
        except Exception as exc:
            # The innermost failure is the cause of all others.
            if self.failure is None:
                self.failure = exc
            raise

    def _build(self, code: int, value: Any) -> Any:
        if code in DECODERS:
            return DECODERS[code](value)
        if code == Ext.SET:
            return set(map(self.unpack, value))
        if code == Ext.FROZENSET:
            return frozenset(map(self.unpack, value))
        raise BlockedTypeError(f"extension {code}", self._where, "this program does not know it")

    def _build_class(self, builder: Callable[..., Any], value: list[Any]) -> Any:
        name, *state = value
        cls = self._serializer.find_class(name, self._where)
        if cls is None:
            return _Unknown(type=name, value=state[0])
        try:
            return builder(cls, *state)
        except (TypeError, ValueError, AttributeError) as exc:
            raise BlockedTypeError(name, self._where, "its fields have changed since") from exc


def _allowed_name(item: type | str) -> str:
    return item if isinstance(item, str) else f"{item.__module__}:{item.__qualname__}"


def _find(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    if "." not in qualname:
        return getattr(found, qualname, None)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _type_name(value: Any) -> str:
    cls = type(value)
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )


def _hint_for(cls: type) -> str:
    return (
        f"instances of {cls.__qualname__} cannot be stored; keep plain data, a dataclass or a "
        "pydantic model in the state, and build other objects inside the node"
    )


def _rewrite(value: Any) -> Any:
    """Replace what the fast path refuses in builtin containers: non-text keys, lone surrogates."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return _Text(value.encode("utf-8", "surrogatepass"))
        return value
    if isinstance(value, dict) and type(value) not in ENCODERS:
        pairs = [(_rewrite(key), _rewrite(item)) for key, item in value.items()]
        if all(type(key) is str for key, _ in pairs):
            return dict(pairs)
        return _Pairs(pairs)
    if type(value) is list:
        return [_rewrite(item) for item in value]
    if type(value) is tuple:
        return tuple(_rewrite(item) for item in value)
    return value


def _children(value: Any) -> list[tuple[str, Any]]:
    """List the parts of a value, each with its step in the path."""
    if isinstance(value, Mapping):
        keys = [(f".keys[{i}]", key) for i, key in enumerate(value) if not isinstance(key, str)]
        return keys + [
            (f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{_key(key)}]", item)
            for key, item in value.items()
        ]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if isinstance(value, (list, tuple, collections.deque)):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [("{}", item) for item in value]
    if isinstance(value, Send):
        return [(".arg", value.arg)]
    if isinstance(value, BaseModel):
        fields, extra, _, private = pydantic_state(value)
        parts = {**fields, **(extra or {}), **(private or {})}
        return [(f".{name}", item) for name, item in parts.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{name}", item) for name, item in dataclass_state(value).items()]
    return []


def _key(key: Any) -> str:
    """Show a dictionary key in a path: its type only, unless it is a plain number or name."""
    if isinstance(key, (int, float, bool)):
        return repr(key)
    return f"key of type {type(key).__name__}"
