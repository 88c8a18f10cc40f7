"""What failed, and how often."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from langgraph.types import StateSnapshot

from agentflow.drive.doubts import is_doubt
from agentflow.types import RunFailure


@dataclass(frozen=True, slots=True)
class Failed:
    """What an attempt left behind when it failed."""

    node: str | None
    attempt: int
    failures: Mapping[str, int]
    """By task id, how often each task of the superstep has failed."""
    checkpoint_id: str | None
    step: int | None


def count(
    state: StateSnapshot,
    *,
    begun_at: str | None,
    attempt: int,
    failures: Mapping[str, int],
    timed_out: str | None,
) -> Failed:
    """Read what failed off a thread, and count: since the last progress, and for each task.

    Args:
        state: The thread after the failure.
        begun_at: The checkpoint at which the attempt began.
        attempt: The number of the attempt.
        failures: The failures of each task before it.
        timed_out: The node that was stopped from outside. It has left no error behind.
    """
    checkpoint_id = state.config["configurable"].get("checkpoint_id")
    has_moved = checkpoint_id != begun_at
    before = {} if has_moved else failures
    tasks = [task for task in state.tasks if task.error is not None and not is_doubt(task.error)]
    if timed_out is not None and not tasks:
        unfinished = [task for task in state.tasks if task.result is None and not task.interrupts]
        # A node of a subgraph is not among the tasks; the one that called the subgraph is.
        tasks = [task for task in unfinished if task.name == timed_out] or unfinished
    counts = {task.id: before.get(task.id, 0) + 1 for task in tasks}
    return Failed(
        node=timed_out or (tasks[0].name if tasks else None),
        attempt=max([1 if has_moved else attempt, *counts.values()]),
        failures={**before, **counts},
        checkpoint_id=checkpoint_id,
        step=(state.metadata or {}).get("step"),
    )


def describe(error: Exception, node: str | None, attempt: int) -> RunFailure:
    """Describe an error, which is user code: not even its text need be there."""
    try:
        message = _storable(str(error))
    except Exception:  # noqa: BLE001 -- user code
        message = "<no text: its str raises>"
    try:
        trace = _storable("".join(traceback.format_exception(error)))
    except Exception:  # noqa: BLE001 -- user code
        trace = None
    cls = type(error)
    return RunFailure(
        type=f"{cls.__module__}.{cls.__qualname__}",
        message=message,
        node=node,
        attempt=attempt,
        traceback=trace,
    )


def _storable(text: str) -> str:
    """Write out what is no character, such as half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()
