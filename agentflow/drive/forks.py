"""A checkpoint that a migration has made, made the head once more.

LangGraph's own copy lacks our metadata, by which the effects of renamed nodes are known.
"""

from __future__ import annotations

from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint, CheckpointTuple
from langgraph.checkpoint.base.id import uuid6

from agentflow.effects import NAMES, SHIFT


async def copy_migrated(saver: BaseCheckpointSaver[Any], found: CheckpointTuple) -> bool:
    """Put a copy in front of a migrated checkpoint, and say whether it is one."""
    metadata: Any = found.metadata
    if NAMES not in metadata:
        return False
    made: Checkpoint = {**found.checkpoint, "id": str(uuid6(clock_seq=-2))}
    step, shift = metadata["step"] + 1, metadata[SHIFT] + 1
    await saver.aput(found.config, made, {**metadata, "step": step, SHIFT: shift}, {})
    return True
