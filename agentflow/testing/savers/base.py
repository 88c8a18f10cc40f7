"""What the suites share: the hooks that a backend fills in, and the savers made from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest


class Suite:
    """The hooks; every suite derives from this and adds tests, nothing else."""

    def open(self) -> AbstractContextManager[Any]:
        """Open a saver on an empty store; called once for each test."""
        raise NotImplementedError

    def open_another(self, *, verify_deltas: bool = False) -> AbstractContextManager[Any]:
        """Open a further saver on the store of this test, as another process would.

        It must share no memory with the first one. Called any number of times.

        Args:
            verify_deltas: Notice each edit of a list's elements at once. A saver that always does
                may ignore it.
        """
        raise NotImplementedError

    @pytest.fixture
    def saver(self) -> Iterator[Any]:
        """A saver on an empty store."""
        with self.open() as opened:
            yield opened

    @pytest.fixture
    def another(self, saver: Any) -> Iterator[Any]:
        """A second saver on the same store."""
        with self.open_another() as opened:
            yield opened
