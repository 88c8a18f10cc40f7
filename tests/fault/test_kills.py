"""A worker killed at any place: its run ends as if nothing had happened.

Every commit of an uninterrupted run is a place, before it and after it; so is the statement in the
middle of a checkpoint, and the inside of each node. One worker is killed at each.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from agentflow.types import RunStatus
from tests.fault.conftest import Sampler, Tally
from tests.fault.graphs import LINEAR
from tests.fault.sabotage import FAILPOINTS, Place
from tests.fault.scene import Scene, assert_sound, durable_nodes, places

INPUT = {"input": "x"}
OUTPUT = {"input": "x", "log": [f"{name}(x)" for name in LINEAR]}


@pytest.mark.parametrize("company", [False, True], ids=["alone", "in-company"])
async def test_run_killed_at_any_commit_ends_as_its_twin(
    scene: Scene, sampler: Sampler, tally: Tally, company: bool
) -> None:
    """Also where every commit holds something else: PostgreSQL has other moments then."""
    tried = sampler.some(await survey(scene, "linear", company=company), 12)
    await scene.kill_each(
        tried,
        lambda name: scene.app.submit("linear", INPUT, run_id=name, queue=name),
        company=company,
    )
    saved = {str(p): await durable_nodes(scene.app, str(p)) for p in tried}
    begun = {str(p): scene.entered(str(p)) for p in tried}
    scene.worker(queues=[str(p) for p in tried], concurrency=10)
    twin = await scene.app.get_run("twin")
    expected = (await scene.app.state("twin")).values
    for run in await scene.ended(str(p) for p in tried):
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, twin.output), run.id
        assert (await scene.app.state(run.id)).values == expected, run.id
        again = {name for name in begun[run.id] if name not in saved[run.id]}
        assert scene.entered(run.id) == Counter([*LINEAR, *again]), (run.id, saved[run.id])
    # The places mean what they say: before the writes of a node it counts as not executed.
    for place in tried:
        if place.kind == "writes":
            executed = ("__start__", *LINEAR)[: place.number - (place.moment == "before")]
            assert saved[str(place)] == set(executed), place
    assert_sound(scene.url, [*saved, "twin"])
    tally(kills=len(tried), executed_again=sum(len(set(begun[r]) - saved[r]) for r in saved))


async def test_second_run_of_a_thread_killed_before_its_first_checkpoint_runs_its_own_input(
    scene: Scene, tally: Tally
) -> None:
    """It must not take the head that the first run left for its own result."""
    beginning = [
        Place("claim", 1, "before"),
        Place("claim", 1, "after"),
        Place("thread", 1, "after"),
        Place("run", 1, "after"),
        Place("insert", 1, "before"),
        Place("checkpoint", 1, "before"),
    ]
    first = [f"first-{place}" for place in beginning]
    for name, place in zip(first, beginning, strict=True):
        await scene.app.submit("linear", {"input": "1"}, run_id=name, thread_id=f"t-{place}")
    scene.worker(concurrency=10)
    await scene.ended(first)
    await scene.kill_each(
        beginning,
        lambda name: scene.app.submit(
            "linear", {"input": "2"}, run_id=name, thread_id=f"t-{name}", queue=name
        ),
    )
    scene.worker(queues=[str(p) for p in beginning], concurrency=10)
    for run in await scene.ended(str(p) for p in beginning):
        assert run.status is RunStatus.SUCCEEDED
        log = [f"{name}({number})" for number in "12" for name in LINEAR]
        assert run.output == {"input": "2", "log": log}, run.id
        assert scene.entered(run.id) == Counter(LINEAR), run.id
    for name in first:
        assert (await scene.app.get_run(name)).output["log"] == [f"{n}(1)" for n in LINEAR]
    assert_sound(scene.url, [*first, *(str(p) for p in beginning)])
    tally(kills=len(beginning))


async def survey(scene: Scene, graph: str, *, company: bool = False) -> list[Place]:
    """Run the twin, which nobody kills, and return every place that it passed.

    A put that is alone in its batch is one statement, which commits by itself: there is no moment
    at which it was executed and not committed. In company there is.
    """
    await scene.app.submit(graph, INPUT, run_id="twin", queue="twin")
    twin = scene.worker(queues=["twin"], reports=True, company=company)
    (run,) = await scene.ended(["twin"])
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, OUTPUT)
    # It reports its last commits after the database has them.
    for kind in ("thread", "run"):
        scene.ledger.wait_for(event="place", kind=kind, number=2, moment="after", pid=twin.pid)
    twin.kill()
    twin.wait()
    found = [
        place
        for place in places(scene.ledger.entries(event="place", pid=twin.pid))
        # A heartbeat may have kept it company by chance, but will not do so for its victims.
        if company or (place.kind, place.moment) != ("insert", "after")
    ]
    assert Counter((p.kind, p.moment) for p in found) == {
        (kind, moment): count
        for kind, count in {
            "claim": 1,
            "thread": 2,  # acquired, released
            "run": 2,  # started, succeeded
            "node": 4,
            "writes": 5,  # LangGraph's own first task, and each node's
            "checkpoint": 6,  # of the input, and of each superstep
            "insert": 6,
        }.items()
        for moment in ("before", "after")
        if company or (kind, moment) != ("insert", "after")
    }
    return found


def test_every_failpoint_is_armed_by_a_test() -> None:
    project = Path(__file__).parents[2]
    named, armed = (
        {
            name
            for module in (project / folder).rglob("*.py")
            for name in re.findall(rf'\b{verb}\(\s*"([^"]+)"', module.read_text(encoding="utf-8"))
        }
        for folder, verb in (("agentflow", "failpoint"), ("tests", "arm"))
    )
    assert set(FAILPOINTS) <= named <= armed
