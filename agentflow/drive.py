"""One attempt of a run: from its claim to where it parks, ends or is given up.

The order is fixed. The thread's token is raised in the checkpointer before anything is read; the
beginning of the attempt is noted before the first step; all checkpoints are flushed before the run
store hears of an outcome. What an attempt is owed is worked out from what is durable alone: the
input is sent only if no checkpoint carries the run's id, an answer only to a question that is still
open, and nothing at all is driven that has ended.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.types import RESUME
from langgraph.errors import (
    EmptyInputError,
    GraphDrained,
    GraphRecursionError,
    InvalidUpdateError,
)
from langgraph.pregel import Pregel
from langgraph.runtime import RunControl
from langgraph.types import Command, Interrupt, StateSnapshot
from opentelemetry.trace import Span

from agentflow import upstream
from agentflow.checkpoint import Retention, Saver
from agentflow.errors import (
    AttemptsExhaustedError,
    FencedError,
    RunError,
    StoreUnavailableError,
)
from agentflow.interrupts import encode, proposal_hash, to_request
from agentflow.lease import LeaseKeeper
from agentflow.retry import Retry, RetryPolicy, decide
from agentflow.storage import RunStore
from agentflow.telemetry import (
    CHECKPOINT_ID,
    RUN_STATUS,
    STEP,
    NodeSpans,
    fail_span,
    segment_span,
    traceparent,
)
from agentflow.types import (
    Approval,
    AttemptStart,
    ClaimedRun,
    Lease,
    NewWait,
    Run,
    RunFailure,
    WaitStatus,
    new_id,
)

logger = logging.getLogger(__name__)

_STRICT_RESUME = "__pregel_strict_resume"
_PAGE = 200
# LangGraph's own errors that the same call would only raise again.
_HOPELESS = (GraphRecursionError, InvalidUpdateError, EmptyInputError)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredGraph:
    """A graph under a name and version, with what its runs need."""

    graph: Pregel[Any, Any, Any, Any]
    name: str
    version: str
    queue: str
    retry: RetryPolicy
    context: Callable[[Run], Any] | None
    input_schema: Any
    retention: Retention | None = None
    """How long the threads of its runs are kept, if not as all others."""

    async def make_context(self, run: Run) -> Any:
        """Rebuild what cannot be stored, for one attempt."""
        if self.context is None:
            return None
        made = self.context(run)
        return await made if inspect.isawaitable(made) else made


@dataclass(slots=True)
class AttemptControl:
    """How others stop an attempt; safe to use from any thread."""

    run_control: RunControl = field(default_factory=RunControl)
    is_lost: bool = False
    is_cancelled: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _task: asyncio.Task[None] | None = None

    def drain(self) -> None:
        """Stop before the next superstep, with the state saved."""
        self.run_control.request_drain("drain")

    def lose(self) -> None:
        """Stop at once: the lease is gone and nothing may be written any more."""
        self.is_lost = True
        self._interrupt()

    def cancel(self) -> None:
        """Stop at once: somebody cancelled the run."""
        self.is_cancelled = True
        # A node that does not let itself be cancelled is the last one.
        self.run_control.request_drain("cancel")
        self._interrupt()

    def attach(self, task: asyncio.Task[None]) -> None:
        """Say which task does the work."""
        self._loop, self._task = task.get_loop(), task
        if self.is_lost or self.is_cancelled:
            task.cancel()

    def _interrupt(self) -> None:
        if self._loop is not None and self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)


@dataclass(frozen=True, slots=True)
class _Question:
    """An interrupt that a parked thread waits on."""

    ns: str
    task_id: str
    checkpoint_id: str
    interrupt: Interrupt
    answers_recorded: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it this question and no other."""
        return (self.ns, self.interrupt.id, self.checkpoint_id)


@dataclass(frozen=True, slots=True)
class _Failed:
    """What an attempt left behind when it failed."""

    node: str | None
    attempt: int
    failures: Mapping[str, int]
    checkpoint_id: str | None
    step: int | None


