"""Steps, each of which is a checkpoint: what they are on record, and where a killed run goes on."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langgraph.checkpoint.base import CheckpointTuple

from agentflow.checkpoint import Save, open_checkpointer
from agentflow.errors import StoreUnavailableError
from tests.acceptance.victims import ABREAST, FAN, NODES, WALK, branches, done, on, steps
from tests.fault.forkserver import ForkServer, Victim
from tests.fault.scene import connected
from tests.integration.graphs import State, chain, logs

BEFORE_THE_FIRST = 2
"""Checkpoints before the first node: of the input, and of what LangGraph makes of it."""
LOCK = {
    "sqlite": "INSERT INTO agentflow_threads SELECT * FROM agentflow_threads WHERE FALSE",
    "postgresql": "LOCK TABLE agentflow_threads IN EXCLUSIVE MODE",
}
"""What lets nobody else write, until it is rolled back."""
AT_ONCE = 4


class Walk:
    """Kills processes that take six steps, each on its own thread, and looks at what is left."""

    def __init__(self, url: str, folder: Path, forkserver: ForkServer) -> None:
        """Have them write to one database."""
        self.url = url
        self._folder = folder
        self._forkserver = forkserver

    def kill(self, places: dict[str, dict[str, Any]]) -> list[str]:
        """Kill one process at each place, and return the threads of those that died there."""
        codes: dict[str, int] = {}
        threads = list(places)
        for few in (threads[i : i + AT_ONCE] for i in range(0, len(threads), AT_ONCE)):
            victims = {thread: self._spawn(thread, places[thread]) for thread in few}
            codes |= {thread: victim.wait() for thread, victim in victims.items()}
        assert set(codes.values()) <= {0, -signal.SIGKILL}, codes
        return [thread for thread, code in codes.items() if code]

    def begun(self, thread: str) -> list[str]:
        """Return the nodes that were begun on a thread."""
        return done(self._trace(thread))

    def stored(self, thread: str) -> list[CheckpointTuple]:
        """Return what is on a thread, the oldest first."""
        with open_checkpointer(self.url) as saver:
            found = list(saver.list(on(thread)))
        parents = [each.parent_config for each in found]
        named = [each["configurable"]["checkpoint_id"] if each else None for each in parents]
        line = [*(each.checkpoint["id"] for each in found[1:]), None]
        assert named == line[: len(found)]
        return found[::-1]

    def go_on(self, thread: str, save: Save = "every_step") -> list[str]:
        """Take the steps that are left, as another process; return the nodes that were begun."""
        before = len(self.begun(thread))
        with open_checkpointer(self.url, save=save) as saver:
            graph = steps(saver, self._trace(thread))
            is_begun = saver.get_tuple(on(thread)) is not None
            output = graph.invoke(None if is_begun else {"log": []}, on(thread))
        assert output["log"] == list(NODES)
        return self.begun(thread)[before:]

    def _spawn(self, thread: str, options: dict[str, Any]) -> Victim:
        return self._forkserver.spawn(WALK, self.url, self._trace(thread), thread, options)

    def _trace(self, thread: str) -> str:
        return str(self._folder / f"{thread}.txt")


@pytest.fixture
def walk(database_url: str, tmp_path: Path, forkserver: ForkServer) -> Walk:
    """Steps on each kind of database."""
    return Walk(database_url, tmp_path, forkserver)


def test_every_step_is_a_checkpoint_and_a_run_killed_behind_it_goes_on_with_the_next(
    walk: Walk,
) -> None:
    places: dict[str, dict[str, Any]] = {
        f"behind-{step}": {"die_in": name} for step, name in enumerate(NODES)
    }
    places[f"behind-{len(NODES)}"] = {"dies_behind": True}
    assert walk.kill(places) == list(places)
    for step, thread in enumerate(places):
        found = walk.stored(thread)
        assert [each.metadata["step"] for each in found] == list(range(-1, step + 1))
        assert [each.checkpoint["channel_values"].get("log", []) for each in found[1:]] == [
            list(NODES[:taken]) for taken in range(step + 1)
        ]
        assert walk.go_on(thread) == list(NODES[step:])
    assert len(walk.stored("behind-0")) == len(NODES) + BEFORE_THE_FIRST


def test_cursor_counts_the_committed_steps_wherever_a_process_was_killed(walk: Walk) -> None:
    """Before its first commit, and after each, when nobody has been told of it yet."""
    died = walk.kill({"before-1": {"at": ["database.before_commit", 1]}})
    # How many there are is a matter of time: what comes together is committed together.
    for first in itertools.count(1, AT_ONCE):
        few = {
            f"after-{number}": {"at": ["database.after_commit", number]}
            for number in range(first, first + AT_ONCE)
        }
        died += (killed := walk.kill(few))
        if len(killed) < AT_ONCE:
            break
    cursors = set()
    for thread in died:
        found = walk.stored(thread)
        cursor = found[-1].metadata["step"] if found else -BEFORE_THE_FIRST
        assert cursor == len(found) - BEFORE_THE_FIRST, thread
        taken = NODES[: max(0, cursor)]
        assert "".join(walk.begun(thread)).startswith(taken), "none before it was taken"
        # What has written and has no checkpoint yet is not begun again either.
        assert walk.go_on(thread) in [list(NODES[len(taken) :]), list(NODES[len(taken) + 1 :])]
        cursors.add(cursor)
    # Steps that were committed together have no place between them; one apart is killed above.
    assert -BEFORE_THE_FIRST in cursors
    assert len(cursors) > len(NODES) // 2


def test_run_that_is_saved_at_marked_steps_repeats_what_came_after_them(
    walk: Walk,
) -> None:
    marked = "c"
    options: dict[str, Any] = {"save": [marked]}
    places = {f"in-{name}": {**options, "die_in": name} for name in NODES}
    places["behind"] = {**options, "dies_behind": True}
    assert walk.kill(places) == list(places)
    # Before the marked step begins, behind it, and at the end.
    expected = {"ab": ([], "abcdef"), "c": ([2], "cdef"), "def": ([2, 3], "def")}
    for names, (at, tail) in expected.items():
        for name in names:
            assert [each.metadata["step"] for each in walk.stored(f"in-{name}")] == at
            assert walk.go_on(f"in-{name}", [marked]) == list(tail)
    assert [each.metadata["step"] for each in walk.stored("behind")] == [2, 3, 6]
    assert walk.go_on("behind", [marked]) == []


def test_of_branches_those_that_were_done_before_a_crash_are_not_run_again(
    database_url: str, tmp_path: Path, forkserver: ForkServer
) -> None:
    trace = str(tmp_path / "trace.txt")
    victim = forkserver.spawn(FAN, database_url, trace)
    assert victim.wait() == -signal.SIGKILL, victim.output()
    before = done(trace)
    assert sorted(before) == sorted(ABREAST)
    with open_checkpointer(database_url) as saver:
        output = branches(saver, trace).invoke(None, on("t"))
    assert output["log"] == [*ABREAST, "then"]
    assert done(trace)[len(before) :] == ["slow", "then"]


def test_save_that_takes_too_long_ends_the_step_and_the_next_one_is_not_begun(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "0.5")
    trace = tmp_path / "trace.txt"

    def locks(_: State) -> State:
        if not repaired:
            rival.execute(sa.text(LOCK[rival.dialect.name]))
        return {"log": ["b"]}

    def traced(state: State) -> State:
        trace.touch()
        return {"log": [*state["log"], "c"]}

    repaired: list[bool] = []
    graph = chain(("a", logs("a")), ("b", locks), ("c", traced))
    with open_checkpointer(database_url) as saver, connected(database_url) as rival:
        compiled = graph.compile(checkpointer=saver)
        with pytest.raises(StoreUnavailableError):
            compiled.invoke({"log": []}, on("t"), durability="sync")
        assert not trace.exists()
        rival.rollback()
        repaired.append(True)
        assert compiled.invoke(None, on("t"))["log"] == ["a", "b", "a", "b", "c"]
