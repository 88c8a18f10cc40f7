"""What the run store says of itself being whole: a part of the port `RunStore`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDamage:
    """Something of a run, or of its events, that is not as it was stored."""

    error: str
    """The name of the error that a reader gets."""
    tenant: str
    payload: str
    """Table, column and row."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What has come of some rows."""

    rows: int
    damages: tuple[RowDamage, ...]


class IntegrityVerbs(ABC):
    """The verbs of `RunStore` by which damage is found."""

    @abstractmethod
    def find_damages(
        self, *, tenant: str | None = None, thread_id: str | None = None
    ) -> AsyncIterator[Verified]:
        """Verify every payload and every chain of events; yield what has come of each few rows.

        Of all tenants or of one; with `thread_id`, of the runs of threads of this id. A payload has
        to open in its place. Events have to be all there are, in their order, each with the hash
        that it has to have, up to the one that the run names as its last. What stands in clear in a
        row has to be what its events say, as far as they do. Nothing is changed, and no class of
        the user's is needed.
        """
