"""`agentflow pause` and `agentflow resume`: hold a graph, a queue, or everything."""

from __future__ import annotations

from typing import Annotated

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError

_COLUMNS = ("scope", "name", "at", "by", "reason")

Graph = Annotated[str | None, typer.Option("--graph", help="All runs of this graph.")]
Queue = Annotated[str | None, typer.Option("--queue", help="All runs of this queue.")]
Everything = Annotated[bool, typer.Option("--all", help="All runs.")]
By = Annotated[str | None, typer.Option(help="Who does it; it is kept.")]


async def pause(
    call: Call,
    *,
    graph: Graph = None,
    queue: Queue = None,
    everything: Everything = False,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    by: By = None,
) -> None:
    """Pause a graph, a queue, or everything; without any of these, list what is paused.

    Nothing of it is begun any more, and what runs stops at its next step with its state saved. Runs
    can be submitted, decided about and cancelled as always.
    """
    is_list = graph is None and queue is None and not everything
    if not is_list:
        _check(graph, queue, everything=everything)
    async with call.open_app() as app:
        if is_list:
            pauses = await app.list_pauses()
            call.output.rows(pauses, _COLUMNS, empty="nothing is paused but, maybe, single runs")
            return
        what = _named(graph, queue)
        if not call.confirm(f"Pause {what}?"):
            raise OutcomeError("not confirmed; nothing is paused")
        made = await app.pause(graph=graph, queue=queue, reason=reason, by=by)
    call.output.message(f"{what} is paused")
    call.output.record(made, _COLUMNS)


async def resume(
    call: Call,
    *,
    graph: Graph = None,
    queue: Queue = None,
    everything: Everything = False,
    by: By = None,
) -> None:
    """End the pause of a graph, of a queue, or the one of everything.

    What is paused by itself, or by another pause, stays so.
    """
    _check(graph, queue, everything=everything)
    async with call.open_app() as app:
        was_paused = await app.resume(graph=graph, queue=queue, by=by)
        left = await app.list_pauses()
    what = _named(graph, queue)
    call.output.message(f"{what} goes on" if was_paused else f"{what} was not paused")
    call.output.rows(left, _COLUMNS, empty="nothing is paused but, maybe, single runs")


def _check(graph: str | None, queue: str | None, *, everything: bool) -> None:
    if [graph is not None, queue is not None, everything].count(True) != 1:
        raise UsageError("--graph, --queue, --all", "exclude each other; give one of them")


def _named(graph: str | None, queue: str | None) -> str:
    if graph is not None:
        return f"graph {graph!r}"
    return "everything" if queue is None else f"queue {queue!r}"
