"""Processes that use a bare checkpointer, to be killed, forked, or set against each other.

They tell a pipe what a call has acknowledged, at once after it has returned. What a thread holds
after so many steps is a function of its name, so a test knows every value that it must find.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import multiprocessing
import operator
import os
import select
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, Self, TypedDict

import psutil
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.graph import END, START, StateGraph

from agentflow.checkpoint import Saver, open_checkpointer
from tests.fault.forkserver import Victim

WRITERS = "tests.fault.savers:write_main"
STAYING_WRITERS = "tests.fault.savers:write_and_stay_main"
GRAPHS = "tests.fault.savers:graph_main"
FORKING_WRITER = "tests.fault.savers:fork_main"
TASKS = ("left", "right")
"""Each checkpoint gets the writes of two tasks."""

Fact = dict[str, Any]
Report = Callable[..., None]


class Reports:
    """The tests' side of the pipe."""

    def __init__(self, path: Path) -> None:
        """Make the pipe at a path that does not exist yet."""
        self.path = str(path)
        self.facts: list[Fact] = []
        """What was reported so far, in order."""
        os.mkfifo(path)
        # For writing too: it then never ends, whoever comes and goes.
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._pipe)

    def wait_for(self, count: int, victim: Victim, timeout: float = 60.0) -> None:
        """Wait until the victim has reported so many facts; fail if it ends before."""
        deadline = time.monotonic() + timeout
        with _ending(victim) as ended:
            while len(self.facts) < count:
                left = max(0, deadline - time.monotonic())
                ready, *_ = select.select([self._pipe, ended], [], [], left)
                if self._pipe in ready:
                    self.take()
                else:
                    what = "it ended" if ready else f"{timeout} s"
                    raise TimeoutError(f"{len(self.facts)} facts after {what}: {victim.output()}")

    def wait_for_end(self, victim: Victim, timeout: float = 60.0) -> list[Fact]:
        """Return what the victim reports until it ends well, but for its beginning."""
        deadline = time.monotonic() + timeout
        with _ending(victim) as ended:
            ready: list[int] = []
            while ended not in ready:
                left = max(0, deadline - time.monotonic())
                ready, *_ = select.select([self._pipe, ended], [], [], left)
                if not ready:
                    raise TimeoutError(f"{victim} still runs: {victim.output()}")
                self.take()
        if victim.wait() != 0:
            raise AssertionError(victim.output())
        return self.facts[1:]

    def take(self) -> list[Fact]:
        """Read what is in the pipe, and return everything that was reported so far."""
        while select.select([self._pipe], [], [], 0)[0]:
            *lines, self._rest = (self._rest + os.read(self._pipe, 65536)).split(b"\n")
            self.facts.extend(json.loads(line) for line in lines)
        return self.facts


