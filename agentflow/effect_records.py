"""The records of effects, and what people say of those in doubt."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from agentflow.effects import find_definition
from agentflow.errors import InvalidInputError
from agentflow.inputs import member
from agentflow.interrupts.plain import to_plain
from agentflow.journal import (
    Effect,
    EffectStatus,
    Resolution,
    question_ids,
    safe_at_of,
    warn_if_early,
)
from agentflow.storage import RunStore
from agentflow.types import Page, SystemClock, WaitStatus

_QUESTIONS = 1000


class EffectRecords:
    """The effects of a tenant; `app.effects`."""

    def __init__(self, store: RunStore, tenant: str) -> None:
        """Work on the records of `tenant` in `store`."""
        self._store = store
        self._tenant = tenant

    async def list(
        self,
        *,
        run_id: str | None = None,
        status: EffectStatus | str | None = None,
        in_doubt: bool = False,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Effect]:
        """Return a page of effects, the first intended first.

        Args:
            run_id: Those of one run only.
            status: Those with one status only.
            in_doubt: Those only of which nobody knows what came of them: they were intended, and
                no attempt is at them any more.
            limit: How many at most.
            cursor: Where the last page ended.

        Raises:
            InvalidInputError: There is no such status.
        """
        return await self._store.list_effects(
            self._tenant,
            run_id=run_id,
            status=member(EffectStatus, status),
            in_doubt=in_doubt,
            limit=limit,
            cursor=cursor,
        )

    async def get(self, effect_id: str) -> Effect:
        """Return an effect as it stands; `NotFoundError` if there is none."""
        return await self._store.get_effect(self._tenant, effect_id)

    async def safe_at(self, effect: Effect) -> datetime | None:
        """Return from when on it is safe to say what came of an effect that is in doubt.

        That is what the question about it shows, if it is asked: whoever asks may know that the
        worker is gone, or have been at the call itself. `None` if nobody can say.
        """
        page = await self._store.list_waits(
            self._tenant,
            status=WaitStatus.PENDING,
            run_id=effect.run_id,
            graph=None,
            limit=_QUESTIONS,
            cursor=None,
        )
        asked = question_ids(effect.id, effect.attempt)
        for each in page.whole():
            if each.kind == "effect" and each.interrupt_id in asked:
                return safe_at_of(each.request.proposal)
        return effect.safe_at

    async def resolve(
        self,
        effect_id: str,
        *,
        happened: bool,
        outcome: Any = None,
        by: str,
        comment: str | None = None,
    ) -> Effect:
        """Say what came of an effect that is in doubt, or that failed.

        Its run goes on if it waits for that. Of one that did not happen, the next attempt makes the
        call. Before `safe_at` the call may still be under way: then a warning is logged.

        Args:
            effect_id: Which effect.
            happened: Whether the call has happened.
            outcome: What it returned, as plain data; a dataclass or pydantic model is built from
                it where the function says that it returns one.
            by: Who says so.
            comment: Kept with the record.

        Raises:
            NotFoundError: There is no such effect.
            ConflictError: It is under way, or its outcome is known. An outcome that a person gave
                can be corrected once its run has failed.
            InvalidInputError: The outcome is not one of the function's, which is known here.
            SerializationError: The outcome is not plain data.
        """
        effect = await self.get(effect_id)
        definition = find_definition(effect.name) if happened else None
        if definition is not None and (problem := definition.outcome_problem(outcome)) is not None:
            raise InvalidInputError("effect", (f"outcome: {problem}",))
        if effect.status is EffectStatus.INTENDED:
            warn_if_early(effect.id, await self.safe_at(effect), SystemClock().now())
        said = Resolution(
            happened=happened, outcome=to_plain(outcome, "outcome"), by=by, comment=comment
        )
        return await self._store.resolve_effect(self._tenant, effect_id, said)
