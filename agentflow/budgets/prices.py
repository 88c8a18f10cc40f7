"""What tokens cost: a table as data, which its user can replace.

The table that comes along holds the list prices of its date, in US dollars. Prices change: give
your own wherever the sum matters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

_DATED = re.compile(r"-(latest|\d{4}-\d{2}-\d{2}|\d{8}|\d{3,4})$")
"""What providers append to the name of a model for one version of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model costs, for a million tokens."""

    input: float
    output: float
    cached_input: float | None = None
    """For tokens that the provider had in its cache; by default as `input`."""

    def cost(self, usage: Mapping[str, Any]) -> float:
        """Return the cost of a call, from LangChain's `usage_metadata`."""
        read: int = usage.get("input_tokens") or 0
        written: int = usage.get("output_tokens") or 0
        cached: int = min((usage.get("input_token_details") or {}).get("cache_read") or 0, read)
        from_cache = self.input if self.cached_input is None else self.cached_input
        spent = (read - cached) * self.input + cached * from_cache + written * self.output
        return spent / 1_000_000


Prices = Mapping[str, Price]


@cache
def read_prices() -> Prices:
    """Return the table that comes along."""
    table = json.loads(files("agentflow.budgets").joinpath("prices.json").read_text())
    return {name: Price(**each) for name, each in table["models"].items()}


def price_of(model: str, prices: Prices) -> Price | None:
    """Return the price of a model, or of that of which it is a dated version."""
    name = model.rpartition("/")[2].rpartition(":")[2]
    return prices.get(model) or prices.get(name) or prices.get(_DATED.sub("", name))
