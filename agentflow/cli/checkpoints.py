"""`agentflow checkpoint`: list, show, verify, prune, archive, restore.

Everything is shown without the code of the graphs: an object whose class is not imported here is
shown as the name of its class and its plain data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError, command
from agentflow.cli.output import Output, OutputFormat, field_lines, jsonable, to_json, visible
from agentflow.errors import ConflictError, NotFoundError

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import CheckpointTuple

    from agentflow.app import AgentFlow
    from agentflow.checkpoint import Archived, Saver

group = typer.Typer(help="Look at stored checkpoints, and verify them.", no_args_is_help=True)

_COLUMNS = ("thread_id", "ns", "checkpoint_id", "step", "source", "run_id", "created_at")
_FIELDS = (*_COLUMNS[:3], "parent_id", *_COLUMNS[3:])
_ARCHIVED = ("thread_id", "archive_id", "checkpoints", "parts", "size")
_REFRESHES = 10
"""How often a second a progress bar is drawn."""

Tenant = Annotated[str | None, typer.Option(help="Of this tenant, if not the app's.")]
Json = Annotated[bool, typer.Option("--json", help="The same as -o json.")]


@command(group, "list")
async def list_checkpoints(
    call: Call,
    *,
    thread_id: Annotated[
        str | None, typer.Option("--thread", help="Checkpoints of this thread only.")
    ] = None,
    tenant: Tenant = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List checkpoints, newest first."""
    config: RunnableConfig | None = None
    if thread_id is not None:
        config = {"configurable": {"thread_id": thread_id}}
    async with call.open_app() as app:
        saver = _saver(app, tenant).readable_anywhere()
        found = [_heading(each) async for each in saver.alist(config, limit=limit)]
    _output(call, as_json=as_json).rows(found, _COLUMNS, empty="no checkpoints")


