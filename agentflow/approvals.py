"""Questions to people, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentflow.inputs import member
from agentflow.interrupts import parse_decision, validate
from agentflow.storage import RunStore
from agentflow.telemetry import APPROVAL_OUTCOME, APPROVAL_WAIT, decide_span
from agentflow.types import Approval, Decision, Page, WaitStatus


class Approvals:
    """The approvals of a tenant; `app.approvals`."""

    def __init__(self, store: RunStore, tenant: str) -> None:
        """Work on the waits of `tenant` in `store`."""
        self._store = store
        self._tenant = tenant

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
        approval_id: str,
        decision: Decision | Mapping[str, Any] | str,
        *,
        by: str,
        comment: str | None = None,
        version: int | None = None,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Answer a request, once; its run goes on with the answer.

        The answer is checked against the request before anything is stored, and the graph sees it
        only after that.

        Args:
            approval_id: Which request.
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
            VersionChangedError: It is not at `version` any more.
        """
        with decide_span(approval_id) as span:
            approval = await self.get(approval_id)
            parsed = parse_decision(approval_id, decision)
            if approval.status is WaitStatus.PENDING:
                validate(approval_id, approval.request, parsed)
            resolved = await self._store.resolve_wait(
                self._tenant,
                approval_id,
                parsed,
                by=by,
                comment=comment,
                version=version,
                idempotency_key=idempotency_key,
                request=approval.request,
            )
            span.set_attribute(APPROVAL_OUTCOME, parsed.type)
            if resolved.decided_at is not None:
                waited = resolved.decided_at - resolved.created_at
                span.set_attribute(APPROVAL_WAIT, waited.total_seconds())
        return resolved
