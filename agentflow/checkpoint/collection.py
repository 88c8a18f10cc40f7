"""Removing objects that no row refers to.

A value's row and the reference to its object come in one commit; the reference outlives the value.
A sweep notes since when a reference is abandoned, and a later one, after a grace period, forgets
it: whoever read the row before the value went has had that time to read the object. An object goes
if nothing refers to it and it was neither put nor touched within the grace period. So long has a
writer who has stored it and not yet committed its row.

Both sides are strict beyond that. Objects go while referrers are locked out, and who commits a
reference sees, with collection locked out, that the object is there; if not, it is put again. So no
pause of a writer, however long, ends in a row whose object is gone. Killed at any point, a sweep
leaves what it has not removed to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from agentflow.checkpoint.rows import ObjectRow, Rows
from agentflow.checkpoint.steps import Change, Read, Steps
from agentflow.failpoints import failpoint
from agentflow.objects import FoundObject, ObjectTier

GRACE = timedelta(days=1)
"""How long an object that nothing refers to is kept."""
_BATCH = 100
"""References or objects that one transaction changes at most."""
_PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or would be."""

    objects: int = 0
    size: int = 0
    """Bytes."""


def collect(
    tier: ObjectTier | None, now: datetime, grace: timedelta, *, dry_run: bool
) -> Steps[Collected]:
    """Remove what nothing has referred to for the grace period, of all tenants."""
    space = (yield Read(lambda rows: rows.find_space(make=False))) if tier is not None else None
    if tier is None or space is None:
        return Collected()
    before = now - grace
    if not dry_run:
        while abandoned := (yield Read(lambda rows: rows.list_abandoned(_BATCH))):
            yield Change(partial(_abandon, abandoned, now))
        while not (yield Change(lambda rows: rows.forget_objects(before, _BATCH))):
            pass
        yield Read(lambda _: tier.store.remove_unfinished(space[0], before))
    count = size = 0
    after: str | None = ""
    while after is not None:
        after, idle = yield Read(partial(_page, tier, space[0], after, before))
        for begin in range(0, len(idle), _BATCH):
            some: Sequence[FoundObject] = idle[begin : begin + _BATCH]
            if not dry_run:
                some = yield Change(partial(_remove, tier, some, before))
            count += len(some)
            size += sum(each.size for each in some)
    return Collected(objects=count, size=size)


def _abandon(abandoned: Sequence[ObjectRow], now: datetime, rows: Rows) -> None:
    rows.exclude_referrers()
    rows.abandon(abandoned, now)


def _page(
    tier: ObjectTier, space: str, after: str, before: datetime, rows: Rows
) -> tuple[str | None, list[FoundObject]]:
    """Find the next objects that may go; and where to go on, if there are more."""
    page = tier.store.list(space, after, _PAGE)
    old = [each for each in page if each.put_at <= before]
    needed = rows.find_needed([each.name for each in old], before)
    idle = [each for each in old if each.name not in needed]
    return page[-1].name if len(page) == _PAGE else None, idle


def _remove(
    tier: ObjectTier, idle: Sequence[FoundObject], before: datetime, rows: Rows
) -> list[FoundObject]:
    """Remove objects that are still not needed, and return them."""
    rows.exclude_referrers()
    needed = rows.find_needed([each.name for each in idle], before)
    gone = [each for each in idle if each.name not in needed]
    for each in gone:
        tier.store.remove(each.name)
        failpoint("objects.removed")
    return gone
