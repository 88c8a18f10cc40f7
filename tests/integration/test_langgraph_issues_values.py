"""What becomes of values: lost types, late errors, and filters that are more than values.

In each pair the first test shows the defect on LangGraph's own checkpointer; if it fails, the
defect was mended there. The second one shows what agentflow's checkpointer makes of it.
"""

from __future__ import annotations

import collections
import enum
import fractions
import pathlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Send
from pydantic import BaseModel

from agentflow.checkpoint import Saver
from agentflow.errors import SerializationError
from tests.integration.graphs import State, chain, logs

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}


class Artifact(BaseModel):
    """A model with an enum inside of it, in two senses."""

    class Phase(enum.Enum):
        READY = "ready"

    phase: Any = None


class Word(enum.StrEnum):
    """Text that is an enum."""

    HELLO = "hello"


@dataclass
class Box:
    """A dataclass that may hold anything."""

    content: Any


class Point(NamedTuple):
    """A named tuple that may hold anything."""

    x: Any


LOST = {
    "nested enum": Artifact.Phase.READY,  # /issues/6718
    "nested enum in a model": Artifact(phase=Artifact.Phase.READY),  # /issues/6718
    "enum as key": {Word.HELLO: 1},  # /issues/6598
    "tuple": (1, (2, 3)),
    "tuple in a dataclass": Box((1, 2)),
    "tuple in a named tuple": Point((1, 2)),
    "set of tuples": {(1, 2)},
    "dataclass in a model": Artifact(phase=Box(1)),
    "bounded deque": collections.deque([1], maxlen=2),
    "time zone": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Rome")),
    "surrogate": "\ud800",
}
"""What LangGraph's serializer turns into something else, without a word."""
REFUSED = {
    "fraction": fractions.Fraction(1, 3),  # /issues/8185
    "complex": 1j,  # /issues/8185
    "range": range(1, 9, 2),  # /issues/8326
    "path": pathlib.PurePosixPath("/a"),  # /issues/8326
    "windows path": pathlib.PureWindowsPath("c:/a"),  # /issues/8326
    "big integer": 2**70,
}
"""What it cannot store."""
KEPT = {"enum": Word.HELLO}  # /issues/6598: mended by ormsgpack 1.12
"""What it used to lose."""


def says(value: Any) -> str:
    """Describe a value with all types in it; equal texts mean equal values of equal types."""
    match value:
        case str():
            return f"{type(value).__name__} {value.encode('utf-8', 'surrogatepass')!r}"
        case list() | tuple() | set() | collections.deque() if not hasattr(value, "_fields"):
            bound = getattr(value, "maxlen", "")
            return f"{type(value).__name__} {bound} [{', '.join(map(says, value))}]"
        case dict():
            items = ", ".join(f"{says(key)}: {says(item)}" for key, item in value.items())
            return f"{{{items}}}"
        case datetime():
            return f"{value!r} {value.fold}"
        case BaseModel():
            return f"{type(value).__name__} {says(dict(value))}"
        case Box():
            return f"Box {says(value.content)}"
        case Point():
            return f"Point {says(value.x)}"
        case _:
            return repr(value)


async def there_and_back(saver: BaseCheckpointSaver[Any], value: Any) -> tuple[Any, Any, Any]:
    """Return a value as a later node, a later state, and a repeated task find it."""
    seen: list[Any] = []
    fails = [ConnectionError("try again")]

    def look(state: State) -> State:
        seen.append(state["value"])
        if fails:
            raise fails.pop()
        return {}

    graph = chain(("make", lambda _: {"value": value}), ("look", look))
    compiled = graph.compile(checkpointer=saver)
    with pytest.raises(ConnectionError):
        await compiled.ainvoke({"log": []}, CONFIG, durability="sync")
    await compiled.ainvoke(None, CONFIG, durability="sync")
    history = [each async for each in compiled.aget_state_history(CONFIG)]
    (made,) = [each for each in history if each.next == ("make",)]
    result = made.tasks[0].result
    assert result is not None
    return seen[-1], history[0].values["value"], result["value"]


@pytest.mark.parametrize("name", LOST)
async def test_langgraph_turns_a_value_into_something_else(name: str) -> None:
    # https://github.com/langchain-ai/langgraph/issues/6718 and the like, see above
    found, _, _ = await there_and_back(InMemorySaver(), LOST[name])
    assert says(found) != says(LOST[name])


@pytest.mark.parametrize("name", REFUSED)
async def test_langgraph_cannot_store_a_common_value(name: str) -> None:
    # https://github.com/langchain-ai/langgraph/issues/8185
    # https://github.com/langchain-ai/langgraph/issues/8326
    with pytest.raises(TypeError, match=r"not msgpack serializable|exceeds 64-bit"):
        await there_and_back(InMemorySaver(), REFUSED[name])


