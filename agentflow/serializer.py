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
import fractions
import ipaddress
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

import ormsgpack
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Send
from pydantic import BaseModel, SecretBytes, SecretStr

from agentflow.errors import BlockedTypeError, SerializationError

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


class _Ext(enum.IntEnum):
    """Extension codes; stored, so never renumbered."""

    TUPLE = 1
    SET = 2
    FROZENSET = 3
    DEQUE = 4
    MAP = 5
    """A dictionary whose keys are not all text, as a list of pairs."""
    TEXT = 6
    """Text that is not valid Unicode (lone surrogates)."""
    BIG_INT = 7
    COMPLEX = 8
    FRACTION = 9
    DECIMAL = 10
    DATETIME = 11
    DATE = 12
    TIME = 13
    TIMEDELTA = 14
    TIMEZONE = 15
    ZONEINFO = 16
    UUID = 17
    PATH = 18
    PATTERN = 19
    RANGE = 20
    IP = 22
    ENUM = 23
    PYDANTIC = 24
    DATACLASS = 25
    NAMEDTUPLE = 26
    SECRET = 27
    SEND = 28
    DELTA_SNAPSHOT = 29
    NDARRAY = 30
    ORDERED = 31
    COUNTER = 32
    DEFAULTS = 33
    """A `defaultdict`, as the name of what makes its values and a list of pairs."""


class _Pairs:
    """A dictionary on its way to `_Ext.MAP`."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs


class _Text:
    """Text on its way to `_Ext.TEXT`."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


class _Unknown(dict[str, Any]):
    """An object of a class that is not known here, which may be a key or stand in a set."""

    def __hash__(self) -> int:  # type: ignore[override]  # nobody changes it
        return hash((self["type"], repr(self["value"])))


class _RefusedError(Exception):
    """A value that cannot be stored; found again with its path by `_explain`."""

    def __init__(self, hint: str) -> None:
        super().__init__(hint)
        self.hint = hint


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
        except (TypeError, ValueError, _RefusedError, RecursionError) as exc:
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

    def _ext(self, code: _Ext, payload: Any) -> ormsgpack.Ext:
        return ormsgpack.Ext(int(code), self._pack(payload))

    def _default(self, value: Any) -> Any:
        cls = type(value)
        encoder = _ENCODERS.get(cls)
        if encoder is not None:
            code, encode = encoder
            return self._ext(code, encode(value))
        if cls is _Pairs:
            return self._ext(_Ext.MAP, [list(pair) for pair in value.pairs])
        if cls is _Text:
            return ormsgpack.Ext(int(_Ext.TEXT), value.raw)
        if cls in {set, frozenset}:
            # Sorted by their bytes, so that equal sets have equal bytes.
            items = sorted(self._pack(item) for item in value)
            code = _Ext.SET if cls is set else _Ext.FROZENSET
            return self._ext(code, items)
        return self._default_class(value, cls)

    def _default_class(self, value: Any, cls: type) -> Any:
        if isinstance(value, BaseException):
            raise _RefusedError("an exception cannot be rebuilt; store its type and text instead")
        if isinstance(value, enum.Enum):
            return self._ext(_Ext.ENUM, [self._name(cls), self._enum_value(value)])
        if isinstance(value, BaseModel):
            return self._ext(_Ext.PYDANTIC, [self._name(cls), *_pydantic_state(value)])
        if dataclasses.is_dataclass(value):
            name = self._name(cls)
            if not _is_plain(cls):
                raise _RefusedError("a dataclass that is also a builtin; keep that in a field")
            return self._ext(_Ext.DATACLASS, [name, _dataclass_state(value)])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = {name: getattr(value, name) for name in value._fields}
            return self._ext(_Ext.NAMEDTUPLE, [self._name(cls), fields])
        if isinstance(value, pathlib.PurePath):
            return self._ext(_Ext.PATH, [_path_flavour(value), str(value)])
        if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            return self._ext(_Ext.NDARRAY, _ndarray_state(value))
        base = next((builtin for builtin in _BUILTINS if isinstance(value, builtin)), None)
        if base is None:
            raise _RefusedError(_hint_for(cls))
        return base(value)

    def _name(self, cls: type) -> str:
        """Return `module:Name` if the class may be stored, by the rule that loading will apply."""
        name = self._checked.get(cls)
        if name is None:
            name = f"{cls.__module__}:{cls.__qualname__}"
            if "<locals>" in name or _find(cls.__module__, cls.__qualname__) is not cls:
                raise _RefusedError(
                    "the class cannot be found by its name; define it at the top of a module"
                )
            if not self._is_allowed(name):
                raise _RefusedError(f'not in the allow-list; add allow=["{name}"]')
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
                raise _RefusedError("its class does not find this member by its value")
        return value

    def _is_allowed(self, name: str) -> bool:
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
            except (TypeError, ValueError, _RefusedError, RecursionError):
                return self._offender(child, path + step, depth + 1)
        try:
            self._pack(value)
        except _RefusedError as exc:
            hint = exc.hint
        except (TypeError, ValueError, RecursionError) as exc:
            cause = exc.__cause__ or exc.__context__
            if isinstance(cause, _RefusedError):
                hint = cause.hint
            elif "Recursion" in str(exc):
                hint = "nested too deeply, or it contains itself"
            elif type(value).__module__ != "builtins" or isinstance(value, BaseException):
                hint = self._class_hint(value)
        return path, value, hint

    def _class_hint(self, value: Any) -> str:
        try:
            self._default(value)
        except _RefusedError as exc:
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
            place = self._places[name] = (module, qualname) if self._is_allowed(name) else None
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
            if code == _Ext.TEXT:
                return payload.decode("utf-8", "surrogatepass")
            value = ormsgpack.unpackb(payload, ext_hook=self._hook)
            builder = _BUILDERS.get(code)
            if builder is not None:
                return self._build_class(builder, value)
            return self._build(code, value)
        except Exception as exc:
            # The innermost failure is the cause of all others.
            if self.failure is None:
                self.failure = exc
            raise

    def _build(self, code: int, value: Any) -> Any:
        if code in _DECODERS:
            return _DECODERS[code](value)
        if code == _Ext.SET:
            return set(map(self.unpack, value))
        if code == _Ext.FROZENSET:
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
    if isinstance(value, dict) and type(value) not in _ENCODERS:
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
        fields, extra, _, private = _pydantic_state(value)
        parts = {**fields, **(extra or {}), **(private or {})}
        return [(f".{name}", item) for name, item in parts.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{name}", item) for name, item in _dataclass_state(value).items()]
    return []


def _key(key: Any) -> str:
    """Show a dictionary key in a path: its type only, unless it is a plain number or name."""
    if isinstance(key, (int, float, bool)):
        return repr(key)
    return f"key of type {type(key).__name__}"


def _pydantic_state(
    model: BaseModel,
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str], Any]:
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
def _is_plain(cls: type) -> bool:
    """Whether an instance can be made without a constructor that knows more than its fields."""
    try:
        object.__new__(cls)
    except TypeError:
        return False
    return True


