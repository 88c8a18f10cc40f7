"""Tasks as a LangGraph graph: a node for each, which is passed whatever became of the others.

Each node writes one channel, its task's result. The rules, all of them:

- a success of the snapshot is kept;
- else a task is skipped if a dependency has not done its part: if that neither succeeded nor failed
  with `continue_on_error`;
- else it is skipped if its condition does not hold;
- else it is run, and what it raises is its failure.
"""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

from langgraph.errors import GraphBubbleUp
from langgraph.graph import START, StateGraph
from langgraph.pregel import Pregel
from langgraph.runtime import get_runtime
from typing_extensions import TypedDict

from agentflow.errors import MissingContextError, StoreError
from agentflow.retry import Retry, RetryPolicy, decide
from agentflow.tasks.plan import Plan, Task, TaskCall, TaskContext
from agentflow.tasks.results import (
    Progress,
    Snapshot,
    StaleResultWarning,
    TaskError,
    TaskResult,
    TaskStatus,
    check_json,
    inputs_tag,
    read_results,
)
from agentflow.types import Clock, to_timedelta
from agentflow.versions import code_tag, declare_parts

_PREFIX = "result:"


class TaskInput(TypedDict):
    """What a run of tasks starts from."""

    snapshot: Snapshot


def channel(task: str) -> str:
    """Return the channel of a task's result."""
    return _PREFIX + task


def found_results(values: Mapping[str, Any]) -> Snapshot:
    """Return the results among the values of channels."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in values.items()
        if name.startswith(_PREFIX) and value is not None
    }


def build_graph(
    plan: Plan, *, clock: Clock, progress: Progress, concurrency: int | None
) -> Pregel[Any, Any, Any, Any]:
    """Compile tasks; the graph's context is the mapping that they are given."""
    outputs = {channel(name): dict[str, Any] for name in plan.tasks}
    # mypy knows literal definitions only
    state = cast("Any", TypedDict)("TaskState", {"snapshot": Snapshot, **outputs})
    output = cast("Any", TypedDict)("TaskOutput", outputs)
    graph = StateGraph(state, input_schema=TaskInput, output_schema=output)
    for name, task in plan.tasks.items():
        node: Any = _Node(task, plan, clock, progress)
        graph.add_node(name, node)
        dependencies = plan.dependencies[name]
        # Several are waited for together; each edge of its own would call the node once more.
        match dependencies:
            case []:
                graph.add_edge(START, name)
            case [only]:
                graph.add_edge(only, name)
            case _:
                graph.add_edge(dependencies, name)
    config: dict[str, Any] = {"recursion_limit": len(plan.tasks) + 2}
    if concurrency is not None:
        config["max_concurrency"] = concurrency
    return graph.compile().with_config(cast("Any", config))


class _Node:
    """The node of a task."""

    def __init__(self, task: Task, plan: Plan, clock: Clock, progress: Progress) -> None:
        self._task = task
        self._plan = plan
        self._clock = clock
        self._progress = progress
        self._code = code_tag(task.run)
        declare_parts(self, task.run, task.condition)
        self._retry = None if task.retry is None else RetryPolicy.of(task.retry)
        self._limit = None if task.timeout is None else to_timedelta(task.timeout).total_seconds()

    async def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        name = self._task.name
        needed = {each: state[channel(each)] for each in self._plan.dependencies[name]}
        results = read_results(needed, "results of dependencies")
        kept = state["snapshot"].get(name)
        if kept is not None and kept["status"] == TaskStatus.SUCCESS:
            result = read_results({name: kept})[name]
            self._warn_if_stale(result, results)
        else:
            result = await self._evaluate(results)
        self._progress.results[name] = result.to_plain()
        return {channel(name): result.to_plain()}

    async def _evaluate(self, results: Mapping[str, TaskResult]) -> TaskResult:
        for name, result in results.items():
            continues = self._plan.tasks[name].continue_on_error
            if not result.satisfies(continue_on_error=continues):
                return TaskResult(status=TaskStatus.SKIPPED, reason="dependency", because_of=name)
        started_at = self._clock.now()
        data, error = None, None
        try:
            if self._task.condition is not None and not await self._called(
                self._task.condition, results
            ):
                return TaskResult(status=TaskStatus.SKIPPED, reason="condition")
            data = await self._carried_out(results)
            check_json(data)
        except MissingContextError as raised:
            self._progress.missing = raised
            raise
        except (GraphBubbleUp, StoreError):
            raise  # a question, or a lease that is lost
        except Exception as raised:  # noqa: BLE001 -- user code
            data, error = None, _described(raised)
        return TaskResult(
            status=TaskStatus.SUCCESS if error is None else TaskStatus.FAILURE,
            data=data,
            error=error,
            started_at=started_at,
            ended_at=self._clock.now(),
            code=self._code,
            inputs=inputs_tag(results),
        )

    async def _carried_out(self, results: Mapping[str, TaskResult]) -> Any:
        """Call the task, and again as often as its policy says."""
        number = 0
        while True:
            number += 1
            try:
                async with asyncio.timeout(self._limit) as limit:
                    return await self._called(self._task.run, results)
            except (MissingContextError, GraphBubbleUp, StoreError):
                raise
            except Exception as raised:  # noqa: BLE001 -- user code
                error: Exception = raised
                if isinstance(raised, TimeoutError) and limit.expired():
                    error = TimeoutError(f"task {self._task.name!r} took longer than its timeout")
                verdict = None if self._retry is None else decide(self._retry, number, error)
                if not isinstance(verdict, Retry):
                    raise error from raised.__cause__
            await asyncio.sleep(verdict.delay.total_seconds())

    async def _called(
        self, function: Callable[[TaskCall], Any], results: Mapping[str, TaskResult]
    ) -> Any:
        name = self._task.name
        context = TaskContext(name, _given())
        call = TaskCall(name=name, results=results, context=context)
        if inspect.iscoroutinefunction(function):
            return await function(call)
        # In a thread, so that the tasks beside it go on.
        made = await asyncio.to_thread(function, call)
        return await made if inspect.isawaitable(made) else made

    def _warn_if_stale(self, kept: TaskResult, results: Mapping[str, TaskResult]) -> None:
        changed = []
        if None not in {kept.code, self._code} and kept.code != self._code:
            changed.append("code")
        if kept.inputs is not None and kept.inputs != inputs_tag(results):
            changed.append("inputs")
        if changed:
            warnings.warn(
                f"the success of task {self._task.name!r} came from other {' and '.join(changed)} "
                "than there are now, and is kept; take it out of the snapshot to run it again",
                StaleResultWarning,
                stacklevel=1,
            )


def _given() -> Mapping[str, Any]:
    """Return the graph's context, which need not have been given."""
    context: Mapping[str, Any] | None = get_runtime().context
    return {} if context is None else context


def _described(error: Exception) -> TaskError:
    cls = type(error)
    try:
        message = str(error).encode("utf-8", "backslashreplace").decode()
    except Exception:  # noqa: BLE001 -- user code
        message = "<no text: its str raises>"
    return TaskError(type=f"{cls.__module__}.{cls.__qualname__}", message=message)
