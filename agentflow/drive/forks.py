"""Checkpoints that are made the head once more: one that a migration has made, or a run's first.

LangGraph's own copy lacks our metadata, by which the effects of renamed nodes are known.
"""

from __future__ import annotations

from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.base.id import uuid6

from agentflow.effects import NAMES, SHIFT
from agentflow.types import Run


async def copy_migrated(saver: BaseCheckpointSaver[Any], found: CheckpointTuple) -> bool:
    """Put a copy in front of a migrated checkpoint, and say whether it is one."""
    metadata: dict[str, Any] = dict(found.metadata)
    if NAMES not in metadata:
        return False
    made: Checkpoint = {**found.checkpoint, "id": str(uuid6(clock_seq=-2))}
    metadata |= {"step": metadata["step"] + 1, SHIFT: metadata[SHIFT] + 1}
    await saver.aput(found.config, made, cast("CheckpointMetadata", metadata), {})
    return True


async def find_start(saver: BaseCheckpointSaver[Any], run: Run) -> str | None:
    """Return the checkpoint from which all of a run is executed again; `None` if it has none."""
    thread: RunnableConfig = {
        "configurable": {"thread_id": run.thread_id, "checkpoint_ns": ""},
    }
    first: CheckpointTuple | None = None
    second: CheckpointTuple | None = None
    async for each in saver.alist(thread, filter={"run_id": run.id}):  # the newest first
        first, second = each, first
    if first is None:
        return None
    if first.metadata.get("source") != "input":
        before = first.parent_config  # that of which the run is a fork
        return None if before is None else str(before["configurable"]["checkpoint_id"])
    # The one behind the input has what was given, and no node has run.
    is_next = second is not None and second.metadata["step"] == first.metadata["step"] + 1
    found = second if second is not None and is_next else first
    return str(found.checkpoint["id"])
