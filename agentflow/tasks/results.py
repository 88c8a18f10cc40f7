"""What became of a task, and the plain form in which that is stored and handed out.

A snapshot strictly is a mapping of names to results, and all of it is JSON. Nothing but results is
in it: a task that is running, or has not begun, is absent.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal, NoReturn

from langchain_core.messages.base import TextAccessor
from pydantic import ConfigDict, TypeAdapter, ValidationError

from agentflow.errors import InvalidInputError, MissingContextError, SerializationError

_SCALARS = {bool, int, float, str, TextAccessor}
"""The last is what a LangChain message's `text` is: plain text, once it is stored."""

Snapshot = dict[str, dict[str, Any]]
"""Results by the names of tasks, as plain data."""


class UnknownTaskWarning(UserWarning):
    """A snapshot holds the result of a task that the program does not have."""


class StaleResultWarning(UserWarning):
    """A success is kept although it came from other code, or from other inputs, than there are."""


class TaskStatus(StrEnum):
    """What became of a task."""

    SUCCESS = "success"
    """It returned. It is not run again."""
    FAILURE = "failure"
    """It raised, or returned what JSON cannot hold."""
    SKIPPED = "skipped"
    """Its condition did not hold, or a task that it depends on has not done its part."""
    CANCELLED = "cancelled"
    """The run was cancelled before the task had a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskError:
    """Why a task failed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    type: str
    """The exception's class, as `module.Name`."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What became of a task."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    status: TaskStatus
    data: Any = None
    """What it returned."""
    error: TaskError | None = None
    reason: Literal["condition", "dependency"] | None = None
    """Why it was skipped."""
    because_of: str | None = None
    """The dependency for which it was skipped."""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    code: str | None = None
    """What identifies the code that made it."""
    inputs: str | None = None
    """What identifies the results of the dependencies that it was made from."""

    def satisfies(self, *, continue_on_error: bool) -> bool:
        """Whether tasks that depend on it may run."""
        return self.status is TaskStatus.SUCCESS or (
            self.status is TaskStatus.FAILURE and continue_on_error
        )

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON-like data that nothing else refers to."""
        plain: dict[str, Any] = _RESULT.dump_python(self, mode="json")
        return {name: value for name, value in plain.items() if value is not None}


_RESULT: TypeAdapter[TaskResult] = TypeAdapter(TaskResult)


@dataclass(slots=True)
class Progress:
    """What is known so far, in this process, of tasks that are being run."""

    results: Snapshot
    """Nobody else has a reference to any of it."""
    missing: MissingContextError | None = None
    """The key that a task has asked for in vain."""

    def begin(self) -> None:
        """Forget what was missing in the last execution."""
        self.missing = None


def read_results(snapshot: Any, subject: str = "snapshot") -> dict[str, TaskResult]:
    """Read a snapshot, wherever it has been meanwhile.

    Raises:
        InvalidInputError: Names each place that is not a result, without its content.
    """
    if not isinstance(snapshot, Mapping):
        raise InvalidInputError(subject, ("must be a mapping of task names to results",))
    found, problems = {}, []
    for name, result in snapshot.items():
        if not isinstance(name, str):
            problems.append("names of tasks must be text")
            continue
        try:
            plain = result.to_plain() if isinstance(result, TaskResult) else copy.deepcopy(result)
            found[name] = _RESULT.validate_python(plain)
            check_json(found[name].data)
        except SerializationError as error:
            problems.append(f"{name}.data: {error}")
        except ValidationError as error:
            problems += [
                f"{'.'.join(str(step) for step in (name, *each['loc']))}: {each['msg']}"
                for each in error.errors(
                    include_input=False, include_context=False, include_url=False
                )
            ]
    if problems:
        raise InvalidInputError(subject, tuple(problems))
    return found


def check_json(value: Any, path: str = "") -> None:
    """Refuse what would not come back from JSON as it was.

    Raises:
        SerializationError: Names the first such place, and its type.
    """
    if value is None or type(value) in _SCALARS:
        _check_scalar(value, path)
    elif type(value) is list:
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                _refuse(key, path, "keys must be text")
            check_json(item, f"{path}.{key}" if path else key)
    else:
        _refuse(value, path, "return dicts with text keys, lists, text, numbers, booleans or None")


def _check_scalar(value: Any, path: str) -> None:
    if type(value) is float and not math.isfinite(value):
        _refuse(value, path, "JSON has no NaN and no infinity")
    if isinstance(value, str) and not value.isprintable():
        try:
            value.encode()
        except UnicodeEncodeError:
            _refuse(value, path, "it holds half of a surrogate pair")


def _refuse(value: Any, path: str, hint: str) -> NoReturn:
    cls = type(value)
    raise SerializationError(f"{cls.__module__}.{cls.__qualname__}", path, hint, "result of a task")


def inputs_tag(dependencies: Mapping[str, TaskResult]) -> str:
    """Identify what a task is given by its dependencies."""
    given = {name: [each.status.value, each.data] for name, each in dependencies.items()}
    return _tag(json.dumps(given, sort_keys=True))


def _tag(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
