"""Processes that use objects and archives, and die at some point of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

from agentflow.checkpoint import Saver
from agentflow.checkpoint.collection import GRACE
from agentflow.failpoints import arm
from tests.integration.offloaded import KEEP, Later, opened, put_value, text

WRITER = "tests.fault.object_victims:write_main"
COLLECTOR = "tests.fault.object_victims:collect_main"
ARCHIVER = "tests.fault.object_victims:archive_main"
RESTORER = "tests.fault.object_victims:restore_main"


def _die_at(point: str, number: int) -> None:
    """Let the process kill itself when it passes a failpoint for the so-manieth time."""
    passed = count(1)

    def die() -> None:
        if next(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    arm(point, die)


def _main(url: str, folder: str, point: str, number: int, act: Callable[[Saver], None]) -> None:
    with opened(url, Path(folder)) as saver:
        # It is connected before, so that only what it does counts.
        saver.get_tuple({"configurable": {"thread_id": "none"}})
        _die_at(point, number)
        act(saver)


def write_main(url: str, folder: str, thread: str, point: str, number: int) -> None:
    """Put a second checkpoint with a large value, and a large write."""

    def act(saver: Saver) -> None:
        put_value(saver, "c2", "c1", text(f"{thread} 2"), thread=thread)

    _main(url, folder, point, number, act)


def collect_main(url: str, folder: str, point: str, number: int) -> None:
    """Sweep, so much later that what was abandoned long ago goes."""

    def act(saver: Saver) -> None:
        for sweep in (2, 4):
            saver.sweep(KEEP, clock=Later(sweep * GRACE))

    _main(url, folder, point, number, act)


def archive_main(url: str, folder: str, thread: str, point: str, number: int, to: str) -> None:
    """Archive a thread."""
    _main(url, folder, point, number, lambda saver: _ignore(saver.archive(thread, to=to)))


def restore_main(url: str, folder: str, thread: str, point: str, number: int, source: str) -> None:
    """Restore a thread."""
    _main(url, folder, point, number, lambda saver: _ignore(saver.restore(thread, source=source)))


def _ignore(_: object) -> None:
    """Take what nobody needs."""
