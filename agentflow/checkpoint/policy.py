"""Which checkpoints of a running graph are stored.

Pure: nothing here knows how.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from langgraph.checkpoint.base import Checkpoint, CheckpointMetadata

from agentflow.checkpoint.deltas import delta_channels
from agentflow.errors import InvalidInputError

Save = Literal["every_step", "exit"] | Collection[str]
"""When the state of a running graph is stored.

- `"every_step"`: after each superstep. A crash loses what the nodes of the current superstep have
  not finished, nothing else.
- The names of some nodes, such as `["charge"]`: before each of these nodes begins, and after it has
  ended. A crash runs again all that came after the last such point, which none of these nodes did.
- `"exit"`: when the graph ends. A crash runs the whole invocation again.

Whatever the choice, the state is stored when a node interrupts or fails, and when the graph ends or
has used its steps; and an update of the state by hand is always stored.

LangGraph does not tell its checkpointer of any other end: a breakpoint (`interrupt_before` or
`interrupt_after`), a drain, a stream that its reader leaves, a call that is cancelled or that
Ctrl-C interrupts, an error that is no node's (a step that takes longer than `step_timeout`, two
nodes that update a channel of one value). What was not stored by then is in the memory of this
process, and a crash loses it. It is stored when the thread is read, copied or pruned through this
saver, by `Saver.flush`, and when the saver is closed or the process ends by itself. So after an
invocation that may end in one of these ways, await `saver.flush(thread_id)`, or call
`graph.get_state(config)`.
"""

_BRANCH, _JOIN, _TASKS = "branch:to:", "join:", "__pregel_tasks"


class SavePolicy:
    """Says which checkpoints have to be stored when they are put."""

    def __init__(self, save: Save) -> None:
        """Take the caller's choice.

        Raises:
            InvalidInputError: It is neither a known word nor a collection of names.
        """
        self.saves_all = save == "every_step"
        if isinstance(save, str):
            if save not in {"every_step", "exit"}:
                advice = f"save: {save!r} is unknown; use 'every_step', 'exit' or names of nodes"
                raise InvalidInputError("checkpointer", (advice,))
            save = ()
        self._marked = frozenset(save)

    def is_due(
        self,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        *,
        was_marked: bool,
        is_last: bool,
    ) -> bool:
        """Whether a checkpoint has to be stored now.

        Args:
            checkpoint: What was put.
            metadata: What was put with it.
            was_marked: Whether a marked node has run since the checkpoint before it.
            is_last: Whether the graph may not take another step.

        Raises:
            InvalidInputError: The graph has delta channels, whose values need every step's writes.
        """
        if delta_channels(metadata):
            advice = "save: a graph with a DeltaChannel needs save='every_step'"
            raise InvalidInputError("checkpointer", (advice,))
        if was_marked or is_last or metadata.get("source") not in {"input", "loop"}:
            return True
        return not self._goes_on(checkpoint) or self.is_marked(checkpoint)

    def is_marked(self, checkpoint: Checkpoint) -> bool:
        """Whether a marked node comes next."""
        if not self._marked:
            return False
        updated = _updated(checkpoint)
        named = {f"{_BRANCH}{node}" for node in self._marked}
        if not named.isdisjoint(updated):
            return True
        targets = {channel.rpartition(":")[2] for channel in updated if channel.startswith(_JOIN)}
        return not self._marked.isdisjoint({*targets, *_sent_to(checkpoint)})

    @staticmethod
    def _goes_on(checkpoint: Checkpoint) -> bool:
        """Whether the graph certainly has another superstep; if in doubt it may end here."""
        updated = _updated(checkpoint)
        begins = "__start__" in updated
        return (
            begins
            or any(name.startswith(_BRANCH) for name in updated)
            or bool(_sent_to(checkpoint))
        )


def _updated(checkpoint: Checkpoint) -> Collection[str]:
    return checkpoint.get("updated_channels") or ()


def _sent_to(checkpoint: Checkpoint) -> list[Any]:
    """Return the nodes to which something was sent (`Send`)."""
    if _TASKS not in _updated(checkpoint):
        return []
    return [send.node for send in checkpoint["channel_values"].get(_TASKS, ())]
