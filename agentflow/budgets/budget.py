"""What may be used, what is used, and what of it is used up. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal, get_args

from agentflow.budgets.prices import Price
from agentflow.errors import InvalidInputError
from agentflow.types import Duration

Limit = Literal["tokens", "cost", "model_calls", "tool_calls", "wall_time"]
LIMITS: tuple[Limit, ...] = get_args(Limit)
Scope = Literal["run", "thread"]
OnExceeded = Literal["fail", "ask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much a run, or all runs of a thread together, may use.

    What counts are the calls of `llm_node` and `tool_node`. A call is begun only if nothing is used
    up; those that are under way come to their end, so a sum of tokens or of money may be exceeded
    by these, a number of calls is not exceeded at all.

    Example:
        ```python
        app.register(graph, name="research", budget=Budget(cost=2.5, model_calls=40))
        ```
    """

    tokens: int | None = None
    """Of input and output together, as the provider counts them."""
    cost: float | None = None
    """In the currency of the prices."""
    model_calls: int | None = None
    tool_calls: int | None = None
    wall_time: Duration | None = None
    """Since the run was first claimed, with all that it waits for."""
    scope: Scope = "run"
    on_exceeded: OnExceeded = "fail"
    """Fail, with a dead letter; or ask a person for more, while the run waits."""
    warn_at: float = 0.8
    """The share of a limit at which a warning is logged, once in an attempt."""
    prices: Mapping[str, Price] | None = None
    """Prices by the names of models; by default those that come along."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            InvalidInputError: Names each field that is out of range.
        """
        limits = {name: getattr(self, name) for name in LIMITS}
        found = [
            f"{name}: must be above 0"
            for name, limit in limits.items()
            if limit is not None and not _number(limit) > 0
        ]
        if all(limit is None for limit in limits.values()):
            found.append(f"set one of {', '.join(LIMITS)}")
        if self.scope not in get_args(Scope):
            found.append(f"scope: must be one of {', '.join(get_args(Scope))}")
        if self.scope == "thread" and self.wall_time is not None:
            found.append("wall_time: is that of a run")
        if self.on_exceeded not in get_args(OnExceeded):
            found.append(f"on_exceeded: must be one of {', '.join(get_args(OnExceeded))}")
        if not 0 < self.warn_at <= 1:
            found.append("warn_at: must be above 0, and 1 at most")
        if found:
            raise InvalidInputError("budget", tuple(found))

    def limits(self) -> Iterator[tuple[Limit, float]]:
        """Yield what is limited, and how much it may be; seconds for a time."""
        for name in LIMITS:
            limit = getattr(self, name)
            if limit is not None:
                yield name, _number(limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What was used."""

    tokens: int = 0
    cost: float = 0.0
    model_calls: int = 0
    tool_calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        both = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in _USED}
        return Usage(**{name: sum(values) for name, values in both.items()})


_USED = fields(Usage)


def _number(limit: Any) -> float:
    return limit.total_seconds() if isinstance(limit, timedelta) else float(limit)
