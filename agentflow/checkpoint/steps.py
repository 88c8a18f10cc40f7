"""Work in steps, whoever runs them, so that the same work serves the sync and the async API."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

from agentflow.checkpoint.rows import Rows, ThreadKey
from agentflow.database.futures import Future

T = TypeVar("T")
BATCH_ROWS = 200
"""Rows of a kind that one transaction deletes at most."""
BATCH_BYTES = 2 * 1024 * 1024
"""Bytes that one transaction deletes at most, but for a single larger row."""


class Read(NamedTuple):
    """A step that only reads, and locks nothing."""

    function: Callable[[Rows], Any]


class Change(NamedTuple):
    """A step that is a transaction; safe to run twice."""

    function: Callable[[Rows], Any]
    thread: ThreadKey | None = None
    """The thread that it changes, if it is one that can be read."""


class Wait(NamedTuple):
    """A step that lets what was accepted end, well or not, so that a `Read` after it sees it."""

    pending: Sequence[Future]


class Ask(NamedTuple):
    """A step outside the database: what to do about some threads."""

    thread_ids: Sequence[str]


Step = Read | Change | Wait | Ask

Steps = Generator[Step, Any, T]
"""Work in steps, whoever runs them: each is sent the outcome of the one before."""
