"""Copying a thread: the copy has all that the source has, and each goes on by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentflow.errors import ConflictError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    at,
    checkpoint,
    ids,
    load,
    plain,
    put,
    put_line,
    put_list,
    values_at,
    writes_at,
)
from agentflow.testing.savers.deletion import WORDS, put_runs


def contents(saver: AnySaver, thread: str) -> list[tuple[Any, ...] | None]:
    """Return all that a thread has, as if its id were `t`."""
    found = []
    for each in saver.list({"configurable": {"thread_id": thread}}):
        whole: Any = plain(each)
        for config in (whole[0], whole[3] or {}):
            if config:
                config["thread_id"] = "t"
        found.append(whole)
    return found


class CopySuite(Suite):
    """`copy_thread`."""

    def test_copy_has_ids_order_namespaces_writes_and_parents(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        put_runs(saver, "r0", "r1", "r1")
        put(saver, "branch", load(saver, "c0").config, changed=WORDS[:3])
        put_runs(saver, "r0", "r1", ns="child:1")

        async def superstep() -> None:
            made = checkpoint("last", {"x": "l"}, x="l")
            await asyncio.gather(
                saver.aput_writes(at("branch"), [("x", "carried")], "task"),
                saver.aput(at("branch"), made, {}, {"x": "l"}),
            )

        asyncio.run(superstep())
        before = contents(saver, "t")
        saver.copy_thread("t", "u")
        for reader in (saver, another):
            assert contents(reader, "u") == before
            assert contents(reader, "t") == before
            assert writes_at(reader, "branch", thread="u") == [("task", "x", "carried")]

    def test_copy_and_source_go_on_by_themselves(self, saver: AnySaver, another: AnySaver) -> None:
        put_list(saver, "c1", None, WORDS)
        put_list(saver, "c2", "c1", [*WORDS, "two"])
        saver.copy_thread("t", "u")
        put_list(saver, "c3", "c2", [*WORDS, "two", "of the source"])
        put(another, "c3", load(another, thread="u").config, changed=[*WORDS, "two", "of the copy"])
        put(saver, "c4", load(saver, "c1", thread="u").config, changed=[*WORDS, "a branch"])
        for reader in (saver, another):
            assert values_at(reader) == {"x": [*WORDS, "two", "of the source"]}
            assert values_at(reader, "c3", thread="u") == {"x": [*WORDS, "two", "of the copy"]}
            assert values_at(reader, thread="u") == {"x": [*WORDS, "a branch"]}
            for thread in ("t", "u"):
                assert values_at(reader, "c1", thread=thread) == {"x": WORDS}
                assert values_at(reader, "c2", thread=thread) == {"x": [*WORDS, "two"]}

    def test_copy_outlives_its_source(self, saver: AnySaver, another: AnySaver) -> None:
        put_runs(saver, "r0", "r1", "r2")
        before = contents(saver, "t")
        saver.copy_thread("t", "u")
        saver.delete_thread("t")
        assert contents(another, "u") == before
        saver.copy_thread("u", "t")
        assert contents(another, "t") == before
        put_list(another, "c3", load(another).config, WORDS[:4])
        assert values_at(saver) == {"x": WORDS[:4]}

    def test_copies_are_deleted_and_pruned_apart(self, saver: AnySaver) -> None:
        put_runs(saver, "r0", "r1", "r2")
        saver.copy_thread("t", "u")
        saver.copy_thread("t", "v")
        before = contents(saver, "t")
        saver.prune(["u"])
        assert ids(saver.list(at(thread="u"))) == ["c2"]
        assert values_at(saver, thread="u") == {"x": WORDS[:3]}
        assert contents(saver, "t") == contents(saver, "v") == before
        saver.delete_for_runs(["r2"])
        for thread, left in (("t", ["c1", "c0"]), ("u", []), ("v", ["c1", "c0"])):
            assert ids(saver.list(at(thread=thread))) == left

    def test_long_thread_is_copied_whole(self, saver: AnySaver) -> None:
        put_line(saver, *(f"c{number:04}" for number in range(620)))
        for number in (0, 300, 619):
            saver.put_writes(at(f"c{number:04}"), [("x", number)], "task")
        saver.copy_thread("t", "u")
        assert contents(saver, "u") == contents(saver, "t")

    def test_target_with_checkpoints_is_refused_and_left_as_it_is(self, saver: AnySaver) -> None:
        put(saver, "c1")
        put(saver, "d1", thread="u")
        for target in ("u", "t"):
            with pytest.raises(ConflictError):
                saver.copy_thread("t", target)
        assert ids(saver.list(at(thread="u"))) == ["d1"]
        assert ids(saver.list(at())) == ["c1"]
        saver.delete_thread("u")
        saver.copy_thread("t", "u")
        assert ids(saver.list(at(thread="u"))) == ["c1"]
