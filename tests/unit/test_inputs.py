"""What `submit` accepts, and what it refuses before anything is written."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired, Required, TypedDict

import pytest
from langgraph.graph import StateGraph
from langgraph.types import Command
from pydantic import BaseModel

from agentflow import RetryPolicy
from agentflow.drive import RegisteredGraph
from agentflow.errors import InvalidInputError
from agentflow.inputs import check_input, check_options, check_wait, check_worker
from agentflow.versions import fingerprint_of


class Inner(TypedDict):
    """A nested mapping."""

    n: int


class Typed(TypedDict, total=False):
    """A state as a mapping."""

    text: Required[str]
    count: int
    inner: NotRequired[Inner]
    log: Required[Annotated[list[str], operator.add]]
    anything: Any


class Model(BaseModel):
    """A state as a pydantic model."""

    text: str
    count: int = 0


@dataclass
class Data:
    """A state as a dataclass."""

    text: str
    count: int = 0


def registered(schema: Any, input_schema: Any = None) -> RegisteredGraph:
    """Register a graph with this state."""
    graph: Any = StateGraph(schema)
    graph.add_node("a", lambda _: None)
    graph.set_entry_point("a")
    compiled = graph.compile()
    return RegisteredGraph(
        graph=compiled,
        fingerprint=fingerprint_of(compiled),
        name="g",
        version="1",
        queue="default",
        retry=RetryPolicy(),
        context=None,
        input_schema=input_schema,
    )


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (Typed, {}),
        (Typed, {"text": "a", "count": 1}),
        (Typed, {"log": "one entry, which the reducer may take"}),
        (Typed, {"inner": {"n": 1}}),
        (Typed, {"anything": object()}),
        (Model, {"text": "a"}),
        (Model, Model(text="a")),
        (Data, Data("a")),
        (Data, {"text": "a"}),
    ],
)
def test_input_that_fits_is_accepted(schema: Any, value: Any) -> None:
    check_input(registered(schema), value)


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        (Typed, {"txet": "a"}, "txet: the graph has no such input key"),
        (Typed, {"text": 7}, "text: Input should be a valid string"),
        (Typed, {"inner": {"n": "x"}}, "inner.n: Input should be a valid integer"),
        (Typed, {"inner": {}}, "inner.n: Field required"),
        (Typed, "text", "must be a mapping"),
        (Typed, None, "must not be empty"),
        (Typed, Command(resume="yes"), "a Command is not an input"),
        (Model, {}, "text: Field required"),
        (Model, {"text": "a", "count": "many"}, "count: Input should be a valid integer"),
        (Data, {"count": 1}, "text:"),
    ],
)
def test_input_that_does_not_fit_is_refused_by_place(schema: Any, value: Any, problem: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        check_input(registered(schema), value)
    assert problem in str(refused.value)
    assert refused.value.subject == "input for graph 'g'"


def test_type_that_cannot_be_looked_up_is_checked_too() -> None:
    schema = Annotated[int, {"unit": "dollars"}]
    with pytest.raises(TypeError):
        hash(schema)
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="valid integer"):
            check_input(registered(Typed, input_schema=schema), "many")


def test_all_problems_are_told_at_once_and_without_the_values() -> None:
    with pytest.raises(InvalidInputError) as refused:
        check_input(registered(Typed), {"text": 1, "count": "hunter2", "other": 1})
    assert len(refused.value.problems) == 3
    assert "hunter2" not in str(refused.value)


def test_schema_of_the_registration_goes_before_the_graphs() -> None:
    graph = registered(Typed, input_schema=Model)
    check_input(graph, {"text": "a"})
    with pytest.raises(InvalidInputError, match="text: Field required"):
        check_input(graph, {"log": ["a"]})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"config": {"callbacks": []}}, "config: unknown keys callbacks"),
        ({"config": {"configurable": 7}}, "config.configurable: must be a mapping"),
        ({"config": {"configurable": {"thread_id": "t"}}}, "thread_id: is set by agentflow"),
        ({"config": {"configurable": {"checkpoint_id": "c"}}}, "checkpoint_id: is set by"),
        ({"config": {"configurable": {"__x": 1}}}, "__x: is set by agentflow"),
        ({"config": {"recursion_limit": 0}}, "recursion_limit: must be a positive integer"),
        ({"config": {"recursion_limit": "9"}}, "recursion_limit: must be a positive integer"),
        ({"metadata": {1: 2}}, "metadata: keys must be text"),
        ({"metadata": {"run_id": "r"}}, "metadata.run_id: is set by agentflow"),
        ({"start_at": datetime(2026, 1, 1)}, "start_at: must have a time zone"),  # noqa: DTZ001 -- the point
        ({"names": {"run_id": "half \udc80"}}, "run_id: must be text"),
        ({"on_existing": "replace"}, "on_existing: must be one of return, reject"),
    ],
)
def test_malformed_option_is_named(options: dict[str, Any], problem: str) -> None:
    fields = {"config": None, "metadata": None, "start_at": None, "on_existing": "return"}
    with pytest.raises(InvalidInputError) as refused:
        check_options(**{**fields, **options})
    assert problem in str(refused.value)


def test_good_options_are_kept() -> None:
    config = {"configurable": {"user": "ada"}, "recursion_limit": 9, "tags": ["t"]}
    kept = check_options(
        config=config,
        metadata={"m": 1},
        start_at=datetime(2026, 1, 1, tzinfo=UTC),
        on_existing="reject",
    )
    assert (kept.config, kept.metadata) == (config, {"m": 1})


@pytest.mark.parametrize(
    ("concurrency", "queues", "named"),
    [(0, ["q"], "concurrency"), (1.5, ["q"], "concurrency"), (1, "default", "queues")]
    + [(1, bad, "queues") for bad in ([], [""], [1])],
)
def test_worker_that_could_not_work_is_refused(concurrency: Any, queues: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{named}: must be"):
        check_worker(concurrency, queues, None)


@pytest.mark.parametrize(
    ("until", "timeout", "named"),
    [("never", 1, "until"), ("ended", float("nan"), "timeout"), ("ended", "1", "timeout")],
)
def test_what_cannot_be_waited_for_is_refused(until: str, timeout: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{named}: must be"):
        check_wait(until, timeout)
