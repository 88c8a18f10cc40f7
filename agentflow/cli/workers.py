"""`agentflow worker`: a process that drives runs until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from agentflow.cli.command import Call
from agentflow.cli.output import visible

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


async def work(
    call: Call,
    *,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 10,
    queue: Annotated[
        list[str] | None, typer.Option(help="A queue to take runs from; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The worker's name in the records.")] = None,
) -> None:
    """Drive runs until SIGTERM or SIGINT, then let them stop at a step boundary and exit.

    A second signal ends the process at once; another worker takes its runs over.
    """
    _log_to_stderr(logging.DEBUG if call.debug else logging.INFO)
    queues = tuple(queue or ("default",))
    async with call.open_app(needs_graphs=True) as app:
        worker = app.worker(concurrency=concurrency, queues=queues, name=name)
        _on_stop_signal(worker.stop)
        call.output.message(
            f"worker {worker.name} (pid {os.getpid()}) started: concurrency {concurrency}, "
            f"queues {', '.join(queues)}"
        )
        await worker.run()
    call.output.message(f"worker {worker.name} stopped")


def _on_stop_signal(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def handle(number: int, _frame: FrameType | None) -> None:
        # The next one is not for us: a drain that hangs can be ended the usual way.
        signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


class _LineFormatter(logging.Formatter):
    """One line per record: time, level, logger, message, and what `extra` holds as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        pairs = "".join(f" {key}={value}" for key, value in extra.items())
        return visible(f"{super().format(record)}{pairs}", keep="\n")


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("agentflow")
    logger.setLevel(level)
    logger.handlers = [handler]
