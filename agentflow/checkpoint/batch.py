"""Running a batch of puts: plans made from remembered states, applied if these still hold.

Nearly always a thread is written by one process, which therefore knows its state without reading.
A plan that was made from a state that has changed is not applied; it is made again from the state
as it is then, which is locked meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from agentflow.checkpoint.planning import ThreadPlan
from agentflow.checkpoint.puts import Planned, PlannedCheckpoint
from agentflow.checkpoint.records import Place, unpack_record
from agentflow.checkpoint.rows import (
    CheckpointRow,
    Head,
    Rows,
    ThreadChange,
    ThreadKey,
    ThreadState,
)
from agentflow.codec import Codec
from agentflow.failpoints import failpoint

_MAX_THREADS = 2048

After = int | Exception | None
"""What a put follows: another one of the batch, by its place, or something that has failed.

A checkpoint without the writes that led to it would lose work, so one failure fails all that
follows.
"""


class ThreadStates:
    """The states of recently used threads; bounded, safe from any thread."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._known: OrderedDict[ThreadKey, ThreadState] = OrderedDict()

    def get(self, key: ThreadKey, namespaces: AbstractSet[str]) -> ThreadState | None:
        """Return a thread's state, if it is known with the heads of these namespaces."""
        state = self._known.get(key)
        return state if state is not None and state.heads.keys() >= namespaces else None

    def put(self, states: Mapping[ThreadKey, ThreadState]) -> None:
        """Remember what a commit has made of threads."""
        known = self._known
        with self._lock:
            for key, state in states.items():
                known[key] = state
                known.move_to_end(key)
            while len(known) > _MAX_THREADS:
                known.popitem(last=False)

    def observe(self, key: ThreadKey, state: ThreadState) -> None:
        """Remember what a reader has seen, unless something newer is known."""
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                if (known.token, known.seq) > (state.token, state.seq):
                    return
                if known.version == state.version:
                    state = replace(state, heads={**state.heads, **known.heads})
            self._known[key] = state
            if len(self._known) > _MAX_THREADS:
                self._known.popitem(last=False)

    def held(self, key: ThreadKey, token: int) -> ThreadState | None:
        """Return a thread's state, if it is known and the thread is held under a token.

        Nobody else can write it then, and what is written under the token passes through here.
        """
        state = self._known.get(key)
        is_held = state is not None and state.is_leased and state.token == token
        return state if is_held else None

    def forget(self, key: ThreadKey | None) -> None:
        """Read the thread again before it is next written; `None` stands for all."""
        with self._lock:
            if key is None:
                self._known.clear()
            else:
                self._known.pop(key, None)


class Batch:
    """Some puts on their way into one commit."""

    def __init__(
        self, rows: Rows, states: ThreadStates, puts: Sequence[Planned], after: Sequence[After]
    ) -> None:
        """Decide on `puts` in their order.

        Args:
            rows: Where they go.
            states: What is known of their threads.
            puts: What to write.
            after: What each of them follows.
        """
        self._rows = rows
        self._states = states
        self._puts = puts
        self._follows = after
        self._by_thread: dict[ThreadKey, list[int]] = {}
        for place, put in enumerate(puts):
            self._by_thread.setdefault(put.key[:2], []).append(place)
        self.outcomes: list[Exception | None] = [None] * len(puts)
        self._after: dict[ThreadKey, ThreadState] = {}

    def run(self) -> None:
        """Apply what may be applied."""
        for put in self._puts:
            if isinstance(put, PlannedCheckpoint):
                failpoint("checkpoint.before_insert")
        again = self._apply(self._load(self._by_thread), is_locked=False)
        if again:
            with self._rows.exclusive():
                self._apply(self._read(again, lock=True), is_locked=True)

    def publish(self) -> None:
        """Remember what the threads have become, once it is durable."""
        self._states.put(self._after)

    def _load(self, keys: Iterable[ThreadKey]) -> dict[ThreadKey, ThreadState]:
        states: dict[ThreadKey, ThreadState] = {}
        unknown = []
        for key in keys:
            state = self._states.get(key, self._namespaces(key))
            if state is None:
                unknown.append(key)
            else:
                states[key] = state
        return states | self._read(unknown, lock=False) if unknown else states

    def _read(self, keys: Iterable[ThreadKey], *, lock: bool) -> dict[ThreadKey, ThreadState]:
        wanted = {key: self._namespaces(key) for key in keys}
        return {
            key: _with_heads(state, wanted[key], rows, key, self._codec(key))
            for key, (state, rows) in self._rows.load_states(wanted, lock=lock).items()
        }

    def _namespaces(self, key: ThreadKey) -> set[str]:
        return {
            put.ns
            for place in self._by_thread[key]
            if isinstance(put := self._puts[place], PlannedCheckpoint)
        }

    def _codec(self, key: ThreadKey) -> Codec:
        return self._puts[self._by_thread[key][0]].codec

    def _apply(
        self, states: Mapping[ThreadKey, ThreadState], *, is_locked: bool
    ) -> list[ThreadKey]:
        """Plan and apply; return the threads of which the state has to be read again."""
        changes: dict[ThreadKey, ThreadChange] = {}
        again: list[ThreadKey] = []
        for key, state in states.items():
            plan = ThreadPlan(state, self._rows)
            is_refused = False
            for place in self._by_thread[key]:
                follows = self._follows[place]
                error = self.outcomes[follows] if isinstance(follows, int) else follows
                if error is None:
                    error = plan.add(self._puts[place])
                    is_refused = is_refused or error is not None
                self.outcomes[place] = error
            change = plan.change()
            if is_refused and not is_locked:
                # What is remembered may be out of date, and nobody is refused for that.
                again.append(key)
            elif change is None:
                self._after[key] = state
            else:
                changes[key] = change
        applied = self._rows.apply(list(changes.values())) if changes else set()
        for key, change in changes.items():
            if change.before.number in applied:
                self._after[key] = change.after
            else:
                again.append(key)
        assert not (again and is_locked), "a locked thread cannot be overtaken"
        return again


def _with_heads(
    state: ThreadState,
    namespaces: Iterable[str],
    rows: Sequence[CheckpointRow],
    key: ThreadKey,
    codec: Codec,
) -> ThreadState:
    heads: dict[str, Head | None] = dict.fromkeys(namespaces)
    for row in rows:
        layout = unpack_record(codec, row, Place(*key, row.ns)).layout
        heads[row.ns] = Head(row.checkpoint_id, row.seq, row.attempt, layout, row.hash)
    return replace(state, heads=heads)
