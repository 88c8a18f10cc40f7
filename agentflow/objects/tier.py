"""The object store that belongs to a database, and what goes there."""

from __future__ import annotations

from agentflow.objects.base import ObjectStore
from agentflow.objects.urls import open_objects

OFFLOAD_FROM = 256 * 1024
"""Bytes, as they would be stored, from which a value becomes an object."""


class ObjectTier:
    """An object store beside one database."""

    def __init__(self, store: ObjectStore, *, offload_from: int = OFFLOAD_FROM) -> None:
        """Use a store, in which databases have folders of their own.

        Args:
            store: Where objects are.
            offload_from: How many bytes make a value one.
        """
        self.store = store
        self.offload_from = offload_from
        self.space: str | None = None
        """The folder of the database, once it is known."""


def open_tier(url: str | None, *, offload_from: int = OFFLOAD_FROM) -> ObjectTier | None:
    """Open the object store at `url`, if there is one, for what has at least so many bytes."""
    return None if url is None else ObjectTier(open_objects(url), offload_from=offload_from)
