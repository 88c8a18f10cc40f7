"""Claims that do more than claim: what else can be done in their transaction.

Each step from a submission, or a decision, to the first node is a transaction of its own where
every store has a database of its own: the run is stored, claimed, its thread is taken in the
checkpointer, and the attempt is noted. Where they share one, all of it is one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple, Protocol

from sqlalchemy.engine import Connection

from agentflow.types import Approval, ClaimedRun, Lease, Run, TakenThread

Graph = tuple[str, str]
"""The name and the version of a graph."""


class TakeThread(Protocol):
    """Takes a lease's thread in the checkpointer."""

    def __call__(self, connection: Connection, lease: Lease, *, is_read: bool) -> TakenThread:
        """Take it in the transaction of a connection; `is_read` asks for its head as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How a claim opens the attempt in its own transaction.

    The thread is taken. Then the attempt is noted as begun, if there is no doubt where it goes on:
    on a new thread, or after an answer at the very checkpoint at which the run has parked; and with
    the graph as it was.
    """

    take_thread: TakeThread
    fingerprints: Mapping[Graph, str]
    """Of the graphs as they are registered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    """Who claims, and for how long."""

    worker: str
    instance: str | None
    """One start of the worker; without one its name stands for it."""
    lease: timedelta
    opening: Opening | None = None
    queues: Collection[str] = field(default=())
    graphs: Collection[Graph] = field(default=())
    """What it takes where it did not ask for a run, but is offered one."""
    foretell: Callable[[ClaimedRun], None] | None = None
    """Told of an offered run whose attempt begins with its claim, before that is durable.

    It is called in the transaction, possibly again if that is tried again, and must not raise. What
    it was told of has become durable if the verb returns the same object.
    """

    def foretold(self, claimed: ClaimedRun) -> None:
        """Tell of what is about to be stored."""
        if self.foretell is not None and claimed.started is not None:
            self.foretell(claimed)

    def wants(self, queue: str, graph: Graph) -> bool:
        """Whether it takes a run of this queue and graph."""
        return queue in self.queues and graph in self.graphs


class Created(NamedTuple):
    """What became of a submission."""

    run: Run
    is_new: bool
    claimed: ClaimedRun | None = None
    """Set if it was claimed for whom it was offered to."""


class Resolved(NamedTuple):
    """What became of a decision."""

    approval: Approval
    claimed: ClaimedRun | None = None
    """Set if the run was claimed for whom it was offered to."""
