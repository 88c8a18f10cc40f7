"""What a workload gives back: rows of the table, and the figures that they were made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[str, Sequence[float]]
"""For each subject one figure of each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One ratio and what is asked of it."""

    workload: str
    figure: str
    """What was measured, for people."""
    ratio: float
    required: float | None = None
    """`None`: for information."""
    aim: float | None = None
    at_least: bool = False
    """Whether the required ratio and the aim are lower bounds; else they are upper ones."""

    @property
    def met(self) -> str:
        """What became of the bounds."""
        if self.required is None:
            return ""
        if not self._holds(self.required):
            return "no"
        return "yes, and the aim" if self.aim is not None and self._holds(self.aim) else "yes"

    def _holds(self, bound: float) -> bool:
        return self.ratio >= bound if self.at_least else self.ratio <= bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one workload came to."""

    rows: Sequence[Row]
    figures: Mapping[str, Figures]
    """The figures of each round, by their unit."""


def medians(figures: Figures) -> dict[str, float]:
    """Return the median of each subject's rounds."""
    return {name: statistics.median(rounds) for name, rounds in figures.items()}


def milliseconds(seconds: float) -> str:
    """Write a time for people."""
    return f"{seconds * 1000:.2f} ms"
