"""`agentflow migrate`: bring the database's schema to the one this program speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agentflow.cli.command import Call, command

if TYPE_CHECKING:
    from agentflow.database.migrate import MigrationStatus

group = typer.Typer(help="Migrate the database.", no_args_is_help=True)

_FIELDS = ("current", "head", "pending")


@command(group, "up")
def up(call: Call) -> None:
    """Migrate the database to the newest revision; one that is there already is left alone."""
    from agentflow.database import migrate

    _report(call, migrate.up(call.open_app().url))


@command(group, "status")
def status(call: Call) -> None:
    """Show the database's revision, the newest one, and what lies between."""
    from agentflow.database import migrate

    _report(call, migrate.status(call.open_app().url))


@command(group, "journal")
def journal(
    call: Call,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="A database of your own.")],
) -> None:
    """Make the table with which transactions commit once, in a database of your own."""
    from agentflow.effects import outside

    is_new = outside.create(url)
    call.output.message("effect_journal was made" if is_new else "effect_journal is there already")


def _report(call: Call, found: MigrationStatus) -> None:
    call.output.record(found, _FIELDS)
    if found.pending:
        call.output.message("run 'agentflow migrate up' to migrate the database")
    else:
        call.output.message("the database is up to date")
