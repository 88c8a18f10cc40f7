"""A checkpoint that a migration has made, made the head once more.

LangGraph's own copy lacks our metadata, by which the effects of renamed nodes are known.
"""

from __future__ import annotations

from typing import Any, cast

from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.base.id import uuid6

from agentflow.effects import NAMES, SHIFT


async def copy_migrated(saver: BaseCheckpointSaver[Any], found: CheckpointTuple) -> bool:
    """Put a copy in front of a migrated checkpoint, and say whether it is one."""
    metadata: dict[str, Any] = dict(found.metadata)
    if NAMES not in metadata:
        return False
    made: Checkpoint = {**found.checkpoint, "id": str(uuid6(clock_seq=-2))}
    metadata |= {"step": metadata["step"] + 1, SHIFT: metadata[SHIFT] + 1}
    await saver.aput(found.config, made, cast("CheckpointMetadata", metadata), {})
    return True
