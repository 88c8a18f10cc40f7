"""What can be stored comes back equal; what cannot is refused when it is written."""

from __future__ import annotations

import collections
import enum
import fractions
import ipaddress
import json
import math
import pathlib
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.types import Send
from pydantic import BaseModel, PrivateAttr, SecretBytes, SecretStr

from agentflow.codec import Codec, context_of
from agentflow.errors import (
    BlockedTypeError,
    HashMismatchError,
    SerializationError,
    UnknownVersionError,
)
from agentflow.keys import KeyRing

T = TypeVar("T")
GOLDEN = Path(__file__).parents[1] / "golden"


class Colour(enum.Enum):
    """An enum with values of several kinds."""

    RED = 1
    BLUE = ("b", 2)


class Level(enum.StrEnum):
    """Text that is an enum."""

    LOW = "low"
    HIGH = "high"


class Rights(enum.IntFlag):
    """Flags."""

    READ = 1
    WRITE = 2


class Point(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any = None


@dataclass(frozen=True, slots=True)
class Order:
    """A frozen dataclass with slots."""

    number: int
    items: tuple[Any, ...] = ()


@dataclass
class Basket:
    """A mutable dataclass with a field that `__init__` does not take."""

    owner: str
    orders: list[Any] = field(default_factory=list)
    total: int = field(default=0, init=False)


class Customer(BaseModel):
    """A model with an extra, a private and a nested value."""

    model_config = {"extra": "allow"}

    name: str
    level: Level = Level.LOW
    order: Order | None = None
    _seen: int = PrivateAttr(default=0)


class Pair(collections.namedtuple("Pair", "x y")):  # noqa: PYI024, SLOT002 -- as users write it
    """A named tuple whose constructor takes something else than its fields."""

    def __new__(cls, both: Any) -> Self:
        """Make a pair of equals."""
        return super().__new__(cls, both, both)


@dataclass
class Box(Generic[T]):
    """A generic dataclass."""

    content: T


class Odd(enum.Enum):
    """An enum with a value that equals nothing."""

    NAN = math.nan
    HALF = 0.5


@dataclass
class DeclinedError(Exception):
    """A dataclass that is an exception."""

    code: int


@dataclass
class Numbered(list[Any]):
    """A dataclass that is a list."""

    number: int


ROME = ZoneInfo("Europe/Rome")
CUSTOMER = Customer.model_validate({"name": "ada", "level": Level.HIGH, "extra_key": {"x": (1,)}})
VALUES: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": -(2**63),
    "big int": 2**200,
    "float": 1.5,
    "infinity": float("-inf"),
    "text": "naïve \x00 text",
    "surrogate": "\ud800x",
    "bytes": b"\x00\xff",
    "list": [1, [2, []]],
    "tuple": (1, ("2",), ()),
    "set": {1, 2, 3},
    "frozenset": frozenset({("b", (1,))}),
    "deque": collections.deque([1, 2], maxlen=3),
    "dict": {"a": {"b": None}},
    "map": {1: "a", "1": "b", (1, 2): "c", None: "d", 1.5: "e"},
    "complex": 1 + 2j,
    "fraction": fractions.Fraction(1, 3),
    "decimal": Decimal("10.10"),
    "datetime": datetime(2026, 5, 4, 3, 2, 1, 999999),  # noqa: DTZ001 -- naive ones are stored too
    "datetime utc": datetime(2026, 5, 4, tzinfo=UTC),
    "datetime fold": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ROME),
    "datetime offset": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-3, minutes=-30), "X")),
    "date": date(2026, 1, 2),
    "time": time(1, 2, 3, 4, tzinfo=UTC),
    "timedelta": timedelta(days=-1, microseconds=1),
    "timezone": timezone(timedelta(hours=2)),
    "zone": ROME,
    "uuid": UUID(int=7),
    "path": pathlib.PurePosixPath("/a/b"),
    "windows path": pathlib.PureWindowsPath("C:/a"),
    "pattern": re.compile("a+", re.IGNORECASE),
    "range": range(1, 10, 3),
    "ip": ipaddress.IPv4Address("127.0.0.1"),
    "network": ipaddress.IPv6Network("::/64"),
    "enum": Colour.BLUE,
    "str enum": Level.HIGH,
    "flag": Rights.READ | Rights.WRITE,
    "enum keys": {Level.LOW: Colour.RED, Level.HIGH: [Rights.READ]},
    "named tuple": Point(Decimal(1), Point(2)),
    "dataclass": Order(1, ({"a"}, Level.LOW)),
    "pydantic": CUSTOMER,
    "message": AIMessage("hi", tool_calls=[{"name": "t", "args": {"a": 1}, "id": "1"}], id="m"),
    "messages": [HumanMessage("a"), ToolMessage("b", tool_call_id="1")],
    "send": Send("node", {"a": (1,)}),
    "secret": SecretStr("s"),
    "secret bytes": SecretBytes(b"s"),
}
MAPPINGS: dict[str, Any] = {
    "ordered": collections.OrderedDict([("b", 1), (2, (3,)), (Level.LOW, [Colour.RED])]),
    "counter": collections.Counter({"a": 2, ("b",): -1}),
    "defaults": collections.defaultdict(list, {"a": [(1,)], 7: []}),
    "no defaults": collections.defaultdict(None, {"a": 1}),
    "counters": collections.defaultdict(collections.Counter, {"a": collections.Counter("aab")}),
    "beside what takes the slow path": [collections.Counter("ab"), {1: "a"}, "\ud800"],
}
"""Python's own mappings, which compare equal to plain ones and do other things."""
CODEC = Codec()


