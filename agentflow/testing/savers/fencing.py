"""Leases: while a run holds a thread, only writes under its token are accepted.

For savers with agentflow's own `acquire`, `release` and `with_lease`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentflow.checkpoint import Saver
from agentflow.errors import ConflictError, FencedError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    acquired,
    after,
    at,
    checkpoint,
    id_of,
    ids,
    lease,
    load,
    put,
    put_line,
    values_at,
    writes_at,
)

CALLS: dict[str, Callable[[Saver], Any]] = {
    "put": lambda saver: put(saver, "fenced", "c1"),
    "put of a child": lambda saver: put(saver, "fenced", ns="child"),
    "put_writes": lambda saver: saver.put_writes(at("c1"), [("x", "fenced")], "task"),
    "delete_thread": lambda saver: saver.delete_thread("t"),
    "prune": lambda saver: saver.prune(["u", "t"]),
    "prune all": lambda saver: saver.prune(["u", "t"], strategy="delete"),
    "delete_for_runs": lambda saver: saver.delete_for_runs(["r"]),
    "copy_thread": lambda saver: saver.copy_thread("u", "t"),
}
"""Everything that changes the thread `t`; some of it changes `u` as well."""


class FencingSuite(Suite):
    """`acquire`, `release` and `with_lease`."""

    def test_thread_under_a_lease_is_closed_to_all_others(self, saver: Saver) -> None:
        put(saver, "c1")
        stale = acquired(saver, lease(1))
        put(stale, "c2", "c1")
        holder = acquired(saver, lease(2))
        wrong_thread = saver.with_lease(lease(2, "other"))
        for other in (saver, stale, wrong_thread):
            with pytest.raises(FencedError):
                put(other, "c3", "c2")
            # A failure fails what follows in the same invocation; a load begins a new one.
            other.get_tuple(at())
            with pytest.raises(FencedError):
                other.put_writes(at("c2"), [("x", 1)], "task")
            other.get_tuple(at())
            with pytest.raises(FencedError):
                other.delete_thread("t")
        assert writes_at(saver) == []
        put(holder, "c3", "c2")
        assert id_of(load(saver)) == "c3"

    @pytest.mark.parametrize("call", CALLS)
    def test_every_change_is_fenced_as_a_whole(
        self, saver: Saver, another: Saver, call: str
    ) -> None:
        """By whichever process it is made, and whatever that process remembers of the thread."""
        for thread in ("t", "u"):
            put(saver, "c1", thread=thread, metadata={"run_id": "r"})
            put(saver, "c2", "c1", thread=thread, metadata={"run_id": "r"})
        saver.prune(["t"])
        assert load(another).checkpoint == load(saver).checkpoint
        stale = acquired(another, lease(1))
        acquired(saver, lease(2))
        for other in (saver, another, stale):
            with pytest.raises(FencedError):
                CALLS[call](other)
        for reader in (saver, another):
            assert ids(reader.list({"configurable": {"thread_id": "t"}})) == ["c2"]
            assert ids(reader.list(at(thread="u"))) == ["c2", "c1"]
            assert writes_at(reader) == []

    def test_nothing_of_what_was_fenced_shows_up_later(self, saver: Saver) -> None:
        holder = acquired(saver, lease(1))
        for name in ("c1", "c2"):
            with pytest.raises(FencedError):
                saver.put_writes(at(name), [("x", "fenced")], "task")
        put_line(holder, "c1", "c2")
        assert writes_at(saver, "c1") == writes_at(saver, "c2") == []

    @pytest.mark.parametrize("call", CALLS)
    def test_holder_may_do_everything_to_its_thread(self, saver: Saver, call: str) -> None:
        if call != "copy_thread":
            put(saver, "c1", metadata={"run_id": "r"})
        if call in {"copy_thread", "prune", "prune all"}:
            put(saver, "c1", thread="u")
        holder = acquired(saver, lease(1))
        if call.startswith("prune"):
            # Only to its own.
            with pytest.raises(FencedError):
                CALLS[call](holder)
            holder.prune(["t"], strategy="delete" if call.endswith("all") else "keep_latest")
        else:
            CALLS[call](holder)
        assert ids(saver.list(at(thread="u"))) == (
            ["c1"] if call in {"copy_thread", "prune", "prune all"} else []
        )

    def test_readers_need_no_lease(self, saver: Saver, another: Saver) -> None:
        holder = acquired(saver, lease(1))
        put(holder, "c1")
        holder.put_writes(at("c1"), [("x", 1)], "task")
        for reader in (saver, another, another.with_lease(lease(7, "other"))):
            assert values_at(reader) == {"x": "c1"}
            assert writes_at(reader) == [("task", "x", 1)]
        another.copy_thread("t", "u")
        assert writes_at(saver, thread="u") == [("task", "x", 1)]

    def test_thread_is_open_again_after_release_but_not_to_old_leases(self, saver: Saver) -> None:
        holder = acquired(saver, lease(3))
        put(holder, "c1")
        asyncio.run(saver.release(lease(2)))
        with pytest.raises(FencedError):
            put(saver, "c2", "c1")
        asyncio.run(saver.release(lease(3)))
        with pytest.raises(FencedError):
            put(holder, "c2", "c1")
        saver.get_tuple(at())
        put(saver, "c2", "c1")

    def test_release_and_acquire_are_seen_by_every_process(
        self, saver: Saver, another: Saver
    ) -> None:
        put(saver, "c1")
        put(another, "c2", load(another).config)
        first = acquired(saver, lease(1))
        put(first, "c3", load(first).config)
        asyncio.run(another.release(lease(1)))
        with pytest.raises(FencedError):
            put(first, "c4", "c3")
        second = acquired(another, lease(2))
        put(second, "c4", load(second).config)
        with pytest.raises(FencedError):
            put(saver.with_lease(lease(1)), "c5", "c4")
        asyncio.run(saver.release(lease(2)))
        put(saver, "c5", load(saver).config)
        assert ids(another.list(at())) == ["c5", "c4", "c3", "c2", "c1"]

    def test_release_twice_or_of_what_was_never_held_is_silent(self, saver: Saver) -> None:
        asyncio.run(saver.release(lease(1)))
        holder = acquired(saver, lease(2))
        for token in (1, 2, 2, 3):
            asyncio.run(saver.release(lease(token)))
        assert asyncio.run(saver.acquire(lease(1))) == 2
        with pytest.raises(FencedError):
            put(holder, "c1")

    def test_lower_token_does_not_take_a_thread(self, saver: Saver, another: Saver) -> None:
        holder = acquired(saver, lease(5))
        for token in (1, 4):
            assert asyncio.run(another.acquire(lease(token))) == 5
            with pytest.raises(FencedError):
                put(another.with_lease(lease(token)), "c1")
        put(holder, "c1")
        assert asyncio.run(another.acquire(lease(5))) == 5, "the same claim, asked again"
        assert asyncio.run(another.acquire(lease(6))) == 6
        with pytest.raises(FencedError):
            put(holder, "c2", "c1")

    def test_lease_that_was_never_taken_writes_nothing(self, saver: Saver) -> None:
        for token in (0, 1):
            claimed = saver.with_lease(lease(token))
            with pytest.raises(FencedError):
                put(claimed, "c1")
            with pytest.raises(FencedError):
                claimed.put_writes(at("c1"), [("x", 1)], "task")
        put(saver, "c1")
        assert writes_at(saver) == []

    def test_token_survives_the_deletion_of_its_thread(self, saver: Saver) -> None:
        holder = acquired(saver, lease(5))
        put(holder, "c1")
        holder.put_writes(at("c1"), [("x", 1)], "task")
        holder.delete_thread("t")
        assert saver.get_tuple(at()) is None
        assert list(saver.list(at())) == []
        assert asyncio.run(saver.acquire(lease(4))) == 5
        with pytest.raises(FencedError):
            put(saver.with_lease(lease(4)), "c2")
        put(holder, "c2")
        assert writes_at(saver) == []

    def test_token_survives_pruning_and_is_not_copied(self, saver: Saver, another: Saver) -> None:
        holder = acquired(saver, lease(5))
        put_line(holder, "c1", "c2")
        holder.prune(["t"], strategy="delete")
        put(holder, "c1")
        assert asyncio.run(another.acquire(lease(4))) == 5
        saver.copy_thread("t", "u")
        put(another, "c2", load(another, thread="u").config)
        assert asyncio.run(another.acquire(lease(1, "u"))) == 1

    def test_head_still_counts_under_a_lease(self, saver: Saver, another: Saver) -> None:
        put_line(saver, "c1", "c2")
        holder = acquired(saver, lease(1))
        twin = another.with_lease(lease(1))
        ours, theirs = load(holder).config, load(twin).config
        put(holder, "c3", ours)
        with pytest.raises(ConflictError):
            put(twin, "d3", theirs)
        # The same checkpoint from the same attempt: its reply was lost, and it came again.
        put(twin, "c3", load(twin, "c2").config)
        put(holder, "c4", after(ours, "c3"))
        assert ids(saver.list(at())) == ["c4", "c3", "c2", "c1"]

    def test_copies_of_the_saver_keep_their_leases_apart(self, saver: Saver) -> None:
        one, two = acquired(saver, lease(1)), acquired(saver, lease(1, "u"))
        put(one, "c1")
        put(two, "c1", thread="u")
        put(one.with_allowlist(()), "c2", "c1")
        for wrong, thread in ((one, "u"), (two, "t"), (one.with_lease(lease(2)), "t")):
            with pytest.raises(FencedError):
                put(wrong, "c9", load(wrong, thread=thread).config)
        assert ids(saver.list(at())) == ["c2", "c1"]
        assert ids(saver.list(at(thread="u"))) == ["c1"]

    def test_write_that_was_accepted_before_a_claim_comes_before_it_or_fails(
        self, saver: Saver, another: Saver
    ) -> None:
        """Nothing of an old holder's becomes durable once a new one has read the thread."""
        old = acquired(saver, lease(1))
        put(old, "c1")

        async def race() -> tuple[str | None, list[str]]:
            made = checkpoint("late", {"x": 1}, x=1)
            late = asyncio.ensure_future(old.aput(at("c1"), made, {}, {"x": 1}))
            assert await another.acquire(lease(2)) == 2
            found = await another.aget_tuple(at())
            try:
                await late
            except FencedError:
                return found and id_of(found), ["c1"]
            return found and id_of(found), ["late", "c1"]

        head, line = asyncio.run(race())
        assert ids(another.list(at())) == line
        assert head == line[0]
