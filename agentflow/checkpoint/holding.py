"""What a sparse policy holds back, and what is decided about it; `intake` stores it.

The newest checkpoint of an invocation waits here until it is due, with the writes that belong to
it. Whatever follows it brings what it would have brought.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME

from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.ids import checkpoint_id_of
from agentflow.checkpoint.policy import SavePolicy
from agentflow.checkpoint.puts import PlannedCheckpoint, PlannedWrites
from agentflow.checkpoint.rows import HeadKey, ThreadKey
from agentflow.checkpoint.stamps import Seen, read_seen
from agentflow.types import Lease

T = TypeVar("T")
_ENGINE = "__pregel_"
"""With this begin LangGraph's own keys."""
_CARRIED_LIMIT = 1000
_MARKED_LIMIT = 10_000
"""How many checkpoints are remembered that were held back and followed by another one, or after
which a marked node began, or a run stopped."""

Spot = tuple[HeadKey, Lease | None, str]
"""Namespace, lease and checkpoint; ids of checkpoints are never those of another invocation."""


class _Carried(NamedTuple):
    """What follows a checkpoint that was not stored has to bring in its stead."""

    since: str | None
    """The last stored checkpoint of the invocation."""
    changed: ChannelVersions
    """The channels that have changed since then."""


@dataclass(slots=True)
class Held:
    """A checkpoint that is not due yet."""

    encoder: Encoder
    config: RunnableConfig
    """Where the last stored checkpoint of the invocation is."""
    planned: PlannedCheckpoint
    carried: _Carried
    writes: list[PlannedWrites] = field(default_factory=list)


@dataclass(slots=True)
class Behind:
    """Writes behind a stored checkpoint whose nodes are not marked.

    If the next checkpoint is not stored, they are not either: a crash runs all again that came
    after the last stored one, and not sometimes a part of it.
    """

    config: RunnableConfig
    writes: list[PlannedWrites] = field(default_factory=list)


