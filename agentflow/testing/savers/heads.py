"""One head for each namespace: what may follow it, who has lost a race, and what "newest" means."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from agentflow.errors import ConflictError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    after,
    at,
    checkpoint,
    clock_id,
    id_of,
    ids,
    load,
    put,
    put_line,
    put_list,
    values_at,
    writes_at,
)


class HeadsSuite(Suite):
    """Races, branches, and ids that say nothing about the order."""

    def test_put_on_what_is_not_the_head_any_more_is_a_conflict(self, saver: AnySaver) -> None:
        put_line(saver, "c1", "c2")
        with pytest.raises(ConflictError, match="'t' has moved on"):
            put(saver, "c3", "c1")
        assert id_of(load(saver)) == "c2"
        assert saver.get_tuple(at("c3")) is None

    def test_branch_from_an_old_checkpoint_is_accepted_from_who_saw_the_head(
        self, saver: AnySaver
    ) -> None:
        put_line(saver, "c1", "c2")
        first, second = load(saver, "c1").config, load(saver, "c1").config
        put(saver, "c3", first)
        assert id_of(load(saver)) == "c3"
        with pytest.raises(ConflictError):
            put(saver, "c4", second)
        assert id_of(load(saver)) == "c3"

    def test_branch_goes_on_and_the_old_line_stays(self, saver: AnySaver) -> None:
        put_line(saver, "c1", "c2", "c3")
        branch = load(saver, "c1").config
        put(saver, "d2", branch)
        put(saver, "d3", after(branch, "d2"))
        put(saver, "d4", "d3")
        assert ids(saver.list(at())) == ["d4", "d3", "d2", "c3", "c2", "c1"]
        parents = {"c2": "c1", "c3": "c2", "d2": "c1", "d3": "d2", "d4": "d3"}
        for name, parent in parents.items():
            config = load(saver, name).parent_config
            assert config is not None
            assert config["configurable"]["checkpoint_id"] == parent

    def test_copy_of_an_old_checkpoint_is_accepted_and_has_its_values(
        self, saver: AnySaver
    ) -> None:
        """As `update_state(as_node="__copy__")` does: same parent, same versions, no values."""
        words = ["word " * 50] * 3
        versions = {"x": "1", "y": "1"}
        made = checkpoint("c1", versions, x=words, y="short")
        saver.put(at(), made, {}, dict(versions))
        put_list(saver, "c2", "c1", [*words, "more"])
        for name, original in (("copy 1", "c1"), ("copy 2", "c2"), ("copy 3", "copy 1")):
            found = load(saver, original)
            parent = found.parent_config or after(found.config, "")
            copied = {**found.checkpoint, "id": name, "channel_values": {}}
            saver.put(parent, copied, {"source": "fork", "step": 1}, {})  # type: ignore[arg-type]  # a dict is a TypedDict
            assert id_of(load(saver)) == name
            assert (
                values_at(saver) == values_at(saver, original) == found.checkpoint["channel_values"]
            )

    def test_put_without_a_parent_begins_a_line_of_its_own(self, saver: AnySaver) -> None:
        put_line(saver, "c1", "c2")
        put(saver, "d1")
        assert load(saver).parent_config is None
        assert ids(saver.list(at())) == ["d1", "c2", "c1"]

    def test_invocation_of_another_process_is_noticed(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        put(saver, "c1")
        ours, theirs = load(saver).config, load(another).config
        put(saver, "c2", ours)
        put(saver, "c3", after(ours, "c2"))
        with pytest.raises(ConflictError):
            put(another, "d2", theirs)
        with pytest.raises(ConflictError):
            put(another, "d3", after(theirs, "d2"))
        theirs = load(another).config
        put(another, "c4", theirs)
        # The first one remembers the thread as it left it, and must not be believed.
        with pytest.raises(ConflictError):
            put(saver, "c5", after(ours, "c3"))
        put(saver, "c5", load(saver).config)
        assert ids(saver.list(at())) == ["c5", "c4", "c3", "c2", "c1"]

    def test_loser_leaves_nothing(self, saver: AnySaver, another: AnySaver) -> None:
        words = ["word " * 50] * 10
        put_list(saver, "c1", None, words)
        ours, theirs = load(saver).config, load(another).config
        put_list(saver, "c2", ours, [*words, "won"])
        with pytest.raises(ConflictError):
            put_list(another, "d2", theirs, [*words, "lost"])
        put_list(saver, "c3", after(ours, "c2"), [*words, "won", "again"])
        put_list(another, "c4", load(another).config, [*words, "won", "again", "both"])
        expected = {
            "c1": words,
            "c2": [*words, "won"],
            "c3": [*words, "won", "again"],
            "c4": [*words, "won", "again", "both"],
        }
        for reader in (saver, another):
            assert {id_of(e): e.checkpoint["channel_values"]["x"] for e in reader.list(at())} == (
                expected
            )

    def test_of_many_racing_threads_one_wins_each_round(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        put(saver, "c0")
        won = ["c0"]
        for number in range(6):
            configs = [load(each).config for each in (saver, another) * 3]
            outcomes = _race(number, (saver, another) * 3, configs)
            (winner,) = [name for name, error in outcomes.items() if error is None]
            lost = [error for error in outcomes.values() if error is not None]
            assert [type(error) for error in lost] == [ConflictError] * 5
            won.append(winner)
        assert ids(saver.list(at())) == won[::-1]
        assert ids(another.list(at())) == won[::-1]

    def test_known_id_is_not_overwritten(self, saver: AnySaver, another: AnySaver) -> None:
        """A stored checkpoint never changes, but by the invocation that has just put it."""
        put_line(saver, "c1", "c2", "c3")
        with pytest.raises(ConflictError):
            put(another, "c3", changed="by hand")
        with pytest.raises(ConflictError):
            put(saver, "c1", changed="by hand")
        with pytest.raises(ConflictError):
            put(saver, "c2", load(saver, "c1").config, changed="as a branch")
        with pytest.raises(ConflictError):
            put(another, "c2", load(another).config, changed="on the head")
        for name in ("c1", "c2", "c3"):
            assert values_at(another, name) == {"x": name}
        assert ids(saver.list(at())) == ["c3", "c2", "c1"]
        put(saver, "c4", load(saver).config)

    def test_thread_that_was_deleted_under_an_invocation_is_a_conflict(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """What the invocation does not put again is gone; without it the state would be torn."""
        for deleted_by in (saver, another):
            both = checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b")
            saver.put(at(), both, {}, {"x": 1, "y": 1})
            invocation = load(saver).config
            put_line(saver, "c1", thread="u")
            deleted_by.delete_thread("t")
            half = checkpoint("c2", {"x": 2, "y": 1}, x="c", y="b")
            with pytest.raises(ConflictError):
                saver.put(invocation, half, {}, {"x": 2})
            assert saver.get_tuple(at()) is None

    def test_checkpoint_whose_parent_was_deleted_under_it_is_a_conflict(
        self, saver: AnySaver
    ) -> None:
        both = checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b")
        saver.put(at(), both, {}, {"x": 1, "y": 1})
        invocation = load(saver).config
        own = checkpoint("c2", {"x": 1, "y": 2}, x="a", y="of the run")
        saver.put(invocation, own, {"run_id": "r"}, {"y": 2})
        saver.delete_for_runs(["r"])
        half = checkpoint("c3", {"x": 3, "y": 2}, x="c", y="of the run")
        with pytest.raises(ConflictError):
            saver.put(after(invocation, "c2"), half, {"run_id": "r"}, {"x": 3})
        assert ids(saver.list(at())) == ["c1"]

    def test_latest_is_the_newest_put_whatever_the_ids_say(self, saver: AnySaver) -> None:
        put(saver, "9", metadata={"n": 1})
        put(saver, "1", "9", metadata={"n": 2})
        put(saver, "5", "1", metadata={"n": 3})
        assert id_of(load(saver)) == "5"
        assert ids(saver.list(at())) == ["5", "1", "9"]
        assert ids(saver.list(at(), before=at("1"))) == ["9"]
        assert ids(saver.list(at(), before=at("5"), limit=1)) == ["1"]

    def test_hosts_whose_clocks_are_a_minute_apart_continue_each_other(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """A host's ids lie a minute before those of the other, and yet come after them."""
        now = 1_800_000_000.0
        parent, line = None, []
        for number in range(12):
            is_behind = number % 3 == 2
            name = clock_id(now + number - 60 * is_behind)
            host = another if is_behind else saver
            put(host, name, parent)
            line.append(name)
            parent = load(host).config
            assert parent["configurable"]["checkpoint_id"] == name
        assert sorted(line) != line
        for host in (saver, another):
            assert ids(host.list(at())) == line[::-1]
            assert ids(host.list(at(), before=at(line[6]))) == line[5::-1]
        with pytest.raises(ConflictError):
            put(another, "late", max(line))

    def test_namespaces_have_heads_of_their_own(self, saver: AnySaver) -> None:
        put(saver, "c1")
        put(saver, "d1", ns="child:1")
        put(saver, "c2", "c1")
        put(saver, "d2", "d1", ns="child:1")
        assert id_of(load(saver, ns="child:1")) == "d2"
        assert id_of(load(saver)) == "c2"
        assert ids(saver.list({"configurable": {"thread_id": "t"}})) == ["d2", "c2", "d1", "c1"]

    def test_child_namespace_takes_the_last_put_of_one_attempt_only(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """Parallel calls of one subgraph share its namespace; there the last put wins."""
        put(saver, "d1", ns="child")
        put(saver, "d2", "d1", ns="child")
        put(saver, "d3", "d1", ns="child")
        put(saver, "d4", "d2", ns="child")
        assert id_of(load(saver, ns="child")) == "d4"
        with pytest.raises(ConflictError):
            put(another, "d5", "d1", ns="child")
        put(another, "d5", load(another, ns="child").config)
        with pytest.raises(ConflictError):
            put(saver, "d6", "d4", ns="child")

    def test_of_two_who_loaded_a_child_namespace_one_loses(self, saver: AnySaver) -> None:
        put(saver, "d1", ns="child")
        first, second = (load(saver, ns="child").config for _ in range(2))
        put(saver, "d2", first, ns="child")
        with pytest.raises(ConflictError):
            put(saver, "d3", second, ns="child")
        assert ids(saver.list(at(ns="child"))) == ["d2", "d1"]

    def test_put_that_leaves_out_what_nobody_has_is_refused(self, saver: AnySaver) -> None:
        torn = checkpoint("c2", {"x": 1, "y": 2}, x="unchanged", y="new")
        with pytest.raises(ConflictError):
            saver.put(at("never stored"), torn, {"step": 1}, {"y": 2})
        assert saver.get_tuple(at()) is None

    def test_second_put_of_an_invocation_that_ends_replaces_the_first(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        """With `durability="exit"` LangGraph puts its last checkpoint again when it ends."""
        words = ["word " * 50] * 10
        put_list(saver, "c1", None, words)
        invocation = load(saver).config
        saver.put_writes(invocation, [("x", "early")], "task")
        put_list(saver, "c2", invocation, [*words, "once"])
        saver.put_writes(after(invocation, "c2"), [("x", "pending")], "task")
        put_list(saver, "c2", invocation, [*words, "once", "twice"])
        for reader in (saver, another):
            assert ids(reader.list(at())) == ["c2", "c1"]
            assert values_at(reader) == {"x": [*words, "once", "twice"]}
            assert values_at(reader, "c1") == {"x": words}
            assert writes_at(reader, "c1") == [("task", "x", "early")]
            assert writes_at(reader) == [("task", "x", "pending")]
        put_list(another, "c3", load(another).config, [*words, "once", "twice", "more"])
        assert values_at(saver) == {"x": [*words, "once", "twice", "more"]}
        assert values_at(saver, "c2") == {"x": [*words, "once", "twice"]}

    def test_forks_with_equal_versions_do_not_read_each_others_values(
        self, saver: AnySaver
    ) -> None:
        root = checkpoint("c1", {"x": 1}, x="root")
        saver.put(at(), root, {"step": 0}, {"x": 1})
        for name in ("left", "right"):
            config = load(saver, "c1").config
            saver.put(config, checkpoint(name, {"x": 2}, x=name), {"step": 1}, {"x": 2})
        # And their successors, which only refer to the value.
        for name in ("left", "right"):
            successor = checkpoint(f"{name} after", {"x": 2, "y": 1}, x=name, y=name)
            saver.put(load(saver, name).config, successor, {"step": 2}, {"y": 1})
        for name in ("left", "right"):
            assert values_at(saver, name) == {"x": name}
            assert values_at(saver, f"{name} after") == {"x": name, "y": name}


def _race(number: int, savers: tuple[AnySaver, ...], configs: Any) -> dict[str, Any]:
    """Let savers put at the same moment; return the error of each, by the checkpoint's id."""
    outcomes: dict[str, Any] = {}
    start = threading.Barrier(len(savers))

    def run(place: int) -> None:
        name = f"round {number} runner {place}"
        start.wait(30)
        try:
            put(savers[place], name, configs[place])
            outcomes[name] = None
        except Exception as error:  # noqa: BLE001 -- judged by the test
            outcomes[name] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(savers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes
