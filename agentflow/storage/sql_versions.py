"""The verbs of `SqlRunStore` that are about versions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from agentflow.storage import migrations, transfer
from agentflow.storage.evolution import VersionVerbs
from agentflow.types import ClaimedRun, Lease, MovedWait, Route, Run

T = TypeVar("T")


class SqlVersionVerbs(VersionVerbs):
    """Versions in a SQL database; the other verbs, and how they are run, are `SqlRunStore`'s."""

    @abstractmethod
    async def _write(self, verb: Callable[..., T], *args: Any, **named: Any) -> T: ...

    @abstractmethod
    async def _read(self, look: Callable[..., T], *args: Any, **named: Any) -> T: ...

    @abstractmethod
    def _tell_settled(self, run_id: str) -> None: ...

    _stored: set[tuple[str, str]]
    """Fingerprints that are known to be there."""

    async def create_fingerprint(self, tenant: str, digest: str, graph: str, form: str) -> None:
        if (tenant, digest) not in self._stored:
            await self._write(migrations.create_fingerprint, tenant, digest, graph, form)
            self._stored.add((tenant, digest))

    async def find_fingerprint(self, tenant: str, digest: str) -> str | None:
        return await self._read(migrations.find_fingerprint, tenant, digest)

    async def route_graph(
        self, tenant: str, graph: str, version: str, share: float | None, *, by: str | None
    ) -> tuple[Route, ...]:
        return await self._write(migrations.route_graph, tenant, graph, version, share, by=by)

    async def list_routes(self, tenant: str, graph: str | None) -> tuple[Route, ...]:
        return await self._read(migrations.list_routes, tenant, graph)

    async def claim_migration(
        self, tenant: str, run_id: str, *, worker: str, lease: timedelta
    ) -> ClaimedRun | None:
        return await self._write(
            migrations.claim_migration, tenant, run_id, worker=worker, lease=lease
        )

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
        migrated: Run = await self._write(
            migrations.migrate_run,
            lease,
            version=version,
            fingerprint=fingerprint,
            checkpoint_id=checkpoint_id,
            moved=waits,
            has_work=has_work,
            by=by,
        )
        self._tell_settled(lease.run_id)
        return migrated

    async def get_rows(self, tenant: str, run_id: str) -> Mapping[str, Any]:
        return await self._read(transfer.get_rows, tenant, run_id)

    async def import_run(
        self, tenant: str, rows: Mapping[str, Any], *, by: str | None, origin: str
    ) -> Run:
        imported: Run = await self._write(transfer.import_run, tenant, rows, by=by, origin=origin)
        self._tell_settled(imported.id)
        return imported
