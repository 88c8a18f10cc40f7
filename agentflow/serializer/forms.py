"""The forms in which values of well-known types are stored, and back."""

from __future__ import annotations

import collections
import enum
import fractions
import ipaddress
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Send
from pydantic import SecretBytes, SecretStr

from agentflow.errors import BlockedTypeError


class Ext(enum.IntEnum):
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


class RefusedError(Exception):
    """A value that cannot be stored; found again with its path by `_explain`."""

    def __init__(self, hint: str) -> None:
        super().__init__(hint)
        self.hint = hint


def path_flavour(path: pathlib.PurePath) -> str:
    """Say of which kind a path is."""
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
        raise RefusedError("a ZoneInfo made from a file has no name")
    return value.key


def _aware(value: datetime | time) -> list[Any]:
    if value.tzinfo is not None and not isinstance(value.tzinfo, (timezone, ZoneInfo)):
        raise RefusedError("only datetime.timezone and zoneinfo.ZoneInfo can be stored")
    return [value.replace(tzinfo=None).isoformat(), value.tzinfo, value.fold]


def _build_datetime(value: list[Any]) -> datetime:
    text, tzinfo, fold = value
    return datetime.fromisoformat(text).replace(tzinfo=tzinfo, fold=fold)


def _build_time(value: list[Any]) -> time:
    text, tzinfo, fold = value
    return time.fromisoformat(text).replace(tzinfo=tzinfo, fold=fold)


_NDARRAY_KINDS = "biufcmMSU"
"""Kinds of elements that their type's short name says all about."""


def ndarray_state(value: Any) -> list[Any]:
    """Return type, shape and bytes of an array."""
    if type(value) is not sys.modules["numpy"].ndarray:
        raise RefusedError("more than an array; keep plain arrays, for a masked one two of them")
    if value.dtype.hasobject:
        raise RefusedError("an array of Python objects; use a list")
    if value.dtype.kind not in _NDARRAY_KINDS:
        raise RefusedError("an array of records; keep an array for each field")
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
        raise RefusedError(f"what makes its values must be one of {known}; or use a plain dict")
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
_Encoder = tuple[Ext, Callable[[Any], Any]]
ENCODERS: dict[type, _Encoder] = {
    tuple: (Ext.TUPLE, list),
    collections.deque: (Ext.DEQUE, _deque),
    collections.OrderedDict: (Ext.ORDERED, _pairs),
    collections.Counter: (Ext.COUNTER, _pairs),
    collections.defaultdict: (Ext.DEFAULTS, _defaults),
    int: (Ext.BIG_INT, str),
    complex: (Ext.COMPLEX, lambda value: [value.real, value.imag]),
    fractions.Fraction: (Ext.FRACTION, lambda v: [v.numerator, v.denominator]),
    Decimal: (Ext.DECIMAL, str),
    datetime: (Ext.DATETIME, _aware),
    date: (Ext.DATE, date.isoformat),
    time: (Ext.TIME, _aware),
    timedelta: (Ext.TIMEDELTA, lambda v: [v.days, v.seconds, v.microseconds]),
    timezone: (Ext.TIMEZONE, _timezone),
    ZoneInfo: (Ext.ZONEINFO, _zone),
    UUID: (Ext.UUID, lambda value: value.bytes),
    re.Pattern: (Ext.PATTERN, lambda value: [value.pattern, value.flags]),
    range: (Ext.RANGE, _range),
    SecretStr: (Ext.SECRET, lambda value: [value.get_secret_value()]),
    SecretBytes: (Ext.SECRET, lambda value: [value.get_secret_value()]),
    Send: (Ext.SEND, _send),
    _DeltaSnapshot: (Ext.DELTA_SNAPSHOT, lambda value: value.value),
    **dict.fromkeys(_IP_CLASSES, (Ext.IP, _ip)),
}

DECODERS: dict[int, Callable[[Any], Any]] = {
    Ext.TUPLE: tuple,
    Ext.DEQUE: lambda value: collections.deque(value[0], maxlen=value[1]),
    Ext.MAP: lambda value: dict(map(tuple, value)),
    Ext.ORDERED: lambda value: collections.OrderedDict(map(tuple, value)),
    Ext.COUNTER: lambda value: collections.Counter(dict(map(tuple, value))),
    Ext.DEFAULTS: _build_defaults,
    Ext.BIG_INT: int,
    Ext.COMPLEX: lambda value: complex(value[0], value[1]),
    Ext.FRACTION: lambda value: fractions.Fraction(value[0], value[1]),
    Ext.DECIMAL: Decimal,
    Ext.DATETIME: _build_datetime,
    Ext.DATE: date.fromisoformat,
    Ext.TIME: _build_time,
    Ext.TIMEDELTA: lambda v: timedelta(days=v[0], seconds=v[1], microseconds=v[2]),
    Ext.TIMEZONE: lambda value: timezone(value[0], value[1]),
    Ext.ZONEINFO: ZoneInfo,
    Ext.UUID: lambda value: UUID(bytes=value),
    Ext.PATH: _build_path,
    Ext.PATTERN: lambda value: re.compile(value[0], value[1]),
    Ext.RANGE: lambda value: range(*value),
    Ext.IP: lambda value: _IP_TYPES[value[0]](value[1]),
    Ext.SECRET: _build_secret,
    Ext.SEND: _build_send,
    Ext.DELTA_SNAPSHOT: _DeltaSnapshot,
    Ext.NDARRAY: _build_ndarray,
}
