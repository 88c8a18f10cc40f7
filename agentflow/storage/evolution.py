"""What the run store knows of versions: a part of the port `RunStore`.

Fingerprints of graphs, routes of new runs, the migration of a run from one version to another, and
runs that leave for another database or come from one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from agentflow.types import ClaimedRun, Lease, MovedWait, Route, Run


class VersionVerbs(ABC):
    """The verbs of `RunStore` that are about versions."""

    @abstractmethod
    async def create_fingerprint(self, tenant: str, digest: str, graph: str, form: str) -> None:
        """Store what a graph is made of, unless it is there; no event."""

    @abstractmethod
    async def find_fingerprint(self, tenant: str, digest: str) -> str | None:
        """Return what a graph was made of, or `None`."""

    @abstractmethod
    async def route_graph(
        self, tenant: str, graph: str, version: str, share: float | None, *, by: str | None
    ) -> tuple[Route, ...]:
        """Set which share of new runs goes to a version, or none (`None`); return all of the graph.

        Shares of more than one in all are `InvalidInputError`. Event, in the tenant's own log:
        `graph.routed`.
        """

    @abstractmethod
    async def list_routes(self, tenant: str, graph: str | None) -> tuple[Route, ...]:
        """Return the routes of a graph, or of all, by graph and version."""

    @abstractmethod
    async def claim_migration(
        self, tenant: str, run_id: str, *, worker: str, lease: timedelta
    ) -> ClaimedRun | None:
        """Take a run that nobody drives in order to migrate it, whether it is due, waits or paused.

        `None` if it has ended; `ThreadBusyError` if it is being driven, or another run of its
        thread is in the way. Whoever finds it expired recovers it as any other run. Events: as of
        `claim_runs`.
        """

    @abstractmethod
    async def migrate_run(
        self,
        lease: Lease,
        *,
        version: str,
        fingerprint: str,
        checkpoint_id: str | None,
        waits: Sequence[MovedWait],
        has_work: bool,
        by: str | None,
    ) -> Run:
        """Give a run another version of its graph, and give it up; its lease ends.

        What it waits for is asked under other ids from now on; pending waits that are not named
        become `superseded`. It becomes `waiting` if it asks something, nothing of that is
        answered, and it has no other work; else `queued`. Attempts and losses are cleared, and so
        is a pause for the reason `incompatible`. Events: `approval.superseded`, `run.migrated`.
        """

    @abstractmethod
    async def get_rows(self, tenant: str, run_id: str) -> Mapping[str, Any]:
        """Return all that is stored of a run, as plain data, for `import_run`.

        A run that is being driven, or whose effects are not its own alone, is `ConflictError`;
        `NotFoundError` if there is none.
        """

    @abstractmethod
    async def import_run(
        self, tenant: str, rows: Mapping[str, Any], *, by: str | None, origin: str
    ) -> Run:
        """Store a run that `get_rows` of another store has returned, with what belongs to it.

        It comes as it was, with its id. What does not fit together is `HashMismatchError`; a run of
        that id, or an unfinished one of its thread, is `ConflictError`. `origin` is told in the
        event: `run.imported`.
        """
