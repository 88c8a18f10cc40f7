"""Whether this process has been forked since something was opened.

Asked with every operation, where asking for the id of the process each time would show.
"""

from __future__ import annotations

import os


class Forks:
    """Counts the forks of which this process is the child."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        """Count from now on."""
        self.count = 0
        os.register_at_fork(after_in_child=self._grow)

    def _grow(self) -> None:
        self.count += 1


FORKS = Forks()