class Driver:
    """Drives attempts against one run store and one checkpointer."""

    def __init__(
        self, store: RunStore, saver: BaseCheckpointSaver[Any], keeper: LeaseKeeper
    ) -> None:
        """Use `store` for runs, `saver` for their checkpoints, and let `keeper` keep the leases."""
        upstream.mend()
        self._store = store
        self._saver = saver
        self._keeper = keeper

    async def attempt(
        self, registered: RegisteredGraph, claimed: ClaimedRun, control: AttemptControl
    ) -> None:
        """Drive a claimed run until it parks, ends, or has to be given up.

        Whatever happens is in the run store afterwards, unless the lease was lost or the store
        cannot be reached: then another attempt will continue from what is durable.

        Raises:
            asyncio.CancelledError: The caller was cancelled; the run was released first.
        """
        with segment_span(claimed) as span:
            try:
                lease = await self._acquire(claimed.lease)
                self._keeper.hold(lease, on_lost=control.lose, on_cancel=control.cancel)
                try:
                    held = replace(claimed, lease=lease)
                    await _Attempt(self._store, self._saver, registered, held, control).run(span)
                finally:
                    self._keeper.drop(lease)
            except FencedError as exc:
                fail_span(span, type(exc).__name__)
                logger.warning("attempt was fenced", extra={"run_id": claimed.run.id})
            except StoreUnavailableError as exc:
                fail_span(span, type(exc).__name__)
                logger.warning("store unavailable", extra={"run_id": claimed.run.id})

    async def cancel(self, claimed: ClaimedRun) -> None:
        """End a claimed run as cancelled, without driving it."""
        lease = await self._acquire(claimed.lease)
        if isinstance(self._saver, Saver):
            await self._saver.release(lease)
        await self._store.finish_cancel(lease)

    async def _acquire(self, lease: Lease) -> Lease:
        """Raise the token in the checkpointer; from then on no earlier attempt can write."""
        if not isinstance(self._saver, Saver):
            return lease
        while (token := await self._saver.acquire(lease)) > lease.token:
            # The checkpointer has seen more claims than the run store, which was restored or moved.
            lease = await self._store.raise_token(lease, above=token)
        return lease


