"""Where in a graph an effect is called: what its key is made of if the user names none.

Such a key has to be the same when the node runs again: in another attempt, after a requeue from an
earlier checkpoint, in a fork. So it holds no ids of tasks or checkpoints, which change then. What
stays is the superstep, counted without those that forks add, the nodes on the way from the root
with their positions in the step, and the step in each subgraph.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ormsgpack
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.config import get_config

from agentflow.interrupts.plain import digest
from agentflow.types import Run

SHIFT = "effect_shift"
"""The key in checkpoints' metadata under which stands how many supersteps forks have added."""


@dataclass(frozen=True, slots=True)
class Place:
    """A call of a node."""

    ns: str
    task_id: str
    node: str
    path: tuple[Any, ...]
    """What identifies it in every attempt."""


NOWHERE = Place("", "", "", ())


class Places:
    """The calls of nodes in one attempt, as they are told by callbacks."""

    def __init__(self) -> None:
        """Know of none."""
        self.shift = 0
        self._step = -1
        self._segments: dict[str, tuple[Any, ...]] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._here: dict[str, tuple[Place, list[Any]]] = {}
        """By namespace, what follows from the segments: the place, and its path as plain data."""
        self._lock = threading.Lock()

    def enter(self, metadata: Mapping[str, Any]) -> None:
        """Note that a node is called, perhaps once more."""
        ns: str = metadata.get("langgraph_checkpoint_ns", "")
        step: int = metadata.get("langgraph_step", 0)
        segment = (
            metadata.get("langgraph_node"),
            step,
            _without_ids(metadata.get("langgraph_path", ())),
        )
        with self._lock:
            if "|" not in ns:
                if step != self._step:
                    self._segments.clear()
                    self._counts.clear()
                    self._step = step
                segment = (segment[0], step - self.shift, segment[2])
            self._segments[ns] = segment
            self._counts.pop(ns, None)
            self._here.clear()

    def here(self) -> Place:
        """Return the place of the caller, from the node's configuration."""
        try:
            config = get_config()
        except RuntimeError:
            return NOWHERE
        ns: str = config.get("configurable", {}).get("checkpoint_ns", "")
        return self._at(ns)[0]

    def _at(self, ns: str) -> tuple[Place, list[Any]]:
        with self._lock:
            found = self._here.get(ns)
            if found is None:
                place = self._place(ns)
                found = self._here[ns] = (place, _plain(place.path))
        return found

    def _place(self, ns: str) -> Place:
        parts = ns.split("|") if ns else []
        path = tuple(
            self._segments.get("|".join(parts[: i + 1]), (parts[i].partition(":")[0],))
            for i in range(len(parts))
        )
        last = parts[-1] if parts else ""
        node, _, task_id = last.partition(":")
        return Place(ns, task_id, node, path)

    def key(self, place: Place, name: str, arguments: Mapping[str, Any]) -> str:
        """Return the key of a call at a place that has none of its own, and count it."""
        what = _hash([name, arguments])
        known, path = self._at(place.ns)
        with self._lock:
            counts = self._counts.setdefault(place.ns, Counter())
            occurrence = counts[what]
            counts[what] += 1
        return _hash([path if place is known else _plain(place.path), what, occurrence])


def shift_of(found: CheckpointTuple | None, run: Run) -> int:
    """Return how many supersteps forks and requeues of a run had added up to a checkpoint."""
    metadata: Mapping[str, Any] = {} if found is None else dict(found.metadata)
    if metadata.get("source") == "fork":
        return run.effect_shift  # the copy itself, which has no metadata of ours
    shift: int = metadata.get(SHIFT, 0)
    return shift


def _hash(plain: list[Any]) -> str:
    """Return a hash of plain data that is the same in every process."""
    try:
        packed = ormsgpack.packb(plain, option=ormsgpack.OPT_SORT_KEYS)
    except (TypeError, ValueError):  # what JSON can write and MessagePack cannot
        return digest(plain)
    return hashlib.sha256(packed).hexdigest()


def _without_ids(path: Any) -> Any:
    """Take what is an id of a task out of the path of one."""
    if isinstance(path, (list, tuple)):
        return tuple(_without_ids(part) for part in path[:3])
    return path


def _plain(path: Any) -> Any:
    if isinstance(path, tuple):
        return [_plain(part) for part in path]
    return path if path is None or isinstance(path, (str, int, bool)) else str(path)
