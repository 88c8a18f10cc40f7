"""Comparison of rows with the marks that their audit events hold, a part of verification.

A few runs at a time, each few on one consistent snapshot with all that belongs to them. What a row
says must fit its newest mark, and what is marked must be there. A chain of events that cannot be
read says nothing; it is named where the events themselves are verified.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database import Database
from agentflow.database.tables import (
    dead_letters,
    effects,
    epochs,
    events,
    leases,
    logs,
    pauses,
    routes,
    runs,
    waits,
)
from agentflow.errors import CodecError, HashMismatchError
from agentflow.journal import GLOBAL
from agentflow.storage.effect_rows import key_hashes
from agentflow.storage.events import LOG, marks_of
from agentflow.storage.integrity import RowDamage, Verified
from agentflow.storage.marks import (
    LETTER,
    RUN,
    Marks,
    mark,
    of_effect,
    of_epoch,
    of_pause,
    of_redacted_key,
    of_route,
    of_wait,
)
from agentflow.storage.payloads import Payloads
from agentflow.types import RunStatus

_RUNS_AT_ONCE = 20
_EVENTS_AT_ONCE = 500
_CHANGED = "what stands there in clear is not what its events say"
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError)

_Row = Mapping[str, Any]
_Key = tuple[str, str]
"""A tenant and a run."""


async def compare_rows(
    database: Database, payloads: Payloads, tenant: str | None, thread_id: str | None
) -> AsyncIterator[Verified]:
    """Compare what stands in clear in rows with their events, and yield what does not fit."""
    key = (runs.c.tenant, runs.c.run_id)
    query = sa.select(runs).order_by(*key).limit(_RUNS_AT_ONCE)
    if tenant is not None:
        query = query.where(runs.c.tenant == tenant)
    if thread_id is not None:
        query = query.where(runs.c.thread_id == thread_id)
    page = query
    while True:
        last, found = await database.read(partial(_compare_runs, payloads, page))
        if last is None:
            break
        yield Verified(rows=0, damages=found)
        page = query.where(sa.tuple_(*key) > last)
    if thread_id is None:
        compare = partial(_compare_logs, payloads, tenant)
        yield Verified(rows=0, damages=await database.read(compare))


def _compare_runs(
    payloads: Payloads, page: sa.Select[Any], connection: Connection
) -> tuple[_Key | None, tuple[RowDamage, ...]]:
    found = [dict(row) for row in connection.execute(page).mappings()]
    keys = [(row["tenant"], row["run_id"]) for row in found]
    if not keys:
        return None, ()
    chains = _read_chains(connection, payloads, keys)
    rows = {table: _of_runs(connection, table, keys) for table in (waits, dead_letters, effects)}
    damages: list[RowDamage] = []
    for key, run in zip(keys, found, strict=True):
        marks = chains.get(key)
        if marks is not None:
            own = {table: groups.get(key, []) for table, groups in rows.items()}
            damages += _Comparison(connection, payloads, marks, run["tenant"]).run(run, own)
    return keys[-1], tuple(damages)


def _compare_logs(
    payloads: Payloads, tenant: str | None, connection: Connection
) -> tuple[RowDamage, ...]:
    query = sa.select(logs.c.tenant).order_by(logs.c.tenant)
    if tenant is not None:
        query = query.where(logs.c.tenant == tenant)
    damages: list[RowDamage] = []
    for name in connection.execute(query).scalars().all():
        marks = _read_chains(connection, payloads, [(name, LOG)]).get((name, LOG))
        if marks is not None:
            damages += _Comparison(connection, payloads, marks, name).log()
    return tuple(damages)


def _read_chains(
    connection: Connection, payloads: Payloads, keys: Sequence[_Key]
) -> dict[_Key, Marks]:
    """Return the marks of chains of events, without those that cannot be read."""
    chains = {key: Marks() for key in keys}
    query = (
        sa.select(events)
        .where(sa.tuple_(events.c.tenant, events.c.run_id).in_(keys))
        .order_by(events.c.tenant, events.c.run_id, events.c.seq)
        .execution_options(yield_per=_EVENTS_AT_ONCE)
    )
    for event in connection.execute(query):
        key = (event.tenant, event.run_id)
        if key in chains:
            try:
                chains[key].add(event.type, *marks_of(event, payloads))
            except (CodecError, *_MALFORMED):
                del chains[key]
    return chains


def _of_runs(
    connection: Connection, table: sa.Table, keys: Sequence[_Key]
) -> dict[_Key, list[_Row]]:
    query = sa.select(table).where(sa.tuple_(table.c.tenant, table.c.run_id).in_(keys))
    groups: dict[_Key, list[_Row]] = {}
    for row in connection.execute(query).mappings():
        groups.setdefault((row["tenant"], row["run_id"]), []).append(dict(row))
    return groups


class _Comparison:
    """Compares rows with the marks of one chain of events."""

    def __init__(
        self, connection: Connection, payloads: Payloads, marks: Marks, tenant: str
    ) -> None:
        self._connection = connection
        self._payloads = payloads
        self._marks = marks
        self._tenant = tenant

    def run(self, run: _Row, own: Mapping[sa.Table, Sequence[_Row]]) -> Iterator[RowDamage]:
        """Yield what does not fit of a run and of what belongs to it."""
        yield from self._compare(RUN, runs, run, f"runs of {run['run_id']!r}")
        yield from self._lease(run)
        asked = {of_wait(wait["wait_id"]): wait for wait in own[waits]}
        for name, wait in asked.items():
            yield from self._compare(name, waits, wait, f"waits of {wait['wait_id']!r}")
        for name in self._marks.missing(asked, "wait:"):
            yield self._damage(f"waits of {name.partition(':')[2]!r}", "it is missing")
        yield from self._letter(run, own[dead_letters])
        yield from self._effects(run, own[effects])

    def log(self) -> Iterator[RowDamage]:
        """Yield what does not fit of what a tenant's own log tells."""
        yield from self._told(pauses, "pause:", of_pause, "scope", "name")
        yield from self._told(routes, "route:", of_route, "graph", "version")
        if self._tenant == "":
            yield from self._told(epochs, "epoch:", of_epoch, "epoch")

    def _told(
        self, table: sa.Table, prefix: str, name_of: Callable[..., str], *key: str
    ) -> Iterator[RowDamage]:
        query = sa.select(table)
        if "tenant" in table.c:
            query = query.where(table.c.tenant == self._tenant)
        what = table.name.removeprefix("agentflow_")
        seen = []
        for row in self._connection.execute(query).mappings():
            place = [row[each] for each in key]
            seen.append(name_of(*place))
            yield from self._compare(
                seen[-1], table, row, f"{what} of {', '.join(map(repr, place))}"
            )
        for name in self._marks.missing(seen, prefix):
            yield self._damage(f"{what} of {name.partition(':')[2]!r}", "it is missing")

    def _compare(
        self, name: str, table: sa.Table, row: Mapping[Any, Any], where: str
    ) -> Iterator[RowDamage]:
        if not self._marks.says(name, mark(table, row)):
            yield self._damage(where, _CHANGED)

    def _lease(self, run: _Row) -> Iterator[RowDamage]:
        """Compare what changes without an event: tokens only grow, and who runs has a lease."""
        where, token, claimed = f"runs of {run['run_id']!r}", run["token"], self._marks.token
        if (run["status"] == RunStatus.RUNNING) == (run["lease_expires_at"] is None):
            yield self._damage(where, "its lease does not fit its status")
        query = sa.select(leases.c.token).where(
            leases.c.tenant == self._tenant, leases.c.thread_id == run["thread_id"]
        )
        of_thread = None if token is None else self._connection.execute(query).scalar()
        if token is not None and (of_thread is None or of_thread < token):
            where = f"leases of thread {run['thread_id']!r}"
            yield self._damage(where, "a run has a higher token")
        elif claimed is not None and (token is None or token < claimed):
            yield self._damage(where, "its token is lower than when it was claimed")

    def _letter(self, run: _Row, letters: Sequence[_Row]) -> Iterator[RowDamage]:
        where = f"dead_letters of {run['run_id']!r}"
        for letter in letters:
            yield from self._compare(LETTER, dead_letters, letter, where)
        if bool(letters) != bool(run["is_dead_letter"]):
            yield self._damage(where, "its run has none" if letters else "it is missing")

    def _effects(self, run: _Row, found: Sequence[_Row]) -> Iterator[RowDamage]:
        for row in found:
            where = f"effects of {row['effect_id']!r}"
            name = of_effect(row["effect_id"])
            if not self._marks.says(name, mark(effects, row)) and not self._is_shared(run, row):
                yield self._damage(where, _CHANGED)
            yield from self._key(row, where)
        # Those of a run that has ended may have been pruned, though it was started again since, and
        # one that another run has called since is that one's.
        if run["ended_at"] is None and not self._marks.has_ended:
            seen = [of_effect(row["effect_id"]) for row in found]
            for name in self._marks.missing(seen, "effect:"):
                effect_id = name.partition(":")[2]
                query = sa.select(effects.c.scope).where(
                    effects.c.tenant == self._tenant, effects.c.effect_id == effect_id
                )
                taken = self._connection.execute(query).mappings().first()
                if taken is None or not self._is_shared(run, taken):
                    yield self._damage(f"effects of {effect_id!r}", "it is missing")

    def _is_shared(self, run: _Row, row: Mapping[Any, Any]) -> bool:
        """Whether other runs may call under the same key; their events tell of it then."""
        if row["scope"] == GLOBAL or run["root"] is not None:
            return True
        forks = sa.select(runs.c.seq).where(
            runs.c.tenant == self._tenant, runs.c.root == run["run_id"]
        )
        return self._connection.execute(forks.limit(1)).first() is not None

    def _key(self, row: _Row, where: str) -> Iterator[RowDamage]:
        """Compare the hash by which an effect is found with the key that it was called under."""
        effect_id, marks = row["effect_id"], self._marks
        if not marks.has(of_effect(effect_id)) or marks.has(of_redacted_key(effect_id)):
            return
        try:
            key = self._payloads.load(effects.c.request, row)["key"]
            is_known = row["key_hash"] in key_hashes(self._payloads, key)
        except (CodecError, *_MALFORMED):
            return  # named with the payload
        if not is_known:
            yield self._damage(where, "its key is another one")

    def _damage(self, where: str, reason: str) -> RowDamage:
        place = f"{where} of tenant {self._tenant!r}" if self._tenant else where
        error = HashMismatchError(place, reason)
        return RowDamage(
            error=type(error).__name__, tenant=self._tenant, payload=place, message=str(error)
        )
