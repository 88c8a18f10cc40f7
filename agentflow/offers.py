"""From whoever stores a run, or wakes one, to an idle worker of the same process.

A worker that has room and knows of nothing else to do is asked first: then the run is claimed in
the very transaction that makes it due, and nobody has to look for it. Otherwise it is queued as
always, and any worker may find it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from agentflow.storage import Claimant
from agentflow.types import ClaimedRun


class Handed(Protocol):
    """What a verb of the run store returns that may have claimed a run for somebody."""

    @property
    def claimed(self) -> ClaimedRun | None:
        """The run, if it was."""


H = TypeVar("H", bound=Handed)
Verb = Callable[[Claimant | None], Awaitable[H]]


class Taker(Protocol):
    """Who takes runs at once if it can."""

    @property
    def claimant(self) -> Claimant:
        """As whom it claims, and what."""

    def take(self, verb: Verb[H]) -> asyncio.Future[H] | None:
        """Run a verb and drive what it claims; `None` if this is no time for it, or no place.

        What has begun goes on although nobody waits for it any more.
        """


class Offers:
    """The workers of one app that run in this process."""

    def __init__(self) -> None:
        """Know of none yet."""
        self._takers: list[Taker] = []

    def join(self, taker: Taker) -> None:
        """Ask `taker` from now on."""
        self._takers.append(taker)

    def leave(self, taker: Taker) -> None:
        """Ask it no more."""
        self._takers.remove(taker)

    async def hand(self, verb: Verb[H], wants: Callable[[Claimant], bool]) -> H:
        """Run a verb that makes a run due, for a worker if there is one that can take it.

        The first that `wants` says it of, and that has room; what it does not take after all is
        queued.
        """
        for taker in self._takers:
            if wants(taker.claimant) and (taken := taker.take(verb)) is not None:
                return await asyncio.shield(taken)
        return await verb(None)
