"""Order: a call is accepted when it is made, and a failure fails what follows it.

For savers with agentflow's own `flush`.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from agentflow.checkpoint import Saver
from agentflow.errors import ConflictError, SerializationError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    after,
    at,
    checkpoint,
    id_of,
    ids,
    load,
    put,
    values_at,
    writes_at,
)


class OrderSuite(Suite):
    """`aput_writes`, `aput` and `flush`, called faster than they end."""

    def test_failed_write_fails_the_checkpoint_that_follows_it(self, saver: Saver) -> None:
        put(saver, "c1")

        async def superstep() -> None:
            first = saver.aput_writes(at("c1"), [("x", object())], "a")
            second = saver.aput_writes(at("c1"), [("x", 2)], "b")
            with pytest.raises(SerializationError, match="channel 'x' of thread 't'"):
                await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})
            with pytest.raises(SerializationError):
                await saver.flush("t")
            for each in (first, second):
                with pytest.raises(SerializationError):
                    await each

        asyncio.run(superstep())
        assert (id_of(load(saver)), writes_at(saver)) == ("c1", [])
        put(saver, "c2", "c1")

    def test_reader_does_not_make_a_failed_write_forgotten(self, saver: Saver) -> None:
        put(saver, "c1")
        invocation = load(saver).config

        async def superstep() -> None:
            with pytest.raises(SerializationError):
                await saver.aput_writes(invocation, [("x", object())], "a")
            await saver.aget_tuple(at())
            with pytest.raises(SerializationError):
                await saver.aput(invocation, checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})

        asyncio.run(superstep())
        assert id_of(load(saver)) == "c1"

    def test_write_is_accepted_by_the_call_though_nobody_awaits_it(self, saver: Saver) -> None:
        put(saver, "c1")

        async def superstep() -> None:
            abandoned = saver.aput_writes(at("c1"), [("x", 1)], "a")
            abandoned.close()
            await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})

        asyncio.run(superstep())
        assert writes_at(saver, "c1") == [("a", "x", 1)]

    def test_value_is_what_it_was_when_the_call_was_made(self, saver: Saver) -> None:
        put(saver, "c1")
        value: dict[str, list[Any]] = {"list": [1]}

        async def superstep() -> None:
            write = saver.aput_writes(at("c1"), [("x", value)], "a")
            made = checkpoint("c2", {"x": 2}, x=value)
            saved = asyncio.ensure_future(saver.aput(at("c1"), made, {}, {"x": 2}))
            value["list"].append("after the write")
            await asyncio.sleep(0)
            value["list"].append("after the checkpoint")
            await asyncio.gather(write, saved)

        asyncio.run(superstep())
        assert writes_at(saver, "c1") == [("a", "x", {"list": [1]})]
        assert values_at(saver) == {"x": {"list": [1, "after the write"]}}

    def test_thread_of_calls_is_durable_in_their_order(self, saver: Saver, another: Saver) -> None:
        """A reader in another process never sees a checkpoint without the writes before it."""
        put(saver, "c0")
        seen: list[list[tuple[str, int]]] = []
        stopped = threading.Event()

        def watch() -> None:
            while not stopped.is_set():
                found = another.list(at(), limit=3)
                seen.append([(id_of(each), len(each.pending_writes or ())) for each in found])

        async def run() -> None:
            calls: list[Any] = []
            for number in range(30):
                place = at(f"c{number}")
                calls += [saver.aput_writes(place, [("x", task)], f"{task}") for task in range(3)]
                made = checkpoint(f"c{number + 1}", {"x": number}, x=number)
                calls.append(asyncio.ensure_future(saver.aput(place, made, {}, {"x": number})))
                await asyncio.sleep(0)
            await asyncio.gather(*calls)

        watcher = threading.Thread(target=watch)
        watcher.start()
        asyncio.run(run())
        stopped.set()
        watcher.join(30)
        assert ids(another.list(at())) == [f"c{number}" for number in reversed(range(31))]
        for number in range(30):
            assert len(writes_at(another, f"c{number}")) == 3
        torn = [(name, count) for _, *older in seen for name, count in older if count < 3]
        assert torn == [], "what a checkpoint follows has all its writes"

    def test_own_calls_are_read_at_once(self, saver: Saver) -> None:
        put(saver, "c1")

        async def superstep() -> None:
            write = saver.aput_writes(at("c1"), [("x", 1)], "a")
            found = await saver.aget_tuple(at())
            assert found is not None
            assert found.pending_writes == [("a", "x", 1)]
            later = saver.aput_writes(at("c1"), [("x", 2)], "b")
            listed = [each async for each in saver.alist(at())]
            assert listed[0].pending_writes == [("a", "x", 1), ("b", "x", 2)]
            saved = asyncio.ensure_future(
                saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})
            )
            await asyncio.sleep(0)
            history = await saver.aget_delta_channel_history(config=at("c2"), channels=["x"])
            assert len(history["x"]["writes"]) == 2
            await asyncio.gather(write, later, saved)

        asyncio.run(superstep())

    def test_flush_waits_for_what_was_accepted(self, saver: Saver, another: Saver) -> None:
        put(saver, "c1")

        async def superstep() -> None:
            write = saver.aput_writes(at("c1"), [("x", 1)], "a")
            saved = asyncio.ensure_future(
                saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})
            )
            await asyncio.sleep(0)
            await saver.flush("t")
            assert ids(another.list(at())) == ["c2", "c1"]
            assert writes_at(another, "c1") == [("a", "x", 1)]
            await asyncio.gather(write, saved)
            await saver.flush("t")
            await saver.flush("a thread that nobody knows")

        asyncio.run(superstep())

    def test_failure_reaches_only_its_own_invocation(self, saver: Saver) -> None:
        put(saver, "c1")
        put(saver, "c1", thread="u")
        put(saver, "d1", ns="child")
        bad, good = load(saver).config, load(saver).config

        async def superstep() -> None:
            failed = saver.aput_writes(bad, [("x", object())], "a")
            others = [
                saver.aput_writes(at("c1", thread="u"), [("x", 1)], "a"),
                saver.aput_writes(at("d1", ns="child"), [("x", 1)], "a"),
                saver.aput_writes(good, [("x", 1)], "a"),
                saver.aput(good, checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2}),
            ]
            await asyncio.gather(*others)
            with pytest.raises(SerializationError):
                await failed
            await saver.flush("u")

        asyncio.run(superstep())
        assert ids(saver.list(at())) == ["c2", "c1"]
        assert writes_at(saver, "c1") == [("a", "x", 1)]

    def test_conflict_fails_all_that_its_invocation_does_later(
        self, saver: Saver, another: Saver
    ) -> None:
        put(saver, "c1")
        loser = load(saver).config
        put(another, "c2", load(another).config)

        async def supersteps() -> None:
            # A checkpoint is accepted when its coroutine starts, a write by the call.
            first = asyncio.ensure_future(
                saver.aput(loser, checkpoint("d2", {"x": 2}, x=2), {}, {"x": 2})
            )
            await asyncio.sleep(0)
            write = saver.aput_writes(after(loser, "d2"), [("x", 1)], "a")
            last = saver.aput(after(loser, "d2"), checkpoint("d3", {"x": 3}, x=3), {}, {"x": 3})
            outcomes = await asyncio.gather(first, write, last, return_exceptions=True)
            assert [type(each) for each in outcomes] == [ConflictError] * 3
            with pytest.raises(ConflictError):
                await saver.aput_writes(after(loser, "d3"), [("x", 1)], "a")

        asyncio.run(supersteps())
        assert ids(another.list(at())) == ["c2", "c1"]
        put(saver, "c3", load(saver).config)
        assert writes_at(saver) == []

    def test_subgraph_of_an_invocation_that_has_lost_does_not_win(self, saver: Saver) -> None:
        """With `durability="async"` it runs before its caller's checkpoint is durable."""
        put(saver, "c1")
        invocation = load(saver).config
        put(saver, "c2", "c1")
        called = at(ns="child")
        called["configurable"]["checkpoint_map"] = {"": "lost"}

        async def superstep() -> list[Any]:
            lost = saver.aput(invocation, checkpoint("lost", {"x": 1}, x=1), {}, {"x": 1})
            losing = asyncio.ensure_future(lost)
            await asyncio.sleep(0)
            inner = saver.aput(called, checkpoint("d1", {"x": 1}, x=1), {}, {"x": 1})
            return list(await asyncio.gather(losing, inner, return_exceptions=True))

        assert [type(each) for each in asyncio.run(superstep())] == [ConflictError] * 2
        assert saver.get_tuple(at(ns="child")) is None

    def test_cancelled_caller_does_not_tear_its_checkpoint(
        self, saver: Saver, another: Saver
    ) -> None:
        put(saver, "c0")

        async def run() -> None:
            for number in range(10):
                made = checkpoint(f"c{number + 1}", {"x": number}, x=number)
                write = asyncio.ensure_future(
                    saver.aput_writes(at(f"c{number}"), [("x", number)], "a")
                )
                saved = asyncio.ensure_future(saver.aput(at(f"c{number}"), made, {}, {"x": number}))
                await asyncio.sleep(0)
                for each in (write, saved):
                    each.cancel()
                await asyncio.gather(write, saved, return_exceptions=True)

        asyncio.run(run())
        assert values_at(saver) == {"x": 9}
        assert ids(another.list(at())) == [f"c{number}" for number in reversed(range(11))]
        assert [len(writes_at(another, f"c{number}")) for number in range(10)] == [1] * 10

    def test_sync_and_async_callers_share_one_order(self, saver: Saver) -> None:
        put(saver, "c0")

        async def run() -> None:
            for number in range(0, 10, 2):
                write = saver.aput_writes(at(f"c{number}"), [("x", "async")], "a")
                await asyncio.to_thread(
                    saver.put_writes, at(f"c{number}"), [("x", "sync")], "b", ""
                )
                await asyncio.to_thread(put, saver, f"c{number + 1}", f"c{number}")
                made = checkpoint(f"c{number + 2}", {"x": number}, x=number)
                await saver.aput(at(f"c{number + 1}"), made, {}, {"x": number})
                await write

        asyncio.run(run())
        assert ids(saver.list(at())) == [f"c{number}" for number in reversed(range(11))]
        for number in range(0, 10, 2):
            assert writes_at(saver, f"c{number}") == [("a", "x", "async"), ("b", "x", "sync")]

    def test_closing_makes_durable_what_was_accepted(self, saver: Saver, another: Saver) -> None:
        with self.open_another() as third:
            put(third, "c1")

            async def abandon() -> None:
                third.aput_writes(at("c1"), [("x", 1)], "a").close()
                made = checkpoint("c2", {"x": 2}, x=2)
                saved = asyncio.ensure_future(third.aput(at("c1"), made, {}, {"x": 2}))
                await asyncio.sleep(0)
                saved.cancel()

            asyncio.run(abandon())
        assert ids(another.list(at())) == ["c2", "c1"]
        assert writes_at(another, "c1") == [("a", "x", 1)]
