"""`agentflow dead-letter`: look at runs that failed for good, requeue or discard them."""

from __future__ import annotations

from typing import Annotated

import typer

from agentflow.cli.command import Call, OutcomeError, command
from agentflow.cli.output import OutputFormat, block, field_lines, jsonable
from agentflow.cli.runs import RunId

group = typer.Typer(help="Look at runs that failed for good, and mend them.", no_args_is_help=True)

_COLUMNS = ("run_id", "graph", "version", "reason", "cause.type", "cause.node", "attempts", "at")
_FIELDS = (
    "run_id",
    "thread_id",
    "graph",
    "version",
    "reason",
    "at",
    "attempts",
    "claims",
    "step",
    "checkpoint_id",
)
_RUN = ("id", "status", "graph", "thread_id", "resume_from")

By = Annotated[str | None, typer.Option(help="Who does it; it is kept.")]


@command(group, "list")
async def list_letters(
    call: Call,
    *,
    graph: Annotated[str | None, typer.Option(help="Of this graph only.")] = None,
    reason: Annotated[
        str | None,
        typer.Option(help="Of this reason only: exhausted, not_retryable or deadline."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
) -> None:
    """List dead letters, newest first."""
    async with call.open_app() as app:
        page = await app.dead_letters.list(graph=graph, reason=reason, limit=limit, cursor=cursor)
    call.output.page(page, _COLUMNS, empty="no dead letters")


@command(group, "show")
async def show(call: Call, run_id: RunId) -> None:
    """Show a dead letter: its cause, and the state that it failed in."""
    async with call.open_app() as app:
        letter = await app.dead_letters.get(run_id)
    if call.output.format is not OutputFormat.TABLE:
        call.output.record(letter)
        return
    data = jsonable(letter)
    lines = [*field_lines(data, _FIELDS), "", "cause:"]
    lines += [f"  {line}" for line in field_lines(data["cause"], ("type", "node", "attempt"))]
    lines += [f"  {line}" for line in block("message", letter.cause.message)]
    if letter.cause.traceback:
        lines += [f"  {line}" for line in block("traceback", letter.cause.traceback)]
    for line in lines:
        typer.echo(line)
    if letter.thread_id is not None and letter.checkpoint_id is not None:
        place = f"{letter.thread_id} {letter.checkpoint_id}"
        call.output.message(f"its state: 'agentflow checkpoint show {place}'")


@command(group, "requeue")
async def requeue(
    call: Call,
    run_id: RunId,
    *,
    checkpoint: Annotated[
        str | None, typer.Option(help="Where to continue; by default where it failed.")
    ] = None,
    by: By = None,
) -> None:
    """Queue a run again, with a new attempt budget. It works once; a worker executes it."""
    async with call.open_app() as app:
        letter = await app.dead_letters.get(run_id)
        cause = f"{letter.cause.type} in node {letter.cause.node!r}"
        if not call.confirm(f"Requeue run {run_id} of graph {letter.graph!r}, failed by {cause}?"):
            raise OutcomeError("not confirmed; the run stays failed")
        run = await app.dead_letters.requeue(run_id, checkpoint_id=checkpoint, by=by)
    call.output.message(f"run {run_id} is {run.status.value}")
    call.output.record(run, _RUN)


@command(group, "discard")
async def discard(
    call: Call,
    run_id: RunId,
    *,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    by: By = None,
) -> None:
    """Delete a dead letter; the run stays failed, with its error and its events."""
    async with call.open_app() as app:
        letter = await app.dead_letters.get(run_id)
        if not call.confirm(f"Discard the dead letter of run {run_id} of graph {letter.graph!r}?"):
            raise OutcomeError("not confirmed; the dead letter is kept")
        run = await app.dead_letters.discard(run_id, reason=reason, by=by)
    call.output.message(f"the dead letter of run {run_id} is gone")
    call.output.record(run, _RUN)
