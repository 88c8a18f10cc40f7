"""Where in a graph an effect is called: what its key is made of if the user names none.

Such a key has to be the same when the node runs again: in another attempt, after a requeue from an
earlier checkpoint, in a fork. So it holds no ids of tasks or checkpoints, which change then. What
stays is the superstep, counted without those that forks and migrations add, the nodes on the way
from the root with their positions in the step, and the step in each subgraph. A node that was due
when a migration renamed it keeps its old name in that superstep.
"""

from __future__ import annotations

import hashlib
import json
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
NAMES = "effect_names"
"""The key under which stands, in that of a migrated checkpoint, what its due nodes were called."""


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
        self._names: Mapping[str, str] = {}
        self._named_step = -1
        self._segments: dict[str, tuple[Any, ...]] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._here: dict[str, tuple[Place, list[Any]]] = {}
        """By namespace, what follows from the segments: the place, and its path as plain data."""
        self._lock = threading.Lock()

    def follow(self, metadata: Mapping[str, Any]) -> int | None:
        """Learn from the metadata of the head what due nodes were called before a migration.

        Returns:
            How many supersteps had been added up to it, if a migration has made it.
        """
        if NAMES not in metadata:
            return None
        self._names, self._named_step = json.loads(metadata[NAMES]), metadata["step"] + 1
        shift: int = metadata[SHIFT]
        return shift

    def enter(self, metadata: Mapping[str, Any]) -> None:
        """Note that a node is called, perhaps once more."""
        ns: str = metadata.get("langgraph_checkpoint_ns", "")
        step: int = metadata.get("langgraph_step", 0)
        node: str | None = metadata.get("langgraph_node")
        path = _without_ids(metadata.get("langgraph_path", ()))
        with self._lock:
            if "|" not in ns:
                if step != self._step:
                    self._segments.clear()
                    self._counts.clear()
                    self._step = step
                names = self._names if step == self._named_step else {}
                node = names.get(str(node), node)
                segment = (node, step - self.shift, _renamed(path, names))
            else:
                names = self._names if self._step == self._named_step else {}
                # Of a task of the functional API, which stands in the node that has called it.
                inside = [_renamed(p, names) if isinstance(p, tuple) else p for p in path]
                segment = (node, step, tuple(inside))
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


def _renamed(path: Any, names: Mapping[str, str]) -> Any:
    if isinstance(path, tuple):
        return tuple(_renamed(part, names) for part in path)
    return names.get(path, path) if isinstance(path, str) else path


def names_before(named: Mapping[str, str], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what due nodes were called at first, by what one more migration calls them.

    Args:
        named: What they were called before that migration, by what they are called after it.
        metadata: Of the checkpoint that is migrated, perhaps not for the first time.
    """
    first: Mapping[str, str] = json.loads(metadata.get(NAMES, "{}"))
    return {new: first.get(old, old) for new, old in named.items()}


def _plain(path: Any) -> Any:
    if isinstance(path, tuple):
        return [_plain(part) for part in path]
    return path if path is None or isinstance(path, (str, int, bool)) else str(path)
