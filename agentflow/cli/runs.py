"""`agentflow run`: submit, list, show, cancel, pause, resume."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentflow.cli.command import Call, OutcomeError, command
from agentflow.cli.output import OutputFormat, block, field_lines, jsonable, to_json
from agentflow.cli.values import read_json, read_pairs
from agentflow.errors import RunCancelledError, RunError, RunFailedError
from agentflow.types import AuditEvent, Run, RunStatus

if TYPE_CHECKING:
    from agentflow.app import AgentFlow

group = typer.Typer(help="Submit runs and look at them.", no_args_is_help=True)

_COLUMNS = ("id", "graph", "version", "status", "step", "attempt", "paused_at", "created_at")
_FIELDS = (
    "id",
    "status",
    "graph",
    "version",
    "thread_id",
    "tenant",
    "queue",
    "priority",
    "step",
    "checkpoint_id",
    "attempt",
    "claims",
    "losses",
    "dead_letter",
    "paused_at",
    "resume_from",
    "submitted_by",
    "created_at",
    "available_at",
    "start_deadline_at",
    "deadline_at",
    "started_at",
    "ended_at",
    "cancel_requested_at",
    "cancel_reason",
    "metadata",
    "config",
    "input",
    "output",
)

_PAUSED = ("id", "status", "graph", "paused_at", "attempt")


class OnBusy(StrEnum):
    """The choices of `--on-busy`; those of `AgentFlow.submit`."""

    ENQUEUE = "enqueue"
    REJECT = "reject"
    INTERRUPT = "interrupt"
    ROLLBACK = "rollback"


RunId = Annotated[str, typer.Argument(metavar="ID", help="The run's id.")]


@command(group, "submit")
async def submit(
    call: Call,
    graph: Annotated[str, typer.Argument(metavar="GRAPH", help="The graph's registered name.")],
    *,
    run_input: Annotated[
        str, typer.Option("--input", metavar="JSON|@FILE|-", help="The run's input; - is stdin.")
    ],
    run_id: Annotated[
        str | None, typer.Option(help="Submitting twice under one id gives one run.")
    ] = None,
    thread_id: Annotated[
        str | None, typer.Option(help="The thread to advance; by default a new one.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="The graph's version.")] = None,
    queue: Annotated[str | None, typer.Option(help="The queue; by default the graph's.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Repeatable.")
    ] = None,
    on_busy: Annotated[
        OnBusy, typer.Option(help="What to do if the thread has unfinished runs.")
    ] = OnBusy.ENQUEUE,
    run_timeout: Annotated[
        float | None, typer.Option(help="Seconds in which the run has to end, or it fails.")
    ] = None,
    start_timeout: Annotated[
        float | None, typer.Option(help="Seconds in which a worker has to begin, or never.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Who submits.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run has ended.")] = False,
    wait_timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds to wait at most.")
    ] = None,
) -> None:
    """Submit a run; its id is printed once it is stored. A worker executes it.

    With --wait the run is printed when it has ended, and the exit code is 0 only if it succeeded.
    """
    value = read_json("--input", run_input)
    pairs = read_pairs("--metadata", metadata or [])
    async with call.open_app(needs_graphs=True) as app:
        handle = await app.submit(
            graph,
            value,
            run_id=run_id,
            thread_id=thread_id,
            version=version,
            queue=queue,
            metadata=pairs or None,
            on_busy=on_busy.value,
            timeout=run_timeout,
            start_timeout=start_timeout,
            by=by,
        )
        if wait:
            call.output.message(f"submitted run {handle.id}; waiting until it has ended")
            await _wait_ended(call, app, handle.id, wait_timeout)
            return
        run = await app.get_run(handle.id)
    call.output.message(f"run of graph {run.graph!r} is {run.status.value}")
    if call.output.format is OutputFormat.TABLE:
        typer.echo(run.id)
    else:
        call.output.record(run)


async def _wait_ended(call: Call, app: AgentFlow, run_id: str, timeout: float | None) -> None:
    try:
        run = await app.wait(run_id, until="ended", timeout=timeout)
    except TimeoutError as exc:
        run = await app.get_run(run_id)
        raise OutcomeError(
            f"run {run_id!r} is still {run.status.value} after {timeout:g} s; it goes on, "
            f"look at it with 'agentflow run show {run_id}'"
        ) from exc
    if call.output.format is OutputFormat.TABLE:
        for line in _run_lines(run, jsonable(run)):
            typer.echo(line)
    else:
        call.output.record(run)
    if run.status is not RunStatus.SUCCEEDED:
        raise _failure(run)


def _failure(run: Run) -> RunError:
    if run.status is RunStatus.CANCELLED:
        return RunCancelledError(run.id, run.cancel_reason)
    kind, node = (run.error.type, run.error.node) if run.error else ("no recorded error", None)
    return RunFailedError(run.id, kind, node, run.attempt)


@command(group, "list")
async def list_runs(
    call: Call,
    *,
    status: Annotated[RunStatus | None, typer.Option(help="Runs of this status only.")] = None,
    graph: Annotated[str | None, typer.Option(help="Runs of this graph only.")] = None,
    thread_id: Annotated[str | None, typer.Option(help="Runs of this thread only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
) -> None:
    """List runs, newest first."""
    async with call.open_app() as app:
        page = await app.list_runs(
            status=status, graph=graph, thread_id=thread_id, limit=limit, cursor=cursor
        )
    call.output.page(page, _COLUMNS, empty="no runs")


@command(group, "show")
async def show(
    call: Call,
    run_id: RunId,
    *,
    events: Annotated[bool, typer.Option("--events", help="Show its audit events too.")] = False,
) -> None:
    """Show a run: its fields, last error and pending approvals."""
    async with call.open_app() as app:
        run = await app.get_run(run_id)
        approvals = (await app.approvals.list(run_id=run_id)).items
        facts = await _all_events(app, run_id) if events else []
    data = jsonable(run)
    data["approvals"] = jsonable(approvals)
    if events:
        data["events"] = jsonable(facts)
    if call.output.format is not OutputFormat.TABLE:
        call.output.record(data)
        return
    for line in _show_lines(run, data):
        typer.echo(line)
    if approvals:
        call.output.message(f"look at one with 'agentflow approval show {approvals[0].id}'")


async def _all_events(app: AgentFlow, run_id: str) -> list[AuditEvent]:
    found: list[AuditEvent] = []
    while page := await app.list_events(run_id, after=found[-1].seq if found else 0):
        found += page
    return found


def _run_lines(run: Run, data: dict[str, Any]) -> list[str]:
    lines = field_lines(data, _FIELDS)
    if run.error is not None:
        lines += ["", "error:"]
        lines += [f"  {line}" for line in field_lines(data["error"], ("type", "node", "attempt"))]
        lines += [f"  {line}" for line in block("message", run.error.message)]
        if run.error.traceback:
            lines += [f"  {line}" for line in block("traceback", run.error.traceback)]
    return lines


def _show_lines(run: Run, data: dict[str, Any]) -> list[str]:
    lines = _run_lines(run, data)
    if data["approvals"]:
        lines += ["", "pending approvals:"]
        for approval in data["approvals"]:
            fields = field_lines(approval, ("id", "request.title", "version", "created_at"))
            lines += [*(f"  {line}" for line in fields), ""]
    if "events" in data:
        lines += ["events:"] if data["approvals"] else ["", "events:"]
        lines += [_event_line(event) for event in data["events"]]
    return lines


def _event_line(event: dict[str, Any]) -> str:
    facts = {name: value for name, value in event["data"].items() if value is not None}
    shown = to_json(facts) if facts else ""
    return f"  {event['seq']:>4}  {event['at']}  {event['type']:<20} {shown}".rstrip()


@command(group, "cancel")
async def cancel(
    call: Call,
    run_id: RunId,
    *,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    by: Annotated[str | None, typer.Option(help="Who cancels.")] = None,
) -> None:
    """Cancel a run; one that is running stops at its next step."""
    async with call.open_app() as app:
        run = await app.get_run(run_id)
        if not call.confirm(f"Cancel run {run.id} of graph {run.graph!r}, {run.status.value}?"):
            raise OutcomeError("not confirmed; the run goes on")
        run = await app.cancel(run_id, reason=reason, by=by)
    if run.status.is_ended:
        call.output.message(f"run {run.id} was cancelled")
    else:
        call.output.message(f"run {run.id} is asked to stop and is still {run.status.value}")
    call.output.record(run, ("id", "status", "graph", "cancel_requested_at", "ended_at"))


@command(group, "pause")
async def pause(
    call: Call,
    run_id: RunId,
    *,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    by: Annotated[str | None, typer.Option(help="Who pauses.")] = None,
) -> None:
    """Pause a run; one that is running stops at its next step, with its state saved."""
    async with call.open_app() as app:
        run = await app.pause_run(run_id, reason=reason, by=by)
    call.output.message(f"run {run.id} is {run.status.value}, and paused")
    call.output.record(run, _PAUSED)


@command(group, "resume")
async def resume(
    call: Call,
    run_id: RunId,
    *,
    by: Annotated[str | None, typer.Option(help="Who resumes.")] = None,
) -> None:
    """Let a paused run go on; one that its failures have paused gets a new attempt budget."""
    async with call.open_app() as app:
        run = await app.resume_run(run_id, by=by)
    call.output.message(f"run {run.id} is {run.status.value}, and not paused")
    call.output.record(run, _PAUSED)
