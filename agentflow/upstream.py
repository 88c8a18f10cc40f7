"""What has to be mended in LangGraph for graphs to run durably, as long as it is broken there."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from langgraph._internal._scratchpad import PregelScratchpad
from langgraph.checkpoint.serde.types import ERROR
from langgraph.pregel import _algo
from langgraph.pregel._loop import AsyncPregelLoop
from langgraph.pregel._runner import PregelRunner
from langgraph.types import PregelExecutableTask, interrupt

Check = Callable[[str, int, Any, Any], None]
"""Gets a task's id, the position of a question in it, what it asks and its `response_schema`."""

_check: ContextVar[Check | None] = ContextVar("agentflow_answers_checked", default=None)


class _Nothing:
    """A put that was never made, for those who wait for it."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


def mend() -> None:
    """Mend what follows; safe to call again.

    - A subgraph with `checkpointer=False` under `durability="sync"`: LangGraph (1.2) waits after
      each superstep for the loop's last put, and fails with `AttributeError` where the loop has no
      checkpointer to put with.
    - Answers go to questions by their position alone: see `answers_checked`.
    - A node's `error_handler` gets whatever the node raises while other tasks run, also what is no
      `Exception` and stops everything; of a node that runs alone it gets exceptions only.
    """
    if not hasattr(AsyncPregelLoop, "_put_checkpoint_fut"):
        AsyncPregelLoop._put_checkpoint_fut = _Nothing()  # type: ignore[assignment]  # awaited only
    if _algo._scratchpad is not _checked_scratchpad:
        _algo._scratchpad = _checked_scratchpad
    if PregelRunner._should_route_to_error_handler is not _is_handled:
        PregelRunner._should_route_to_error_handler = _is_handled  # type: ignore[assignment,method-assign]  # mended


@contextmanager
def answers_checked(check: Check) -> Iterator[None]:
    """Have `check` called by each `interrupt` that has an answer, before it returns that.

    It holds for the graphs that are driven inside of it. What it raises, the `interrupt` raises.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


_scratchpad = _algo._scratchpad
_should_route = PregelRunner._should_route_to_error_handler


def _is_handled(runner: PregelRunner, task: PregelExecutableTask) -> bool:
    """Say whether a task that has failed has somebody who handles that."""
    # Its error is among its writes by then.
    stops = any(
        isinstance(value, BaseException)
        and not isinstance(value, (Exception, asyncio.CancelledError))
        for channel, value in task.writes
        if channel == ERROR
    )
    return not stops and _should_route(runner, task)


def _checked_scratchpad(*args: Any, **named: Any) -> PregelScratchpad:
    """Make what a task knows of its answers; LangGraph's own function does."""
    made = _scratchpad(*args, **named)
    check = _check.get()
    if check is None or not made.resume:
        return made
    task_id: str = named["task_id"] if "task_id" in named else args[2]
    return replace(made, interrupt_counter=_Positions(made, task_id, check))


class _Positions:
    """Counts the questions of a task; `interrupt` asks it for the position of each."""

    def __init__(self, scratchpad: PregelScratchpad, task_id: str, check: Check) -> None:
        self._count = scratchpad.interrupt_counter
        self._answers = scratchpad.resume
        self._task_id = task_id
        self._check = check

    def __call__(self) -> int:
        position = self._count()
        if position < len(self._answers):
            # What is asked is known to nobody but `interrupt`, whose name everybody has imported.
            asking = sys._getframe(1)
            if asking.f_code is interrupt.__code__:
                asked = asking.f_locals
                self._check(self._task_id, position, asked["value"], asked["response_schema"])
        return position
