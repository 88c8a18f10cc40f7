"""`Meter`: counts what an attempt uses, on top of what is durable of the run and its thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, cast

from agentflow.budgets.budget import Budget, Limit, Scope, Usage
from agentflow.budgets.prices import price_of, read_prices
from agentflow.control import AsksPerson
from agentflow.errors import BudgetExceededError, UnknownPriceError
from agentflow.journal import Effect, EffectStatus
from agentflow.storage import RunStore
from agentflow.telemetry import note_budget
from agentflow.types import Approval, Clock, Run, SystemClock, WaitStatus

logger = logging.getLogger(__name__)

MODEL = "agentflow:model"
"""What a model's call is named in the journal."""
TOOL = "agentflow:tool:"
"""How the names of tools' calls begin there."""
WAIT = "budget"
"""The kind of wait in which a run asks for more."""

Call = Literal["model", "tool"]
_PAGE = 200


class OverBudget(AsksPerson):
    """A budget is used up, and a person is asked for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a person is to be asked for."""

    scope: Scope
    limit: Limit
    base: float
    """What the budget says."""
    allowed: float
    """With what was granted since."""
    used: float
    number: int
    """How often the run has asked before."""


class Meter:
    """What one attempt may use; safe to use from any thread."""

    def __init__(
        self,
        store: RunStore,
        run: Run,
        budgets: Sequence[Budget],
        *,
        clock: Clock | None = None,
    ) -> None:
        """Hold a run to its budgets."""
        self.asks: dict[tuple[Scope, Limit], Ask] = {}
        """What is to be asked for when the attempt has stopped."""
        self._store = store
        self._run = run
        self._budgets = budgets
        self._clock = clock or SystemClock()
        self._used: dict[Scope, Usage] = {}
        self._under_way = {"model": 0, "tool": 0}
        self._answers: list[Approval] = []
        self._warned: set[tuple[Scope, Limit]] = set()
        self._lock = threading.Lock()

    async def begin(self, waits: Iterable[Approval]) -> None:
        """Read what is durable of what was used, and, from the run's waits, what was granted.

        To be called before anything is driven: from then on the calls are counted here.
        """
        self._answers = [each for each in waits if each.kind == WAIT]
        for scope in {budget.scope for budget in self._budgets}:
            self._used[scope] = await self._durable(scope)

    def admit(self, call: Call) -> None:
        """Let a call begin, which `end` is then told of.

        Raises:
            BudgetExceededError: Something is used up.
            OverBudget: The same, where a person is asked for more.
        """
        with self._lock:
            for budget in self._budgets:
                for limit, base in budget.limits():
                    allowed = base + self._granted(budget.scope, limit)
                    spent = self._spent(limit, self._used[budget.scope], call)
                    if spent >= allowed:
                        self._exceeded(budget, limit, base, allowed, spent)
            self._under_way[call] += 1

    def end(self, call: Call, usage: Usage | None = None) -> None:
        """Note that a call has come to its end, and what it has used; `None` if it was not made."""
        with self._lock:
            self._under_way[call] -= 1
            if usage is None:
                return
            for scope, before in self._used.items():
                self._used[scope] = before + usage
        for budget in self._budgets:
            for limit, base in budget.limits():
                allowed = base + self._granted(budget.scope, limit)
                self._warn(
                    budget, limit, self._spent(limit, self._used[budget.scope], None), allowed
                )

    def cost(self, models: Sequence[str], usage: Mapping[str, Any]) -> float:
        """Return what a call has cost, by whichever name of the model has a price; 0 if none."""
        for budget in sorted(self._budgets, key=lambda each: each.cost is None):
            prices = read_prices() if budget.prices is None else budget.prices
            for model in models:
                if (price := price_of(model, prices)) is not None:
                    return price.cost(usage)
        return 0.0

    def check_price(self, model: str) -> None:
        """Refuse to call a model whose costs are limited and not known.

        Raises:
            UnknownPriceError: There is no price of this model.
        """
        for budget in self._budgets:
            prices = read_prices() if budget.prices is None else budget.prices
            if budget.cost is not None and price_of(model, prices) is None:
                raise UnknownPriceError(model)

    # What is used, and what is allowed.

    def _spent(self, limit: Limit, used: Usage, call: Call | None) -> float:
        if limit == "wall_time":
            since = self._run.started_at or self._clock.now()
            return (self._clock.now() - since).total_seconds()
        spent = float(getattr(used, limit))
        if limit == "model_calls":
            return spent + self._under_way["model"] if call != "tool" else -1.0
        if limit == "tool_calls":
            return spent + self._under_way["tool"] if call != "model" else -1.0
        return spent

    def _granted(self, scope: Scope, limit: Limit) -> float:
        return sum(
            float((each.decision.value or {}).get("more", 0))
            if each.decision.type == "respond"
            else float(each.request.proposal["base"])
            for each in self._resolved(scope, limit)
            if each.decision is not None and each.decision.type != "reject"
        )

    def _resolved(self, scope: Scope, limit: Limit) -> list[Approval]:
        return [
            each
            for each in self._answers
            if each.status is WaitStatus.RESOLVED
            and (each.request.proposal["scope"], each.request.proposal["limit"]) == (scope, limit)
        ]

    def _exceeded(
        self, budget: Budget, limit: Limit, base: float, allowed: float, spent: float
    ) -> None:
        is_refused = any(
            each.decision is not None and each.decision.type == "reject"
            for each in self._resolved(budget.scope, limit)
        )
        if budget.on_exceeded == "fail" or is_refused:
            raise BudgetExceededError(self._run.id, budget.scope, limit, spent, allowed)
        self.asks[budget.scope, limit] = Ask(
            scope=budget.scope,
            limit=limit,
            base=base,
            allowed=allowed,
            used=spent,
            number=len(self._answers),
        )
        raise OverBudget(limit)

    def _warn(self, budget: Budget, limit: Limit, spent: float, allowed: float) -> None:
        key = (budget.scope, limit)
        if spent < budget.warn_at * allowed or key in self._warned:
            return
        self._warned.add(key)
        note_budget(budget.scope, limit, spent / allowed)
        logger.warning(
            "budget is nearly used up",
            extra={"run_id": self._run.id, "scope": budget.scope, "limit": limit},
        )

    async def _durable(self, scope: Scope) -> Usage:
        run_ids = [self._run.id] if scope == "run" else await self._runs_of_thread()
        total = Usage()
        for run_id in run_ids:
            cursor = None
            while True:
                page = await self._store.list_effects(
                    self._run.tenant, run_id=run_id, limit=_PAGE, cursor=cursor
                )
                for effect in page.whole():
                    total += self._usage_of(effect)
                if (cursor := page.cursor) is None:
                    break
        return total

    async def _runs_of_thread(self) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            page = await self._store.list_runs(
                self._run.tenant,
                status=None,
                graph=None,
                thread_id=self._run.thread_id,
                limit=_PAGE,
                cursor=cursor,
            )
            found += [run.id for run in page.items]
            found += [run.id for run in page.unreadable]
            if (cursor := page.cursor) is None:
                return found

    def _usage_of(self, effect: Effect) -> Usage:
        """Return what stands in the journal of a call; one in doubt may have been made."""
        if effect.status in {EffectStatus.NOT_CALLED, EffectStatus.NOT_HAPPENED}:
            return Usage()
        if effect.name.startswith(TOOL):
            return Usage(tool_calls=1)
        if effect.name != MODEL:
            return Usage()
        if effect.status is not EffectStatus.SUCCEEDED:
            return Usage(model_calls=1)
        return Usage(**cast("Mapping[str, Any]", effect.outcome)["usage"])


_current: ContextVar[Meter | None] = ContextVar("agentflow_meter", default=None)


@contextmanager
def metering(meter: Meter | None) -> Iterator[None]:
    """Make a meter the current one, for everything that is called from here."""
    token = _current.set(meter)
    try:
        yield
    finally:
        _current.reset(token)


def current_meter() -> Meter | None:
    """Return the meter of the attempt that the caller runs in, if it has a budget."""
    return _current.get()
