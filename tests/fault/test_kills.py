"""A worker killed at any place: its run ends as if nothing had happened.

Every commit of an uninterrupted run is a place, before it and after it; so is the statement in the
middle of a checkpoint, each call of a verb of the run store or of the checkpointer's rows, and the
inside of each node. One worker is killed at each, for graphs of five shapes, with runs and
checkpoints in one database and in two.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from agentflow.interrupts import proposal_hash
from agentflow.types import RunStatus, WaitStatus
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer
from tests.fault.graphs import LINEAR
from tests.fault.ledger import Entry, Ledger
from tests.fault.sabotage import FAILPOINTS, Place
from tests.fault.scene import LONG, Approver, Scene, assert_sound, durable_nodes, open_scene, places

INPUT = {"input": "x"}
OUTPUT = {"input": "x", "log": [f"{name}(x)" for name in LINEAR]}
SHAPES: dict[str, dict[str, Any]] = {
    "linear": INPUT,
    "fan_out": INPUT,
    "nested": INPUT,
    "loop": {"wanted": 4},
    "questions": {"wanted": 2},
}
"""Graphs, and what they are given."""
CONCURRENCY = 10


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("postgres-and-sqlite", marks=pytest.mark.postgres),
    ]
)
async def placed(
    request: pytest.FixtureRequest, ledger: Ledger, forkserver: ForkServer
) -> AsyncIterator[Scene]:
    """A scene with runs and checkpoints in one database, or in one of their own each."""
    first, _, second = request.param.partition("-and-")
    url: str = request.getfixturevalue(f"{first}_url")
    checkpoints: str = request.getfixturevalue(f"{second}_url") if second else ""
    async with open_scene(url, ledger, forkserver, checkpoints=checkpoints) as scene:
        scene.deciders.append(Approver(scene))
        yield scene


@pytest.mark.parametrize("graph", SHAPES)
async def test_run_killed_at_any_place_ends_as_its_twin(
    placed: Scene, sampler: Sampler, tally: Tally, graph: str
) -> None:
    """Also where every commit holds something else: PostgreSQL has other moments then."""
    scene = placed
    kills = executed_again = 0
    # One or the other in a sample.
    for company in sampler.some([False, True], 1):
        tag = "company-" if company else ""
        found = await survey(scene, graph, company=company, twin=f"{tag}twin")
        tried = {f"{tag}{place}": place for place in sampler.some(found, 4)}
        kills += await scene.kill_each(
            tried,
            lambda name: scene.app.submit(graph, SHAPES[graph], run_id=name, queue=name),
            company=company,
        )
        executed_again += await settle(scene, tried, twin=f"{tag}twin")
    assert kills > 0, "nobody was killed"
    tally(kills=kills, executed_again=executed_again)


async def settle(
    scene: Scene, tried: dict[str, Place], *, twin: str, was_recovered: bool = False
) -> int:
    """Let a successor end the runs of killed workers, and hold them against their twin.

    Another one may have been killed in between, and have gone beyond the place of the first.

    Returns how many executions of nodes were lost, and repeated.
    """
    saved = {name: await durable_nodes(scene.app, name) for name in tried}
    begun = {name: scene.entered(name) for name in tried}
    successor = scene.worker(lease=LONG, queues=list(tried), concurrency=CONCURRENCY)
    usual, ended = scene.entered(twin), await scene.app.get_run(twin)
    expected = (await scene.app.state(twin)).values
    for run in await scene.ended(tried):
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, ended.output), run.id
        assert (await scene.app.state(run.id)).values == expected, run.id
        again = Counter({name: (begun[run.id] - saved[run.id])[name] for name in usual})
        assert scene.entered(run.id) == usual + again, (run.id, begun[run.id], saved[run.id])
        await assert_approvals_were_used_once(scene, run.id)
    # The places mean what they say: before the writes of a node it counts as not executed.
    for name, place in tried.items():
        if place.kind == "writes" and ended.graph == "linear" and not was_recovered:
            executed = ("__start__", *LINEAR)[: place.number - (place.moment == "before")]
            assert set(saved[name]) == set(executed), place
    assert_sound(scene.url, [*tried, twin], saved=scene.saved_url)
    assert_never_more_runs_at_once(scene.ledger.entries(pid=successor.pid), CONCURRENCY)
    return sum((begun[name] - saved[name]).total() for name in tried)


async def assert_approvals_were_used_once(scene: Scene, run_id: str) -> None:
    """Hold what nodes acted on against what was shown to whoever approved it."""
    asked = (await scene.app.approvals.list(run_id=run_id, status=None)).items
    assert all(each.status is WaitStatus.RESOLVED for each in asked)
    assert all(each.proposal_hash == proposal_hash(each.request) for each in asked)
    used = [e["approved"] for e in scene.ledger.entries(event="enter", run=run_id, node="ask")]
    approved = [each.request.proposal for each in asked]
    assert len(approved) == len({str(each) for each in approved}), "a question was asked twice"
    assert all(each in approved for each in used)
    assert {str(each) for each in used} == {str(each) for each in approved}


def assert_never_more_runs_at_once(entries: Iterable[Entry], most: int) -> None:
    """Count the runs that are inside a node of one process, as the ledger saw them."""
    inside: Counter[str] = Counter()
    for entry in entries:
        if entry["event"] in {"enter", "leave"}:
            inside[entry["run"]] += 1 if entry["event"] == "enter" else -1
            assert sum(count > 0 for count in inside.values()) <= most


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
    tried = {str(place): place for place in beginning}
    kills = await scene.kill_each(
        tried,
        lambda name: scene.app.submit(
            "linear", {"input": "2"}, run_id=name, thread_id=f"t-{name}", queue=name
        ),
    )
    assert kills == len(beginning)
    scene.worker(lease=LONG, queues=list(tried), concurrency=10)
    for run in await scene.ended(str(p) for p in beginning):
        assert run.status is RunStatus.SUCCEEDED
        log = [f"{name}({number})" for number in "12" for name in LINEAR]
        assert run.output == {"input": "2", "log": log}, run.id
        assert scene.entered(run.id) == Counter(LINEAR), run.id
    for name in first:
        assert (await scene.app.get_run(name)).output["log"] == [f"{n}(1)" for n in LINEAR]
    assert_sound(scene.url, [*first, *(str(p) for p in beginning)])
    tally(kills=len(beginning))


async def survey(
    scene: Scene, graph: str = "linear", *, company: bool = False, twin: str = "twin"
) -> list[Place]:
    """Run the twin, which nobody kills, and return every place that it passed.

    A put that is alone in its batch is one statement, which commits by itself: there is no moment
    at which it was executed and not committed. In company there is.
    """
    await scene.app.submit(graph, SHAPES[graph], run_id=twin, queue=twin)
    worker = scene.worker(lease=LONG, queues=[twin], reports=True, company=company)
    (run,) = await scene.ended([twin])
    assert run.status is RunStatus.SUCCEEDED
    # It reports its last commits after the database has them.
    worker.kill(signal.SIGTERM)
    assert await scene.gone(worker) == 0, worker.output()
    found = [
        place
        for place in places(scene.ledger.entries(event="place", pid=worker.pid))
        # A heartbeat may have kept it company by chance, but will not do so for its victims.
        if company or (place.kind, place.moment) != ("insert", "after")
    ]
    if graph == "linear":
        assert run.output == OUTPUT
        is_apart = bool(scene.checkpoints)
        _assert_all_commits_are_places(found, company=company, is_apart=is_apart)
    return found


def _assert_all_commits_are_places(found: list[Place], *, company: bool, is_apart: bool) -> None:
    counts = Counter((p.kind, p.moment) for p in found if "." not in p.kind)
    assert counts == {
        (kind, moment): count
        for kind, count in {
            "claim": 1,
            "thread": 2,  # acquired, released
            "run": 1 + is_apart,  # started, if not with the claim; succeeded
            "node": 4,
            "writes": 5,  # LangGraph's own first task, and each node's
            "checkpoint": 6,  # of the input, and of each superstep
            "insert": 6,
        }.items()
        for moment in ("before", "after")
        if company or (kind, moment) != ("insert", "after")
    }


def test_every_failpoint_is_armed_by_a_test() -> None:
    project = Path(__file__).parents[2]

    def found(folder: str, pattern: str) -> set[str]:
        modules = (m.read_text(encoding="utf-8") for m in (project / folder).rglob("*.py"))
        return {name for text in modules for name in re.findall(pattern, text)}

    named = found("agentflow", r'\bfailpoint\(\s*"([^"]+)"')
    # Some tests arm what their parameters name.
    armed = found("tests", r'"([a-z_.]+)"')
    assert set(FAILPOINTS) <= named <= armed
