"""LangGraph's contract for `list`: newest first, filtered, paged, and without a lock."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig

from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    at,
    checkpoint,
    id_of,
    ids,
    load,
    plain,
    put,
    put_line,
)


class ListingSuite(Suite):
    """`list`."""

    def test_listing_filters_limits_and_pages_over_all_threads(self, saver: AnySaver) -> None:
        parent: str | None = None
        for i in range(120):
            put(saver, f"c{i:03}", parent, metadata={"even": i % 2 == 0})
            parent = f"c{i:03}"
        put(saver, "z", thread="u")
        newest_first = [f"c{i:03}" for i in reversed(range(120))]
        assert ids(saver.list(at())) == newest_first
        assert ids(saver.list(None)) == ["z", *newest_first]
        even = ids(saver.list(at(), filter={"even": True}, limit=55))
        assert even == newest_first[1::2][:55]
        assert ids(saver.list(at(), limit=75)) == newest_first[:75]
        before = saver.list(at(), before=at("c060"), limit=3)
        assert ids(before) == ["c059", "c058", "c057"]
        assert ids(saver.list(at("c007"))) == ["c007"]
        for nothing in (
            saver.list(at(), limit=0),
            saver.list(at(), filter={"even": None}),
            saver.list(at(), filter={"x' OR 1=1 --": 1}),
            saver.list(at(thread="none")),
        ):
            assert list(nothing) == []

    def test_what_is_listed_is_what_is_loaded(self, saver: AnySaver) -> None:
        put_line(saver, "c1", "c2", "c3")
        put(saver, "d1", ns="child")
        for name, task in (("c1", "a"), ("c3", "b"), ("c3", "a")):
            saver.put_writes(at(name), [("x", task)], task)
        found = list(saver.list({"configurable": {"thread_id": "t"}}))
        places = [("d1", "child"), ("c3", ""), ("c2", ""), ("c1", "")]
        loaded = [load(saver, name, ns=ns) for name, ns in places]
        assert [plain(each) for each in found] == [plain(each) for each in loaded]

    def test_filters_are_exact_and_combined(self, saver: AnySaver) -> None:
        details: list[dict[str, Any]] = [
            {"source": "input", "step": -1, "score": 1.5},
            {"source": "loop", "step": 0, "tags": ["a"], "nested": {"b": (1,)}},
            {"source": "loop", "step": 1, "tags": ["a", "b"], "flag": False},
        ]
        parent = None
        for number, metadata in enumerate(details):
            saver.put(at(parent), checkpoint(f"c{number}", {}), metadata, {})  # type: ignore[arg-type]  # keys of our own
            parent = f"c{number}"
        for matching, expected in (
            ({}, ["c2", "c1", "c0"]),
            ({"source": "loop"}, ["c2", "c1"]),
            ({"source": "loop", "step": 0}, ["c1"]),
            ({"source": "loop", "step": -1}, []),
            ({"score": 1.5}, ["c0"]),
            ({"tags": ["a"]}, ["c1"]),
            ({"nested": {"b": (1,)}}, ["c1"]),
            ({"flag": False}, ["c2"]),
            ({"source": "LOOP"}, []),
        ):
            assert ids(saver.list(at(), filter=matching)) == expected, matching

    @pytest.mark.parametrize("given", ["put", "metadata", "configurable"])
    @pytest.mark.parametrize("run_id", ["r1", "a' OR 1=1 --", "", "a\x00b", "\ud800"])
    def test_run_id_is_found_wherever_it_was_given(
        self, saver: AnySaver, given: str, run_id: str
    ) -> None:
        config = at()
        if given == "metadata":
            config["metadata"] = {"run_id": run_id}
        elif given == "configurable":
            config["configurable"]["run_id"] = run_id
        metadata: Any = {"run_id": run_id} if given == "put" else {}
        saver.put(config, checkpoint("c1", {}), metadata, {})
        put(saver, "c2", "c1", metadata={"run_id": "other"})
        # LangGraph strips NUL from the texts of metadata.
        stored = run_id.replace("\x00", "")
        assert dict(load(saver, "c1").metadata)["run_id"] == stored
        assert ids(saver.list(None, filter={"run_id": stored})) == ["c1"]
        assert ids(saver.list(at(), filter={"run_id": stored, "step": 1})) == []

    def test_listing_narrows_to_thread_namespace_and_id(self, saver: AnySaver) -> None:
        for thread in ("t", "u"):
            put_line(saver, "c1", "c2", thread=thread)
            put(saver, "c1", thread=thread, ns="child:1")
        everywhere: RunnableConfig = {"configurable": {"thread_id": "t"}}
        root, child = at(), at(ns="child:1")
        assert ids(saver.list(everywhere)) == ["c1", "c2", "c1"]
        assert ids(saver.list(root)) == ["c2", "c1"]
        assert ids(saver.list(child)) == ["c1"]
        assert ids(saver.list(at("c1"))) == ["c1"]
        assert ids(saver.list(at("c2", ns="child:1"))) == []
        in_all = {"configurable": {"thread_id": "t", "checkpoint_id": "c1"}}
        spaces = [found.config["configurable"]["checkpoint_ns"] for found in saver.list(in_all)]  # type: ignore[arg-type]  # a dict is a TypedDict
        assert sorted(spaces) == ["", "child:1"]
        threads = [found.config["configurable"]["thread_id"] for found in saver.list(None)]
        assert sorted(threads) == ["t", "t", "t", "u", "u", "u"]

    def test_before_is_by_the_order_of_the_puts(self, saver: AnySaver) -> None:
        put_line(saver, "9", "1", "5")
        put(saver, "7", ns="child")
        put(saver, "3", "5")
        everywhere: RunnableConfig = {"configurable": {"thread_id": "t"}}
        assert ids(saver.list(at(), before=at("1"))) == ["9"]
        assert ids(saver.list(at(), before=at("5"), limit=1)) == ["1"]
        assert ids(saver.list(at(), before=at("9"))) == []
        assert ids(saver.list(everywhere, before=at("3"))) == ["7", "5", "1", "9"]
        assert ids(saver.list(at(), before=at("7"))) == ["5", "1", "9"], "an id of the child"
        # What nobody has put can only be compared by its id.
        assert ids(saver.list(at(), before=at("4"))) == ["3", "1"]
        assert ids(saver.list(at(), before=at())) == ["3", "5", "1", "9"]

    def test_paused_listing_locks_nothing(self, saver: AnySaver, another: AnySaver) -> None:
        put_line(saver, "c1", "c2")
        listing = saver.list(at())
        assert id_of(next(listing)) == "c2"
        put(saver, "c3", "c2")
        put(another, "c4", "c3")
        assert ids(listing) == ["c1"]

    def test_listing_goes_on_while_checkpoints_come_and_go(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        names = [f"c{i:03}" for i in range(130)]
        put_line(saver, *names)
        listing = saver.list(at())
        seen = [id_of(next(listing)) for _ in range(10)]
        for number in range(5):
            put(another, f"d{number}", f"d{number - 1}" if number else names[-1])
        another.prune(["t"])
        seen += ids(listing)
        assert seen[:10] == names[:-11:-1]
        assert seen == sorted(seen, reverse=True), "none twice and none out of order"
        assert "d4" not in seen

    def test_writes_of_each_checkpoint_come_with_it(self, saver: AnySaver) -> None:
        names = [f"c{i:03}" for i in range(60)]
        put_line(saver, *names)
        for name in names[::7]:
            saver.put_writes(at(name), [("x", f"{name} 0"), ("x", f"{name} 1")], "task")
        for found in saver.list(at()):
            name = id_of(found)
            expected = [("task", "x", f"{name} {i}") for i in (0, 1)]
            assert found.pending_writes == (expected if name in names[::7] else [])
