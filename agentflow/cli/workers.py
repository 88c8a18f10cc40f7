"""`agentflow worker`: a process that drives runs until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from agentflow.cli.command import Call, OutcomeError
from agentflow.cli.output import OutputFormat, to_json, visible
from agentflow.cli.values import read_age

if TYPE_CHECKING:
    from rich.live import Live

    from agentflow.worker import Worker, WorkerStats

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_REFRESH = 0.5
"""Seconds between two looks at what the worker does, on a terminal."""


async def work(
    call: Call,
    *,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 10,
    queue: Annotated[
        list[str] | None, typer.Option(help="A queue to take runs from; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The worker's name in the records.")] = None,
    sweep_every: Annotated[
        str | None,
        typer.Option(metavar="1h", help="Sweep about so often: s, m, h, d or w."),
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Answer GET /healthz on this port; 0 takes any."),
    ] = None,
    health_host: Annotated[
        str, typer.Option(help="The address to answer on; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
) -> None:
    """Drive runs until SIGTERM or SIGINT, then let them stop at a step boundary and exit.

    A second signal ends the process at once; another worker takes its runs over. With -o json or
    jsonl log lines are JSON objects. On a terminal a line shows what the worker is doing.
    """
    queues = tuple(queue or ("default",))
    every = None if sweep_every is None else read_age("--sweep-every", sweep_every)
    async with call.open_app(needs_graphs=True) as app:
        worker = app.worker(concurrency=concurrency, queues=queues, name=name, sweep_every=every)
        with _logging(call) as live:
            _on_stop_signal(worker.stop)
            async with _health(call, worker, health_host, health_port), _showing(live, worker):
                call.output.message(
                    f"worker {worker.name} (pid {os.getpid()}) started: concurrency {concurrency}, "
                    f"queues {', '.join(queues)}"
                )
                await worker.run()
    call.output.message(f"worker {worker.name} stopped")
    if worker.stats().health == "overloaded":
        raise OutcomeError(
            "too many of its threads are stuck in nodes that were given up; start it again"
        )


@asynccontextmanager
async def _health(call: Call, worker: Worker, host: str, port: int | None) -> AsyncIterator[None]:
    if port is None:
        yield
        return
    from agentflow.health import serve_health

    async with serve_health(worker.stats, host=host, port=port) as taken:
        call.output.message(f"health is told at http://{host}:{taken}/healthz")
        yield


def _on_stop_signal(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def handle(number: int, _frame: FrameType | None) -> None:
        # The next one is not for us: a drain that hangs can be ended the usual way.
        signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def status_line(stats: WorkerStats) -> str:
    """Say in one line what a worker is doing."""
    parts = [
        f"worker {stats.name}",
        stats.health,
        f"{stats.active} of {stats.concurrency} driven",
        f"{stats.claimed} claimed",
    ]
    if stats.abandoned:
        parts.append(f"{stats.abandoned} threads stuck")
    if stats.silence > 5:  # noqa: PLR2004 -- seconds that are worth a word
        parts.append(f"the database has been silent for {stats.silence:.0f} s")
    return visible(" · ".join(parts))


@asynccontextmanager
async def _showing(live: Live | None, worker: Worker) -> AsyncIterator[None]:
    """Keep the line on the terminal up to date."""
    if live is None:
        yield
        return
    from rich.text import Text

    async def show() -> None:
        while True:
            live.update(Text(status_line(worker.stats()), style="dim", overflow="ellipsis"))
            await asyncio.sleep(_REFRESH)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(show())
        try:
            yield
        finally:
            task.cancel()


class _LineFormatter(logging.Formatter):
    """One line per record: time, level, logger, message, and what `extra` holds as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={value}" for key, value in _extra(record).items())
        return visible(f"{super().format(record)}{pairs}", keep="\n")


class _JsonFormatter(logging.Formatter):
    """One JSON object per record, in one line, with what `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return to_json(entry)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


@contextmanager
def _logging(call: Call) -> Iterator[Live | None]:
    """Write log lines to stderr; on a terminal, above a line that is yielded."""
    is_plain = call.output.format is OutputFormat.TABLE
    formatter = (
        _LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
        if is_plain
        else _JsonFormatter()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logger = logging.getLogger("agentflow")
    logger.setLevel(logging.DEBUG if call.debug else logging.INFO)
    logger.handlers = [handler]
    if not is_plain or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live

    # It moves the line out of the way of whatever is written to stderr.
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    with Live(
        console=console,
        auto_refresh=True,
        refresh_per_second=2,
        transient=True,
        redirect_stdout=False,
    ) as live:
        handler.setStream(sys.stderr)
        yield live
        handler.setStream(sys.__stderr__ or sys.stderr)
