"""`agentflow sweep`: deletes what need not be kept any longer."""

from __future__ import annotations

from typing import Annotated

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError
from agentflow.cli.values import read_age


async def sweep(
    call: Call,
    *,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Checkpoints of each namespace to keep.")
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(metavar="30d", help="Age at which a thread is deleted: s, m, h, d or w."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete old checkpoints and threads; those with unfinished work are let be.

    Graphs that the app registers with a retention of their own are swept by that one.
    """
    from agentflow.checkpoint import Retention

    age = None if ttl is None else read_age("--ttl", ttl)
    if keep_last is None and age is None and call.app is None:
        raise UsageError("--keep-last", "is missing: give --keep-last, --ttl or an app")
    async with call.open_app() as app:
        retention = Retention(keep_last=keep_last, ttl=age)
        if not dry_run and not call.confirm("Delete what need not be kept any longer?"):
            raise OutcomeError("not confirmed; nothing is deleted")
        report = await app.sweep(retention, dry_run=dry_run)
    spared = ", ".join(f"{count} {reason}" for reason, count in sorted(report.spared.items()))
    call.output.message(
        f"{report.threads} threads looked at; let be: {spared or 'none'}; "
        f"{'would go' if dry_run else 'gone'}: {report.checkpoints} checkpoints, "
        f"{report.objects} objects of {report.object_bytes} bytes"
    )
    columns = ("thread_id", "checkpoints", "is_deleted")
    call.output.rows(report.swept, columns, empty="nothing to delete")
    if damaged := report.spared.get("damaged"):
        noun = "thread" if damaged == 1 else "threads"
        raise OutcomeError(
            f"{damaged:,} {noun} could not be read, and nothing more of them was deleted; "
            "run 'agentflow checkpoint verify', and see that all keys are here"
        )
