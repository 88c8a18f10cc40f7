"""`RunHandle`: one run, by its id."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from langgraph.types import StateSnapshot

from agentflow.approvals import Approvals
from agentflow.errors import RunCancelledError, RunFailedError
from agentflow.types import Approval, Duration, Run, RunStatus

Until = Literal["ended", "parked"]


class Runs(Protocol):
    """What a handle asks of the app that made it; see `AgentFlow`."""

    approvals: Approvals

    async def get_run(self, run_id: str) -> Run: ...
    async def wait(
        self, run_id: str, *, until: Until = "ended", timeout: Duration | None = None
    ) -> Run: ...
    async def state(self, run_id: str) -> StateSnapshot: ...
    async def cancel(
        self, run_id: str, *, reason: str | None = None, by: str | None = None
    ) -> Run: ...
    async def pause_run(
        self, run_id: str, *, reason: str | None = None, by: str | None = None
    ) -> Run: ...
    async def resume_run(self, run_id: str, *, by: str | None = None) -> Run: ...


class RunHandle:
    """One run, by its id."""

    def __init__(self, app: Runs, run_id: str, thread_id: str | None) -> None:
        """Refer to the run `run_id` of `app`."""
        self._app = app
        self.id = run_id
        self.thread_id = thread_id

    async def run(self) -> Run:
        """Return the run as it stands."""
        return await self._app.get_run(self.id)

    async def wait(self, *, until: Until = "ended", timeout: Duration | None = None) -> Run:
        """Return the run once it has ended, or parked; see `AgentFlow.wait`."""
        return await self._app.wait(self.id, until=until, timeout=timeout)

    async def result(self, *, timeout: Duration | None = None) -> Any:
        """Return the run's output once it has succeeded.

        Raises:
            RunFailedError: It failed.
            RunCancelledError: It was cancelled.
            TimeoutError: It took longer than `timeout`.
        """
        run = await self.wait(timeout=timeout)
        if run.status is RunStatus.CANCELLED:
            raise RunCancelledError(run.id, run.cancel_reason)
        if run.status is RunStatus.FAILED:
            error = run.error
            raise RunFailedError(
                run.id,
                error.type if error else "unknown",
                error.node if error else None,
                error.attempt if error else run.attempt,
            )
        return run.output

    async def status(self) -> RunStatus:
        """Return the run's status."""
        return (await self.run()).status

    async def state(self) -> StateSnapshot:
        """Return the state of the run's thread, as LangGraph shows it."""
        return await self._app.state(self.id)

    async def approvals(self) -> tuple[Approval, ...]:
        """Return the run's pending approvals, oldest first."""
        page = await self._app.approvals.list(run_id=self.id, limit=1000)
        return page.items

    async def cancel(self, *, reason: str | None = None, by: str | None = None) -> Run:
        """Cancel the run; see `AgentFlow.cancel`."""
        return await self._app.cancel(self.id, reason=reason, by=by)

    async def pause(self, *, reason: str | None = None, by: str | None = None) -> Run:
        """Pause the run; see `AgentFlow.pause_run`."""
        return await self._app.pause_run(self.id, reason=reason, by=by)

    async def resume(self, *, by: str | None = None) -> Run:
        """Let the paused run go on; see `AgentFlow.resume_run`."""
        return await self._app.resume_run(self.id, by=by)

    def __repr__(self) -> str:
        """Show the id."""
        return f"RunHandle({self.id!r})"
