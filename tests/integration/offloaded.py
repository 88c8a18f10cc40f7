"""What the tests of the object tier share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint

from agentflow.checkpoint import Retention, Saver, open_checkpointer
from agentflow.checkpoint.audit import Damage
from agentflow.checkpoint.collection import GRACE
from agentflow.testing.savers.calls import at, checkpoint

LIMIT = 2000
"""Bytes from which a value is an object here."""
KEEP = Retention()
"""A retention that keeps everything; a sweep with it only collects objects."""


@dataclass(frozen=True)
class Later:
    """A clock that is ahead by so much."""

    by: timedelta

    def now(self) -> datetime:
        return datetime.now(UTC) + self.by


def text(seed: Any, size: int = 5000) -> str:
    """Return a text that is another one for another seed, and does not compress below a half."""
    return random.Random(str(seed)).randbytes(size // 2).hex()


def opened(url: str, folder: Path, **options: Any) -> Saver:
    """Open a checkpointer beside a folder of objects."""
    folder.mkdir(exist_ok=True)
    return open_checkpointer(url, offload=f"file://{folder}", offload_from=LIMIT, **options)


def put_value(saver: Saver, name: str, parent: str | None, value: Any, thread: str = "t") -> None:
    """Put a checkpoint whose channel `x` has a value, beside a small one."""
    made = checkpoint(name, {"x": name, "n": name}, x=value, n=len(name))
    saver.put(at(parent, thread=thread), made, {"step": 1}, {"x": name, "n": name})


def put_kept(saver: Saver, name: str, parent: str, value: Any, thread: str = "t") -> None:
    """Put a checkpoint behind one whose value it keeps."""
    made = {
        **empty_checkpoint(),
        "id": name,
        "channel_values": {"x": value, "n": name},
        "channel_versions": {"x": parent, "n": name},
    }
    saver.put(at(parent, thread=thread), made, {"step": 1}, {"n": name})  # type: ignore[arg-type]


def objects(folder: Path) -> list[Path]:
    """Return the files of a folder, and whatever else is there."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def collect(saver: Saver, *, sweeps: int = 2) -> int:
    """Sweep as often, each time later than the grace period; return how many objects went."""
    count = 0
    for number in range(1, sweeps + 1):
        count += saver.sweep(KEEP, clock=Later(2 * number * GRACE)).objects
    return count


def damages(saver: Saver) -> list[Damage]:
    """Return what is not as it was stored."""

    async def run() -> list[Damage]:
        return [damage async for audited in saver.verify() for damage in audited.damages]

    return asyncio.run(run())


def everything(saver: Saver, thread: str = "t") -> list[Any]:
    """Return what a thread shows: values, versions, metadata and writes of all its checkpoints."""
    return [
        (
            each.checkpoint["id"],
            each.checkpoint["channel_values"],
            each.checkpoint["channel_versions"],
            each.metadata,
            each.parent_config and each.parent_config["configurable"]["checkpoint_id"],
            each.pending_writes,
        )
        for each in saver.list({"configurable": {"thread_id": thread}})
    ]


def once(action: Callable[[], None]) -> Callable[[], None]:
    """Return what does something the first time only."""
    left = [action]

    def run() -> None:
        with suppress(IndexError):
            left.pop()()

    return run
