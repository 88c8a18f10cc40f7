"""Budgets: how much runs and threads may use, counted from the journal of their effects.

`budget.py` is what may be set, and pure; `prices.py` what tokens cost; `meter.py` counts in an
attempt, and lets calls through or not.
"""

from __future__ import annotations

from agentflow.budgets.budget import Budget, Usage
from agentflow.budgets.meter import (
    MODEL,
    TOOL,
    WAIT,
    Ask,
    Meter,
    OverBudget,
    current_meter,
    metering,
)
from agentflow.budgets.prices import Price, price_of, read_prices

__all__ = [
    "MODEL",
    "TOOL",
    "WAIT",
    "Ask",
    "Budget",
    "Meter",
    "OverBudget",
    "Price",
    "Usage",
    "current_meter",
    "metering",
    "price_of",
    "read_prices",
]
