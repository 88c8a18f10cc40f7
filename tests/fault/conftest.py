"""Fixtures of the fault tests: the scene, and which of many positions are tried.

`make test` tries a sample, the same each time; `make chaos` sets `AGENTFLOW_FAULT_FULL` and tries
them all. `AGENTFLOW_FAULT_SEED` chooses another sample; it is printed with a failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import pytest

from tests.fault.forkserver import ForkServer
from tests.fault.ledger import Ledger
from tests.fault.scene import Scene, open_scene

T = TypeVar("T")
Tally = Callable[..., None]

_SEED = int(os.environ.get("AGENTFLOW_FAULT_SEED") or 20_261_121)
IS_FULL = os.environ.get("AGENTFLOW_FAULT_FULL") == "1"


class Sampler:
    """Chooses what is tried, the same for the same seed and test."""

    def __init__(self, name: str) -> None:
        """Choose for one test."""
        self.is_full = IS_FULL
        self._random = random.Random(f"{_SEED}:{name}")

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` of the items, in order; all of them in a full run."""
        if self.is_full or count >= len(items):
            return list(items)
        return [items[i] for i in sorted(self._random.sample(range(len(items)), count))]

    def dice(self) -> random.Random:
        """Return the test's own source of randomness."""
        return self._random


@pytest.fixture
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """Chooses positions for this test; prints the seed, which pytest shows if the test fails."""
    print(f"AGENTFLOW_FAULT_SEED={_SEED}")
    return Sampler(request.node.name)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """Report counts, which `make chaos` adds up and publishes."""

    def report(**counts: int) -> None:
        for name, count in counts.items():
            record_property(name, count)

    return report


@pytest.fixture
async def scene(database_url: str, ledger: Ledger, forkserver: ForkServer) -> AsyncIterator[Scene]:
    """A database with the graphs of `tests.fault.graphs`."""
    async with open_scene(database_url, ledger, forkserver) as opened:
        yield opened


@pytest.fixture
async def postgres_scene(
    postgres_url: str, ledger: Ledger, forkserver: ForkServer
) -> AsyncIterator[Scene]:
    """The same on PostgreSQL only."""
    async with open_scene(postgres_url, ledger, forkserver) as opened:
        yield opened
