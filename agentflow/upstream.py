"""What has to be mended in LangGraph for graphs to run durably, as long as it is broken there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from langgraph._internal._scratchpad import PregelScratchpad
from langgraph.pregel import _algo
from langgraph.pregel._loop import AsyncPregelLoop
from langgraph.types import interrupt

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
    """
    if not hasattr(AsyncPregelLoop, "_put_checkpoint_fut"):
        AsyncPregelLoop._put_checkpoint_fut = _Nothing()  # type: ignore[assignment]  # awaited only
    if _algo._scratchpad is not _checked_scratchpad:
        _algo._scratchpad = _checked_scratchpad


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
