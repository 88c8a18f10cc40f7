"""`agentflow effect`: look at what runs have done outside, and clear up what is in doubt."""

from __future__ import annotations

from typing import Annotated

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError, command
from agentflow.cli.output import OutputFormat, block, field_lines, jsonable, to_json
from agentflow.cli.values import read_json
from agentflow.journal import EffectStatus
from agentflow.types import SystemClock

group = typer.Typer(help="Look at effects, and clear up those in doubt.", no_args_is_help=True)

_COLUMNS = ("id", "status", "name", "node", "run_id", "attempt", "intended_at", "ended_at")
_FIELDS = (
    "id",
    "status",
    "kind",
    "name",
    "key",
    "run_id",
    "thread_id",
    "graph",
    "node",
    "attempt",
    "worker",
    "on_in_doubt",
    "timeout",
    "intended_at",
    "ended_at",
    "compensate",
    "resolved_by",
    "comment",
)
_OUTCOME = ("id", "status", "name", "run_id", "resolved_by")

EffectId = Annotated[str, typer.Argument(metavar="ID", help="The effect's id.")]


@command(group, "list")
async def list_effects(
    call: Call,
    *,
    run_id: Annotated[str | None, typer.Option(help="Effects of this run only.")] = None,
    status: Annotated[
        EffectStatus | None, typer.Option(help="Effects with this status only.")
    ] = None,
    in_doubt: Annotated[
        bool, typer.Option("--in-doubt", help="Those only that somebody has to look into.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
) -> None:
    """List effects, in the order in which they were first intended."""
    async with call.open_app() as app:
        page = await app.effects.list(
            run_id=run_id, status=status, in_doubt=in_doubt, limit=limit, cursor=cursor
        )
    call.output.page(page, _COLUMNS, empty="no effects")


@command(group, "show")
async def show(call: Call, effect_id: EffectId) -> None:
    """Show an effect: what it was called with, and what is known of it."""
    async with call.open_app() as app:
        effect = await app.effects.get(effect_id)
        safe_at = await app.effects.safe_at(effect)
    if call.output.format is not OutputFormat.TABLE:
        call.output.record(effect)
        return
    data = jsonable(effect)
    lines = [*field_lines(data, _FIELDS), *block("arguments", to_json(data["arguments"]))]
    if effect.failure is not None:
        lines += block(effect.failure.type, effect.failure.message)
    elif effect.status is EffectStatus.SUCCEEDED:
        lines += block("outcome", to_json(data["outcome"]))
    for late in data["late"]:
        lines += block("late outcome", to_json(late))
    for line in lines:
        typer.echo(line)
    if effect.status is EffectStatus.INTENDED:
        when = "its worker is gone" if safe_at is None else safe_at.isoformat()
        call.output.message(f"its call is under way or in doubt; do not resolve it before {when}")


@command(group, "resolve")
async def resolve(
    call: Call,
    effect_id: EffectId,
    *,
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="Who says so; it is kept.")],
    happened: Annotated[
        bool | None, typer.Option("--happened/--did-not-happen", help="What came of it.")
    ] = None,
    outcome: Annotated[
        str | None, typer.Option(metavar="JSON", help="What it returned: JSON, @file or -.")
    ] = None,
    comment: Annotated[str | None, typer.Option(help="A remark for the record.")] = None,
) -> None:
    """Say whether an effect in doubt happened; its run goes on, and calls it if it did not."""
    if happened is None:
        raise UsageError("--happened", "or --did-not-happen has to be given")
    if outcome is not None and not happened:
        raise UsageError("--outcome", "is only for what happened")
    value = None if outcome is None else read_json("--outcome", outcome)
    async with call.open_app() as app:
        effect = await app.effects.get(effect_id)
        what = "happened" if happened else "did not happen"
        is_open = effect.status is EffectStatus.INTENDED
        safe_at = await app.effects.safe_at(effect)
        if is_open and (safe_at is None or SystemClock().now() < safe_at):
            until = "" if safe_at is None else f"until {safe_at.isoformat()} "
            call.output.message(
                f"WARNING: {until}worker {effect.worker!r} may still be at this call, unless you "
                "know that it is gone"
            )
        if not call.confirm(f"Say that {effect.name} of run {effect.run_id} {what}?"):
            raise OutcomeError("not confirmed; nothing was recorded")
        resolved = await app.effects.resolve(
            effect_id, happened=happened, outcome=value, by=by, comment=comment
        )
    call.output.message(f"effect {effect_id} {what}")
    call.output.record(resolved, _OUTCOME)
