"""The shipped suites on a checkpointer whose values are objects, from a few bytes on.

Those that are about heads and leases, or compare with other savers, do not depend on where values
are, and are not repeated.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.testing.savers import (
    BranchesSuite,
    ContractSuite,
    CopySuite,
    DeletionSuite,
    DeltaChannelSuite,
    HistoriesSuite,
    ListingSuite,
    ListsSuite,
    OrderSuite,
    RetentionSuite,
    WritesSuite,
)


class TestOffloaded(
    ContractSuite,
    ListingSuite,
    WritesSuite,
    DeletionSuite,
    CopySuite,
    BranchesSuite,
    OrderSuite,
    ListsSuite,
    HistoriesSuite,
    DeltaChannelSuite,
    RetentionSuite,
):
    """A file of SQLite beside a folder of objects."""

    @pytest.fixture(autouse=True)
    def _stores(self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # What survives a power cut is no matter of these tests, and they store much.
        monkeypatch.setattr("os.fsync", lambda _: None)
        self.url, self.folder = sqlite_url, tmp_path / "objects"
        self.folder.mkdir()

    def open(self) -> AbstractContextManager[Saver]:
        return self.open_another()

    def open_another(self, *, verify_deltas: bool = False) -> AbstractContextManager[Saver]:
        return open_checkpointer(
            self.url,
            verify_deltas=verify_deltas,
            offload=f"file://{self.folder}",
            offload_from=40,
        )
