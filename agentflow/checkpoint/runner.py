"""Running work in steps: each step in a transaction or a read of its own, one after the other.

The work is the same for both APIs, and so is the way through it; how a step is waited for differs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, cast

from agentflow.checkpoint.intake import Intake
from agentflow.checkpoint.sql import on_rows
from agentflow.checkpoint.steps import Ask, Change, Read, Step, Steps, Wait
from agentflow.database import Database
from agentflow.errors import AgentflowError

T = TypeVar("T")


class StepRunner:
    """Runs steps on a database, for callers that wait by blocking or by awaiting."""

    def __init__(self, database: Database, intake: Intake) -> None:
        """Read from `database`, and give what changes threads to `intake`."""
        self._database = database
        self._intake = intake

    def run(self, steps: Steps[T], answer: Callable[[Ask], Any] | None = None) -> T:
        """Run steps and wait for each of them; `answer` is what an `Ask` is put to."""

        async def outcome_of(step: Step) -> Any:
            if isinstance(step, Read):
                return self._database.query_now(on_rows(step.function))
            if isinstance(step, Change):
                return self._intake.step(step.thread, step.function).result()
            if isinstance(step, Wait):
                for pending in step.pending:
                    pending.wait()
                return None
            assert answer is not None
            return answer(step)

        # A coroutine that awaits nothing but what blocks is over when it is first sent something.
        try:
            _follow(steps, outcome_of).send(None)
        except StopIteration as stop:
            return cast("T", stop.value)
        raise AssertionError

    async def arun(
        self, steps: Steps[T], answer: Callable[[Ask], Awaitable[Any]] | None = None
    ) -> T:
        """Run steps without blocking the event loop; see `run`."""

        async def outcome_of(step: Step) -> Any:
            if isinstance(step, Read):
                return await self._database.query(on_rows(step.function))
            if isinstance(step, Change):
                return await self._database.settled(self._intake.step(step.thread, step.function))
            if isinstance(step, Wait):
                for pending in step.pending:
                    await self._database.ended(pending)
                return None
            assert answer is not None
            return await answer(step)

        return await _follow(steps, outcome_of)


async def _follow(steps: Steps[T], outcome_of: Callable[[Step], Awaitable[Any]]) -> T:
    """Send each step's outcome, or throw its error, to where the next step comes from."""
    go_on: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            step = go_on()
        except StopIteration as stop:
            return cast("T", stop.value)
        try:
            outcome = await outcome_of(step)
        except AgentflowError as exc:
            go_on = partial(steps.throw, exc)
        else:
            go_on = partial(steps.send, outcome)