@command(group, "show")
async def show(
    call: Call,
    thread_id: Annotated[str, typer.Argument(metavar="THREAD", help="The thread's id.")],
    checkpoint_id: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Its id; by default the newest.")
    ] = None,
    *,
    ns: Annotated[
        str | None, typer.Option("--ns", help="The namespace, for one of a subgraph.")
    ] = None,
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint: its values, its metadata and what tasks have written for the next one."""
    named: dict[str, Any] = {"thread_id": thread_id}
    if checkpoint_id is not None:
        named["checkpoint_id"] = checkpoint_id
    if ns is not None or checkpoint_id is None:
        named["checkpoint_ns"] = ns or ""
    async with call.open_app() as app:
        saver = _saver(app, tenant).readable_anywhere()
        found = [each async for each in saver.alist({"configurable": named}, limit=1)]
    if not found:
        what = f"{thread_id}/{checkpoint_id}" if checkpoint_id is not None else thread_id
        raise NotFoundError("checkpoint", what)
    data = _whole(found[0])
    output = _output(call, as_json=as_json)
    if output.format is not OutputFormat.TABLE:
        output.record(data)
        return
    for line in field_lines(jsonable(data), _FIELDS):
        typer.echo(line)
    for title in ("values", "metadata", "writes"):
        if data[title]:
            typer.echo(f"{title}:")
            for line in to_json(data[title], indent=2).splitlines():
                typer.echo(f"  {line}")


@command(group, "verify")
async def verify(
    call: Call,
    *,
    thread_id: Annotated[str | None, typer.Option("--thread", help="This thread only.")] = None,
    tenant: Annotated[str | None, typer.Option(help="This tenant only.")] = None,
) -> None:
    """Verify all that is stored: every record, value and write, and the chains between them.

    Of checkpoints, and of runs with their events. All tenants by default. What is damaged is
    printed as it is found; the exit code is 1 if there is anything.
    """
    from agentflow.checkpoint.audit import Counts

    counts = Counts()
    report = _Report(call.output)
    rows = 0
    async with call.open_app() as app:
        saver = _saver(app, tenant)
        total = await saver.count(tenant=tenant, thread_id=thread_id)
        began = time.perf_counter()
        with _progress(total) as advance:
            async for audited in saver.verify(tenant=tenant, thread_id=thread_id, advance=advance):
                counts.add(audited.counts)
                report.add(audited.damages)
            took = time.perf_counter() - began
            async for verified in app._store.find_damages(tenant=tenant, thread_id=thread_id):
                rows += verified.rows
                report.add(verified.damages)
    if thread_id is not None and not counts.threads and not rows:
        raise NotFoundError("thread", thread_id)
    report.end()
    facts = ", ".join(f"{count:,} {name}" for name, count in asdict(counts).items())
    rate = counts.checkpoints / took
    call.output.message(
        f"verified {facts} in {took:.1f} s ({rate:,.0f} checkpoints/s), and {rows:,} rows of runs"
    )
    if report.count:
        noun = "thing is" if report.count == 1 else "things are"
        raise OutcomeError(f"{report.count:,} {noun} damaged; nothing was changed")
    call.output.message("everything is as it was stored")


@command(group, "prune")
async def prune(
    call: Call,
    thread_ids: Annotated[list[str], typer.Argument(metavar="THREAD...", help="Ids of threads.")],
    *,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete all checkpoints, also the newest.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    tenant: Tenant = None,
) -> None:
    """Delete old checkpoints of threads: all but the newest of each namespace.

    Of all threads or of none; a thread with a run that has not ended is refused.
    """
    async with call.open_app() as app:
        saver = _saver(app, tenant)
        found: list[dict[str, Any]] = []
        total = 0
        for thread_id in dict.fromkeys(thread_ids):
            there = await saver.count_by_namespace(thread_id)
            if not there:
                raise NotFoundError("thread", thread_id)
            await _check_ended(app, tenant, thread_id)
            kept = 0 if delete else len(there)
            deleted = sum(there.values()) - kept
            found.append({"thread_id": thread_id, "deleted": deleted, "kept": kept})
            total += deleted
        if not dry_run:
            if total and not call.confirm(f"Delete {_checkpoints(total)}?"):
                raise OutcomeError("not confirmed; nothing was deleted")
            strategy = "delete" if delete else "keep_latest"
            await saver.aprune(thread_ids, strategy=strategy)
    call.output.rows(found, ("thread_id", "deleted", "kept"), empty="")
    would = "would be" if dry_run else "were" if total != 1 else "was"
    call.output.message(f"{_checkpoints(total)} {would} deleted")


@command(group, "archive")
async def archive(
    call: Call,
    thread_ids: Annotated[list[str], typer.Argument(metavar="THREAD...", help="Ids of threads.")],
    *,
    to: Annotated[str, typer.Option(metavar="URL", help="The object store: file:///folder.")],
    keep: Annotated[bool, typer.Option("--keep", help="Do not delete the threads.")] = False,
    tenant: Tenant = None,
) -> None:
    """Move threads with all that they have into an object store.

    One by one; each is deleted once its archive is durable. A thread that a run holds is refused.
    """
    async with call.open_app() as app:
        saver = _saver(app, tenant)
        names = list(dict.fromkeys(thread_ids))
        for name in names:
            if not await saver.count_by_namespace(name):
                raise NotFoundError("thread", name)
        if not keep and not call.confirm(f"Archive {len(names)} threads, and delete them?"):
            raise OutcomeError("not confirmed; nothing was archived")
        done: list[Archived] = []
        try:
            for name in names:
                done += [await saver.aarchive(name, to=to, keep=keep)]
        finally:
            call.output.rows(done, _ARCHIVED, empty="no thread was archived")
    call.output.message("archived and kept" if keep else "archived and deleted")


@command(group, "restore")
async def restore(
    call: Call,
    thread_id: Annotated[str, typer.Argument(metavar="THREAD", help="The thread's id.")],
    *,
    source: Annotated[
        str, typer.Option("--from", metavar="URL", help="The object store: file:///folder.")
    ],
    archive_id: Annotated[
        str | None, typer.Option("--archive", help="Which archive; by default the newest.")
    ] = None,
    tenant: Tenant = None,
) -> None:
    """Make a thread from its archive, after all of it is verified; the archive stays.

    A thread that is there already is refused.
    """
    async with call.open_app() as app:
        saver = _saver(app, tenant)
        done = await saver.arestore(thread_id, source=source, archive_id=archive_id)
    call.output.rows([done], _ARCHIVED, empty="")
    call.output.message(f"restored {_checkpoints(done.checkpoints)}")


def _saver(app: AgentFlow, tenant: str | None) -> Saver:
    """Return the app's checkpointer; it knows the app's keys."""
    from agentflow.checkpoint import Saver

    saver = app._saver
    if not isinstance(saver, Saver):
        raise UsageError("--app", "has a checkpointer that is not agentflow's")
    return saver if tenant is None else saver.for_tenant(tenant)


async def _check_ended(app: AgentFlow, tenant: str | None, thread_id: str) -> None:
    """Refuse a thread of which a run is going to need what it has."""
    from agentflow.types import RunStatus

    for status in RunStatus:
        if status.is_ended:
            continue
        found = await app._store.list_runs(
            app.tenant if tenant is None else tenant,
            status=status,
            graph=None,
            thread_id=thread_id,
            limit=1,
            cursor=None,
        )
        for run in found.whole():
            raise ConflictError(
                f"thread {thread_id!r} has run {run.id!r}, which is {status.value}; "
                "wait for its end, or cancel it, before anything of it is deleted"
            )


def _output(call: Call, *, as_json: bool) -> Output:
    return replace(call.output, format=OutputFormat.JSON) if as_json else call.output


def _heading(found: CheckpointTuple) -> dict[str, Any]:
    place, before = found.config["configurable"], found.parent_config
    return {
        "thread_id": place["thread_id"],
        "ns": place["checkpoint_ns"],
        "checkpoint_id": place["checkpoint_id"],
        "parent_id": before["configurable"]["checkpoint_id"] if before else None,
        "step": found.metadata.get("step"),
        "source": found.metadata.get("source"),
        "run_id": found.metadata.get("run_id"),
        "created_at": found.checkpoint["ts"],
    }


def _whole(found: CheckpointTuple) -> dict[str, Any]:
    return {
        **_heading(found),
        "values": found.checkpoint["channel_values"],
        "versions": found.checkpoint["channel_versions"],
        "metadata": found.metadata,
        "writes": [
            {"task_id": task_id, "channel": channel, "value": value}
            for task_id, channel, value in found.pending_writes or ()
        ],
    }


def _checkpoints(count: int) -> str:
    return f"{count:,} checkpoint" if count == 1 else f"{count:,} checkpoints"


class _Report:
    """Tells what is damaged: at once, or as one list of data at the end."""

    def __init__(self, output: Output) -> None:
        self.count = 0
        self._output = output
        self._whole: list[Any] = []

    def add(self, damages: Sequence[Any]) -> None:
        """Tell of some that were found together."""
        self.count += len(damages)
        for damage in damages:
            if self._output.format is OutputFormat.JSON:
                self._whole.append(damage)
            elif self._output.format is OutputFormat.JSONL:
                self._output.record(damage)
            else:
                # The message names the place.
                typer.echo(visible(f"{damage.error}: {damage.message}"))

    def end(self) -> None:
        """Tell of all of them, if that is how it is done."""
        if self._output.format is OutputFormat.JSON:
            self._output.rows(self._whole, (), empty="")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, refresh_per_second=_REFRESHES
    ) as bar:
        task = bar.add_task("verifying", total=total)
        yield lambda count: bar.advance(task, count)
