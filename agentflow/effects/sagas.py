"""Sagas: undoes what a run has done, in the reverse order, when it fails or is cancelled.

Each compensation is an effect of its own, with an intent and an outcome, so that what was undone
before a crash is not undone again after it. What is in doubt is cleared up before anything is
undone, since it may have to be undone first.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, get_type_hints

from pydantic import BaseModel

from agentflow.effects.definition import Definition, called_as, find_definition
from agentflow.effects.journal import Journal
from agentflow.effects.policy import EffectContext, InDoubt, Policy
from agentflow.errors import FencedError, RunError, StoreUnavailableError
from agentflow.interrupts.plain import rebuild
from agentflow.journal import Effect, EffectStatus, NewEffect
from agentflow.retry import RetryPolicy
from agentflow.storage import RunStore
from agentflow.types import Run, new_id

logger = logging.getLogger(__name__)

_PAGE = 200


async def compensate(journal: Journal, store: RunStore, run: Run) -> None:
    """Undo the effects of a run that can be undone: the one that ended last first.

    A compensation that fails for good is left, and the others go on.

    Raises:
        InDoubt: Whether some of them happened has to be found out first, or whether a compensation
            did.
        RunError: A compensation is not to be found in this process.
    """
    found = await _effects(store, run)
    if doubts := [each for each in found if _is_to_be_asked(each)]:
        journal.doubts.update({each.id: each for each in doubts})
        raise InDoubt(doubts[0])
    done = [
        each
        for each in found
        if each.compensate is not None and each.status is EffectStatus.SUCCEEDED
    ]
    for effect in sorted(done, key=lambda each: each.order or 0, reverse=True):
        try:
            await _undo(journal, effect)
        except (FencedError, StoreUnavailableError, _MissingError):
            raise
        except Exception as exc:  # noqa: BLE001 -- user code; its record says what it was
            logger.warning(
                "compensation failed",
                extra={"run_id": run.id, "effect": effect.id, "error": type(exc).__name__},
            )


def _is_to_be_asked(effect: Effect) -> bool:
    """Whether it has to be known of an effect first if it has happened.

    One that may be repeated, or is declared to fail, matters only if it may have to be undone.
    """
    may_matter = effect.compensate is not None or effect.on_in_doubt in {"ask", "check"}
    return may_matter and effect.status is EffectStatus.INTENDED


async def count_undone(store: RunStore, run: Run) -> int:
    """Count the effects of a run that are undone: how far its compensation has come."""
    found = await _effects(store, run)
    return sum(each.status is EffectStatus.COMPENSATED for each in found)


class _MissingError(RunError):
    """A compensation is not here; a process that has it may go on."""


async def _effects(store: RunStore, run: Run) -> list[Effect]:
    found: list[Effect] = []
    cursor: str | None = None
    while True:
        page = await store.list_effects(
            run.tenant, run_id=run.id, limit=_PAGE, cursor=cursor, strict=True
        )
        found += [each for each in page.whole() if each.kind == "effect"]
        if (cursor := page.cursor) is None:
            return found


async def _undo(journal: Journal, effect: Effect) -> None:
    definition = find_definition(effect.name)
    if definition is None or definition.compensate is None:
        raise _MissingError(
            f"the compensation {effect.compensate!r} of effect {effect.name!r} is not here; give "
            "this run to a worker that has imported it"
        )
    function = definition.compensate
    own: Definition | None = getattr(function, "__agentflow_effect__", None)
    new = NewEffect(
        id=new_id(),
        scope=journal.root,
        key=f"@compensate:{effect.id}:{effect.attempt}",
        name=effect.compensate or "",
        arguments={"effect": effect.id},
        ns=effect.ns,
        task_id=effect.id,
        node=effect.node,
        on_in_doubt="ask" if own is None or own.on_in_doubt == "check" else own.on_in_doubt,
        timeout=None if own is None else own.timeout,
        kind="compensation",
    )
    policy = Policy(
        retry=RetryPolicy() if own is None or own.retry is None else own.retry,
        in_doubt_on=None if own is None else own.in_doubt_on,
    )
    target = function if own is None else own.function
    await journal.run(new, policy, functools.partial(_call, target, definition, effect))


async def _call(
    function: Callable[..., Any], definition: Definition, effect: Effect, context: EffectContext
) -> Any:
    """Call a compensation with the outcome, and with those arguments that it has names for."""
    arguments = _arguments(function, definition, effect)
    outcome = definition.restored(effect)
    with called_as(replace(context, key=effect.key)):
        if inspect.iscoroutinefunction(function):
            return await function(outcome, **arguments)
        return await asyncio.to_thread(function, outcome, **arguments)


def _arguments(
    function: Callable[..., Any], definition: Definition, effect: Effect
) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    names = {each.name for each in parameters}
    try:
        hints = get_type_hints(definition.function)
    except Exception:  # noqa: BLE001 -- names that are not there when it is called
        hints = {}
    return {
        name: _typed(hints.get(name), plain)
        for name, plain in effect.arguments.items()
        if takes_all or name in names
    }


def _typed(hint: Any, plain: Any) -> Any:
    is_typed = isinstance(hint, type) and (issubclass(hint, BaseModel) or is_dataclass(hint))
    return rebuild(hint, plain) if is_typed else plain
