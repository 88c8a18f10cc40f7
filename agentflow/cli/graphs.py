"""`agentflow graph`: fingerprints of graphs, a guard for CI, and where new runs go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError, command

if TYPE_CHECKING:
    from agentflow.app import AgentFlow
    from agentflow.inspection import CheckedRun

group = typer.Typer(help="Look at graphs and their versions.", no_args_is_help=True)

_CHANGES = ("graph", "kind", "change")
_RUNS = ("run_id", "graph", "version", "status", "verdict", "action", "changes")
_ROUTES = ("graph", "version", "share", "at", "by")


@command(group, "fingerprint")
async def fingerprint(
    call: Call,
    *,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with what was printed into this file."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="With --check: a database, to say which runs stop."),
    ] = None,
) -> None:
    """Print the fingerprints of all graphs as JSON, to be committed; or compare with that.

    With --check the exit code is 1 if a graph differs from the file, or a run would be refused.
    """
    if url is not None and check is None:
        raise UsageError("--url", "needs --check")
    async with call.open_app(needs_graphs=True) as app:
        now = {
            f"{name}@{version}": {
                "digest": graph.fingerprint.digest,
                **json.loads(graph.fingerprint.text),
            }
            for (name, version), graph in sorted(app.graphs.items())
        }
        if check is None:
            typer.echo(json.dumps(now, indent=1, sort_keys=True))
            return
        changes = list(_differences(_read(check), now))
        runs = [] if url is None else await _stopped(app, url)
    call.output.rows(changes, _CHANGES, empty="no graph has changed")
    if url is not None:
        call.output.rows(runs, _RUNS, empty="no unfinished run would be stopped")
    if runs:
        raise OutcomeError(f"{len(runs)} unfinished runs would be stopped by these changes")
    if changes:
        raise OutcomeError(
            f"graphs differ from {str(check)!r}: if that is meant, print the file again and commit "
            "it; runs that have begun need the old code, a migration, or on_change"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[dict[str, str]]:
    from agentflow.versions import compare_from_beginning

    for name in sorted({*before, *now}):
        if name not in now:
            yield {"graph": name, "kind": "removed", "change": "it is not registered any more"}
        elif name not in before:
            yield {"graph": name, "kind": "added", "change": "it is new"}
        elif before[name]["digest"] != now[name]["digest"]:
            changes = compare_from_beginning(before[name]["graph"], now[name]["graph"])
            for change in changes:
                yield {"graph": name, "kind": change.kind, "change": str(change)}
            if not changes:
                text = "it is another one, in nothing that its runs rely on"
                yield {"graph": name, "kind": "other", "change": text}


async def _stopped(app: AgentFlow, url: str) -> list[CheckedRun]:
    async with app.with_url(url) as other:
        return [run for run in await other.check_runs() if run.action == "refuse"]


def _read(file: Path) -> dict[str, Any]:
    from agentflow.errors import AgentflowError, InvalidInputError
    from agentflow.versions import Fingerprint

    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError("--check", f"cannot read the file {str(file)!r}: {exc}") from exc
    try:
        for name, each in found.items():
            form = {part: each[part] for part in ("form", "graph")}
            stored = Fingerprint.of_text(json.dumps(form), f"{name} in {str(file)!r}")
            if stored.digest != each["digest"]:
                raise InvalidInputError("fingerprint", (f"{name}: was changed by hand",))
    except (AgentflowError, AttributeError, KeyError, TypeError) as exc:
        said = f": {exc}" if isinstance(exc, AgentflowError) else ""
        raise UsageError(
            "--check",
            f"{str(file)!r} has no fingerprints{said}; 'agentflow graph fingerprint' prints it",
        ) from exc
    return found


@command(group, "check")
async def check_runs(
    call: Call,
    graph: Annotated[str | None, typer.Argument(metavar="GRAPH", help="One graph only.")] = None,
) -> None:
    """Say of each unfinished run whether it could go on with the graphs of --app."""
    async with call.open_app(needs_graphs=True) as app:
        runs = await app.check_runs(graph)
    call.output.rows(runs, _RUNS, empty="no unfinished runs")
    stopped = sum(run.action == "refuse" for run in runs)
    if stopped:
        raise OutcomeError(f"{stopped} of {len(runs)} unfinished runs would be stopped")


@command(group, "route")
async def route(
    call: Call,
    graph: Annotated[str | None, typer.Argument(metavar="GRAPH", help="The graph.")] = None,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="A version.")] = None,
    *,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of new runs that goes to it.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Let none be routed to it.")] = False,
    by: Annotated[str | None, typer.Option(help="Who asks for it.")] = None,
) -> None:
    """Send a share of a graph's new runs to one of its versions, or show what is sent where."""
    async with call.open_app() as app:
        if version is None:
            if share is not None or clear:
                raise UsageError("VERSION", "is missing")
            routes = await app.list_routes(graph)
        elif graph is None or (share is None) != clear:
            raise UsageError("--share", "is missing: give --share or --clear")
        else:
            routes = await app.route(graph, version, None if clear else share, by=by)
    call.output.rows(routes, _ROUTES, empty="new runs go to the newest version of each graph")