def _dataclass_state(value: Any) -> dict[str, Any]:
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


_BUILDERS: dict[int, Callable[..., Any]] = {
    _Ext.ENUM: _build_enum,
    _Ext.PYDANTIC: _build_pydantic,
    _Ext.DATACLASS: _build_dataclass,
    _Ext.NAMEDTUPLE: _build_namedtuple,
}


def _path_flavour(path: pathlib.PurePath) -> str:
    pure = not isinstance(path, pathlib.Path)
    windows = isinstance(path, pathlib.PureWindowsPath)
    return ("Pure" if pure else "") + ("Windows" if windows else "Posix")


def _build_path(value: list[str]) -> pathlib.PurePath:
    flavour, text = value
    if flavour == "PurePosix":
        return pathlib.PurePosixPath(text)
    if flavour == "PureWindows":
        return pathlib.PureWindowsPath(text)
    return pathlib.Path(text)


def _send(value: Send) -> list[Any]:
    return [value.node, value.arg, getattr(value, "timeout", None)]


def _build_send(value: list[Any]) -> Send:
    node, arg, timeout = value
    return Send(node, arg) if timeout is None else Send(node, arg, timeout=timeout)


def _timezone(value: timezone) -> list[Any]:
    return [value.utcoffset(None), value.tzname(None)]


def _zone(value: ZoneInfo) -> str:
    if value.key is None:
        raise _RefusedError("a ZoneInfo made from a file has no name")
    return value.key


def _aware(value: datetime | time) -> list[Any]:
    if value.tzinfo is not None and not isinstance(value.tzinfo, (timezone, ZoneInfo)):
        raise _RefusedError("only datetime.timezone and zoneinfo.ZoneInfo can be stored")
    return [value.replace(tzinfo=None).isoformat(), value.tzinfo, value.fold]


def _build_datetime(value: list[Any]) -> datetime:
    text, tzinfo, fold = value
    return datetime.fromisoformat(text).replace(tzinfo=tzinfo, fold=fold)


def _build_time(value: list[Any]) -> time:
    text, tzinfo, fold = value
    return time.fromisoformat(text).replace(tzinfo=tzinfo, fold=fold)


_NDARRAY_KINDS = "biufcmMSU"
"""Kinds of elements that their type's short name says all about."""


def _ndarray_state(value: Any) -> list[Any]:
    if type(value) is not sys.modules["numpy"].ndarray:
        raise _RefusedError("more than an array; keep plain arrays, for a masked one two of them")
    if value.dtype.hasobject:
        raise _RefusedError("an array of Python objects; use a list")
    if value.dtype.kind not in _NDARRAY_KINDS:
        raise _RefusedError("an array of records; keep an array for each field")
    return [value.dtype.str, list(value.shape), value.tobytes()]


def _build_ndarray(value: list[Any]) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        raise BlockedTypeError("numpy:ndarray", "", "not imported")
    dtype, shape, raw = value
    return numpy.frombuffer(raw, dtype=numpy.dtype(dtype)).reshape(shape).copy()


