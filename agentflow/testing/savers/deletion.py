"""Deleting threads, the checkpoints of runs, and old checkpoints; and going on with what is left.

Delta channels have a suite of their own, as they need more than what is left shows.
"""

from __future__ import annotations

from typing import Any

import pytest

from agentflow.errors import InvalidInputError
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

WORDS = [f"{number} " * 20 for number in range(100)]


def put_runs(saver: AnySaver, *runs: str, thread: str = "t", ns: str = "") -> None:
    """Put checkpoints `c0`, `c1` … of some runs, each with a list that is one word longer."""
    parent: str | None = None
    for number, run in enumerate(runs):
        name = f"c{number}"
        words, details = WORDS[: number + 1], {"run_id": run}
        place = {"thread": thread, "ns": ns}
        put(saver, name, parent, changed=words, metadata=details, **place)
        saver.put_writes(at(name, thread=thread, ns=ns), [("x", name)], f"task of {name}")
        parent = name


class DeletionSuite(Suite):
    """`delete_thread`, `delete_for_runs` and `prune`."""

    def test_deleted_thread_is_gone_in_all_namespaces(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        for thread in ("t", "u"):
            put_line(saver, "c1", "c2", thread=thread)
            put(saver, "d1", thread=thread, ns="child:1")
            saver.put_writes(at("c2", thread=thread), [("x", 1)], "task")
        saver.put_writes(at("orphan"), [("x", 1)], "task")
        before = [plain(each) for each in saver.list(at(thread="u"))]
        saver.delete_thread("t")
        for reader in (saver, another):
            assert reader.get_tuple(at()) is None
            assert reader.get_tuple(at("c1")) is None
            assert reader.get_tuple(at(ns="child:1")) is None
            assert list(reader.list({"configurable": {"thread_id": "t"}})) == []
            assert [plain(each) for each in reader.list(at(thread="u"))] == before

    def test_thread_begins_anew_after_its_deletion(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        put_list(saver, "c1", None, WORDS)
        saver.put_writes(at("c1"), [("x", 1)], "task")
        put_list(another, "c2", load(another).config, [*WORDS, "more"])
        saver.delete_thread("t")
        put_list(saver, "c1", None, ["new"] * 100)
        assert writes_at(saver) == []
        assert load(saver).parent_config is None
        put_list(another, "c2", load(another).config, [*["new"] * 100, "newer"])
        assert values_at(saver) == {"x": [*["new"] * 100, "newer"]}
        assert ids(saver.list(None)) == ["c2", "c1"]

    def test_deleting_what_is_not_there_is_silent(self, saver: AnySaver) -> None:
        put(saver, "c1", metadata={"run_id": "r"})
        saver.delete_thread("none")
        saver.delete_for_runs(["none"])
        saver.delete_for_runs([])
        saver.prune(["none"])
        saver.prune(["none"], strategy="delete")
        saver.prune([])
        saver.copy_thread("none", "u")
        assert ids(saver.list(None)) == ["c1"]

    @pytest.mark.parametrize(
        ("doomed", "left"),
        [
            (["r0"], ["c5", "c4", "c3", "c2", "c1"]),
            (["r1"], ["c5", "c4", "c3", "c2", "c0"]),
            (["r2"], ["c5", "c4", "c1", "c0"]),
            (["r4"], ["c4", "c3", "c2", "c1", "c0"]),
            (["r0", "r2", "none"], ["c5", "c4", "c1"]),
            (["r3", "r4"], ["c3", "c2", "c1", "c0"]),
            (["r0", "r1", "r2", "r3", "r4"], []),
        ],
    )
    def test_checkpoints_of_runs_are_deleted_and_the_others_stay_as_they_were(
        self, saver: AnySaver, another: AnySaver, doomed: list[str], left: list[str]
    ) -> None:
        put_runs(saver, "r0", "r1", "r2", "r2", "r3", "r4")
        before = {name: plain(load(saver, name)) for name in left}
        saver.delete_for_runs(doomed)
        for reader in (saver, another):
            assert ids(reader.list(at())) == left
            for name in left:
                assert plain(load(reader, name)) == before[name]

    def test_runs_are_deleted_in_all_threads_and_namespaces(self, saver: AnySaver) -> None:
        for thread in ("t", "u"):
            put_runs(saver, "r0", "r1", thread=thread)
            put_runs(saver, "r1", "r0", thread=thread, ns="child:1")
        saver.delete_for_runs(["r0"])
        for thread in ("t", "u"):
            everywhere: Any = {"configurable": {"thread_id": thread}}
            found = {(e.config["configurable"]["checkpoint_ns"], e.checkpoint["id"])
                     for e in saver.list(everywhere)}  # fmt: skip
            assert found == {("", "c1"), ("child:1", "c0")}
            assert values_at(saver, thread=thread) == {"x": WORDS[:2]}
            assert values_at(saver, thread=thread, ns="child:1") == {"x": WORDS[:1]}

    def test_more_runs_are_deleted_than_a_statement_may_name(self, saver: AnySaver) -> None:
        put_runs(saver, "r0", "r70000", "r1")
        saver.delete_for_runs([f"r{number}" for number in range(1, 70_001)])
        assert ids(saver.list(None)) == ["c0"]

    @pytest.mark.parametrize("given", ["put", "metadata", "configurable"])
    def test_run_is_deleted_wherever_its_id_was_given(self, saver: AnySaver, given: str) -> None:
        config = at()
        if given == "metadata":
            config["metadata"] = {"run_id": "r"}
        elif given == "configurable":
            config["configurable"]["run_id"] = "r"
        metadata: Any = {"run_id": "r"} if given == "put" else {}
        saver.put(config, checkpoint("c1", {}), metadata, {})
        saver.delete_for_runs(["other", "R", "r "])
        assert ids(saver.list(None)) == ["c1"]
        saver.delete_for_runs(["r"])
        assert list(saver.list(None)) == []

    @pytest.mark.parametrize("run_id", ["a\x00b", "\ud800"])
    def test_run_with_an_odd_id_can_be_deleted(self, saver: AnySaver, run_id: str) -> None:
        put(saver, "c1", metadata={"run_id": run_id})
        # LangGraph strips NUL from the texts of metadata.
        saver.delete_for_runs([run_id.replace("\x00", "")])
        assert list(saver.list(None)) == []

    def test_thread_goes_on_after_its_newest_run_was_deleted(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        put_runs(saver, "r0", "r1", "r2", "r3")
        load(another)
        saver.delete_for_runs(["r2", "r3"])
        put_list(another, "d2", load(another).config, [*WORDS[:2], "other"])
        put_list(saver, "d3", load(saver).config, [*WORDS[:2], "other", "still"])
        assert ids(saver.list(at())) == ["d3", "d2", "c1", "c0"]
        for name, expected in (
            ("c0", WORDS[:1]),
            ("c1", WORDS[:2]),
            ("d2", [*WORDS[:2], "other"]),
            ("d3", [*WORDS[:2], "other", "still"]),
        ):
            assert values_at(another, name) == {"x": expected}

    def test_newest_checkpoint_of_each_namespace_survives_pruning(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        for thread in ("t", "u", "v"):
            put_runs(saver, *["r"] * 12, thread=thread)
            put_runs(saver, *["r"] * 3, thread=thread, ns="child:1")
        put(saver, "a branch", load(saver, "c3").config, changed=WORDS[:4])
        kept = {ns: plain(load(saver, ns=ns)) for ns in ("", "child:1")}
        untouched = [plain(each) for each in saver.list({"configurable": {"thread_id": "v"}})]
        saver.prune(["t", "u", "t", "none"])
        for reader in (saver, another):
            assert ids(reader.list(at())) == ["a branch"]
            assert ids(reader.list(at(thread="u"))) == ["c11"]
            assert ids(reader.list(at(ns="child:1"))) == ["c2"]
            for ns, before in kept.items():
                assert plain(load(reader, ns=ns)) == before
            of_v = reader.list({"configurable": {"thread_id": "v"}})
            assert [plain(each) for each in of_v] == untouched
        assert reader.get_tuple(at("c3")) is None

    def test_newest_is_the_one_put_last_whatever_its_id(self, saver: AnySaver) -> None:
        put_line(saver, "9", "1", "5")
        saver.prune(["t"])
        assert ids(saver.list(at())) == ["5"]

    def test_pruned_thread_goes_on(self, saver: AnySaver, another: AnySaver) -> None:
        words = WORDS[:40]
        put_list(saver, "c0", None, words)
        for number in range(1, 20):
            writer = saver if number % 3 else another
            words = [*words, f"more {number} " * 20] if number % 4 else words[:-3]
            put_list(writer, f"c{number}", load(writer).config, words)
            saver.put_writes(at(f"c{number}"), [("x", number)], "task")
            if number % 5 == 0:
                writer.prune(["t"])
                assert ids(saver.list(at())) == [f"c{number}"]
            assert values_at(saver) == values_at(another) == {"x": words}
            assert writes_at(another) == [("task", "x", number)]
        assert ids(saver.list(at())) == ["c19", "c18", "c17", "c16", "c15"]

    def test_pruning_may_delete_everything(self, saver: AnySaver) -> None:
        for thread in ("t", "u"):
            put_runs(saver, "r", "r", thread=thread)
            put(saver, "d1", thread=thread, ns="child:1")
        saver.prune(["t", "none"], strategy="delete")
        assert list(saver.list({"configurable": {"thread_id": "t"}})) == []
        assert len(list(saver.list({"configurable": {"thread_id": "u"}}))) == 3
        put(saver, "c0")
        assert writes_at(saver) == []

    def test_unknown_strategy_is_refused(self, saver: AnySaver) -> None:
        put(saver, "c1")
        with pytest.raises(InvalidInputError, match="strategy"):
            saver.prune(["t"], strategy="everything")
        assert ids(saver.list(at())) == ["c1"]
