"""Durable AI agents: LangGraph graphs that survive crashes, deploys and days of waiting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentflow.app import AgentFlow
    from agentflow.control import shield
    from agentflow.effects import effect, effect_context
    from agentflow.effects.transaction import transaction
    from agentflow.interrupts import request_approval
    from agentflow.retry import RetryPolicy

__all__ = [
    "AgentFlow",
    "RetryPolicy",
    "effect",
    "effect_context",
    "request_approval",
    "shield",
    "transaction",
]
__version__ = "0.1.0"

_HOMES = {
    "AgentFlow": "agentflow.app",
    "RetryPolicy": "agentflow.retry",
    "effect": "agentflow.effects",
    "effect_context": "agentflow.effects",
    "request_approval": "agentflow.interrupts",
    "shield": "agentflow.control",
    "transaction": "agentflow.effects.transaction",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `agentflow --help` needs no LangGraph."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