def _build_secret(value: list[Any]) -> SecretStr | SecretBytes:
    (secret,) = value
    return SecretStr(secret) if isinstance(secret, str) else SecretBytes(secret)


def _ip(value: Any) -> list[str]:
    return [type(value).__name__, str(value)]


def _range(value: range) -> list[int]:
    return [value.start, value.stop, value.step]


def _pairs(value: Mapping[Any, Any]) -> list[list[Any]]:
    return [[key, item] for key, item in value.items()]


def _defaults(value: collections.defaultdict[Any, Any]) -> list[Any]:
    make = value.default_factory
    name = next((name for name, known in _FACTORIES.items() if known is make), None)
    if name is None:
        known = ", ".join(filter(None, _FACTORIES))
        raise _RefusedError(f"what makes its values must be one of {known}; or use a plain dict")
    return [name, _pairs(value)]


def _build_defaults(value: list[Any]) -> collections.defaultdict[Any, Any]:
    name, pairs = value
    return collections.defaultdict(_FACTORIES[name], map(tuple, pairs))


_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "": None,
    **{cls.__name__: cls for cls in (bool, dict, float, frozenset, int, list, set, str, tuple)},
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "deque": collections.deque,
}
"""What may make the values of a `defaultdict`, by the name that is stored."""


def _deque(value: collections.deque[Any]) -> list[Any]:
    return [list(value), value.maxlen]


_IP_CLASSES = (
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)
_IP_TYPES = {cls.__name__: cls for cls in _IP_CLASSES}
_Encoder = tuple[_Ext, Callable[[Any], Any]]
_ENCODERS: dict[type, _Encoder] = {
    tuple: (_Ext.TUPLE, list),
    collections.deque: (_Ext.DEQUE, _deque),
    collections.OrderedDict: (_Ext.ORDERED, _pairs),
    collections.Counter: (_Ext.COUNTER, _pairs),
    collections.defaultdict: (_Ext.DEFAULTS, _defaults),
    int: (_Ext.BIG_INT, str),
    complex: (_Ext.COMPLEX, lambda value: [value.real, value.imag]),
    fractions.Fraction: (_Ext.FRACTION, lambda v: [v.numerator, v.denominator]),
    Decimal: (_Ext.DECIMAL, str),
    datetime: (_Ext.DATETIME, _aware),
    date: (_Ext.DATE, date.isoformat),
    time: (_Ext.TIME, _aware),
    timedelta: (_Ext.TIMEDELTA, lambda v: [v.days, v.seconds, v.microseconds]),
    timezone: (_Ext.TIMEZONE, _timezone),
    ZoneInfo: (_Ext.ZONEINFO, _zone),
    UUID: (_Ext.UUID, lambda value: value.bytes),
    re.Pattern: (_Ext.PATTERN, lambda value: [value.pattern, value.flags]),
    range: (_Ext.RANGE, _range),
    SecretStr: (_Ext.SECRET, lambda value: [value.get_secret_value()]),
    SecretBytes: (_Ext.SECRET, lambda value: [value.get_secret_value()]),
    Send: (_Ext.SEND, _send),
    _DeltaSnapshot: (_Ext.DELTA_SNAPSHOT, lambda value: value.value),
    **dict.fromkeys(_IP_CLASSES, (_Ext.IP, _ip)),
}

_DECODERS: dict[int, Callable[[Any], Any]] = {
    _Ext.TUPLE: tuple,
    _Ext.DEQUE: lambda value: collections.deque(value[0], maxlen=value[1]),
    _Ext.MAP: lambda value: dict(map(tuple, value)),
    _Ext.ORDERED: lambda value: collections.OrderedDict(map(tuple, value)),
    _Ext.COUNTER: lambda value: collections.Counter(dict(map(tuple, value))),
    _Ext.DEFAULTS: _build_defaults,
    _Ext.BIG_INT: int,
    _Ext.COMPLEX: lambda value: complex(value[0], value[1]),
    _Ext.FRACTION: lambda value: fractions.Fraction(value[0], value[1]),
    _Ext.DECIMAL: Decimal,
    _Ext.DATETIME: _build_datetime,
    _Ext.DATE: date.fromisoformat,
    _Ext.TIME: _build_time,
    _Ext.TIMEDELTA: lambda v: timedelta(days=v[0], seconds=v[1], microseconds=v[2]),
    _Ext.TIMEZONE: lambda value: timezone(value[0], value[1]),
    _Ext.ZONEINFO: ZoneInfo,
    _Ext.UUID: lambda value: UUID(bytes=value),
    _Ext.PATH: _build_path,
    _Ext.PATTERN: lambda value: re.compile(value[0], value[1]),
    _Ext.RANGE: lambda value: range(*value),
    _Ext.IP: lambda value: _IP_TYPES[value[0]](value[1]),
    _Ext.SECRET: _build_secret,
    _Ext.SEND: _build_send,
    _Ext.DELTA_SNAPSHOT: _DeltaSnapshot,
    _Ext.NDARRAY: _build_ndarray,
}
