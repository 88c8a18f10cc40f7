"""The root command: puts the groups together and holds the options that may precede them."""

from __future__ import annotations

import io
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from agentflow.cli import (
    approvals,
    checkpoints,
    effects,
    keys,
    letters,
    migrations,
    operations,
    pauses,
    runs,
    sweeps,
    workers,
)
from agentflow.cli.command import (
    AppOption,
    Call,
    DbOption,
    DebugOption,
    FormatOption,
    YesOption,
    command,
)

program = typer.Typer(
    name="agentflow",
    help="Run LangGraph graphs durably.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
program.add_typer(runs.group, name="run")
program.add_typer(approvals.group, name="approval")
program.add_typer(letters.group, name="dead-letter")
program.add_typer(effects.group, name="effect")
program.add_typer(checkpoints.group, name="checkpoint")
program.add_typer(migrations.group, name="migrate")
program.add_typer(keys.group, name="keys")
command(program, "worker")(workers.work)
command(program, "pause")(pauses.pause)
command(program, "resume")(pauses.resume)
command(program, "doctor")(operations.doctor)
command(program, "restore")(operations.restore)
command(program, "sweep")(sweeps.sweep)


def main() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not turn a result into a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    program(prog_name="agentflow")


def _installed_version() -> str:
    try:
        return version("agentflow")
    except PackageNotFoundError:
        return "unknown"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"agentflow {_installed_version()}")
        raise typer.Exit


@program.callback()
def _root(
    *,
    app: Annotated[str | None, AppOption(envvar="AGENTFLOW_APP")] = None,
    db: Annotated[str | None, DbOption(envvar="AGENTFLOW_DB_URL")] = None,
    output: FormatOption = None,
    yes: YesOption = False,
    debug: Annotated[bool, DebugOption(envvar="AGENTFLOW_DEBUG")] = False,
    is_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Run LangGraph graphs durably.

    Data goes to stdout, messages to stderr. Exit codes: 0 done, 1 error, 2 usage, 3 not found,
    4 conflict (already decided, changed, busy), 5 expired, withdrawn or superseded.
    """


@command(program, "version")
def show_version(call: Call) -> None:
    """Print the version of agentflow."""
    call.output.record({"version": _installed_version()})
