"""What a thread asks, and which answers it is owed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.types import RESUME
from langgraph.types import Interrupt, StateSnapshot

from agentflow.interrupts import encode, proposal_hash, to_request
from agentflow.types import Approval, NewWait, WaitStatus, new_id

Key = tuple[str, str, str]
"""Namespace, interrupt id and checkpoint id: what makes it this question and no other."""

Waits = Mapping[Key, Approval]


@dataclass(frozen=True, slots=True)
class Question:
    """An interrupt that a parked thread waits on."""

    ns: str
    task_id: str
    checkpoint_id: str
    interrupt: Interrupt
    answers_recorded: int

    @property
    def key(self) -> Key:
        """What makes it this question and no other."""
        return (self.ns, self.interrupt.id, self.checkpoint_id)

    def to_wait(self) -> NewWait:
        """Return what the run waits for."""
        request = to_request(self.interrupt.value, self.interrupt.response_schema)
        return NewWait(
            wait_id=new_id(),
            kind="approval",
            ns=self.ns,
            task_id=self.task_id,
            interrupt_id=self.interrupt.id,
            checkpoint_id=self.checkpoint_id,
            answers_recorded=self.answers_recorded,
            request=request,
            proposal_hash=proposal_hash(request),
        )


@dataclass(frozen=True, slots=True)
class Owed:
    """What the graph is to be given."""

    send: Mapping[str, Any]
    """Answers by interrupt id."""
    answered: frozenset[Key]
    """The questions that somebody answered, also those whose answer the thread has already."""
    has_work: bool
    """Whether there is work without any answer.

    There is if some task of the superstep neither finished nor asks, or if an answer is recorded in
    the thread already: sending that again would answer the next question.
    """


async def open_questions(
    saver: BaseCheckpointSaver[Any], state: StateSnapshot, waits: Waits
) -> list[Question]:
    """Read the open questions of a thread, each in the namespace that asked it."""
    found = []
    spaces: dict[str, set[str]] = {}
    for known_ns, interrupt_id, _ in waits:
        spaces.setdefault(interrupt_id, set()).add(known_ns)
    for snapshot, task_id, interrupt in _interrupts(state):
        configurable = snapshot.config["configurable"]
        ns = configurable.get("checkpoint_ns", "")
        if spaces.get(interrupt.id, {ns}) != {ns}:
            # What a subgraph asked stays listed by its parent after it was answered, until the
            # subgraph has ended. It was asked there, and is not open here.
            continue
        stored = await saver.aget_tuple(snapshot.config)
        recorded = 0
        for writer, channel, value in (stored.pending_writes or ()) if stored else ():
            if writer == task_id and channel == RESUME:
                recorded = len(value) if isinstance(value, (list, tuple)) else 1
        found.append(
            Question(
                ns=ns,
                task_id=task_id,
                checkpoint_id=configurable["checkpoint_id"],
                interrupt=interrupt,
                answers_recorded=recorded,
            )
        )
    return found


def owed(state: StateSnapshot, questions: Sequence[Question], waits: Waits) -> Owed:
    """Work out what a thread that asks is owed."""
    send: dict[str, Any] = {}
    answered = set()
    has_work = _has_open_task(state, {question.task_id for question in questions})
    for question in questions:
        wait = waits.get(question.key)
        if wait is None or wait.status is not WaitStatus.RESOLVED or wait.decision is None:
            continue
        answered.add(question.key)
        if question.answers_recorded > wait.answers_recorded:
            has_work = True
            continue
        send[question.interrupt.id] = encode(
            wait.request, wait.decision, by=wait.decided_by, at=wait.decided_at
        )
    return Owed(send, frozenset(answered), has_work)


def _interrupts(state: StateSnapshot) -> Iterator[tuple[StateSnapshot, str, Interrupt]]:
    """Yield each open interrupt with the snapshot and the task that raised it.

    A question of a subgraph is listed by its parent too; it belongs to where it was asked.
    """
    for task in state.tasks:
        if isinstance(task.state, StateSnapshot) and task.state.interrupts:
            yield from _interrupts(task.state)
        elif task.result is None:
            for interrupt in task.interrupts:
                yield state, task.id, interrupt


def _has_open_task(state: StateSnapshot, asking: Collection[str]) -> bool:
    """Whether a task of the superstep neither finished nor is one of those that ask."""
    return any(
        _has_open_task(task.state, asking)
        if isinstance(task.state, StateSnapshot) and task.state.interrupts
        else task.result is None and task.id not in asking
        for task in state.tasks
    )
