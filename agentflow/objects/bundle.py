"""Objects in memory, to be written somewhere as one file."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from agentflow.objects.base import FoundObject, ObjectStore, check_name

_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class Bundle(ObjectStore):
    """Keeps objects in a dictionary, which is its whole content."""

    url = "memory"

    def __init__(self, objects: Mapping[str, bytes] | None = None) -> None:
        """Begin with `objects`."""
        self.objects = {check_name(name): data for name, data in (objects or {}).items()}

    def put(self, name: str, data: bytes) -> None:
        self.objects[check_name(name)] = data

    def touch(self, name: str) -> bool:
        return self.has(name)

    def has(self, name: str) -> bool:
        return name in self.objects

    def get(self, name: str) -> bytes | None:
        return self.objects.get(name)

    def list(self, folder: str, after: str, limit: int) -> list[FoundObject]:
        names = sorted(n for n in self.objects if n.startswith(f"{folder}/") and n > after)
        return [FoundObject(name, len(self.objects[name]), _NEVER) for name in names[:limit]]

    def remove(self, name: str) -> None:
        self.objects.pop(name, None)

    def remove_unfinished(self, folder: str, before: datetime) -> int:
        del folder, before
        return 0