async def test_values_come_back_as_they_were(saver: Saver) -> None:
    values = {**LOST, **REFUSED, **KEPT}
    for found in await there_and_back(saver, values):
        assert {name: says(found[name]) for name in values} == {
            name: says(value) for name, value in values.items()
        }


class Socket:
    """What nobody can store."""


BURIED = {"user": {"sessions": [{"name": "a"}, {"name": "b", "socket": Socket()}]}}


def unstorable(saver: BaseCheckpointSaver[Any], calls: list[str]) -> Any:
    """Compile a graph whose first node returns what cannot be stored."""
    nodes = ("node", lambda _: {"value": BURIED}), ("next", lambda _: calls.append("next"))
    return chain(*nodes).compile(checkpointer=saver)


def unstorable_in_a_send(saver: BaseCheckpointSaver[Any]) -> Any:
    """Compile a graph that sends what cannot be stored."""
    graph = chain(("a", logs("a")))
    graph.add_node("work", lambda _: None)
    graph.add_conditional_edges("a", lambda _: [Send("work", BURIED)], ["work"])
    return graph.compile(checkpointer=saver)


async def test_langgraph_names_neither_channel_nor_path_of_what_it_cannot_store() -> None:
    # https://github.com/langchain-ai/langgraph/issues/8606
    calls: list[str] = []
    with pytest.raises(TypeError, match=r"^Type is not msgpack serializable: Socket$"):
        await unstorable(InMemorySaver(), calls).ainvoke({"log": []}, CONFIG)
    assert calls == ["next"], "it says so only at the end"
    with pytest.raises(TypeError, match=r"^Type is not msgpack serializable: Send$"):
        await unstorable_in_a_send(InMemorySaver()).ainvoke({"log": []}, CONFIG)


async def test_unstorable_value_is_named_with_channel_path_and_type(saver: Saver) -> None:
    calls: list[str] = []
    with pytest.raises(SerializationError, match="channel 'value' of thread 't'") as caught:
        await unstorable(saver, calls).ainvoke({"log": []}, CONFIG, durability="sync")
    assert calls == []
    assert caught.value.path == ".user.sessions[1].socket"
    assert caught.value.type_name == f"{__name__}.Socket"


async def test_unstorable_value_is_named_inside_of_a_send(saver: Saver) -> None:
    with pytest.raises(SerializationError) as caught:
        await unstorable_in_a_send(saver).ainvoke({"log": []}, CONFIG, durability="sync")
    assert caught.value.type_name == f"{__name__}.Socket"
    assert caught.value.path.endswith(".user.sessions[1].socket")


def put_with(saver: BaseCheckpointSaver[Any], name: str, metadata: Any) -> None:
    """Put a checkpoint with this metadata, in a thread of its name."""
    place: RunnableConfig = {"configurable": {"thread_id": name, "checkpoint_ns": ""}}
    saver.put(place, {**empty_checkpoint(), "id": name}, metadata, {})


def found_with(saver: BaseCheckpointSaver[Any], key: str, value: Any) -> list[str]:
    """List the threads whose metadata has this value."""
    return [each.checkpoint["id"] for each in saver.list(None, filter={key: value})]


INJECTIONS = (
    "x') = 1 OR 1=1 --",
    "x' OR '1'='1",
    'x" OR "1"="1',
    "$.user",
    "user'); DROP TABLE agentflow_checkpoints; --",
    "%",
    "a\x00b",
    "",
)


def test_langgraph_takes_a_filter_key_for_a_path() -> None:
    # CVE-2025-67644 is mended: what could be SQL is refused now. A key is still no plain key.
    with SqliteSaver.from_conn_string(":memory:") as saver:
        put_with(saver, "nested", {"a": {"b": 1}})
        put_with(saver, "dotted", {"a.b": 1})
        assert found_with(saver, "a.b", 1) == ["nested"]
        for key in INJECTIONS:
            with pytest.raises(ValueError, match="Invalid filter key"):
                found_with(saver, key, 1)


async def test_filter_key_is_compared_and_nothing_else(saver: Saver) -> None:
    put_with(saver, "plain", {"user": 1, "a": {"b": 1}})
    keys = [*INJECTIONS, "a.b", "a b", "ä", "'"]
    for number, key in enumerate(keys):
        assert found_with(saver, key, 1) == []
        put_with(saver, f"{number}", {key: 1})
        assert found_with(saver, key, 1) == [f"{number}"]
    assert found_with(saver, "user", 1) == ["plain"]
    assert found_with(saver, "user", "1") == []
    assert len(list(saver.list(None))) == len(keys) + 1


@pytest.mark.parametrize("value", ["' OR 1=1 --", {"b": 1}, [1, (2,)], None, 1.5, True])
async def test_filter_value_is_compared_exactly(saver: Saver, value: Any) -> None:
    put_with(saver, "it", {"key": value})
    put_with(saver, "other", {"key": "something else"})
    assert found_with(saver, "key", value) == ["it"]
