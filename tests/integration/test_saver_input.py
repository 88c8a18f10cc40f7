"""What is no id, no step and no version is refused by name, before anything is stored."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.stamps import KEY
from agentflow.errors import InvalidInputError


@pytest.fixture
def saver(database_url: str) -> Iterator[Saver]:
    """A checkpointer on an empty database."""
    with open_checkpointer(database_url) as opened:
        yield opened


def at(**named: Any) -> Any:
    return {"configurable": {"thread_id": "t", "checkpoint_ns": "", **named}}


@pytest.mark.parametrize(
    "config",
    [at(checkpoint_id=uuid.uuid4()), at(checkpoint_ns=7), at(thread_id="\ud800")],
    ids=["checkpoint", "namespace", "thread"],
)
def test_id_that_is_no_text_is_refused(saver: Saver, config: Any) -> None:
    for call in (
        lambda: saver.get_tuple(config),
        lambda: saver.put(config, empty_checkpoint(), {}, {}),
    ):
        with pytest.raises(InvalidInputError, match="invalid config"):
            call()
    assert list(saver.list(None)) == []


def test_checkpoint_whose_id_is_no_text_is_refused(saver: Saver) -> None:
    made: Any = {**empty_checkpoint(), "id": 7}
    with pytest.raises(InvalidInputError, match="checkpoint_id: is no text"):
        saver.put(at(), made, {}, {})
    with pytest.raises(InvalidInputError, match="task_id"):
        saver.put_writes(at(checkpoint_id="c"), [("x", 1)], None)  # type: ignore[arg-type]
    assert list(saver.list(None)) == []


@pytest.mark.parametrize("step", [2**70, -(2**40), "three", [1], True])
def test_step_that_is_no_number_of_a_step_is_kept_in_the_metadata(saver: Saver, step: Any) -> None:
    made = empty_checkpoint()
    saver.put(at(), made, {"step": step}, {})
    found = saver.get_tuple(at())
    assert found is not None
    assert found.metadata["step"] == step


@pytest.mark.parametrize("stamp", ['[{"a": 1}, [1], "", [2], 1, true]', "7", "{}", "", 5])
def test_stamp_that_is_none_counts_as_none(saver: Saver, stamp: Any) -> None:
    saver.put(at(**{KEY: stamp}), empty_checkpoint(), {}, {})
    assert len(list(saver.list(at()))) == 1


def test_tenant_that_cannot_be_stored_is_refused(database_url: str) -> None:
    with pytest.raises(InvalidInputError, match="tenant: holds a lone surrogate"):
        open_checkpointer(database_url, tenant="\ud800")


def test_versions_go_on_as_they_are(saver: Saver) -> None:
    assert saver.get_next_version(1, None) == 2  # type: ignore[comparison-overlap]
    assert saver.get_next_version(1.0, None) == 2.0  # type: ignore[arg-type,comparison-overlap]
    assert saver.get_next_version("0009.abc", None).startswith("0010.")
    with pytest.raises(InvalidInputError, match="begins with no number"):
        saver.get_next_version("abc", None)
