"""Sweeping: what a `Retention` lets go, and what is never touched.

For savers with agentflow's own `sweep`.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.func import entrypoint, task
from langgraph.types import Command, Send

from agentflow.checkpoint import Retention, Saver, SweepReport
from agentflow.errors import InvalidInputError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import acquired, at, dumped, ids, lease, load, plain
from agentflow.testing.savers.deltas import line, of_run, run
from agentflow.testing.savers.graphs import CONFIG, Graph, asks, chain, letters, logs
from agentflow.types import SystemClock

DAY = timedelta(days=1)
LATEST = Retention(keep_last=1)
OLD = Retention(ttl=DAY)
EVERYTHING: Any = None


class Later:
    """A clock that is two days ahead."""

    def now(self) -> datetime:
        """Return the time in two days."""
        return SystemClock().now() + 2 * DAY


def thread(name: str) -> RunnableConfig:
    """Name a thread."""
    return {"configurable": {"thread_id": name}}


def swept(report: SweepReport) -> dict[str, tuple[int, bool]]:
    """Return what a report says of each thread."""
    return {each.thread_id: (each.checkpoints, each.is_deleted) for each in report.swept}


def fails(_: Any) -> Any:
    """Fail as a node does."""
    raise RuntimeError("the node failed")


def many(saver: Saver, *, stops: bool) -> Graph:
    """Make a graph that sends and joins, and may stop between the two."""
    builder = chain(("a", logs("a")), ("z", logs("z")))
    builder.add_node("b", logs("b"))
    builder.add_node("c", logs("c"))
    builder.add_node("d", logs("d"), defer=True)
    builder.add_conditional_edges("a", lambda _: [Send("b", {}), Send("b", {}), "c"], ["b", "c"])
    builder.add_edge(["b", "c"], "d")
    return builder.compile(checkpointer=saver, interrupt_before=["b", "c"] if stops else [])


class RetentionSuite(Suite):
    """`sweep` and `asweep`."""

    def test_last_checkpoints_of_each_namespace_stay(self, saver: Saver, another: Saver) -> None:
        child = letters("x", "y").compile(checkpointer=True)
        graph: Graph = chain(("a", logs("a")), ("b", child)).compile(checkpointer=saver)
        for _ in range(3):
            for name in "tuv":
                run(graph, {"log": ["input"]}, thread(name))
        before = ids(saver.list(at(ns="b")))
        report = saver.sweep(Retention(keep_last=2), thread_ids=["t", "u", "none"])
        assert swept(report) == {"t": (20, False), "u": (20, False)}
        assert report.threads == 3
        for reader in (saver, another):
            for ns in ("", "b"):
                assert len(list(reader.list(at(ns=ns)))) == 2
            assert ids(reader.list(at(ns="b"))) == before[:2]
            assert len(list(reader.list(thread("v")))) == 24

    @pytest.mark.parametrize("retention", [LATEST, Retention(keep_last=3), OLD])
    def test_dry_run_says_what_then_goes_and_changes_nothing(
        self, saver: Saver, retention: Retention
    ) -> None:
        for number, name in enumerate("tuvw"):
            graph: Graph = letters(*"abcdef"[: number + 1]).compile(checkpointer=saver)
            run(graph, {"log": []}, thread(name))
        waiting: Graph = chain(("a", asks("ok?"))).compile(checkpointer=saver)
        run(waiting, {"log": []}, thread("x"))
        before = [plain(each) for each in saver.list(EVERYTHING)]
        said = saver.sweep(retention, dry_run=True, clock=Later())
        assert [plain(each) for each in saver.list(EVERYTHING)] == before
        done = asyncio.run(saver.asweep(retention, clock=Later()))
        assert (said.swept, said.spared, said.threads) == (done.swept, done.spared, done.threads)
        assert len(list(saver.list(EVERYTHING))) == len(before) - done.checkpoints
        assert done.spared == {"unfinished": 1}
        again = saver.sweep(retention, clock=Later())
        assert again.swept == ()

    def test_thread_is_deleted_when_its_newest_checkpoint_is_old(self, saver: Saver) -> None:
        graph: Graph = letters("a").compile(checkpointer=saver)
        run(graph, {"log": []}, thread("t"))
        assert swept(saver.sweep(OLD)) == {}
        assert swept(saver.sweep(OLD, clock=Later())) == {"t": (3, True)}
        assert list(saver.list(EVERYTHING)) == []
        run(graph, {"log": ["anew"]}, thread("t"))
        assert graph.get_state(thread("t")).values == {"log": ["anew", "a"]}

    def test_thread_with_open_question_is_let_be_until_it_is_answered(self, saver: Saver) -> None:
        child = chain(("x", logs("x")), ("y", asks("ok?"))).compile(checkpointer=True)
        graph: Graph = chain(("a", logs("a")), ("b", child)).compile(checkpointer=saver)
        run(graph, {"log": []})
        before = [plain(each) for each in saver.list(EVERYTHING)]
        for retention in (LATEST, OLD):
            assert saver.sweep(retention, clock=Later()).spared == {"unfinished": 1}
        assert [plain(each) for each in saver.list(EVERYTHING)] == before
        output = run(graph, Command(resume="yes"))
        assert saver.sweep(LATEST).checkpoints > 0
        assert graph.get_state(CONFIG).values == output

    def test_thread_with_work_left_is_let_be(self, saver: Saver) -> None:
        stopped: Graph = letters("a", "b").compile(checkpointer=saver, interrupt_before=["b"])
        run(stopped, {"log": []}, thread("stopped"))
        failing: Graph = chain(("a", logs("a")), ("b", fails)).compile(checkpointer=saver)
        with pytest.raises(RuntimeError):
            run(failing, {"log": []}, thread("failed"))
        run(many(saver, stops=True), {"log": []}, thread("sends"))
        updated: Graph = letters("a", "b").compile(checkpointer=saver)
        run(updated, {"log": []}, thread("updated"))
        updated.update_state(thread("updated"), {"log": ["by hand"]}, as_node="a")
        started: Graph = letters("a").compile(checkpointer=saver, interrupt_before=["a"])
        run(started, {"log": []}, thread("started"))
        for retention in (LATEST, OLD):
            report = saver.sweep(retention, clock=Later())
            assert report.swept == ()
            assert report.spared == {"unfinished": 5}

    def test_superstep_whose_writes_are_not_applied_is_work_left(self, saver: Saver) -> None:
        """There `StateSnapshot.next` is empty, although later nodes have not run."""
        graph: Graph = letters("a", "b").compile(checkpointer=saver, interrupt_before=["b"])
        run(graph, {"log": []})
        (task_of_b,) = graph.get_state(CONFIG).tasks
        saver.put_writes(load(saver).config, [("log", ["b"])], task_of_b.id)
        assert graph.get_state(CONFIG).next == ()
        assert saver.sweep(OLD, clock=Later()).spared == {"unfinished": 1}

    def test_any_graph_that_has_ended_is_swept(self, saver: Saver) -> None:
        run(many(saver, stops=False), {"log": []}, thread("sends"))

        @task
        def doubled(number: int) -> int:
            return 2 * number

        @entrypoint(checkpointer=saver)
        def flow(number: int) -> int:
            return doubled(number).result()

        flow.invoke(1, thread("functional"))
        run(line(saver), {"log": []}, thread("deltas"))
        child = letters("x").compile()
        nested: Graph = chain(("a", child), ("b", logs("b"))).compile(checkpointer=saver)
        run(nested, {"log": []}, thread("nested"))
        asking: Graph = chain(("a", asks("ok?"))).compile(checkpointer=saver)
        run(asking, {"log": []}, thread("answered"))
        run(asking, Command(resume=1), thread("answered"))
        names = {"sends", "functional", "deltas", "nested", "answered"}
        assert swept(saver.sweep(LATEST, dry_run=True)).keys() == names
        assert saver.sweep(OLD, clock=Later()).spared == {}
        assert list(saver.list(EVERYTHING)) == []

    def test_thread_that_a_run_holds_is_let_be(self, saver: Saver) -> None:
        graph: Graph = letters("a").compile(checkpointer=saver)
        run(graph, {"log": []})
        holder = acquired(saver, lease(1))
        for retention in (LATEST, OLD):
            for each in (saver, holder):
                report = each.sweep(retention, clock=Later())
                assert (report.swept, report.spared) == ((), {"held": 1})
        asyncio.run(saver.release(lease(1)))
        assert saver.sweep(LATEST).checkpoints == 2

    @pytest.mark.parametrize("keep_last", [1, 2, 5])
    def test_delta_channels_and_branches_keep_their_values(
        self, saver: Saver, another: Saver, keep_last: int
    ) -> None:
        graph = line(saver)
        for turn in range(3):
            run(graph, {"log": [f"input {turn}"]}, of_run(f"r{turn}"))
        for place in (9, 4, 7):
            old = list(graph.get_state_history(CONFIG))[place]
            run(graph, None, old.config)
        expected = {each.config["configurable"]["checkpoint_id"]: dumped(each.values)
                    for each in graph.get_state_history(CONFIG)}  # fmt: skip
        saver.sweep(Retention(keep_last=keep_last))
        for reader in (saver, another):
            left = ids(reader.list(at()))
            assert left == list(expected)[:keep_last]
            for each in line(reader).get_state_history(CONFIG):
                name = each.config["configurable"]["checkpoint_id"]
                assert dumped(each.values) == expected[name]
        before = graph.get_state(CONFIG).values["log"]
        assert run(line(another), {"log": ["more"]})["log"][: len(before)] == before

    def test_threads_that_are_left_out_are_let_be(self, saver: Saver) -> None:
        graph: Graph = letters("a").compile(checkpointer=saver)
        for number in range(3):
            run(graph, {"log": []}, thread(f"t{number}"))

        async def choose(names: Any) -> dict[str, Retention]:
            assert list(names) == ["t0", "t1", "t2"]
            return {"t0": LATEST, "t2": Retention(keep_last=2)}

        assert swept(asyncio.run(saver.asweep(choose))) == {"t0": (2, False), "t2": (1, False)}

    def test_thread_is_asked_about_again_before_it_is_deleted(self, saver: Saver) -> None:
        """A run may have been submitted to it meanwhile."""
        graph: Graph = letters("a").compile(checkpointer=saver)
        for name in ("t0", "t1"):
            run(graph, {"log": []}, thread(name))
        asked: list[list[str]] = []

        async def choose(names: Any) -> dict[str, Retention]:
            asked.append(list(names))
            return {} if names == ["t0"] else dict.fromkeys(names, OLD)

        report = asyncio.run(saver.asweep(choose, clock=Later()))
        assert asked == [["t0", "t1"], ["t0"], ["t1"]]
        assert (swept(report), report.spared) == ({"t1": (3, True)}, {"unfinished": 1})
        assert len(list(saver.list(thread("t0")))) == 3

    @pytest.mark.parametrize("limits", [{"keep_last": 0}, {"ttl": 0}, {"ttl": -DAY}])
    def test_limit_that_would_delete_what_is_in_use_is_refused(self, limits: Any) -> None:
        with pytest.raises(InvalidInputError, match="retention"):
            Retention(**limits)
