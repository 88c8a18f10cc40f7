"""Attempts of what is submitted or decided beside a worker, begun before their claims are durable.

What such an attempt reads takes as long as the commit of its claim does. It drives nothing before
that is durable, and it is withdrawn if that fails.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from agentflow.control import AttemptControl, monotonic
from agentflow.types import ClaimedRun


@dataclass(frozen=True, slots=True)
class Active:
    """An attempt that a worker has begun."""

    control: AttemptControl
    task: asyncio.Task[None]


class Begin(Protocol):
    """How a worker begins one; `None` if it does not."""

    def __call__(
        self, claimed: ClaimedRun, *, since: float, stored: asyncio.Event | None = None
    ) -> Active | None:
        """Begin an attempt.

        Args:
            claimed: What it is of.
            since: When its lease began, by `control.monotonic`.
            stored: Set once the claim is durable; `None` if it is already.
        """
        ...


class Early:
    """An attempt that reads while its claim is being committed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, begin: Begin) -> None:
        """Have it begun in `loop`, by `begin`."""
        self.since = monotonic()
        self._loop = loop
        self._begin = begin
        self._stored = asyncio.Event()
        self._claimed: ClaimedRun | None = None
        self._active: Active | None = None
        self._is_known = False
        """Whether it is known what became of the claim."""

    def foretell(self, claimed: ClaimedRun) -> None:
        """Begin with what is about to be committed; called by the writer's thread."""
        # A loop that was closed drives nothing any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._start, claimed)

    def _start(self, claimed: ClaimedRun) -> None:
        if self._claimed is None and not self._is_known:
            self._claimed = claimed
            self._active = self._begin(claimed, since=self.since, stored=self._stored)

    @property
    def has_begun(self) -> bool:
        """Whether the worker has it among those that it drives."""
        return self._active is not None

    def confirm(self, claimed: ClaimedRun) -> bool:
        """Let it go on if it has begun with the claim that was committed."""
        self._is_known = True
        if self._active is None or self._claimed is not claimed:
            return False
        self._stored.set()
        return True

    async def withdraw(self) -> None:
        """End it, if it has begun: its claim was not stored, or another one was."""
        self._is_known = True
        active, self._active = self._active, None
        if active is not None:
            active.control.lose()
            await asyncio.wait([active.task])
