"""`TaskRunner`: tasks, run durably from a snapshot of earlier results."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from warnings import warn

from agentflow.app import AgentFlow
from agentflow.errors import (
    InvalidInputError,
    NotFoundError,
    RunFailedError,
    ThreadBusyError,
)
from agentflow.tasks.graph import build_graph, found_results
from agentflow.tasks.plan import Plan, Task
from agentflow.tasks.results import (
    Progress,
    Snapshot,
    TaskResult,
    TaskStatus,
    UnknownTaskWarning,
    read_results,
)
from agentflow.types import Clock, Run, RunStatus, SystemClock, new_id

_LOOK = 1.0
"""Seconds after which a run that somebody else holds is tried for again."""


class TaskRunner:
    """Runs a graph of named tasks; what has succeeded before is not run again.

    Tasks go in supersteps, as nodes of LangGraph do: those whose dependencies are through run
    beside each other, and the next ones follow when all of them are through. The result of each is
    durable when it is there, also while others of its superstep still run.

    Example:
        ```python
        runner = TaskRunner([fetch, parse, load], snapshot=json.loads(saved))
        results = await runner.execute(context={"db": db})
        saved = json.dumps(runner.snapshot())
        ```
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        snapshot: Mapping[str, Any] | None = None,
        app: AgentFlow | None = None,
        url: str | None = None,
        run_id: str | None = None,
        name: str = "tasks",
        concurrency: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Prepare to run tasks.

        Args:
            tasks: The tasks, in any order.
            snapshot: Results of earlier runs, as `snapshot` returned them. Successes are kept, all
                else is evaluated again. Results of tasks that are not among `tasks` are carried
                along, with a warning; tasks that it has no result of are run.
            app: Where the run is stored; or `url`. With neither, it is in memory and the snapshot
                is all that remains of it.
            url: As `app`, opened for each execution.
            run_id: The id of the one run that is executed. Where it exists it is continued, in
                whichever process. Without an id each execution is a new run, which starts from
                what this runner knows.
            name: What the run shows as its graph.
            concurrency: How many tasks run at once; by default all that can.
            clock: The clock of the times in results.

        Raises:
            InvalidInputError: The tasks make no graph without cycles, the snapshot is none, or
                options do not fit together.
        """
        self._plan = Plan(tasks)
        problems = []
        if app is not None and url is not None:
            problems.append("app, url: give one of them")
        if concurrency is not None and concurrency < 1:
            problems.append("concurrency: must be at least 1")
        if problems:
            raise InvalidInputError("task runner", tuple(problems))
        self._progress = Progress(_plain({} if snapshot is None else snapshot))
        unknown = [each for each in self._progress.results if each not in self._plan.tasks]
        if unknown:
            warn(
                f"the snapshot holds results of tasks that there are not: {', '.join(unknown)}; "
                "they are carried along",
                UnknownTaskWarning,
                stacklevel=2,
            )
        self._app = app
        self._url = url or "memory://"
        self._fixed_id = run_id
        self._name = name
        self.run_id = run_id
        """The id of the run that is, or was last, executed."""
        self._running: AgentFlow | None = None
        self.graph = build_graph(
            self._plan,
            clock=clock or SystemClock(),
            progress=self._progress,
            concurrency=concurrency,
        )
        """The tasks as a LangGraph graph, to register elsewhere: its input is `{"snapshot": {}}`,
        its context the mapping that tasks are given."""

    async def execute(self, *, context: Mapping[str, Any] | None = None) -> dict[str, TaskResult]:
        """Run what has not succeeded, and return the results of all tasks by name.

        A task that fails does not raise here: its result says so. It returns when the run has
        ended, or waits for somebody, or has been cancelled; whoever else drives the run meanwhile
        is waited for.

        Args:
            context: What tasks are given and is never stored.

        Raises:
            MissingContextError: A key is missing; named with the task that needs it. Nothing was
                begun if the task says so in `needs`, else what was done by then is kept.
            InvalidInputError: The run of this id was begun with other tasks.
            RunFailedError: The run failed, which is more than the failure of a task. Execute it
                again to go on.
            PausedError: The run is paused.
        """
        given = dict(context or {})
        self._progress.begin()
        if (missing := self._plan.missing_context(given)) is not None:
            raise missing
        async with self._opened(given) as app:
            run = await self._begin(app)
            self._take(await _saved(app, run))
            run = await _driven(app, run)
            self._take(await _saved(app, run))
        if run.status is RunStatus.FAILED:
            raise self._progress.missing or _failure(run)
        if run.status is RunStatus.CANCELLED:
            self._cancel_rest()
        results = read_results(self._progress.results)
        return {name: results[name] for name in self._plan.tasks if name in results}

    def snapshot(self) -> Snapshot:
        """Return the results that there are, by name, as JSON-like data; a copy.

        During a run, running tasks are absent: a runner that continues from here runs them again.
        """
        # A task may ask from its thread while others come to their end.
        return {name: copy.deepcopy(each) for name, each in list(self._progress.results.items())}

    async def cancel(self, *, reason: str | None = None) -> None:
        """Cancel the run; tasks without a result become `cancelled`.

        Raises:
            NotFoundError: Nothing was executed, or it was in memory and has ended.
        """
        if self.run_id is None or self._running is None:
            raise NotFoundError("run", self.run_id or "of this runner")
        await self._running.cancel(self.run_id, reason=reason)

    @asynccontextmanager
    async def _opened(self, context: Mapping[str, Any]) -> AsyncIterator[AgentFlow]:
        """Yield an app that knows these tasks alone, with this context."""
        app = AgentFlow(self._url) if self._app is None else self._app.without_graphs()
        app.register(
            self.graph,
            name=self._name,
            version=self._plan.shape,
            context=lambda _run: context,
            # A task is mended, and the run goes on with it; of successes the node warns.
            on_change={"code_changed": "accept"},
        )
        self._running = app
        try:
            yield app
        finally:
            self._running = None
            if self._app is None:
                await app.aclose()

    async def _begin(self, app: AgentFlow) -> Run:
        """Return the run to drive, stored."""
        if self._fixed_id is not None and (run := await _find(app, self._fixed_id)) is not None:
            if (run.graph, run.version) != (self._name, self._plan.shape):
                how = "begin another one with its snapshot, which read_snapshot returns"
                raise InvalidInputError(f"run {run.id!r}", (f"begun with other tasks; {how}",))
            if run.status is RunStatus.FAILED:
                run = await app.dead_letters.requeue(run.id)
            return run
        self.run_id = self._fixed_id or new_id()
        await app.submit(
            self._name,
            {"snapshot": self.snapshot()},
            version=self._plan.shape,
            run_id=self.run_id,
        )
        return await app.get_run(self.run_id)

    def _take(self, saved: Snapshot) -> None:
        self._progress.results.update(_plain(saved))

    def _cancel_rest(self) -> None:
        cancelled = TaskResult(status=TaskStatus.CANCELLED).to_plain()
        for name in self._plan.tasks:
            self._progress.results.setdefault(name, dict(cancelled))


def _plain(snapshot: Mapping[str, Any]) -> Snapshot:
    """Check a snapshot, and return a copy in the form in which it is stored."""
    return {name: result.to_plain() for name, result in read_results(snapshot).items()}


def _failure(run: Run) -> RunFailedError:
    error = run.error
    assert error is not None, "a failed run has its error"
    return RunFailedError(run.id, error.type, error.node, error.attempt)


async def read_snapshot(app: AgentFlow, run_id: str) -> Snapshot:
    """Return the snapshot of a run of tasks as far as it is durable, whoever drives it.

    For a run whose process is gone, or whose tasks have changed.

    Raises:
        NotFoundError: There is no such run.
    """
    return await _saved(app, await app.get_run(run_id))


async def _saved(app: AgentFlow, run: Run) -> Snapshot:
    """Read what is durable of a run: its state, and what tasks of the last superstep wrote."""
    place: Any = {"configurable": {"thread_id": run.thread_id, "checkpoint_ns": ""}}
    saved = await app.checkpointer.aget_tuple(place)
    if saved is None:
        return {}
    values = saved.checkpoint["channel_values"]
    writes = {name: value for _, name, value in saved.pending_writes or ()}
    given: Snapshot = values.get("snapshot") or {}
    return {**given, **found_results(values), **found_results(writes)}


async def _find(app: AgentFlow, run_id: str) -> Run | None:
    try:
        return await app.get_run(run_id)
    except NotFoundError:
        return None


async def _driven(app: AgentFlow, run: Run) -> Run:
    """Drive a run, or wait for whoever drives it."""
    while not run.status.is_ended:
        try:
            return await app.drive(run.id)
        except ThreadBusyError:
            try:
                return await app.wait(run.id, until="parked", timeout=_LOOK)
            except TimeoutError:
                run = await app.get_run(run.id)
    return run