class HeldBack:
    """What one process holds back; each method is called under `lock`."""

    def __init__(self, policy: SavePolicy) -> None:
        """Hold back what `policy` does not want to have stored."""
        self._policy = policy
        # Taken from the look at what is held back until what became of it is queued, so that
        # nothing overtakes what it follows.
        self.lock = threading.RLock()
        self._held: dict[Spot, Held] = {}
        self._carried: OrderedDict[Spot, _Carried] = OrderedDict()
        self._behind: dict[Spot, Behind] = {}
        self._marked: OrderedDict[Spot, None] = OrderedDict()
        self._stopped: OrderedDict[Spot, None] = OrderedDict()

    def may_wait(self, spot: Spot, config: RunnableConfig, channels: Collection[str]) -> bool:
        """Whether writes may be held back until it is known if the next checkpoint is due."""
        if not {ERROR, INTERRUPT}.isdisjoint(channels):
            _remember(self._stopped, spot, None, _MARKED_LIMIT)
            return False
        if spot in self._held:
            return True
        if RESUME in channels:
            self._stopped.pop(spot, None)
            return False
        return spot not in self._stopped and not self._is_before_marked(spot, config)

    def is_due(
        self,
        parent: Spot,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
    ) -> bool:
        """Whether a checkpoint that follows `parent` has to be stored now."""
        key, lease, _ = parent
        seen = read_seen(config, key[2])
        was_marked = self._is_before_marked(parent, config)
        self._marked.pop(parent, None)
        if self._policy.is_marked(checkpoint):
            _remember(self._marked, (key, lease, checkpoint["id"]), None, _MARKED_LIMIT)
        return self._policy.is_due(
            checkpoint, metadata, was_marked=was_marked, is_last=_is_last(config, metadata, seen)
        )

    def _is_before_marked(self, spot: Spot, config: RunnableConfig) -> bool:
        """Whether a marked node comes after a checkpoint."""
        key, _, checkpoint_id = spot
        seen = read_seen(config, key[2])
        is_seen = seen is not None and seen.checkpoint_id == checkpoint_id and seen.is_marked
        return is_seen or spot in self._marked

    def completed(
        self, parent: Spot, config: RunnableConfig, new_versions: ChannelVersions
    ) -> tuple[RunnableConfig, ChannelVersions]:
        """Return where a checkpoint comes from and what changed, with what it has to bring.

        If `parent` was not stored, it comes from the last one that was.
        """
        followed = self._held.get(parent)
        carried = followed.carried if followed else self._carried.get(parent)
        if carried is None:
            return config, new_versions
        return _at(config, carried.since), {**carried.changed, **new_versions}

    def follow(self, parent: Spot) -> None:
        """Let go of a checkpoint that another one brings."""
        followed = self._held.pop(parent, None)
        if followed is not None:
            # Others may follow it too; if not, it is one of the first to be forgotten.
            _remember(self._carried, parent, followed.carried, _CARRIED_LIMIT)

    def hold(
        self,
        parent: Spot,
        encoder: Encoder,
        config: RunnableConfig,
        planned: PlannedCheckpoint,
        changed: ChannelVersions,
    ) -> None:
        """Hold back a checkpoint that follows `parent`.

        Args:
            parent: The checkpoint before it.
            encoder: What has made it.
            config: Where the last stored checkpoint of the invocation is.
            planned: The checkpoint.
            changed: The channels that have changed since then.
        """
        key, lease, _ = parent
        # It brings what they have made of the state.
        self._behind.pop(parent, None)
        carried = _Carried(checkpoint_id_of(config), changed)
        held = Held(encoder, _without_engine(config), planned, carried)
        self._held[key, lease, planned.checkpoint_id] = held

    def hold_writes(self, spot: Spot, config: RunnableConfig, planned: PlannedWrites) -> None:
        """Hold back writes, with their checkpoint or behind it."""
        held = self._held.get(spot)
        if held is not None:
            held.writes.append(planned)
            return
        behind = Behind(_without_engine(config))
        self._behind.setdefault(spot, behind).writes.append(planned)

    def take(self, spot: Spot) -> Held | None:
        """Take a checkpoint that is held back, to store it; its writes are behind it then."""
        held = self._held.pop(spot, None)
        if held is not None:
            # It is there for whoever follows it.
            self._carried.pop(spot, None)
            self._behind[spot] = Behind(_at(held.config, spot[2]), held.writes)
        return held

    def take_behind(self, spot: Spot) -> Behind | None:
        """Take the writes that wait behind a stored checkpoint, to store them."""
        return self._behind.pop(spot, None)

    def spots(self, thread: ThreadKey | None) -> list[Spot]:
        """List where something of a thread is held back, or of all (`None`)."""
        waiting = [*self._held, *self._behind]
        return [spot for spot in waiting if thread is None or spot[0][:2] == thread]

    def forget_thread(self, thread: ThreadKey) -> None:
        """Drop everything about a thread."""
        kept: dict[Spot, Any]
        for kept in (self._held, self._behind, self._carried, self._marked, self._stopped):
            for spot in [spot for spot in kept if spot[0][:2] == thread]:
                del kept[spot]


def _remember(kept: OrderedDict[Spot, T], spot: Spot, value: T, limit: int) -> None:
    """Keep a value, and drop the oldest one if there are too many."""
    kept[spot] = value
    kept.move_to_end(spot)
    if len(kept) > limit:
        kept.popitem(last=False)


def _is_last(config: RunnableConfig, metadata: CheckpointMetadata, seen: Seen | None) -> bool:
    """Whether LangGraph stops here, since the invocation has used its steps; it puts nothing then.

    It counts from the step behind the one that was loaded; a new thread begins at -1.
    """
    limit, step = config.get("recursion_limit"), metadata.get("step")
    if limit is None or step is None:
        return False
    loaded = -2 if seen is None or seen.step is None else seen.step
    return step >= loaded + limit + 2


def _at(config: RunnableConfig, checkpoint_id: str | None) -> RunnableConfig:
    """Return a configuration that names another checkpoint."""
    return {**config, "configurable": {**config["configurable"], "checkpoint_id": checkpoint_id}}


def _without_engine(config: RunnableConfig) -> RunnableConfig:
    """Return what is needed of a configuration; the engine's keys hold on to the whole state."""
    configurable = config["configurable"].items()
    return {"configurable": {k: v for k, v in configurable if not k.startswith(_ENGINE)}}
