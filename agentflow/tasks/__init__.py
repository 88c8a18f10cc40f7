"""A runner for a graph of named tasks, whose results are a snapshot that another runner continues.

It owns tasks, their results, and how both become a LangGraph graph. It knows the runtime only as
anybody who submits runs does.
"""

from __future__ import annotations

from agentflow.tasks.plan import Task, TaskCall
from agentflow.tasks.results import (
    StaleResultWarning,
    TaskError,
    TaskResult,
    TaskStatus,
    UnknownTaskWarning,
)
from agentflow.tasks.runner import TaskRunner, read_snapshot

__all__ = [
    "StaleResultWarning",
    "Task",
    "TaskCall",
    "TaskError",
    "TaskResult",
    "TaskRunner",
    "TaskStatus",
    "UnknownTaskWarning",
    "read_snapshot",
]
