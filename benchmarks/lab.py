"""Where workloads get their databases, and how what they compare takes turns."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.servers import PostgresServer

Figure = TypeVar("Figure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """What every workload is given."""

    folder: Path
    """Below it each SQLite database has a folder of its own."""
    server: PostgresServer | None
    """Present for the workloads that say they need it."""
    rounds: int
    """How often each figure is measured."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def sqlite_path(self) -> Path:
        """Name the file of a database that does not exist yet, alone in its folder."""
        folder = self.folder / f"database-{next(self._numbers)}"
        folder.mkdir()
        return folder / "bench.db"

    def sqlite_url(self) -> str:
        """Return the URL of a SQLite database that does not exist yet."""
        return f"sqlite:///{self.sqlite_path()}"

    def postgres_url(self) -> str:
        """Return the URL of an empty PostgreSQL database."""
        assert self.server is not None
        return self.server.url(self.server.create_database())


async def interleave(
    subjects: Mapping[str, Callable[[], Awaitable[Figure]]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[Figure]]:
    """Measure all subjects in every round, each round beginning with another one.

    A machine whose speed drifts is fair to all that way, and so is what one leaves to the next.
    """
    if warm_up:
        for measure in subjects.values():
            await measure()
    figures: dict[str, list[Figure]] = {name: [] for name in subjects}
    for number in range(rounds):
        first = number % len(subjects)
        names = list(subjects)
        for name in [*names[first:], *names[:first]]:
            gc.collect()
            figures[name].append(await subjects[name]())
    return figures


def folder_size(path: Path) -> int:
    """Return the bytes of a database's file and of all files beside it."""
    return sum(file.stat().st_size for file in path.parent.iterdir())
