"""The graph that tasks make: held against a model of its rules, and what is refused before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentflow.errors import InvalidInputError, SerializationError
from agentflow.tasks import Task, TaskCall, TaskRunner
from agentflow.tasks.graph import found_results
from agentflow.tasks.results import check_json

NAMES = "abcde"
STATUSES = ("success", "failure", "skipped", "cancelled")


@dataclass(frozen=True)
class Given:
    """A graph of tasks, how each behaves, and what a snapshot says of some."""

    dependencies: Mapping[str, tuple[str, ...]]
    fails: frozenset[str]
    continues: frozenset[str]
    unwanted: frozenset[str]
    """Those whose condition does not hold."""
    snapshot: Mapping[str, str]


@st.composite
def given_tasks(draw: st.DrawFn) -> Given:
    names = NAMES[: draw(st.integers(1, 5))]
    some = st.frozensets(st.sampled_from(names))
    dependencies = {
        name: tuple(sorted(draw(st.frozensets(st.sampled_from(names[:index]))))) if index else ()
        for index, name in enumerate(names)
    }
    snapshot = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(STATUSES)))
    return Given(dependencies, draw(some), draw(some), draw(some), snapshot)


def modelled(case: Given) -> tuple[dict[str, str], set[str]]:
    """Return the status of each task in the end, and which tasks are run."""
    status: dict[str, str] = {}
    run = set()
    for name, dependencies in case.dependencies.items():  # names are in a valid order
        if case.snapshot.get(name) == "success":
            status[name] = "success"
        elif not all(
            status[each] == "success" or (status[each] == "failure" and each in case.continues)
            for each in dependencies
        ):
            status[name] = "skipped:dependency"
        elif name in case.unwanted:
            status[name] = "skipped:condition"
        else:
            run.add(name)
            status[name] = "failure" if name in case.fails else "success"
    return status, run


def tasks_of(case: Given, ran: list[str]) -> list[Task]:
    async def work(call: TaskCall) -> list[Any]:
        ran.append(call.name)
        if call.name in case.fails:
            raise ValueError(call.name)
        return [call.name, {name: each.data for name, each in call.results.items()}]

    tasks = [
        Task(
            name=name,
            run=work,
            dependencies=dependencies,
            condition=partial(_is_wanted, case),
            continue_on_error=name in case.continues,
        )
        for name, dependencies in case.dependencies.items()
    ]
    return tasks[::-1]  # in whichever order they are given


async def _is_wanted(case: Given, call: TaskCall) -> bool:
    return call.name not in case.unwanted


def results_of(case: Given) -> dict[str, dict[str, Any]]:
    return {
        name: {"status": status} | ({"data": f"old {name}"} if status == "success" else {})
        for name, status in case.snapshot.items()
    }


async def end_of(case: Given, snapshot: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Run the graph as LangGraph does; return the results, JSON and back, and what ran."""
    ran: list[str] = []
    runner = TaskRunner(tasks_of(case, ran))
    output = await runner.graph.ainvoke({"snapshot": snapshot})
    results: dict[str, Any] = json.loads(json.dumps(found_results(output)))
    assert runner.snapshot() == results
    return results, ran


def statuses(results: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: ":".join([each["status"], *([each["reason"]] if "reason" in each else [])])
        for name, each in results.items()
    }


@settings(max_examples=60, deadline=None)
@given(given_tasks())
def test_any_graph_with_any_snapshot_ends_as_the_model_says(case: Given) -> None:
    expected, runs = modelled(case)
    results, ran = asyncio.run(end_of(case, results_of(case)))
    assert statuses(results) == expected
    assert sorted(ran) == sorted(runs), "each is run once, or not at all"
    for name in case.dependencies.keys() - runs:
        if expected[name] == "success":
            assert results[name] == {"status": "success", "data": f"old {name}"}


@settings(max_examples=25, deadline=None)
@given(given_tasks(), st.data())
def test_snapshot_of_any_moment_leads_to_the_same_end(case: Given, data: st.DataObject) -> None:
    """Those of all moments are parts of the end that hold what comes before each of their own."""
    expected, _ = asyncio.run(end_of(case, results_of(case)))
    reached = data.draw(st.frozensets(st.sampled_from(sorted(expected))))
    moment = {
        name: expected[name]
        for name in expected
        if name in reached and _ancestors(case, name) <= reached
    }
    again, ran = asyncio.run(end_of(case, results_of(case) | moment))
    assert {name: (each["status"], each.get("data")) for name, each in again.items()} == {
        name: (each["status"], each.get("data")) for name, each in expected.items()
    }
    assert not {name for name in moment if moment[name]["status"] == "success"} & set(ran)


def _ancestors(case: Given, name: str) -> set[str]:
    found = set(case.dependencies[name])
    return found.union(*(_ancestors(case, each) for each in found))


def nothing(call: TaskCall) -> None:
    del call


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ([], "must not be empty"),
        ([("a", []), ("a", [])], "'a' is given to 2 tasks"),
        ([("a", ["z"])], "a.dependencies: there is no task 'z'"),
        ([("a", ["a"])], "a -> a"),
        ([("x", []), ("a", ["c"]), ("b", ["a"]), ("c", ["b"])], "go in a circle"),
        ([("", [])], "must be text, not empty"),
        ([("a|b", [])], "must not contain"),
        ([("snapshot", [])], "'snapshot' is taken"),
    ],
)
def test_tasks_that_make_no_graph_are_refused_by_name(
    tasks: list[tuple[str, list[str]]], problem: str
) -> None:
    made = [Task(name=name, run=nothing, dependencies=each) for name, each in tasks]
    with pytest.raises(InvalidInputError) as refused:
        TaskRunner(made)
    assert problem in str(refused.value)


def test_time_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="timeout: must be above 0"):
        TaskRunner([Task(name="a", run=nothing, timeout=0)])


@pytest.mark.parametrize(
    ("snapshot", "problem"),
    [
        ([], "must be a mapping"),
        ({1: {"status": "success"}}, "names of tasks must be text"),
        ({"a": "success"}, "a: "),
        ({"a": {"status": "done"}}, "a.status: "),
        ({"a": {"status": "success", "secret-7": 1}}, "a.secret-7: "),
        ({"a": {"status": "failure", "error": {"type": "E"}}}, "a.error.message: "),
        ({"a": {"status": "success", "data": {"x": (1,)}}}, "a.data: "),
    ],
)
def test_what_is_no_snapshot_is_refused_by_place(snapshot: Any, problem: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        TaskRunner([Task(name="a", run=nothing)], snapshot=snapshot)
    assert problem in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=25)
@given(JSON)
def test_what_json_can_hold_is_accepted(value: Any) -> None:
    check_json(value)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ((1, 2), "at the top"),
        ({"a": [1, {2}]}, "a[1]"),
        ({"a": {1: 2}}, "at a"),
        ([float("nan")], "[0]"),
        ("\ud800", "at the top"),
        ({"a": b"x"}, "at a"),
        ({"when": SerializationError}, "at when"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_place(value: Any, path: str) -> None:
    with pytest.raises(SerializationError) as refused:
        check_json(value)
    assert path in str(refused.value)
