"""Tasks, what they are given, and the check that together they make a graph without cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from graphlib import CycleError, TopologicalSorter
from hashlib import sha256
from typing import Any

from agentflow.errors import InvalidInputError, MissingContextError
from agentflow.retry import LangGraphRetryPolicy, RetryPolicy
from agentflow.tasks.results import TaskResult
from agentflow.types import Duration, to_timedelta


class TaskContext(Mapping[str, Any]):
    """What a task was given at run time and is stored nowhere: connections, clients, secrets."""

    def __init__(self, task: str, values: Mapping[str, Any]) -> None:
        """Show `values` to a task."""
        self._task = task
        self._values = values

    def __getitem__(self, key: str) -> Any:
        """Return a value; `MissingContextError` if it was not given."""
        if key not in self._values:
            raise MissingContextError(self._task, key)
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default` if it was not given."""
        return self._values.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCall:
    """What a task is called with."""

    name: str
    """The task."""
    results: Mapping[str, TaskResult]
    """The results of its dependencies, by name; a copy."""
    context: TaskContext
    """What was given to `TaskRunner.execute`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A named piece of work.

    Example:
        ```python
        Task(name="load", run=load, dependencies=["fetch"], needs=["db"])
        ```
    """

    name: str
    run: Callable[[TaskCall], Any]
    """Does the work; sync or async. What it returns must be JSON."""
    dependencies: Sequence[str] = ()
    """The tasks that must have done their part before."""
    condition: Callable[[TaskCall], Any] | None = None
    """Whether to run, if its dependencies have done their part; sync or async."""
    needs: Sequence[str] = ()
    """Keys of the context without which nothing is begun."""
    continue_on_error: bool = False
    """Whether the tasks that depend on it run although it has failed."""
    retry: RetryPolicy | LangGraphRetryPolicy | None = None
    """Which exceptions are worth another call, how many, and after how long; by default none. It is
    waited for within the run's attempt: after a crash they are counted anew."""
    timeout: Duration | None = None
    """How long a call may take; then it has failed with `TimeoutError`. What is not async cannot be
    stopped, and goes on unheard."""


class Plan:
    """Tasks whose dependencies are all there and make no cycle, in an order that respects them."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Check the tasks.

        Raises:
            InvalidInputError: A name is empty, reserved or given twice; a dependency is unknown; or
                tasks depend on each other in a circle.
        """
        problems = list(_problems(tasks))
        if problems:
            raise InvalidInputError("tasks", tuple(problems))
        by_name = {task.name: task for task in tasks}
        graph = {task.name: list(dict.fromkeys(task.dependencies)) for task in tasks}
        try:
            order = list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise InvalidInputError("tasks", (f"dependencies: go in a circle, {circle}",)) from None
        self.tasks = {name: by_name[name] for name in order}
        self.dependencies = graph
        self.shape = sha256(repr(sorted(graph.items())).encode()).hexdigest()[:16]
        """Names and dependencies: what a run that has begun cannot see changed."""

    def missing_context(self, context: Mapping[str, Any]) -> MissingContextError | None:
        """Return what is wrong with a context, before anything is begun."""
        for task in self.tasks.values():
            for key in task.needs:
                if key not in context:
                    return MissingContextError(task.name, key)
        return None


def _problems(tasks: Sequence[Task]) -> Iterator[str]:
    if not tasks:
        yield "must not be empty"
    names = [task.name for task in tasks]
    for name in dict.fromkeys(names):
        if not name or name.startswith("__"):
            yield f"name: {name!r} must be text, not empty and without __ at its beginning"
        elif any(sign in name for sign in "|:\0"):
            yield f"name: {name!r} must not contain '|', ':' or NUL"
        elif name == "snapshot":
            yield "name: 'snapshot' is taken; call the task otherwise"
        if names.count(name) > 1:
            yield f"name: {name!r} is given to {names.count(name)} tasks"
    for task in tasks:
        yield from (
            f"{task.name}.dependencies: there is no task {dependency!r}"
            for dependency in task.dependencies
            if dependency not in names
        )
        if task.timeout is not None and to_timedelta(task.timeout) <= timedelta(0):
            yield f"{task.name}.timeout: must be above 0"
