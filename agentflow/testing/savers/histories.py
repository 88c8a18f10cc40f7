"""Random histories, held against a plain model: a dictionary of what each checkpoint had.

Several savers take turns on one thread. They put lists that grow, are cut, edited and replaced, on
the head and on branches from anywhere; tasks write, the same elements among others; runs are
deleted, threads pruned and copied. After it all every checkpoint that is left must have exactly
the values and the writes that it had when they were put, byte by byte.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.runnables import RunnableConfig

from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import AnySaver, after, at, checkpoint, dumped, ids, load

TAIL = 8
"""How many of the last stored elements may be edited in place and are noticed at once."""
LISTS = ("x", "y")
"""The first one has elements of all kinds, the second only such as cannot be edited in place."""
RUNS = 4


class Edit(NamedTuple):
    """What becomes of one list before the next checkpoint."""

    kind: str
    place: int
    amount: int


class Step(NamedTuple):
    """A checkpoint."""

    edits: tuple[Edit, Edit]
    writes: str
    """When what a task wrote to its parent comes."""
    is_again: bool
    """Whether the last checkpoint is put once more instead, as LangGraph does on exit."""


class Turn(NamedTuple):
    """Some steps of one saver, on the head or as a branch from some older checkpoint."""

    writer: int
    fork: int | None
    """How many checkpoints to go back."""
    steps: list[Step]


class Verb(NamedTuple):
    """A change of whole threads."""

    name: str
    writer: int
    number: int


KINDS = ("append", "append", "append", "append in place", "back", "back", "cut", "edit", "replace",
         "reverse", "insert", "new", "copy", "same", "keep", "gone")  # fmt: skip
small = st.integers(min_value=0, max_value=40)
edits = st.builds(Edit, st.sampled_from(KINDS), small, st.integers(min_value=0, max_value=20))
steps = st.builds(
    Step,
    st.tuples(edits, edits),
    st.sampled_from(["none", "before", "together", "after"]),
    st.sampled_from([False] * 5 + [True]),
)
turns = st.builds(
    Turn,
    st.integers(min_value=0, max_value=2),
    st.none() | st.integers(min_value=0, max_value=6),
    st.lists(steps, min_size=1, max_size=4),
)
verbs = st.builds(
    Verb,
    st.sampled_from(["delete run", "delete run", "prune", "copy"]),
    st.integers(min_value=0, max_value=1),
    small,
)
plans = st.lists(turns | turns | turns | verbs, min_size=3, max_size=16)


@dataclass
class Stored:
    """What a checkpoint must have."""

    parent: str | None
    run: str
    values: dict[str, bytes]
    writes: list[tuple[str, str, bytes]] = field(default_factory=list)


@dataclass
class Live:
    """An invocation: its own objects, and where it is."""

    config: RunnableConfig
    parent: RunnableConfig
    values: dict[str, Any]
    versions: dict[str, Any]
    lengths: Mapping[str, list[int]]
    """How long each list was when it was loaded, and at each checkpoint since."""
    is_own: bool = False
    """Whether the invocation has put the checkpoint that it is at."""

    @property
    def last(self) -> str | None:
        """The id of that checkpoint."""
        found: str | None = self.config["configurable"].get("checkpoint_id")
        return found


class History:
    """Plays a plan on some savers, and knows what must come of it."""

    def __init__(
        self,
        savers: tuple[AnySaver, ...],
        fresh: Callable[[], AbstractContextManager[AnySaver]],
        thread: str,
        *,
        verifies: bool,
    ) -> None:
        """Play on `thread`.

        Args:
            savers: They live as long as the history.
            fresh: Opens one more, for one step.
            thread: The thread's id; copies get others.
            verifies: Whether the savers notice an edit of any element.
        """
        self.savers = savers
        self.fresh = fresh
        self.thread = thread
        self.verifies = verifies
        self.threads: dict[str, dict[str, Stored]] = {thread: {}}
        self.lives: dict[int, Live] = {}
        self.serial = count()

    @property
    def model(self) -> dict[str, Stored]:
        """The checkpoints of the present thread, in the order of their puts."""
        return self.threads[self.thread]

    def play(self, plan: list[Turn | Verb]) -> None:
        """Do what the plan says, and look at the newest checkpoint after each of its points."""
        for point in plan:
            if isinstance(point, Verb):
                self.call(point)
            else:
                with self.writer(point.writer) as saver:
                    self.live(saver, point)
                    for step in point.steps:
                        self.step(saver, point.writer, step)
            for saver in self.savers:
                self.check_head(saver)

    @contextmanager
    def writer(self, number: int) -> Iterator[AnySaver]:
        """Return one of the savers, or a fresh one."""
        if number < len(self.savers):
            yield self.savers[number]
        else:
            self.lives.pop(number, None)
            with self.fresh() as opened:
                yield opened

    def call(self, verb: Verb) -> None:
        """Delete a run, prune the thread, or go on in a copy of it."""
        saver = self.savers[verb.writer]
        if verb.name == "prune":
            saver.prune([self.thread])
            for name in list(self.model)[:-1]:
                del self.model[name]
        elif verb.name == "copy":
            target = f"{self.thread}'"
            saver.copy_thread(self.thread, target)
            self.threads[target] = copy.deepcopy(self.model)
            self.thread = target
            self.lives.clear()
        else:
            run = self.run(verb.number)
            saver.delete_for_runs([run])
            for model in self.threads.values():
                for name in [name for name, stored in model.items() if stored.run == run]:
                    del model[name]

    def run(self, number: int) -> str:
        """Name a run of this history."""
        return f"{self.thread.rstrip(chr(39))} run {number % RUNS}"

    def live(self, saver: AnySaver, turn: Turn) -> None:
        """Let the writer go on with its own invocation, or begin one."""
        head = next(reversed(self.model), None)
        if head is None:
            nowhere = at(thread=self.thread)
            lengths = {channel: [0] for channel in LISTS}
            self.lives[turn.writer] = Live(nowhere, nowhere, {}, {}, lengths)
            return
        live = self.lives.get(turn.writer)
        if turn.fork is None and live is not None and live.last == head:
            return
        names = list(self.model)
        name = None if turn.fork is None else names[-1 - turn.fork % len(names)]
        found = load(saver, name, thread=self.thread)
        values = dict(found.checkpoint["channel_values"])
        self.lives[turn.writer] = Live(
            found.config,
            found.config,
            values,
            dict(found.checkpoint["channel_versions"]),
            {channel: [len(values.get(channel, ()))] for channel in LISTS},
        )

    def step(self, saver: AnySaver, writer: int, step: Step) -> None:
        """Put a checkpoint, and what a task has written before it."""
        live = self.lives[writer]
        head = next(reversed(self.model), None)
        name, parent = f"c{next(self.serial):03}", live.config
        is_own_head = live.is_own and live.last == head
        # What it has come from may be gone meanwhile.
        is_whole = head is not None and self.model[head].parent in {*self.model, None}
        if step.is_again and is_own_head and is_whole and head is not None:
            name, parent = head, live.parent
        changed = self.edit(live, step.edits)
        self.put(saver, step, name, parent, live, changed)
        for channel in LISTS:
            live.lengths[channel].append(len(live.values.get(channel, ())))
        live.config, live.parent, live.is_own = after(parent, name), parent, True

    def edit(self, live: Live, edits: tuple[Edit, Edit]) -> dict[str, list[Any]]:
        """Change the lists, and return for each changed one what was added to it."""
        changed: dict[str, list[Any]] = {}
        for channel, each in zip(LISTS, edits, strict=True):
            if each.kind == "keep":
                continue
            changed[channel] = []
            if each.kind == "gone":
                live.values.pop(channel, None)
                continue
            items = live.values.get(channel, [])
            added = [self.element(channel) for _ in range(max(1, each.amount))]
            lengths = live.lengths[channel]
            live.values[channel] = self.edited(items, each, added, lengths)
            if each.kind.startswith("append"):
                changed[channel] = added
        live.versions |= dict.fromkeys(changed, f"v{next(self.serial):03}")
        return changed

    def edited(  # noqa: C901, PLR0912 -- one case for each kind of edit
        self, items: list[Any], edit: Edit, added: list[Any], lengths: list[int]
    ) -> list[Any]:
        """Return the list as it is afterwards."""
        place = edit.place % len(items) if items else 0
        match edit.kind:
            case "append":
                return [*items, *added]
            case "append in place":
                items.extend(added)
                return items
            case "back":
                return items[: lengths[edit.place % len(lengths)]]
            case "cut":
                return items[: len(items) - edit.amount % (len(items) + 1)]
            case "edit" if items:
                if not self.verifies:
                    first = max(0, min(lengths[-1], len(items)) - TAIL)
                    place = first + edit.place % (len(items) - first)
                if isinstance(items[place], dict):
                    items[place]["edited"] = next(self.serial)
                else:
                    items[place] = added[0]
                return items
            case "replace" if items:
                return [*items[:place], added[0], *items[place + 1 :]]
            case "insert":
                return [*items[:place], *added, *items[place:]]
            case "reverse":
                return items[::-1]
            case "new":
                return added
            case "copy":
                return copy.deepcopy(items)
        return items

    def element(self, channel: str) -> Any:
        """Make an element; most are too large to stand in the row of each checkpoint."""
        number = next(self.serial)
        if channel != LISTS[0]:
            return f"text {number} " * 15
        kinds: tuple[Any, ...] = (
            {"number": number, "text": "text " * 20},
            f"text {number} " * 15,
            number,
            (number, ["nested"]),
            b"bytes" * number,
            {"number": number},
            -0.0 if number % 2 else 0,
        )
        return kinds[number % len(kinds)]

    def put(
        self,
        saver: AnySaver,
        step: Step,
        name: str,
        parent: RunnableConfig,
        live: Live,
        changed: dict[str, list[Any]],
    ) -> None:
        """Put it, with the writes before it, in the same commit, or late."""
        versions = {channel: live.versions[channel] for channel in changed}
        made = checkpoint(name, dict(live.versions), **live.values)
        run = self.run(next(self.serial))
        parent_id = parent["configurable"].get("checkpoint_id")
        task = f"task {next(self.serial):04}"
        batch = [*changed.items(), ("z", task)]
        is_written = step.writes != "none" and parent_id in self.model

        async def superstep() -> None:
            if is_written and step.writes == "before":
                await saver.aput_writes(parent, batch, task)
            together = []
            if is_written and step.writes == "together":
                together.append(saver.aput_writes(parent, batch, task))
            metadata: Any = {"step": 1, "run_id": run}
            await asyncio.gather(*together, saver.aput(parent, made, metadata, versions))
            if is_written and step.writes == "after":
                await saver.aput_writes(parent, batch, task)

        written = [(task, channel, dumped(value)) for channel, value in batch]
        asyncio.run(superstep())
        if is_written:
            self.model[str(parent_id)].writes += written
        before = self.model.get(name)
        values = {channel: dumped(value) for channel, value in live.values.items()}
        self.model[name] = Stored(parent_id, run, values, before.writes if before else [])

    def check_head(self, saver: AnySaver) -> None:
        """Look at the newest checkpoint."""
        found = saver.get_tuple(at(thread=self.thread))
        name = next(reversed(self.model), None)
        assert (found and found.checkpoint["id"]) == name
        if found is not None and name is not None:
            self.check_one(found, self.model[name])

    def check(self) -> None:
        """Look at everything, through every saver."""
        with self.fresh() as opened:
            for saver in (*self.savers, opened):
                for thread, model in self.threads.items():
                    listed = list(saver.list(at(thread=thread)))
                    assert ids(listed) == list(model)[::-1]
                    for found in listed:
                        self.check_one(found, model[found.checkpoint["id"]])
                    for name, stored in model.items():
                        self.check_one(load(saver, name, thread=thread), stored)

    @staticmethod
    def check_one(found: Any, stored: Stored) -> None:
        """Compare a checkpoint with what it must have."""
        values = found.checkpoint["channel_values"]
        assert {channel: dumped(value) for channel, value in values.items()} == stored.values
        parent = found.parent_config and found.parent_config["configurable"]["checkpoint_id"]
        assert parent == stored.parent
        writes = [(task, channel, dumped(value)) for task, channel, value in found.pending_writes]
        assert writes == sorted(stored.writes, key=lambda write: write[0])


class HistoriesSuite(Suite):
    """Random histories, byte by byte."""

    examples = 15
    """How many histories each test plays."""

    @pytest.mark.parametrize("verifies", [False, True])
    def test_random_history_keeps_every_value_and_write(
        self,
        saver: AnySaver,
        verifies: bool,  # noqa: FBT001 -- pytest names it
    ) -> None:
        numbers = count()

        def fresh() -> AbstractContextManager[AnySaver]:
            return self.open_another(verify_deltas=verifies)

        with fresh() as one, fresh() as two:

            @settings(max_examples=self.examples, deadline=None)
            @given(plans)
            def play(plan: list[Turn | Verb]) -> None:
                thread = f"history {next(numbers)}"
                history = History((one, two), fresh, thread, verifies=verifies)
                history.play(plan)
                history.check()

            play()
        saver.delete_thread("history 0")
