"""The port of object stores: bytes under names, each object whole or not there."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from datetime import datetime
from typing import NamedTuple

from agentflow.errors import InvalidInputError

_NAME = re.compile(r"[0-9a-z][0-9a-z._-]*(?:/[0-9a-z][0-9a-z._-]*)*")


class FoundObject(NamedTuple):
    """An object in a listing."""

    name: str
    size: int
    """Bytes."""
    put_at: datetime
    """When it was put, or touched, last; by the store's clock."""


class ObjectStore(ABC):
    """Keeps objects; safe from any thread and any number of processes.

    Names are parts of lower-case letters, digits, `.`, `_` and `-`, separated by slashes. A call
    that fails raises `ObjectStoreError`, and has then done nothing that another one could see, or
    all of it.
    """

    url: str
    """Where it is, without a secret."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Store an object, in the place of one of this name; durable on return.

        Whoever gets it meanwhile has the old one or the new one, whole.
        """

    @abstractmethod
    def touch(self, name: str) -> bool:
        """Let an object count as put now; say whether it is there."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether an object is there."""

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """Return an object; `None` if it is not there."""

    @abstractmethod
    def list(self, folder: str, after: str, limit: int) -> list[FoundObject]:
        """List objects whose names begin with a folder, in an order of the store's.

        Args:
            folder: One or more whole parts of names.
            after: The name at which the page before ended; empty for the first one.
            limit: At most so many; fewer mean that there are no more.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object; nothing happens if it is not there."""

    @abstractmethod
    def remove_unfinished(self, folder: str, before: datetime) -> int:
        """Remove what puts below a folder that were cut short before this time have left.

        Returns:
            How many there were.
        """


def check_name(name: str) -> str:
    """Return a name as it is.

    Raises:
        InvalidInputError: It may not be a name; so none leads out of its store.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInputError("object", ("name: is not one that agentflow gives",))
    return name
