"""Runs that failed for good: looked at, requeued, or discarded."""

from __future__ import annotations

from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.errors import NotDeadLetterError, NotFoundError
from agentflow.storage import RunStore
from agentflow.types import DeadLetter, Page, Run


class DeadLetters:
    """The dead letters of a tenant; `app.dead_letters`."""

    def __init__(self, store: RunStore, saver: BaseCheckpointSaver[Any], tenant: str) -> None:
        """Work on the failed runs of `tenant` in `store`, with their checkpoints in `saver`."""
        self._store = store
        self._saver = saver
        self._tenant = tenant

    async def list(
        self,
        *,
        graph: str | None = None,
        reason: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[DeadLetter]:
        """Return a page of dead letters, newest first.

        Args:
            graph: Of runs of this graph only.
            reason: `exhausted`, `not_retryable` or `deadline` only.
            limit: How many at most.
            cursor: Where the last page ended.
        """
        return await self._store.list_dead_letters(
            self._tenant, graph=graph, reason=reason, limit=limit, cursor=cursor
        )

    async def get(self, run_id: str) -> DeadLetter:
        """Return the dead letter of a run.

        Raises:
            NotFoundError: There is no such run.
            NotDeadLetterError: It has none.
        """
        letter = await self._store.find_dead_letter(self._tenant, run_id)
        if letter is None:
            run = await self._store.get_run(self._tenant, run_id)
            raise NotDeadLetterError(run_id, run.status.value)
        return letter

    async def requeue(
        self, run_id: str, *, checkpoint_id: str | None = None, by: str | None = None
    ) -> Run:
        """Queue the run again, with a new attempt budget; of many callers one succeeds.

        Args:
            run_id: Which run.
            checkpoint_id: Where to continue: a checkpoint of its thread. By default it continues
                from the node that failed, and what finished beside it is not executed again; but
                all of a run whose effects were undone is.
            by: Who does it.

        Raises:
            NotFoundError: There is no such run, or no such checkpoint in its thread.
            NotDeadLetterError: The run has no dead letter; somebody else may have been first.
        """
        if checkpoint_id is not None:
            letter = await self.get(run_id)
            thread_id = letter.thread_id or run_id
            place = {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": checkpoint_id}
            if await self._saver.aget_tuple({"configurable": place}) is None:
                raise NotFoundError("checkpoint", checkpoint_id)
        return await self._store.requeue_dead_letter(
            self._tenant, run_id, checkpoint_id=checkpoint_id, by=by
        )

    async def discard(
        self, run_id: str, *, reason: str | None = None, by: str | None = None
    ) -> Run:
        """Delete the dead letter; the run stays failed, with its error and its events.

        Raises:
            NotFoundError: There is no such run.
            NotDeadLetterError: It has none.
        """
        return await self._store.discard_dead_letter(self._tenant, run_id, reason=reason, by=by)