class _Attempt:
    """The state of one attempt."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        registered: RegisteredGraph,
        claimed: ClaimedRun,
        control: AttemptControl,
    ) -> None:
        self._store = store
        self._saver = saver
        self._registered = registered
        self._run = claimed.run
        self._lease = claimed.lease
        self._reason = claimed.reason
        self._control = control
        self._graph = registered.graph
        self._started: AttemptStart | None = None
        self._begun_at: str | None = None
        self._is_released = False
        self._answered: set[tuple[str, str, str]] = set()
        """The questions whose answers the graph has been given."""

    async def run(self, span: Span) -> None:
        """Work, and settle the outcome."""
        config: RunnableConfig = {"callbacks": [NodeSpans(self._run.id, span)]}
        self._graph = self._registered.graph.copy(
            update={
                "checkpointer": self._own_saver(),
                # Breakpoints are for debugging by hand; a run that stopped at one waits for nobody.
                "interrupt_before_nodes": [],
                "interrupt_after_nodes": [],
            }
        )
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(self._work(span, config))
                self._control.attach(task)
            if self._control.is_cancelled and task.cancelled():
                await self._flush_quietly()
                await self._release_thread()
                await self._store.finish_cancel(self._lease)
                span.set_attribute(RUN_STATUS, "cancelled")
        except ExceptionGroup as raised:
            await self._settle_failure(raised.exceptions[0], span)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back())
            raise
        finally:
            await self._release_thread()

    def _own_saver(self) -> BaseCheckpointSaver[Any]:
        return (
            self._saver.with_lease(self._lease) if isinstance(self._saver, Saver) else self._saver
        )

    async def _release_thread(self) -> None:
        """Give the thread back, before the outcome is told.

        Whoever hears that the run has ended or parked can write the thread at once. If this process
        dies in between, the run is recovered and takes the thread again.
        """
        if isinstance(self._saver, Saver) and not self._control.is_lost and not self._is_released:
            self._is_released = True
            await asyncio.shield(self._saver.release(self._lease))

    async def _give_back(self) -> None:
        """Queue the run again, because whoever drives it is going away.

        The attempt counts, since the run itself may be the reason: a node that calls `sys.exit`
        takes its worker with it.
        """
        await self._flush_quietly()
        await self._release_thread()
        await self._store.release_run(self._lease, reason="drain", counts=True)

    async def _flush(self) -> None:
        if isinstance(self._saver, Saver):
            await self._saver.with_lease(self._lease).flush(self._run.thread_id)

    async def _flush_quietly(self) -> None:
        try:
            await self._flush()
        except FencedError:
            raise
        except Exception:  # noqa: BLE001 -- the outcome that is being settled is the news
            logger.warning("unsaved writes were dropped", extra={"run_id": self._run.id})

    async def _work(self, span: Span, config: RunnableConfig) -> None:
        config = self._config(config)
        before = await self._state(config)
        questions = await self._questions(before)
        started = await self._start(before, questions)
        self._started = started
        _show(span, before)
        if self._run.cancel_requested_at is not None:
            # Requested while its last worker was dying.
            await self._release_thread()
            await self._store.finish_cancel(self._lease)
            span.set_attribute(RUN_STATUS, "cancelled")
            return
        if started.attempt > self._registered.retry.max_attempts:
            raise AttemptsExhaustedError(self._run.id, started.attempt - 1)
        is_begun = await self._is_begun(before)
        # Not `next`, which leaves out tasks whose writes are durable but not applied yet.
        if is_begun and not before.tasks:
            await self._finish(before, span)
            return
        graph_input: Any = None if is_begun else self._run.input
        if is_begun and questions:
            answers, has_work = await self._answers(before, questions)
            if not answers and not has_work:
                await self._park(before, questions, span)
                return
            graph_input = Command(resume=answers) if answers else None
        try:
            await self._drive(graph_input, config)
        except GraphDrained:
            await self._flush()
            await self._release_thread()
            await self._store.release_run(self._lease, reason="drain", counts=False)
            span.set_attribute(RUN_STATUS, "queued")
            return
        await self._flush()
        after = await self._state(config)
        _show(span, after)
        questions = await self._questions(after)
        if any(question.key in self._answered for question in questions):
            raise RunError("the graph asks again what was answered; it did not take the answer")
        if questions:
            await self._park(after, questions, span)
        elif after.next:
            raise RunError(f"graph stopped before {', '.join(after.next)} without an interrupt")
        else:
            await self._finish(after, span)

    async def _drive(self, graph_input: Any, config: RunnableConfig) -> None:
        stream = self._graph.astream(
            graph_input,
            config,
            context=await self._registered.make_context(self._run),
            stream_mode="values",
            durability="sync",
            control=self._control.run_control,
        )
        async for _ in stream:
            pass

    def _config(self, base: RunnableConfig) -> RunnableConfig:
        stored = self._run.config
        config: RunnableConfig = {
            **base,
            "configurable": {
                **stored.get("configurable", {}),
                "thread_id": self._run.thread_id,
                # The second line of defence behind the checks made here.
                _STRICT_RESUME: True,
            },
            "metadata": {**self._run.metadata, "run_id": self._run.id},
        }
        if "recursion_limit" in stored:
            config["recursion_limit"] = stored["recursion_limit"]
        if "tags" in stored:
            config["tags"] = list(stored["tags"])
        return config

    async def _state(self, config: RunnableConfig) -> StateSnapshot:
        return await self._graph.aget_state(config, subgraphs=True)

    async def _is_begun(self, state: StateSnapshot) -> bool:
        """Whether some checkpoint of the thread carries this run's id."""
        if (state.metadata or {}).get("run_id") == self._run.id:
            return True
        if not state.config["configurable"].get("checkpoint_id"):
            return False
        # The head may be somebody's `update_state`, or an earlier run's last checkpoint.
        of_thread: RunnableConfig = {"configurable": {"thread_id": self._run.thread_id}}
        own = self._own_saver().alist(of_thread, filter={"run_id": self._run.id}, limit=1)
        return [item async for item in own] != []

    async def _start(self, state: StateSnapshot, questions: list[_Question]) -> AttemptStart:
        self._begun_at = checkpoint_id = state.config["configurable"].get("checkpoint_id")
        finished = sum(1 for task in state.tasks if task.result is not None)
        answered = sum(question.answers_recorded for question in questions)
        return await self._store.start_attempt(
            self._lease,
            progress=f"{checkpoint_id}:{finished}:{answered}",
            reason=self._reason,
            checkpoint_id=checkpoint_id,
            step=(state.metadata or {}).get("step"),
            traceparent=traceparent(),
        )

    async def _questions(self, state: StateSnapshot) -> list[_Question]:
        """Read the open questions, each in the namespace that asked it."""
        found = []
        saver = self._own_saver()
        spaces: dict[str, set[str]] = {}
        for known_ns, interrupt_id, _ in await self._waits() if state.tasks else ():
            spaces.setdefault(interrupt_id, set()).add(known_ns)
        for snapshot, task_id, interrupt in _interrupts(state):
            ns = snapshot.config["configurable"].get("checkpoint_ns", "")
            if spaces.get(interrupt.id, {ns}) != {ns}:
                # What a subgraph asked stays listed by its parent after it was answered, until the
                # subgraph has ended. It was asked there, and is not open here.
                continue
            stored = await saver.aget_tuple(snapshot.config)
            recorded = 0
            for writer, channel, value in (stored.pending_writes or ()) if stored else ():
                if writer == task_id and channel == RESUME:
                    recorded = len(value) if isinstance(value, (list, tuple)) else 1
            configurable = snapshot.config["configurable"]
            found.append(
                _Question(
                    ns=ns,
                    task_id=task_id,
                    checkpoint_id=configurable["checkpoint_id"],
                    interrupt=interrupt,
                    answers_recorded=recorded,
                )
            )
        return found

    async def _answers(
        self, state: StateSnapshot, questions: list[_Question]
    ) -> tuple[dict[str, Any], bool]:
        """Return the answers to send, by interrupt id, and whether there is work without any.

        There is if some task of the superstep neither finished nor asks, or if an answer is
        recorded in the thread already: sending that again would answer the next question.
        """
        waits = await self._waits()
        send: dict[str, Any] = {}
        has_work = _has_open_task(state, {question.task_id for question in questions})
        for question in questions:
            wait = waits.get(question.key)
            if wait is None or wait.status is not WaitStatus.RESOLVED or wait.decision is None:
                continue
            self._answered.add(question.key)
            if question.answers_recorded > wait.answers_recorded:
                has_work = True
                continue
            send[question.interrupt.id] = encode(
                wait.request, wait.decision, by=wait.decided_by, at=wait.decided_at
            )
        return send, has_work

    async def _waits(self) -> dict[tuple[str, str, str], Approval]:
        waits: dict[tuple[str, str, str], Approval] = {}
        cursor: str | None = None
        while True:
            page = await self._store.list_waits(
                self._run.tenant,
                status=None,
                run_id=self._run.id,
                graph=None,
                limit=_PAGE,
                cursor=cursor,
            )
            for wait in page.items:
                waits[wait.ns, wait.interrupt_id, wait.checkpoint_id] = wait
            if (cursor := page.cursor) is None:
                return waits

    async def _park(self, state: StateSnapshot, questions: list[_Question], span: Span) -> None:
        waits = []
        for question in questions:
            request = to_request(question.interrupt.value, question.interrupt.response_schema)
            waits.append(
                NewWait(
                    wait_id=new_id(),
                    kind="approval",
                    ns=question.ns,
                    task_id=question.task_id,
                    interrupt_id=question.interrupt.id,
                    checkpoint_id=question.checkpoint_id,
                    answers_recorded=question.answers_recorded,
                    request=request,
                    proposal_hash=proposal_hash(request),
                )
            )
        await self._release_thread()
        await self._store.park_run(
            self._lease,
            waits,
            checkpoint_id=state.config["configurable"].get("checkpoint_id"),
            step=(state.metadata or {}).get("step"),
        )
        span.set_attribute(RUN_STATUS, "waiting")

    async def _finish(self, state: StateSnapshot, span: Span) -> None:
        await self._release_thread()
        await self._store.finish_run(
            self._lease,
            _output(self._graph, state.values),
            checkpoint_id=state.config["configurable"].get("checkpoint_id"),
            step=(state.metadata or {}).get("step"),
        )
        span.set_attribute(RUN_STATUS, "succeeded")

    async def _settle_failure(self, error: Exception, span: Span) -> None:
        """Queue the run again, or end it with a dead letter."""
        if isinstance(error, (FencedError, StoreUnavailableError)):
            raise error
        fail_span(span, type(error).__name__)
        await self._flush_quietly()
        failed = await self._failed()
        failure = _failure(error, failed.node, failed.attempt)
        await self._release_thread()
        policy = self._registered.retry
        verdict = None if isinstance(error, _HOPELESS) else decide(policy, failed.attempt, error)
        if isinstance(verdict, Retry):
            await self._store.retry_run(
                self._lease,
                failure,
                delay=verdict.delay,
                failures=failed.failures,
                checkpoint_id=failed.checkpoint_id,
                step=failed.step,
            )
            span.set_attribute(RUN_STATUS, "queued")
        else:
            reason = verdict.reason if verdict else "not_retryable"
            if isinstance(error, AttemptsExhaustedError):
                reason = "exhausted"
            await self._store.fail_run(
                self._lease,
                failure,
                reason=reason,
                checkpoint_id=failed.checkpoint_id,
                step=failed.step,
            )
            span.set_attribute(RUN_STATUS, "failed")

    async def _failed(self) -> _Failed:
        """Read what failed, and count: since the last progress, and for each task."""
        started = self._started or AttemptStart(attempt=self._run.attempt, failures={})
        try:
            state = await self._state(self._config({}))
        except FencedError:
            raise
        except Exception:  # noqa: BLE001 -- the failure that is being settled is the news
            run = self._run
            return _Failed(None, started.attempt, started.failures, self._begun_at, run.step)
        checkpoint_id = state.config["configurable"].get("checkpoint_id")
        has_moved = checkpoint_id != self._begun_at
        before = {} if has_moved else started.failures
        tasks = [task for task in state.tasks if task.error is not None]
        counts = {task.id: before.get(task.id, 0) + 1 for task in tasks}
        return _Failed(
            node=tasks[0].name if tasks else None,
            attempt=max([1 if has_moved else started.attempt, *counts.values()]),
            failures={**before, **counts},
            checkpoint_id=checkpoint_id,
            step=(state.metadata or {}).get("step"),
        )


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


def _output(graph: Pregel[Any, Any, Any, Any], values: Any) -> Any:
    """Return what `invoke` would: the output channels of the final state."""
    channels = graph.output_channels
    if isinstance(graph.stream_channels_asis, str):
        return values  # one channel: the state is its value
    if isinstance(channels, str):
        return values.get(channels)
    if not isinstance(values, Mapping):
        return values
    return {channel: values[channel] for channel in channels if channel in values}


def _failure(error: Exception, node: str | None, attempt: int) -> RunFailure:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 -- user code
        message = "<no text: its str raises>"
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 -- user code
        trace = None
    cls = type(error)
    return RunFailure(
        type=f"{cls.__module__}.{cls.__qualname__}",
        message=message,
        node=node,
        attempt=attempt,
        traceback=trace,
    )


def _show(span: Span, state: StateSnapshot) -> None:
    checkpoint_id = state.config["configurable"].get("checkpoint_id")
    if checkpoint_id:
        span.set_attribute(CHECKPOINT_ID, checkpoint_id)
    step = (state.metadata or {}).get("step")
    if step is not None:
        span.set_attribute(STEP, step)
