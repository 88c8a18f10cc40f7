"""`agentflow run migrate`, `export` and `import`: runs move to other versions and databases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError, command
from agentflow.cli.runs import RunId
from agentflow.cli.values import read_json

if TYPE_CHECKING:
    from agentflow.migration import MigrationReport

_MIGRATED = ("run_id", "status", "from_version", "to_version", "outcome", "reason")
_RUN = ("id", "status", "graph", "version", "thread_id", "paused_at")


def add_to(group: typer.Typer) -> None:
    """Add the commands to those of `agentflow run`."""
    command(group, "migrate")(migrate)
    command(group, "export")(export)
    command(group, "import")(import_run)


async def migrate(
    call: Call,
    run_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="One run; or give --graph.")
    ] = None,
    *,
    graph: Annotated[str | None, typer.Option(help="All unfinished runs of this graph.")] = None,
    to: Annotated[
        str | None, typer.Option(help="The version; by default the one registered last.")
    ] = None,
    from_version: Annotated[
        str | None, typer.Option("--from", help="With --graph: only runs of this version.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --graph: only say what would happen.")
    ] = False,
    by: Annotated[str | None, typer.Option(help="Who asks for it.")] = None,
) -> None:
    """Bring waiting runs to another version of their graph, by the migrations of --app."""
    if (run_id is None) == (graph is None):
        raise UsageError("ID", "or --graph is needed, and not both")
    async with call.open_app(needs_graphs=True) as app:
        if run_id is not None:
            run = await app.migrate_run(run_id, to=to, by=by)
            call.output.message(f"run {run.id} is {run.status.value}, at version {run.version!r}")
            call.output.record(run, _RUN)
            return
        assert graph is not None
        if not dry_run and not call.confirm(f"Migrate all unfinished runs of graph {graph!r}?"):
            raise OutcomeError("not confirmed; nothing was migrated")
        report = await app.migrate_runs(graph, to=to, from_=from_version, dry_run=dry_run, by=by)
    _show(call, report)


def _show(call: Call, report: MigrationReport) -> None:
    call.output.rows(report.runs, _MIGRATED, empty="no run needs it")
    done = report.count("would_migrate" if report.is_dry else "migrated")
    left = len(report.runs) - done
    verb = "can be migrated" if report.is_dry else "were migrated"
    call.output.message(f"{done} runs {verb} to version {report.to_version!r}, {left} not")
    if left:
        raise OutcomeError(f"{left} runs stay at their version")


async def export(
    call: Call,
    run_id: RunId,
    *,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="A new file; else it is printed.")
    ] = None,
) -> None:
    """Write a run with its thread as one JSON file, to be imported into another database.

    What is encrypted stays so. What is not can be read in the file by anybody.
    """
    async with call.open_app() as app:
        exported = await app.export_run(run_id)
    text = json.dumps(exported, sort_keys=True)
    if to is None:
        sys.stdout.write(f"{text}\n")
    else:
        try:
            with to.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as exc:
            raise UsageError("--to", f"cannot write the file {str(to)!r}: {exc.strerror}") from exc
    if not exported["content"]["is_encrypted"]:
        call.output.message("it is not encrypted: keep it as you keep the database")


async def import_run(
    call: Call,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="What export has written.")],
    *,
    by: Annotated[str | None, typer.Option(help="Who imports it.")] = None,
) -> None:
    """Store a run that was exported elsewhere; it goes on from where it stood."""
    exported = read_json("FILE", "-" if file == "-" else f"@{file}")
    async with call.open_app() as app:
        run = await app.import_run(exported, by=by)
    call.output.message(f"run {run.id} is {run.status.value} here")
    call.output.record(run, _RUN)