@contextmanager
def _ending(victim: Victim) -> Iterator[int]:
    """What becomes readable once the victim has ended."""
    pidfd = os.pidfd_open(victim.pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def reporter(path: str) -> Report:
    """Return what reports a fact through the pipe."""
    pipe = os.open(path, os.O_WRONLY)

    def report(**fact: Any) -> None:
        # One write that is short enough is never torn, and stays in the pipe after a kill.
        os.write(pipe, json.dumps(fact).encode() + b"\n")

    return report


def at(thread: str) -> RunnableConfig:
    """Name a thread."""
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def digest(value: Any) -> str:
    """Return a short text that is another one for another value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def values_at(thread: str, step: int) -> dict[str, Any]:
    """Return the channels of a thread after a step: one grows, one changes, one never does."""
    log = [f"{thread}:{number}:".ljust(120, ".") for number in range(step + 1)]
    return {"log": log, "step": {"number": step}, "fixed": thread * 100}


def writes_at(thread: str, step: int, task: str) -> list[tuple[str, Any]]:
    """Return what a task writes that follows a step."""
    return [("log", f"{thread}:{task}:{step}"), ("step", {"number": step, "task": task})]


class Line:
    """A thread as one writer sees it, step by step."""

    def __init__(self, saver: Saver, thread: str, found: CheckpointTuple | None) -> None:
        """Go on from what was loaded, or begin."""
        self.thread = thread
        self.config = found.config if found else at(thread)
        self.step: int = (found.metadata.get("step") or 0) if found else -1
        written = {task for task, *_ in (found.pending_writes or [])} if found else set()
        self.missing = [task for task in TASKS if task not in written] if found else []
        """The tasks of the last step whose writes are not there yet."""
        self._saver = saver
        self._versions: dict[str, Any] = dict(found.checkpoint["channel_versions"]) if found else {}

    def next(self) -> tuple[RunnableConfig, Checkpoint, Any, Any]:
        """Return the arguments of the put of the next step."""
        self.step += 1
        changed = ("log", "step", "fixed") if self.step == 0 else ("log", "step")
        new: dict[str, Any] = {
            name: self._saver.get_next_version(self._versions.get(name), None) for name in changed
        }
        self._versions |= new
        made: Checkpoint = {
            **empty_checkpoint(),
            "id": str(uuid6()),
            "channel_values": values_at(self.thread, self.step),
            "channel_versions": dict(self._versions),
        }
        return self.config, made, {"source": "loop", "step": self.step}, new

    def saved(self, report: Report, config: RunnableConfig) -> None:
        """Take what a put has returned, and tell it."""
        self.config, self.missing = config, list(TASKS)
        checkpoint_id = config["configurable"]["checkpoint_id"]
        value = digest(values_at(self.thread, self.step))
        report(put=checkpoint_id, thread=self.thread, step=self.step, digest=value)


def write(saver: Saver, thread: str, steps: int, report: Report) -> None:
    """Continue a thread by so many steps, one call after the other."""
    line = Line(saver, thread, saver.get_tuple(at(thread)))
    for _ in range(steps):
        for task in line.missing:
            writes = writes_at(thread, line.step, task)
            saver.put_writes(line.config, writes, task)
            _tell_writes(report, line.config, task, writes)
        line.saved(report, saver.put(*line.next()))


async def awrite(saver: Saver, thread: str, steps: int, report: Report) -> None:
    """Continue a thread by so many steps; a step's writes and the next step are under way at once.

    They are accepted in order, so a step is never there without the writes before it.
    """
    line = Line(saver, thread, await saver.aget_tuple(at(thread)))
    for _ in range(steps):
        async with asyncio.TaskGroup() as group:
            for task in line.missing:
                writes = writes_at(thread, line.step, task)
                accepted = saver.aput_writes(line.config, writes, task)
                told = partial(_tell_writes, report, line.config, task, writes)
                group.create_task(_told(accepted, told))
            put = saver.aput(*line.next())
            group.create_task(_told(put, partial(line.saved, report)))


async def _told(call: Coroutine[Any, Any, Any], tell: Callable[[Any], None]) -> None:
    tell(await call)


def _tell_writes(
    report: Report, config: RunnableConfig, task: str, writes: Any, _result: None = None
) -> None:
    checkpoint_id = config["configurable"]["checkpoint_id"]
    thread = config["configurable"]["thread_id"]
    report(writes=checkpoint_id, thread=thread, task=task, digest=digest(writes))


def write_and_stay_main(url: str, pipe: str, threads: list[str], steps: int) -> None:
    """Do as `write_main` does, and then wait to be killed."""
    write_main(url, pipe, threads, steps)
    signal.pause()


def write_main(url: str, pipe: str, threads: list[str], steps: int) -> None:
    """Write all threads at once, half of them through each interface."""
    report = reporter(pipe)
    half = len(threads) // 2
    with open_checkpointer(url) as saver, ThreadPoolExecutor(half) as pool:
        report(began=True)
        writing = [pool.submit(write, saver, thread, steps, report) for thread in threads[:half]]
        asyncio.run(awrite_all(saver, threads[half:], steps, report))
        for each in writing:
            each.result()


async def awrite_all(saver: Saver, threads: list[str], steps: int, report: Report) -> None:
    """Continue several threads at once; see `awrite`."""
    async with asyncio.TaskGroup() as group:
        for thread in threads:
            group.create_task(awrite(saver, thread, steps, report))


def fork_main(url: str, pipe: str, how: str) -> None:
    """Fork while a checkpointer is open: both processes go on with it, the child for longer."""
    report = reporter(pipe)
    report(began=True)
    saver = open_checkpointer(url)
    write(saver, "before", 3, report)
    asyncio.run(awrite(saver, "before", 3, report))
    inherited = _connections()
    parent_has_closed, close = os.pipe()

    def go_on() -> None:
        os.close(close)
        gc.collect()  # whatever the child forgets, it must not end in its parent's name
        write(saver, "child", 5, report)
        report(child=sorted(_connections() - inherited))
        os.read(parent_has_closed, 1)
        write(saver, "child", 5, report)
        assert len(list(saver.list(at("parent")))) == 5
        saver.close()
        gc.collect()

    if how == "fork":
        pid = os.fork()
        if pid == 0:
            go_on()
            return  # into the fork server's code, which ends the process
    else:
        child = multiprocessing.get_context("fork").Process(target=go_on)
        child.start()
    os.close(parent_has_closed)
    write(saver, "parent", 5, report)
    report(parent=sorted(_connections()), inherited=sorted(inherited))
    saver.close()
    os.close(close)
    if how == "fork":
        assert os.waitpid(pid, 0)[1] == 0
    else:
        child.join()
        assert child.exitcode == 0


def _connections() -> set[int]:
    """Return this process's ends of its connections."""
    return {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.raddr}


@dataclass
class Acknowledged:
    """What was acknowledged of one thread, to whichever process."""

    step: int = -1
    """The last one."""
    puts: dict[str, str] = field(default_factory=dict)
    """Digests by checkpoint."""
    writes: dict[tuple[str, str], str] = field(default_factory=dict)
    """Digests by checkpoint and task."""


class Books(defaultdict[str, Acknowledged]):
    """What was acknowledged, by thread."""

    def __init__(self) -> None:
        super().__init__(Acknowledged)

    def add(self, **fact: Any) -> None:
        """Take a report."""
        thread = self[fact["thread"]]
        if "put" in fact:
            thread.step = fact["step"]
            thread.puts[fact["put"]] = fact["digest"]
        else:
            thread.writes[fact["writes"], fact["task"]] = fact["digest"]

    def add_all(self, facts: Iterable[Fact]) -> None:
        """Take several reports."""
        for fact in facts:
            self.add(**fact)


def assert_kept(saver: Saver, thread: str, acknowledged: Acknowledged) -> bool:
    """Hold a thread against what was acknowledged; whether it is further than that.

    Its checkpoints form one line, each is readable and holds what a thread holds after that step,
    and between two of them are the writes that led from one to the other.
    """
    line = list(saver.list(at(thread)))[::-1]
    ids = [each.checkpoint["id"] for each in line]
    parents = [
        each.parent_config and each.parent_config["configurable"]["checkpoint_id"] for each in line
    ]
    assert parents == [None, *ids][: len(line)], f"{thread} branches"
    assert [each.metadata["step"] for each in line] == list(range(len(line)))
    assert len(line) - 1 in {acknowledged.step, acknowledged.step + 1}, thread
    puts, writes = {}, {}
    for step, each in enumerate(line):
        values = each.checkpoint["channel_values"]
        assert values == values_at(thread, step)
        puts[ids[step]] = digest(values)
        written = _pending_writes(each)
        assert written.keys() == set(TASKS) or step == len(line) - 1, f"{thread} {step}"
        for task, found in written.items():
            assert found == writes_at(thread, step, task)
            writes[ids[step], task] = digest(found)
    assert acknowledged.puts.items() <= puts.items(), thread
    assert acknowledged.writes.items() <= writes.items(), thread
    head = saver.get_tuple(at(thread))
    assert (head.checkpoint["id"] if head else None) == (ids[-1] if ids else None)
    return len(line) - 1 > acknowledged.step


def _pending_writes(found: CheckpointTuple) -> dict[str, list[tuple[str, Any]]]:
    """Return the writes of a checkpoint by task."""
    by_task: dict[str, list[tuple[str, Any]]] = {}
    for task, channel, value in found.pending_writes or []:
        by_task.setdefault(task, []).append((channel, value))
    return by_task


class Rounds(TypedDict):
    """What the nodes of each round made of it, in order."""

    wanted: int
    log: Annotated[NotRequired[list[str]], operator.add]


def rounds(report: Report) -> StateGraph[Rounds, None, Any, Any]:
    """Return a graph of `wanted` rounds: two nodes in one superstep, and one after them."""

    def node(name: str) -> Any:
        def run(state: Rounds, config: RunnableConfig) -> dict[str, Any]:
            step = config["metadata"]["langgraph_step"]
            report(enter=name, thread=config["configurable"]["thread_id"], step=step)
            made = f"{name} {step} after {len(state.get('log', []))}".ljust(100, ".")
            report(leave=name, thread=config["configurable"]["thread_id"], step=step)
            return {"log": [made]}

        return run

    graph: StateGraph[Rounds, None, Any, Any] = StateGraph(Rounds)
    for name in ("left", "right", "join"):
        graph.add_node(name, node(name))
    graph.add_edge(START, "left")
    graph.add_edge(START, "right")
    graph.add_edge(["left", "right"], "join")
    graph.add_conditional_edges("join", _go_on, ["left", "right", END])
    return graph


def _go_on(state: Rounds) -> list[str]:
    return [END] if len(state["log"]) >= 3 * state["wanted"] else ["left", "right"]


async def graph_main(url: str, pipe: str, threads: list[str], wanted: int) -> None:
    """Run the graph on all threads at once; then wait for the end."""
    report = reporter(pipe)
    async with open_checkpointer(url) as saver:
        graph = rounds(report).compile(checkpointer=saver)
        report(began=True)
        async with asyncio.TaskGroup() as group:
            for thread in threads:
                call = graph.ainvoke({"wanted": wanted}, at(thread), durability="sync")
                group.create_task(call)
        signal.pause()
