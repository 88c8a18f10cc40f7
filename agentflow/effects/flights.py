"""Calls of effects that are under way in an attempt: one caller makes each, and others wait for it.

What is stored about a call is the journal's.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from agentflow.journal import NewEffect


class LeftError(Exception):
    """The caller that was to make a call was cancelled; whoever waits for it is to make it."""


@dataclass(slots=True)
class Flight:
    """A call that is being made, or about to."""

    new: NewEffect
    loop: asyncio.AbstractEventLoop
    limit: float
    ended: Future[Any] = field(default_factory=Future)
    is_stopping: bool = False
    """The node was cancelled: what has not been called is not called."""
    is_doubtful: bool = False
    """An earlier attempt may have made the call, and it may be made again."""
