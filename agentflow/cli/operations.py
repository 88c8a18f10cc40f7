"""`agentflow doctor` and `agentflow restore`: how a deployment is, and another epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agentflow.cli.command import Call, OutcomeError
from agentflow.cli.output import OutputFormat
from agentflow.types import Page, Run, RunStatus

if TYPE_CHECKING:
    from agentflow.app import AgentFlow

_RUNS = ("id", "tenant", "graph", "version", "status", "step", "created_at")


async def doctor(call: Call) -> None:
    """Look for what is wrong: with the database, with workers, with runs. It changes nothing.

    The exit code is 1 if there is a problem; what is merely a warning leaves it 0.
    """
    async with call.open_app() as app:
        found = await app.doctor()
    if call.output.format is OutputFormat.TABLE:
        call.output.rows(found.checks, ("name", "level", "message"), empty="")
    else:
        call.output.record({"level": found.level, "checks": found.checks})
    problems = sum(check.level == "problem" for check in found.checks)
    if problems:
        raise OutcomeError(f"{problems} of {len(found.checks)} checks have found a problem")


async def restore(
    call: Call,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Let everything go on, once it was looked through.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    by: Annotated[str | None, typer.Option(help="Who does it; it is kept.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many runs to list at most.")] = 100,
) -> None:
    """Mark that the database was put back from a backup; everything starts paused.

    Run it after the backup is back and before any worker starts. No process from before can write
    any more. It lists the runs that are unfinished in the backup: what they did since it was made
    they are about to do again. Cancel those that must not; then let the others go on by --resume.
    """
    async with call.open_app() as app:
        if resume:
            was_paused = await app.resume_restored(by=by)
            call.output.message("everything goes on" if was_paused else "it was not paused")
            return
        if not call.confirm("Mark this database as restored, and pause everything in it?"):
            raise OutcomeError("not confirmed; nothing was changed")
        restored = await app.restore(reason=reason, by=by)
        unfinished = await _unfinished(app, limit)
    call.output.message(
        f"the database is in epoch {restored.epoch}, and paused; unfinished runs of all tenants: "
        f"{restored.unfinished}"
    )
    if call.output.format is OutputFormat.TABLE:
        call.output.page(unfinished, _RUNS, empty="no unfinished runs of this tenant")
    else:
        shown = call.output.page_rows(unfinished, _RUNS)
        call.output.record({"restored": restored, "unfinished": shown})
    call.output.message("when they were looked through: 'agentflow restore --resume'")


async def _unfinished(app: AgentFlow, limit: int) -> Page[Run]:
    found: Page[Run] = Page(items=(), cursor=None)
    for status in RunStatus:
        room = limit - len(found.items) - len(found.unreadable)
        if not status.is_ended and room > 0:
            more = await app.list_runs(status=status, limit=room)
            found = Page(
                items=found.items + more.items,
                cursor=None,
                unreadable=found.unreadable + more.unreadable,
            )
    return found