def same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of the same types, all the way down."""
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return list(map(repr, value)) == list(map(repr, other)) and all(
            same(value[key], other[key]) for key in value
        )
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)


@pytest.mark.parametrize("name", [*VALUES, *MAPPINGS])
def test_every_supported_type_comes_back_equal_and_of_its_type(name: str) -> None:
    value = {**VALUES, **MAPPINGS}[name]
    assert same(CODEC.loads(CODEC.dumps(value)), value)


def test_what_equality_does_not_see_is_kept_too() -> None:
    stored = Basket("ada", orders=[Order(1)])
    stored.total = 7
    customer = Customer(name="ada")
    customer._seen = 3
    deque, when = VALUES["deque"], VALUES["datetime fold"]
    for value, look in (
        (stored, lambda v: (v.owner, v.orders, v.total)),
        (customer, lambda v: (v._seen, v.model_fields_set)),
        (deque, lambda v: v.maxlen),
        (when, lambda v: (v.fold, v.tzinfo.key, v.utcoffset())),
        (VALUES["pattern"], lambda v: (v.pattern, v.flags)),
        (VALUES["secret"], lambda v: v.get_secret_value()),
        (MAPPINGS["counter"], lambda v: v["of which there is none"]),
        (MAPPINGS["defaults"], lambda v: v.default_factory),
        (MAPPINGS["no defaults"], lambda v: v.default_factory),
        (MAPPINGS["counters"], lambda v: v.default_factory),
    ):
        assert look(CODEC.loads(CODEC.dumps(value))) == look(value)


@pytest.mark.parametrize("value", [Pair(1), Box[int](1), Odd.HALF])
def test_what_a_constructor_would_not_make_of_it_comes_back_too(value: Any) -> None:
    assert same(CODEC.loads(CODEC.dumps([value])), [value])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i2").reshape(2, 3)[:, ::2],
        np.asfortranarray([[1.5, np.inf], [0, -1]]),
        np.array(["a", "long"]),
        np.array(["2026-01-02"], dtype="datetime64[D]"),
        np.zeros((0, 3), dtype=bool),
        np.array(1j),
    ],
)
def test_arrays_come_back_with_their_shapes_and_types(array: Any) -> None:
    loaded = CODEC.loads(CODEC.dumps({"a": array}))["a"]
    assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
    assert np.array_equal(loaded, array)
    assert loaded.flags.writeable


def test_bytearray_comes_back_as_equal_bytes() -> None:
    assert same(CODEC.loads(CODEC.dumps(bytearray(b"ab"))), b"ab")


def test_equal_sets_have_equal_bytes() -> None:
    # The order of a set depends on its history: collisions keep the order of insertion.
    one, other = set(), set()
    for i in range(50):
        one.add(f"n{i}")
        other.add(f"n{49 - i}")
    assert CODEC.dumps(one) == CODEC.dumps(other)


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters()),
    st.binary(max_size=20),
    st.decimals(allow_nan=False),
    st.datetimes(timezones=st.one_of(st.none(), st.timezones())),
    st.dates(),
    st.timedeltas(),
    st.uuids(),
    st.sampled_from([*Colour, *Level, Rights.READ | Rights.WRITE]),
)
hashable = st.one_of(
    st.integers(), st.text(), st.booleans(), st.sampled_from(list(Level)), st.tuples(st.integers())
)
states = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(hashable, inner, max_size=4),
        st.frozensets(hashable, max_size=4),
        st.builds(Order, st.integers(), st.tuples(inner)),
        st.builds(Basket, st.text(), st.lists(inner, max_size=2)),
        st.builds(Point, inner, inner),
        st.builds(Customer, name=st.text(), level=st.sampled_from(list(Level)), more=inner),
        st.builds(HumanMessage, st.text()),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(states)
def test_any_state_comes_back_equal(state: Any) -> None:
    assert same(CODEC.loads(CODEC.dumps(state)), state)


@settings(max_examples=60, deadline=None)
@given(states, st.data())
def test_changed_byte_is_never_read_as_a_value(state: Any, data: st.DataObject) -> None:
    sealed = CODEC.dumps(state)
    position = data.draw(st.integers(0, len(sealed) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = bytearray(sealed)
    damaged[position] ^= flip
    with pytest.raises((HashMismatchError, UnknownVersionError)):
        CODEC.loads(bytes(damaged))


def test_each_flipped_cut_or_added_byte_is_found() -> None:
    sealed = CODEC.dumps({"a": [1, 2]})
    for position in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[position] ^= 0x01
        with pytest.raises((HashMismatchError, UnknownVersionError)):
            CODEC.loads(bytes(damaged))
        with pytest.raises(HashMismatchError):
            CODEC.loads(sealed[:position])
    with pytest.raises(HashMismatchError):
        CODEC.loads(sealed + b"\x00")


def test_newer_version_is_named() -> None:
    newer = bytearray(CODEC.dumps(1))
    newer[0] = 3
    with pytest.raises(UnknownVersionError, match=r"version 3.*up to 2; upgrade agentflow") as told:
        CODEC.loads(bytes(newer), where="runs.input")
    assert (told.value.version, told.value.supported, told.value.where) == (3, 2, "runs.input")


class Local:
    """An object of a class that nothing knows how to store."""


def _recursive() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def _of_a_local_class() -> Any:
    @dataclass
    class Inner:
        x: int

    return Inner(1)


@pytest.mark.parametrize(
    ("value", "path", "type_name", "hint"),
    [
        ({"a": [1, Local()]}, ".a[1]", f"{__name__}.Local", "plain data"),
        ({"a": {"b c": threading.Lock()}}, ".a[key of type str]", "_thread.lock", ""),
        (
            Customer.model_validate({"name": "x", "extra_key": [open]}),
            ".extra_key[0]",
            "builtin_function",
            "",
        ),
        (Order(1, ({"k": Local()},)), ".items[0].k", "Local", ""),
        (Point(1, Local()), ".y", "Local", ""),
        ({(1, Local()): 1}, ".keys[0][1]", "Local", ""),
        ([ValueError("no")], "[0]", "ValueError", "type and text"),
        ([DeclinedError(1)], "[0]", "DeclinedError", "type and text"),
        ([Numbered(1)], "[0]", "Numbered", "also a builtin"),
        ([Odd.NAN], "[0]", "Odd", "by its value"),
        ([np.array([object()])], "[0]", "ndarray", "a list"),
        ([np.zeros(1, dtype=[("a", int)])], "[0]", "ndarray", "an array for each field"),
        ([np.ma.MaskedArray([1], mask=[True])], "[0]", "MaskedArray", "two of them"),
        ([_of_a_local_class()], "[0]", "Inner", "top of a module"),
        ([datetime.now], "[0]", "builtin_function", ""),
        ([(i for i in "")], "[0]", "generator", ""),
        ([lambda: 1], "[0]", "function", ""),
        (_recursive(), "", "list", "contains itself"),
        ({"a": collections.defaultdict(lambda: 0)}, ".a", "defaultdict", "plain dict"),
        ({"a": collections.defaultdict(Local)}, ".a", "defaultdict", "one of bool, dict"),
        ({"a": collections.Counter({"b": Local()})}, ".a.b", "Local", ""),
    ],
)
def test_unstorable_value_is_refused_with_path_type_and_advice(
    value: Any, path: str, type_name: str, hint: str
) -> None:
    with pytest.raises(SerializationError) as refused:
        CODEC.dumps(value, where="channel 'x'")
    error = refused.value
    assert error.where == "channel 'x'"
    assert type_name in error.type_name
    assert hint in error.hint
    if hint != "contains itself":
        assert error.path == path
    assert "channel 'x'" in str(error)
    assert error.hint


def test_message_of_a_refusal_shows_no_content() -> None:
    with pytest.raises(SerializationError) as refused:
        CODEC.dumps({"hunter2 password": {"hunter2": [Local()]}, "b": "hunter2"})
    assert "hunter2" not in str(refused.value).replace(".hunter2", "")


def test_exact_allow_list_is_applied_when_writing_and_when_reading() -> None:
    stored = CODEC.dumps([Order(1)])
    only_customers = Codec(allow=[Customer, f"{__name__}:Level"])
    with pytest.raises(SerializationError, match=rf'add allow=\["{__name__}:Order"\]'):
        only_customers.dumps([Order(1)])
    with pytest.raises(BlockedTypeError, match="not in the allow-list"):
        only_customers.loads(stored)
    customer = Customer(name="ada", level=Level.HIGH)
    assert only_customers.loads(only_customers.dumps(customer)) == customer
    messages = VALUES["messages"]
    assert only_customers.loads(only_customers.dumps(messages)) == messages
    assert only_customers.with_allowed([Order]).loads(stored) == [Order(1)]


def test_class_that_is_not_imported_is_blocked_and_never_imported(tmp_path: Path) -> None:
    (tmp_path / "strange_module.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Strange:\n    x: int\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import strange_module  # type: ignore[import-not-found]  # made above

        stored = CODEC.dumps({"s": strange_module.Strange(1)})
        del sys.modules["strange_module"]
        before = set(sys.modules)
        with pytest.raises(BlockedTypeError, match=r"strange_module:Strange.*import its module"):
            CODEC.loads(stored, where="channel 's'")
        shown = CODEC.readable_anywhere().loads(stored)
        assert shown == {"s": {"type": "strange_module:Strange", "value": {"x": 1}}}
        assert set(sys.modules) == before
    finally:
        sys.path.remove(str(tmp_path))


def test_text_that_only_looks_like_a_class_or_an_import_does_nothing() -> None:
    import ormsgpack

    for name in ("os:system", "subprocess:Popen", "builtins:eval", "antigravity:x"):
        for code in (23, 24, 25, 26):
            body = ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb([name, {"a": 1}, 1, [], 1])))
            with pytest.raises(BlockedTypeError):
                CODEC.loads(CODEC.seal(body))
    assert "antigravity" not in sys.modules
    with pytest.raises(BlockedTypeError, match="extension 99"):
        CODEC.loads(CODEC.seal(ormsgpack.packb(ormsgpack.Ext(99, b"\xc0"))))


@dataclass
class Grown:
    """A class whose fields change between two programs."""

    x: int


def test_field_that_was_added_gets_its_default_and_a_lost_one_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = CODEC.dumps(Grown(1))

    @dataclass
    class WithDefault:
        x: int
        y: list[int] = field(default_factory=list)

    @dataclass
    class WithoutDefault:
        x: int
        y: int

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "Grown", WithDefault)
    assert CODEC.loads(stored) == WithDefault(1, [])
    monkeypatch.setattr(module, "Grown", WithoutDefault)
    with pytest.raises(BlockedTypeError, match="its fields have changed"):
        CODEC.loads(stored)


def test_stored_bytes_of_version_one_are_still_read() -> None:
    """The file is never edited: what was written once has to be read for ever."""
    read_golden("codec-v1.jsonl", VALUES)


def test_stored_bytes_of_version_two_are_still_read() -> None:
    """As above; this version compresses, and binds each value to its context."""
    stored = read_golden("codec-v2.jsonl", {**VALUES, "long text": LONG_TEXT}, bound=True)
    assert len(stored["long text"]) < len(LONG_TEXT) / 4


def test_stored_mappings_of_version_two_are_still_read() -> None:
    read_golden("codec-v2-mappings.jsonl", MAPPINGS, bound=True)


def test_encrypted_bytes_of_version_two_are_still_read() -> None:
    keys = KeyRing({"golden": bytes(range(32))})
    read_golden(
        "codec-v2-encrypted.jsonl",
        {**VALUES, "long text": LONG_TEXT},
        codec=Codec(keys=keys),
        bound=True,
    )


LONG_TEXT = "All happy families are alike. " * 100


def read_golden(
    name: str, expected: dict[str, Any], *, codec: Codec = CODEC, bound: bool = False
) -> dict[str, bytes]:
    """Hold what a golden file has against the values that it was made from."""
    lines = [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]
    stored = {line["name"]: bytes.fromhex(line["bytes"]) for line in lines}
    assert stored.keys() == expected.keys()
    for line in lines:
        context = context_of("golden", line["name"]) if bound else b""
        value = codec.loads(stored[line["name"]], context=context)
        assert same(value, expected[line["name"]]), line["name"]
        assert repr(value) == line["repr"], line["name"]
    return stored


def test_fresh_process_reads_dataclasses_models_enums_and_messages(tmp_path: Path) -> None:
    names = ["dataclass", "pydantic", "enum keys", "messages", "datetime fold"]
    (tmp_path / "state").write_bytes(CODEC.dumps({name: VALUES[name] for name in names}))
    program = f"""
import sys, {__name__} as types
from agentflow.codec import Codec
assert not [m for m in sys.modules if m == "antigravity"]
state = Codec().loads(open({str(tmp_path / "state")!r}, "rb").read())
assert types.same(state, {{name: types.VALUES[name] for name in {names!r}}}), state
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path.cwd())


def test_fresh_process_without_the_users_code_shows_plain_data(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(CODEC.dumps([Order(1), HumanMessage("hi"), Level.LOW]))
    program = f"""
from agentflow.codec import Codec
from agentflow.errors import BlockedTypeError
data = open({str(tmp_path / "state")!r}, "rb").read()
order, message, level = Codec().readable_anywhere().loads(data)
assert order == {{"type": "{__name__}:Order", "value": {{"number": 1, "items": ()}}}}, order
assert level == {{"type": "{__name__}:Level", "value": "low"}}, level
assert type(message).__name__ == "HumanMessage", message
try:
    Codec().loads(data)
except BlockedTypeError:
    raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60, cwd=Path.cwd())
    assert done.returncode == 7
