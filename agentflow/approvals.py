"""Questions to people, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.checkpoint import Saver
from agentflow.checkpoint.retraction import Retraction
from agentflow.drive import acquire
from agentflow.errors import ConflictError, FencedError, InvalidInputError
from agentflow.inputs import member
from agentflow.interrupts import parse_decision, validate
from agentflow.journal import safe_at_of, warn_if_early
from agentflow.offers import Offers
from agentflow.storage import RunStore
from agentflow.telemetry import APPROVAL_OUTCOME, APPROVAL_WAIT, decide_span
from agentflow.types import Approval, Decision, Page, SystemClock, WaitStatus, new_id


class Approvals:
    """The approvals of a tenant; `app.approvals`."""

    def __init__(
        self,
        store: RunStore,
        tenant: str,
        *,
        saver: BaseCheckpointSaver[Any],
        lease: timedelta,
        offers: Offers,
    ) -> None:
        """Work on the waits of `tenant` in `store`, whose graphs ask under `saver`.

        `lease` is for how long a run is held whose answer is taken back. What goes on after a
        decision is offered to `offers`.
        """
        self._store = store
        self._tenant = tenant
        self._saver = saver
        self._lease = lease
        self._offers = offers

    async def list(
        self,
        *,
        status: WaitStatus | str | None = WaitStatus.PENDING,
        run_id: str | None = None,
        graph: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Approval]:
        """Return a page of approvals, oldest first; `status=None` returns all."""
        return await self._store.list_waits(
            self._tenant,
            status=member(WaitStatus, status),
            run_id=run_id,
            graph=graph,
            limit=limit,
            cursor=cursor,
        )

    async def get(self, approval_id: str) -> Approval:
        """Return an approval as it stands; `NotFoundError` if there is none."""
        return await self._store.get_wait(self._tenant, approval_id)

    async def decide(
        self,
        approval: Approval | str,
        decision: Decision | Mapping[str, Any] | str,
        *,
        by: str,
        comment: str | None = None,
        version: int | None = None,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Answer a request, once; its run goes on with the answer.

        The answer is checked against the request before anything is stored, and the graph sees it
        only after that. About an effect in doubt a warning is logged before it is safe to answer.

        Args:
            approval: Which request: its id, or the request itself as it was read and shown. The
                latter is not read again, and decided only if it is as it was.
            decision: A `Decision`, the same as a mapping, or a bare type like `"approve"`.
            by: Who decides.
            comment: Kept with the decision; the graph does not see it.
            version: Decide only if the request still is at this version.
            idempotency_key: Makes a repeated call return the first one's result.

        Raises:
            NotFoundError: There is no such request.
            InvalidDecisionError: The answer does not fit the request.
            AlreadyResolvedError: It was answered before; that answer stands.
            SupersededError: It is gone: the run was cancelled or moved past it.
            VersionChangedError: It is not at `version` any more, or not as it was read.
        """
        approval_id = approval if isinstance(approval, str) else approval.id
        with decide_span(approval_id) as span:
            if isinstance(approval, str) or approval.status is not WaitStatus.PENDING:
                shown = await self.get(approval_id)
            else:
                shown, version = approval, version or approval.version
            parsed = parse_decision(approval_id, decision)
            if shown.status is WaitStatus.PENDING:
                validate(approval_id, shown.request, parsed)
                if shown.kind == "effect" and parsed.type == "respond":
                    asked = shown.request.proposal
                    warn_if_early(asked["effect"], safe_at_of(asked), SystemClock().now())
            resolve = partial(
                self._store.resolve_wait,
                self._tenant,
                approval_id,
                parsed,
                by=by,
                comment=comment,
                version=version,
                idempotency_key=idempotency_key,
                request=shown.request,
            )
            resolved, _ = await self._offers.hand(
                lambda claimant: resolve(claimant=claimant),
                # Of which version it is, and in which queue, is seen when it is locked.
                lambda claimant: any(name == shown.graph for name, _ in claimant.graphs),
            )
            span.set_attribute(APPROVAL_OUTCOME, parsed.type)
            if resolved.decided_at is not None:
                waited = resolved.decided_at - resolved.created_at
                span.set_attribute(APPROVAL_WAIT, waited.total_seconds())
        return resolved

    async def reopen(self, approval_id: str, *, by: str, comment: str | None = None) -> Approval:
        """Take a decision back: its question is pending again, under the same id.

        The node that asked gets back to where it waited, and no other one runs again. What it has
        done since stays done: effects on record are not called again with another answer, as far
        as their keys or arguments are the same. What it has asked after that is asked anew. A run
        in the dead letter goes on. A process that dies in between leaves the run paused, with the
        old decision; call it again.

        Args:
            approval_id: Which request.
            by: Who takes it back.
            comment: Kept with the audit event.

        Raises:
            NotFoundError: There is no such request.
            ConflictError: It is not resolved, or its run has ended or is past the superstep that
                asked; fork the run from a checkpoint before it instead.
            ThreadBusyError: The run is being driven; pause it, and try again.
            InvalidInputError: The checkpointer is not agentflow's.
        """
        if not isinstance(self._saver, Saver):
            problem = "the checkpointer is not agentflow's; fork the run instead"
            raise InvalidInputError("reopen", (problem,))
        wait = await self.get(approval_id)
        wanted = Retraction(
            ns=wait.ns,
            checkpoint_id=wait.checkpoint_id,
            task_id=wait.task_id,
            interrupt_id=wait.interrupt_id,
            answers=wait.answers_recorded,
        )
        await self._check_open(self._saver, wait)
        claimed = await self._store.claim_reopening(
            self._tenant, approval_id, worker=f"reopen-{new_id()[-6:]}", lease=self._lease, by=by
        )
        lease = await acquire(self._store, self._saver, claimed.lease)
        try:
            await self._saver.with_lease(lease).retract_answer(wait.thread_id, wanted)
        finally:
            with suppress(FencedError):
                await self._saver.release(lease)
        return await self._store.reopen_wait(lease, approval_id, by=by, comment=comment)

    async def _check_open(self, saver: Saver, wait: Approval) -> None:
        """See that the superstep is not over, before anything is touched."""
        if wait.kind != "approval" or wait.status is not WaitStatus.RESOLVED:
            return  # refused by the store, which says why
        place = {"thread_id": wait.thread_id, "checkpoint_ns": wait.ns}
        # As plain data: this process need not know the classes of the run's state.
        head = await saver.readable_anywhere().aget_tuple({"configurable": place})
        if head is None or head.checkpoint["id"] != wait.checkpoint_id:
            raise ConflictError(
                f"run {wait.run_id!r} is past the step that asked {wait.id!r}; fork it from a "
                "checkpoint before that"
            )
