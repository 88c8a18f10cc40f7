"""Lists that grow: every checkpoint keeps its own, whatever is done to the list later.

A store may keep of a list only what is new. None of that may ever show: an older checkpoint, a
branch and a list that was cut back have exactly the elements that were put, of the same types.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    after,
    at,
    checkpoint,
    dumped,
    id_of,
    ids,
    load,
    put_list,
    values_at,
    writes_at,
)

TAIL = 8
"""How many of the last stored elements may be edited in place and are noticed at once."""
CHECKED_FROM = 64
"""From this length on an edit of any element is noticed when the list has doubled."""


def word(number: int) -> str:
    """Return a text that is too long to stand in the row of a checkpoint."""
    return f"word {number} " * 20


def item(number: int) -> dict[str, Any]:
    """Return an element that can be edited in place."""
    return {"number": number, "text": word(number), "tags": []}


@dataclass
class Line:
    """One invocation that puts a list again and again, and what must be found of it."""

    saver: AnySaver
    items: list[Any]
    expected: dict[str, bytes] = field(default_factory=dict)
    prefix: str = "c"
    last: Any = None

    def put(self) -> str:
        """Put the list as it is now."""
        name = f"{self.prefix}{len(self.expected):03}"
        self.last = put_list(self.saver, name, self.last, self.items)
        self.expected[name] = dumped(self.items)
        return name

    def load(self, checkpoint_id: str | None = None, *, by: AnySaver | None = None) -> None:
        """Begin a new invocation with what is stored."""
        self.saver = by or self.saver
        found = load(self.saver, checkpoint_id)
        self.items = found.checkpoint["channel_values"]["x"]
        self.last = found.config
        assert dumped(self.items) == self.expected[id_of(found)]

    def check(self, *readers: AnySaver) -> None:
        """Compare every checkpoint with what was put, one by one and listed."""
        for reader in readers:
            for name, expected in self.expected.items():
                assert dumped(values_at(reader, name)["x"]) == expected, name
            found = {
                id_of(e): dumped(e.checkpoint["channel_values"]["x"]) for e in reader.list(at())
            }
            assert found == self.expected


def _appended(items: list[Any]) -> list[Any]:
    items.append(item(100))
    return items


CHANGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "nothing": lambda items: items,
    "append": lambda items: [*items, item(100)],
    "append in place": _appended,
    "append many": lambda items: [*items, *map(item, range(100, 140))],
    "cut the last": lambda items: items[:-1],
    "cut half": lambda items: items[: len(items) // 2],
    "cut all but one": lambda items: items[:1],
    "cut the first": lambda items: items[1:],
    "empty": lambda _: [],
    "reverse": lambda items: items[::-1],
    "swap the last": lambda items: [*items[:-2], items[-1], items[-2]],
    "swap the first": lambda items: [items[1], items[0], *items[2:]],
    "insert": lambda items: [*items[:3], item(100), *items[3:]],
    "remove one": lambda items: [*items[:3], *items[4:]],
    "replace the first": lambda items: [item(100), *items[1:]],
    "replace the last": lambda items: [*items[:-1], item(100)],
    "replace all": lambda items: [item(100 + each) for each in range(len(items))],
    "equal copies": copy.deepcopy,
    "repeat": lambda items: [*items, *items],
    "another type": lambda items: [*items[:-1], "text"],
}


class ListsSuite(Suite):
    """What may happen to a list between two checkpoints."""

    @pytest.mark.parametrize("change", CHANGES)
    def test_every_checkpoint_keeps_its_own_list(
        self, saver: AnySaver, another: AnySaver, change: str
    ) -> None:
        line = Line(saver, [item(number) for number in range(20)])
        line.put()
        line.items = CHANGES[change](line.items)
        line.put()
        # And it goes on from there, in this invocation and in a new one.
        for number in range(3):
            line.items = [*line.items, item(200 + number)]
            line.put()
        line.load(by=another)
        line.items = CHANGES[change](line.items) if len(line.items) > 4 else line.items
        line.put()
        line.items = [*line.items, item(300)]
        line.put()
        line.check(saver, another)

    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_list_grows_by_some_elements_at_a_time(
        self, saver: AnySaver, another: AnySaver, steps: int
    ) -> None:
        line = Line(saver, [])
        for number in range(70):
            line.items = [*line.items, *(word(number * steps + each) for each in range(steps))]
            line.put()
        line.check(saver, another)

    def test_fresh_saver_for_each_step(self, saver: AnySaver) -> None:
        """As many processes that each take one step of a run."""
        line = Line(saver, [])
        for number in range(24):
            with self.open_another() as fresh:
                if number:
                    line.load(by=fresh)
                line.saver = fresh
                line.items = [*line.items, item(number)] if number % 6 != 5 else line.items[:-2]
                line.put()
        line.check(saver)

    def test_two_savers_take_turns(self, saver: AnySaver, another: AnySaver) -> None:
        """Each remembers the list as it left it, which is not how it is now."""
        line = Line(saver, [item(number) for number in range(12)])
        line.put()
        for number in range(20):
            line.load(by=(saver, another)[number % 2])
            line.items = [*line.items[: 10 if number == 9 else None], item(100 + number)]
            line.put()
            line.items = [*line.items, item(200 + number)]
            line.put()
        line.check(saver, another)

    def test_invocations_one_after_another(self, saver: AnySaver, another: AnySaver) -> None:
        line = Line(saver, [])
        line.put()
        for number in range(8):
            for step in range(5):
                line.items = [*line.items, HumanMessage(f"{number} {step}", id=f"{number}-{step}")]
                line.put()
            line.load()
        assert isinstance(line.items[0], HumanMessage)
        line.check(saver, another)

    def test_branch_from_any_checkpoint_has_its_own_list(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        line = Line(saver, [word(0)])
        line.put()
        for number in range(1, 8):
            line.items = [*line.items, word(number)]
            line.put()
        for turn, name in enumerate([*line.expected, "c009", "c011", "c015"]):
            line.load(name, by=(saver, another)[turn % 2])
            for number in range(2):
                line.items = [*line.items, f"{word(turn)} of branch {number}"]
                line.put()
        line.check(saver, another)

    def test_branch_that_is_cut_back_leaves_the_other_line_alone(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """The branch begins where the other line has gone on, and goes back even further."""
        line = Line(saver, [word(0)])
        line.put()
        line.load(by=another)
        line.items = [*line.items, word(1)]
        line.put()
        line.load("c000", by=saver)
        line.items = [*line.items, word(2)]
        line.put()
        line.items = [*line.items[:1], word(3)]
        line.put()
        line.items = line.items[:1]
        line.put()
        line.items = [*line.items, word(4), word(5)]
        line.put()
        line.check(saver, another)

    def test_list_that_is_cut_and_grows_many_times(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        line = Line(saver, [item(number) for number in range(30)])
        line.put()
        for number in range(30):
            cut = line.items[: -(number % 5) or None]
            line.items = [*cut, item(100 + number), item(200 + number)]
            line.put()
            if number % 7 == 6:
                line.load(by=(saver, another)[number % 2])
        line.check(saver, another)

    @pytest.mark.parametrize("place", range(-TAIL, 0))
    def test_edit_of_one_of_the_last_elements_is_noticed(
        self, saver: AnySaver, another: AnySaver, place: int
    ) -> None:
        line = Line(saver, [item(number) for number in range(12)])
        line.put()
        line.items[place]["tags"].append("edited")
        line.put()
        line.load(by=another)
        line.items[place]["tags"].append("again")
        line.items = [*line.items, item(100)]
        line.put()
        line.check(saver, another)

    def test_edit_of_a_message_is_noticed(self, saver: AnySaver, another: AnySaver) -> None:
        """As an agent does that streams into its last message."""
        line = Line(saver, [HumanMessage("hi", id="1"), AIMessage("", id="2")])
        line.put()
        for number in range(5):
            line.items[-1].content += f"token {number} " * 20
            line.put()
        line.check(saver, another)

    @pytest.mark.parametrize("place", [0, 1, 7, 11])
    def test_edit_of_any_element_is_noticed_by_who_verifies(
        self, saver: AnySaver, place: int
    ) -> None:
        with self.open_another(verify_deltas=True) as verifying:
            line = Line(verifying, [item(number) for number in range(20)])
            line.put()
            for number in range(4):
                line.items[place]["tags"].append(number)
                line.items = [*line.items, item(100 + number)]
                line.put()
                if number == 1:
                    line.load()
            line.check(saver, verifying)

    @pytest.mark.parametrize("length", [CHECKED_FROM // 2, CHECKED_FROM, 100])
    def test_edit_of_any_element_is_noticed_when_the_list_has_doubled(
        self, saver: AnySaver, another: AnySaver, length: int
    ) -> None:
        line = Line(saver, [item(number) for number in range(length)])
        first = line.put()
        before = line.expected[first]
        line.items[0]["tags"].append("edited")
        while len(line.items) < 2 * length:
            line.items = [*line.items, item(100 + len(line.items)), item(200 + len(line.items))]
            last = line.put()
        for reader in (saver, another):
            assert dumped(values_at(reader)["x"]) == line.expected[last]
            assert dumped(values_at(reader, first)["x"]) == before

    def test_lists_of_one_object_are_apart(self, saver: AnySaver, another: AnySaver) -> None:
        """Two channels, and two invocations, may hold the very same list."""
        shared = [item(number) for number in range(10)]
        expected = {}
        parent = None
        for number in range(6):
            values = {"x": shared, "y": shared if number % 2 else shared[:-1]}
            versions: Any = {"x": number, "y": number}
            made = checkpoint(f"c{number}", dict(versions), **values)
            parent = saver.put(at(parent), made, {}, versions)["configurable"]["checkpoint_id"]
            expected[parent] = dumped(values)
            shared.append(item(100 + number))
        for reader in (saver, another):
            for name, values_then in expected.items():
                assert dumped(values_at(reader, name)) == values_then

    def test_elements_of_every_kind_keep_their_types(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        kinds = [1, True, 1.0, "1", b"1", (1,), [1], {1}, {"1": 1}, None, 0.0, -0.0, False, 0, ""]
        line = Line(saver, [word(0)])
        line.put()
        for kind in kinds:
            line.items = [*line.items, kind]
            line.put()
        for place, kind in enumerate(reversed(kinds)):
            # Equal to what is there in part, and of another type.
            line.items = [*line.items[: -1 - place], kind, *line.items[len(line.items) - place :]]
            line.put()
        line.check(saver, another)

    def test_unchanged_list_is_carried_along_any_line(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """It is in the versions of each checkpoint, and in the values of none after the first."""
        words = list(map(word, range(10)))
        saver.put(at(), checkpoint("c0", {"x": 1, "y": 0}, x=words, y=0), {}, {"x": 1, "y": 0})
        for number in range(1, 6):
            writer = (saver, another)[number % 2]
            # Each second one is a branch from the first.
            config = load(writer, "c0" if number % 2 else None).config
            made = checkpoint(f"c{number}", {"x": 1, "y": number}, y=number)
            writer.put(config, made, {}, {"y": number})
        grown = [*words, word(100)]
        made = checkpoint("c6", {"x": 2, "y": 5}, x=grown, y=5)
        saver.put(load(saver).config, made, {}, {"x": 2})
        for reader in (saver, another):
            assert values_at(reader) == {"x": grown, "y": 5}
            for number in range(6):
                assert values_at(reader, f"c{number}") == {"x": words, "y": number}

    def test_what_tasks_wrote_is_kept_beside_what_the_list_took_in(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """The same elements are written by a task, and are then the end of a list."""
        line = Line(saver, [])
        line.put()
        wrote: dict[str, list[tuple[str, str, Any]]] = {}

        async def superstep(number: int, new: list[Any], *, together: bool) -> None:
            before = line.last["configurable"]["checkpoint_id"]
            wrote[before] = [("task", "x", copy.deepcopy(new)), ("task", "y", word(number))]
            write = line.saver.aput_writes(
                line.last, [("x", new), ("y", word(number))], "task", "~path"
            )
            if not together:
                await write
            name = f"c{len(line.expected):03}"
            line.items = [*line.items, *new]
            made = checkpoint(name, {"x": name, "y": name}, x=line.items, y=word(number))
            saved = line.saver.aput(line.last, made, {}, {"x": name, "y": name})
            line.last = after(await saved, name)
            line.expected[name] = dumped(line.items)
            if together:
                await write

        for number in range(40):
            new = [item(number * 10 + each) for each in range(number % 4)]
            asyncio.run(superstep(number, new, together=number % 3 != 0))
            if number % 11 == 10:
                line.load(by=(saver, another)[number % 2])
        line.check(saver, another)
        for reader in (saver, another):
            for name, expected in wrote.items():
                assert dumped(writes_at(reader, name)) == dumped(expected)
        last = dumped(line.items)
        before = list(line.expected)[-2]
        line.load(before)
        saver.prune(["t"])
        assert ids(another.list(at())) == [list(line.expected)[-1]]
        assert dumped(values_at(another)["x"]) == last
