"""LangGraph's contract for pending writes: their order, their keys, and to what they belong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED

from agentflow.errors import ConflictError, SerializationError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    after,
    at,
    checkpoint,
    ids,
    load,
    put,
    put_line,
    values_at,
    writes_at,
)


@dataclass
class DeclinedError(Exception):
    """An error that is also something which could be stored, but not loaded back."""

    code: int


class WritesSuite(Suite):
    """`put_writes`."""

    def test_pending_writes_come_in_the_order_of_path_task_and_position(
        self, saver: AnySaver
    ) -> None:
        put(saver, "c1")
        for path, task in (("~b", "2"), ("~a", "9"), ("", "3"), ("~a", "1"), ("~B", "0")):
            batch = [("x", f"{path}{task}-0"), ("y", f"{path}{task}-1")]
            saver.put_writes(at("c1"), batch, task, path)
        saver.put_writes(at("c1"), [(ERROR, "boom")], "9", "~a")
        found = [value for _, _, value in writes_at(saver)]
        expected = ["3-0", "3-1", "~B0-0", "~B0-1", "~a1-0", "~a1-1", "boom", "~a9-0", "~a9-1"]
        assert found == [*expected, "~b2-0", "~b2-1"]
        (listed,) = saver.list(at())
        assert listed.pending_writes == load(saver).pending_writes

    def test_more_than_nine_writes_of_a_task_are_ordered_by_number(self, saver: AnySaver) -> None:
        put(saver, "c1")
        saver.put_writes(at("c1"), [("x", number) for number in range(25)], "task")
        assert [value for _, _, value in writes_at(saver)] == list(range(25))

    def test_first_ordinary_and_last_special_write_of_each_position_stand(
        self, saver: AnySaver
    ) -> None:
        put(saver, "c1")
        for turn in ("first", "last"):
            batch = [(RESUME, turn), ("x", turn), (INTERRUPT, turn)]
            saver.put_writes(at("c1"), batch, "task")
        kept = {channel: value for _, channel, value in writes_at(saver)}
        assert kept == {RESUME: "last", "x": "first", INTERRUPT: "last"}

    def test_rule_holds_within_one_batch(self, saver: AnySaver) -> None:
        put(saver, "c1")
        batch = [(RESUME, 1), ("x", 1), (RESUME, 2), ("x", 2), (ERROR, "e"), (SCHEDULED, "s")]
        saver.put_writes(at("c1"), batch, "task")
        found = [(channel, value) for _, channel, value in writes_at(saver)]
        # The special ones have the positions -4, -2 and -1; each ordinary one has its own.
        assert found == [(RESUME, 2), (SCHEDULED, "s"), (ERROR, "e"), ("x", 1), ("x", 2)]

    def test_repeated_batch_adds_only_the_positions_that_are_missing(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        put(saver, "c1")
        saver.put_writes(at("c1"), [("x", 1)], "task")
        another.put_writes(at("c1"), [("x", "again"), ("y", 2)], "task")
        saver.put_writes(at("c1"), [("z", "again"), ("z", "again"), ("z", 3)], "task")
        saver.put_writes(at("c1"), [("x", "of another task")], "task 2")
        found = [(task, channel, value) for task, channel, value in writes_at(saver)]
        own = [("task", "x", 1), ("task", "y", 2), ("task", "z", 3)]
        assert found == [*own, ("task 2", "x", "of another task")]

    def test_path_of_a_position_is_that_of_the_write_that_stands(self, saver: AnySaver) -> None:
        put(saver, "c1")
        saver.put_writes(at("c1"), [("x", 1)], "a", "~2")
        saver.put_writes(at("c1"), [("x", 9), ("x", 3)], "a", "~0")
        saver.put_writes(at("c1"), [("x", 2)], "b", "~1")
        assert [value for _, _, value in writes_at(saver)] == [3, 2, 1]

    def test_empty_batch_is_nothing(self, saver: AnySaver) -> None:
        put(saver, "c1")
        saver.put_writes(at("c1"), [], "task")
        assert writes_at(saver) == []

    def test_exceptions_are_kept_as_text(self, saver: AnySaver) -> None:
        class OddError(Exception):
            def __repr__(self) -> str:
                raise RuntimeError

        put(saver, "c1")
        saver.put_writes(at("c1"), [(ERROR, ValueError("no"))], "a")
        saver.put_writes(at("c1"), [(ERROR, OddError())], "b")
        saver.put_writes(at("c1"), [(ERROR, DeclinedError(3))], "c")
        texts = [value for _, _, value in writes_at(saver)]
        odd = "OddError(<no text: its repr raises>)"
        assert texts == ["ValueError('no')", odd, "DeclinedError(code=3)"]

    def test_batch_with_an_unstorable_write_leaves_none(self, saver: AnySaver) -> None:
        put(saver, "c1")
        invocation = load(saver).config
        with pytest.raises(SerializationError, match="channel 'bad' of thread 't'"):
            saver.put_writes(invocation, [("x", 1), ("bad", object())], "task")
        assert writes_at(saver) == []

    def test_writes_belong_to_one_checkpoint(self, saver: AnySaver) -> None:
        for thread, ns in (("t", ""), ("t", "child:1"), ("u", "")):
            put_line(saver, "c1", "c2", thread=thread, ns=ns)
        saver.put_writes(at("c1"), [("x", 1)], "task")
        saver.put_writes(at("c2"), [("x", 2)], "task")
        saver.put_writes(at("c2", ns="child:1"), [("x", 3)], "task")
        for place, expected in (
            ({"checkpoint_id": "c1"}, [("task", "x", 1)]),
            ({"checkpoint_id": "c2"}, [("task", "x", 2)]),
            ({"checkpoint_id": "c1", "ns": "child:1"}, []),
            ({"checkpoint_id": "c2", "ns": "child:1"}, [("task", "x", 3)]),
            ({"checkpoint_id": "c1", "thread": "u"}, []),
            ({"checkpoint_id": "c2", "thread": "u"}, []),
        ):
            assert writes_at(saver, **place) == expected, place

    def test_writes_of_a_checkpoint_that_never_came_are_not_shown(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        saver.put_writes(at("lost"), [("x", 1)], "task")
        for reader in (saver, another):
            assert reader.get_tuple(at()) is None
            assert reader.get_tuple(at("lost")) is None
            assert list(reader.list(None)) == []
        put(saver, "c1")
        saver.put_writes(at("lost 2"), [("x", 2)], "task")
        for reader in (saver, another):
            assert writes_at(reader) == []
            assert ids(reader.list(None)) == ["c1"]
            assert reader.get_tuple(at("lost 2")) is None

    def test_writes_that_came_before_their_checkpoint_are_shown_with_it(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        saver.put_writes(at("c1"), [("x", 1)], "task")
        put(saver, "c1")
        saver.put_writes(at("c2"), [("x", 2)], "task")
        put(another, "c2", load(another).config)
        for reader in (saver, another):
            assert writes_at(reader, "c1") == [("task", "x", 1)]
            assert writes_at(reader, "c2") == [("task", "x", 2)]

    def test_writes_stay_when_the_next_checkpoint_comes(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """Whether both are committed together or not."""
        put(saver, "c1")

        async def superstep(number: int) -> None:
            place = at(f"c{number}")
            made = checkpoint(f"c{number + 1}", {"x": number}, x=number)
            await asyncio.gather(
                saver.aput_writes(place, [("x", f"{number} a")], "a"),
                saver.aput_writes(place, [("x", f"{number} b")], "b"),
                saver.aput(place, made, {}, {"x": number}),
                saver.aput_writes(place, [("x", f"{number} late")], "late"),
            )

        for number in range(1, 5):
            asyncio.run(superstep(number))
        put_line(another, "c1", thread="u")
        for reader in (saver, another):
            for number in range(1, 5):
                values = [value for _, _, value in writes_at(reader, f"c{number}")]
                assert values == [f"{number} a", f"{number} b", f"{number} late"]
            assert writes_at(reader) == []

    def test_late_write_reaches_a_checkpoint_that_has_successors(self, saver: AnySaver) -> None:
        put(saver, "c1")
        saver.put_writes(at("c1"), [("x", "first"), (RESUME, "first")], "task")
        put(saver, "c2", "c1")
        put(saver, "branch", load(saver, "c1").config)
        saver.put_writes(at("c1"), [("x", "late"), (RESUME, "late"), ("y", "late")], "task")
        kept = {channel: value for _, channel, value in writes_at(saver, "c1")}
        assert kept == {"x": "first", RESUME: "late", "y": "late"}
        assert writes_at(saver, "c2") == writes_at(saver, "branch") == []

    def test_checkpoint_put_again_keeps_its_writes_and_those_of_its_parent(
        self, saver: AnySaver
    ) -> None:
        put(saver, "c1")
        invocation = load(saver).config

        async def superstep() -> None:
            made = checkpoint("c2", {"x": 2}, x=2)
            await asyncio.gather(
                saver.aput_writes(invocation, [("x", 1)], "task"),
                saver.aput(invocation, made, {}, {"x": 2}),
                saver.aput_writes(after(invocation, "c2"), [("x", 2)], "task"),
            )

        asyncio.run(superstep())
        put(saver, "c2", invocation, changed="again")
        assert writes_at(saver, "c1") == [("task", "x", 1)]
        assert writes_at(saver, "c2") == [("task", "x", 2)]
        put(saver, "c3", after(invocation, "c2"))
        assert writes_at(saver, "c1") == [("task", "x", 1)]
        assert writes_at(saver, "c2") == [("task", "x", 2)]

    def test_checkpoint_put_again_elsewhere_leaves_its_parent_the_writes(
        self, saver: AnySaver
    ) -> None:
        put(saver, "c1")
        made = checkpoint("c2", {"x": 2}, x=2)

        async def superstep() -> None:
            await asyncio.gather(
                saver.aput_writes(at("c1"), [("x", 1)], "task"),
                saver.aput(at("c1"), made, {}, {"x": 2}),
            )

        asyncio.run(superstep())
        put(saver, "c2", changed="again")
        assert load(saver).parent_config is None
        assert writes_at(saver, "c1") == [("task", "x", 1)]

    def test_what_others_were_made_from_is_not_put_again(self, saver: AnySaver) -> None:
        put(saver, "d1", ns="child")
        place = at("d1", ns="child")

        async def superstep() -> None:
            made = checkpoint("d2", {"x": 2}, x=2)
            await asyncio.gather(
                saver.aput_writes(place, [("x", 1)], "task"),
                saver.aput(place, made, {}, {"x": 2}),
            )

        asyncio.run(superstep())
        with pytest.raises(ConflictError):
            put(saver, "d1", ns="child", changed="again")
        assert values_at(saver, "d1", ns="child") == {"x": "d1"}
        assert writes_at(saver, "d1", ns="child") == [("task", "x", 1)]

    def test_writes_survive_a_parallel_call_that_puts_again(self, saver: AnySaver) -> None:
        """Parallel calls of one subgraph share its namespace; each may put its last again."""
        put(saver, "d1", ns="child")
        place = at("d1", ns="child")

        async def superstep() -> None:
            made = checkpoint("d2", {"x": 2}, x=2)
            await asyncio.gather(
                saver.aput_writes(place, [("x", 1)], "task"),
                saver.aput(place, made, {}, {"x": 2}),
            )

        asyncio.run(superstep())
        for name in ("d3", "d2"):
            put(saver, name, "d1", ns="child")
            assert writes_at(saver, "d1", ns="child") == [("task", "x", 1)], name

    def test_writes_survive_parallel_calls_in_one_commit(self, saver: AnySaver) -> None:
        put(saver, "d1", ns="child")
        place = at("d1", ns="child")

        async def superstep() -> None:
            write = saver.aput_writes(place, [("x", 1)], "task")
            puts = []
            for name in ("d2", "d3", "d2", "d4", "d3"):
                made = checkpoint(name, {"x": name}, x=name)
                puts.append(asyncio.ensure_future(saver.aput(place, made, {}, {"x": name})))
                await asyncio.sleep(0)
            await asyncio.gather(write, *puts)

        asyncio.run(superstep())
        assert writes_at(saver, "d1", ns="child") == [("task", "x", 1)]
        assert sorted(ids(saver.list(at(ns="child")))) == ["d1", "d2", "d3", "d4"]

    def test_thousands_of_writes_on_one_checkpoint(self, saver: AnySaver) -> None:
        """The functional API binds every result of a task to the checkpoint of its input."""
        put(saver, "c1")

        async def results() -> None:
            await asyncio.gather(
                *(
                    saver.aput_writes(at("c1"), [("__return__", i), ("x", i)], f"task {i:04}")
                    for i in range(1500)
                )
            )

        asyncio.run(results())
        found: list[Any] = writes_at(saver)
        assert [value for _, channel, value in found if channel == "x"] == list(range(1500))
        assert len(found) == 3000
