"""What happens in an attempt.

The order is fixed. The thread's token is raised in the checkpointer before anything is read; the
beginning of the attempt is noted, and durable, before the first step; all checkpoints are flushed
before the run store hears of an outcome. What an attempt is owed is worked out from what is durable
alone: the input is sent only if no checkpoint carries the run's id, an answer only to a question
that is still open, and nothing at all is driven that has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import START
from langgraph.errors import GraphDrained, NodeTimeoutError
from langgraph.pregel import Pregel
from langgraph.types import Command, StateSnapshot
from opentelemetry.trace import Span

from agentflow import upstream
from agentflow.budgets import Meter, OverBudget, metering
from agentflow.checkpoint import Saver
from agentflow.control import AttemptControl
from agentflow.drive import allowances, doubts, failures
from agentflow.drive.compatibility import (
    Compatibility,
    is_begun,
    marks_of,
    store_fingerprint,
)
from agentflow.drive.failures import Failed
from agentflow.drive.forks import copy_migrated, find_start
from agentflow.drive.gate import Gate
from agentflow.drive.graph import RegisteredGraph
from agentflow.drive.questions import Key, Question, Waits, open_questions, owed
from agentflow.drive.settlement import INCOMPATIBLE, Settlement
from agentflow.effects import (
    SHIFT,
    InDoubt,
    Journal,
    compensate,
    count_undone,
    recording,
    shift_of,
)
from agentflow.errors import (
    AttemptsExhaustedError,
    DeadlineExceededError,
    FencedError,
    IncompatibleGraphError,
    KeyUnavailableError,
    LeaseLostError,
    RunError,
    StoreUnavailableError,
    UnknownVersionError,
)
from agentflow.interrupts import Asked
from agentflow.retry import RetryPolicies, RetryPolicy
from agentflow.storage import RunStore
from agentflow.telemetry import (
    CHECKPOINT_ID,
    STEP,
    NodeSpans,
    fail_span,
    is_traced,
    traceparent,
)
from agentflow.types import (
    FROM_START,
    Approval,
    AttemptStart,
    ClaimedRun,
    NewWait,
    progress_of,
)

logger = logging.getLogger(__name__)

_STRICT_RESUME = "__pregel_strict_resume"
_PAGE = 200
_KEY_DELAY = timedelta(minutes=1)
"""How long a run is left alone whose key could not be had."""
_LOSSES = 10
"""How many times as often as it may fail a run may be lost with workers that others have killed."""


class Attempt:
    """One attempt, under a lease that holds in the run store and in the checkpointer."""

    def __init__(
        self,
        store: RunStore,
        saver: BaseCheckpointSaver[Any],
        registered: RegisteredGraph,
        claimed: ClaimedRun,
        control: AttemptControl,
        stored: asyncio.Event | None = None,
    ) -> None:
        """Drive `claimed` as far as `control` lets it go.

        Its claim is durable when `stored` is set, if that is given.
        """
        self._store = store
        self._registered = registered
        self._run = claimed.run
        self._lease = claimed.lease
        self._claimed = claimed
        self._policies = registered.policies.as_stored(claimed.run.retry)
        if claimed.run.saga_cause is not None:
            # The attempts of the graph are used up; those to undo it are others.
            self._policies = RetryPolicies(graph=RetryPolicy())
        self._control = control
        self._stored = stored
        self._saver = (
            saver.with_lease(
                claimed.lease,
                check=control.check,
                taken=claimed.thread,
                # Nodes that the input itself triggers run beside its checkpoint.
                is_input_followed=START in registered.graph.nodes,
            )
            if isinstance(saver, Saver)
            else saver
        )
        # Not by its own `copy`, which checks again what was checked when it was registered.
        self._graph = copy(registered.graph)
        self._graph.checkpointer = self._saver
        # Breakpoints are for debugging by hand; a run that stopped at one waits for nobody.
        self._graph.interrupt_before_nodes = self._graph.interrupt_after_nodes = []
        self._settlement = Settlement(store, self._saver, registered, claimed, control)
        self._journal = Journal(
            store,
            self._settlement.flush,
            claimed.lease,
            control,
            root=claimed.run.root_id or claimed.run.id,
            is_fresh=claimed.run.root_id is None and claimed.run.claims <= 1,
            codec=store.codec,
        )
        budgets = registered.budgets
        self._meter = Meter(store, claimed.run, budgets) if budgets else None
        self._gate = Gate(control, registered.time_limits(), self._journal.places)
        self._shift = claimed.run.effect_shift
        self._compatibility = Compatibility(store, saver, registered, claimed.run.tenant)
        self.refused: IncompatibleGraphError | UnknownVersionError | None = None
        """Why the graph that is registered is not one that the run can go on with."""
        self._graph_changed: Mapping[str, Any] | None = None
        self._started: AttemptStart | None = None
        self._begun_at: str | None = None
        self._asked = Asked(store.codec.redact)
        self._answered: frozenset[Key] = frozenset()
        """The questions whose answers the graph has been given."""

    async def run(self, span: Span) -> None:
        """Work, and settle the outcome."""
        try:
            with (
                recording(self._journal),
                metering(self._meter),
                upstream.answers_checked(self._asked.check),
            ):
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(self._work(span))
                    self._control.attach(task)
            if task.cancelled():
                await self._settle_stop(span)
        except ExceptionGroup as raised:
            await self._settle_failure(raised.exceptions[0], span)
        except asyncio.CancelledError:
            has_begun = self._stored is None or self._stored.is_set()
            await asyncio.shield(self._settlement.give_back(counts=has_begun))
            raise
        finally:
            await self._settlement.release_thread()

    # The work.

    async def _work(self, span: Span) -> None:
        config = self._config(span)
        try:
            before = await self._beginning(config)
            waits = await self._waits(before)
            self._asked.learn(waits.values())
            await self._begin_metering(waits)
            questions = await open_questions(self._saver, before, waits)
            self._started = started = await self._start(before, questions)
        except Exception:
            await self._until_stored()
            raise
        await self._until_stored()
        self._control.is_isolated = started.is_isolated
        _show(span, before)
        if started.stop is not None:
            # Asked for while its last worker was dying.
            self._control.stop(started.stop)
            await self._settle_stop(span)
            return
        self._check_attempts(started, before)
        if self._run.saga_cause is not None:
            await self._undo(before, self._run.saga_cause, span)
            return
        has_begun = await self._is_begun(before)
        # Not `next`, which leaves out tasks whose writes are durable but not applied yet.
        if has_begun and not before.tasks:
            await self._finish(before, span)
            return
        graph_input: Any = None if has_begun else self._run.input
        if has_begun and questions:
            due = owed(before, questions, waits)
            self._answered = due.answered
            if not due.send and not due.has_work:
                await self._park(before, questions, span)
                return
            graph_input = Command(resume=due.send) if due.send else None
        try:
            await self._drive(graph_input, config)
        except GraphDrained:
            await self._settlement.flush()
            await self._settle_stop(span)
            return
        except (InDoubt, OverBudget):
            pass  # the journal has all of them, or the meter
        await self._settlement.flush()
        await self._conclude(await self._state(config), span)

    async def _until_stored(self) -> None:
        """Wait until the beginning of the attempt is durable, if it is stored with its claim.

        So far it has only read. If it is not stored, the control interrupts this.
        """
        if self._stored is not None:
            await self._stored.wait()

    async def _beginning(self, config: RunnableConfig) -> StateSnapshot:
        """Bring the thread to where the run is to go on, and read it."""
        await self._roll_back()
        if self._run.saga_cause is None:
            state, self._graph_changed = await self._compatibility.fitting_state(
                self._run, partial(self._state, config)
            )
        else:
            state = await self._state(config)  # the graph is not driven any more
        if await self._prepare(config):
            state = await self._state(config)
        moved = self._journal.places.follow(state.metadata or {})
        self._shift = self._shift if moved is None else moved
        if self._shift:
            # What follows is known by the steps that it has in common with what was forked.
            config["metadata"][SHIFT] = self._journal.places.shift = self._shift
        return state

    def _check_attempts(self, started: AttemptStart, before: StateSnapshot) -> None:
        most = self._policies.most_attempts(before.next)
        if started.attempt > most or started.losses > most * _LOSSES:
            raise AttemptsExhaustedError(self._run.id, max(started.attempt - 1, started.losses))

    async def _undo(self, before: StateSnapshot, cause: Mapping[str, Any], span: Span) -> None:
        """Undo the run's effects, and then end it as it was to end before that."""
        try:
            await compensate(self._journal, self._store, self._run)
        except InDoubt:
            await self._park(before, [], span)
            return
        await self._settlement.end_undone(cause, span)

    async def _begin_metering(self, waits: Waits) -> None:
        if self._meter is not None:
            await self._meter.begin(waits.values())

    async def _conclude(self, after: StateSnapshot, span: Span) -> None:
        """Park or finish a run whose graph has nothing more to do."""
        _show(span, after)
        questions = await open_questions(self._saver, after, await self._waits(after))
        progress = _progress(after, questions)
        if self._stops():
            # A node that has its answer, and an effect in doubt after that, still shows the
            # question.
            questions = [each for each in questions if each.key not in self._answered]
        if any(question.key in self._answered for question in questions):
            raise RunError("the graph asks again what was answered; it did not take the answer")
        if questions or self._stops():
            await self._park(after, questions, span, progress)
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
        try:
            async for _ in stream:
                if self._control.is_isolated and self._gate.has_progressed:
                    await self._store.end_isolation(self._settlement.held())
                    self._control.is_isolated = False
        finally:
            await self._journal.settle()

    async def _roll_back(self) -> None:
        """Delete the checkpoints of runs of the thread that were rolled back."""
        if gone := self._claimed.rolled_back:
            await self._saver.adelete_for_runs(list(gone))
            await self._store.finish_rollback(self._settlement.held(), gone)

    async def _prepare(self, config: RunnableConfig) -> bool:
        """Bring the thread to where the run is to go on; say whether it did not stand there."""
        checkpoint_id = self._run.resume_from
        if checkpoint_id == FROM_START:
            checkpoint_id = await find_start(self._saver, self._run)
        if checkpoint_id is not None:
            place = {**config["configurable"], "checkpoint_id": checkpoint_id, "checkpoint_ns": ""}
            found = await self._saver.aget_tuple({"configurable": place})
            self._shift = 1 + shift_of(found, self._run)
            # The state of that checkpoint becomes the head, and its tasks are due again.
            if found is None or not await copy_migrated(self._saver, found):
                await self._graph.aupdate_state(
                    {**config, "configurable": place}, None, as_node="__copy__"
                )
            await self._settlement.flush()
            return True
        return False

    def _config(self, span: Span) -> RunnableConfig:
        stored = self._run.config
        callbacks: list[BaseCallbackHandler] = [self._gate]
        if is_traced():
            callbacks.append(NodeSpans(self._run.id, span))
        config: RunnableConfig = {
            "callbacks": callbacks,
            "configurable": {
                **stored.get("configurable", {}),
                "thread_id": self._run.thread_id,
                # The second line of defence behind the checks made here.
                _STRICT_RESUME: True,
            },
            "metadata": {
                **self._run.metadata,
                **marks_of(self._registered),
                "run_id": self._run.id,
            },
        }
        if "recursion_limit" in stored:
            config["recursion_limit"] = stored["recursion_limit"]
        if "tags" in stored:
            config["tags"] = list(stored["tags"])
        return config

    # What is durable.

    async def _state(self, config: RunnableConfig) -> StateSnapshot:
        return await self._graph.aget_state(config, subgraphs=True)

    async def _is_begun(self, state: StateSnapshot) -> bool:
        """Whether some checkpoint of the thread carries this run's id, or it began as a fork."""
        if self._run.forked_from is not None:
            return True
        if (state.metadata or {}).get("run_id") == self._run.id:
            return True
        if not state.config["configurable"].get("checkpoint_id"):
            return False
        return await is_begun(self._saver, self._run)

    async def _start(self, state: StateSnapshot, questions: list[Question]) -> AttemptStart:
        self._begun_at = checkpoint_id = state.config["configurable"].get("checkpoint_id")
        if self._claimed.started is not None:
            return self._claimed.started
        progress = _progress(state, questions)
        if self._run.saga_cause is not None:
            progress += f":{await count_undone(self._store, self._run)}"
        await store_fingerprint(self._store, self._run.tenant, self._registered)
        return await self._store.start_attempt(
            self._settlement.held(),
            progress=progress,
            reason=self._claimed.reason,
            checkpoint_id=checkpoint_id,
            step=(state.metadata or {}).get("step"),
            traceparent=traceparent(),
            effect_shift=self._shift,
            fingerprint=self._registered.fingerprint.digest,
            graph_changed=self._graph_changed,
        )

    async def _waits(self, state: StateSnapshot) -> Waits:
        """Read what the run has asked so far, if its thread has work left."""
        if self._claimed.waits is not None and self._started is None:
            found = self._claimed.waits
            return {(each.ns, each.interrupt_id, each.checkpoint_id): each for each in found}
        waits: dict[Key, Approval] = {}
        cursor: str | None = None
        while state.tasks:
            page = await self._store.list_waits(
                self._run.tenant,
                status=None,
                run_id=self._run.id,
                graph=None,
                limit=_PAGE,
                cursor=cursor,
            )
            for wait in page.whole():
                waits[wait.ns, wait.interrupt_id, wait.checkpoint_id] = wait
            if (cursor := page.cursor) is None:
                break
        return waits

    # The outcome.

    async def _park(
        self,
        state: StateSnapshot,
        questions: list[Question],
        span: Span,
        progress: str | None = None,
    ) -> None:
        waits = [question.to_wait() for question in questions]
        about = self._journal.doubts.values()
        tenant = self._run.tenant
        workers = await doubts.look_for_workers(self._store, tenant, about) if about else {}
        await self._settlement.park(state, [*waits, *self._stops(workers)], span, progress)

    def _stops(self, workers: Mapping[str, doubts.Worker] = MappingProxyType({})) -> list[NewWait]:
        """Return what stopped the attempt in the middle of a node, and waits for somebody."""
        found, is_undoing = self._journal.doubts.values(), self._run.saga_cause is not None
        waits = [
            doubts.to_wait(each, self._lease, workers, is_undoing=is_undoing) for each in found
        ]
        if self._meter is not None:
            waits += [allowances.to_wait(each) for each in self._meter.asks.values()]
        return waits

    async def _finish(self, state: StateSnapshot, span: Span) -> None:
        await self._settlement.finish(state, _output(self._graph, state.values), span)

    async def _settle_stop(self, span: Span) -> None:
        """Settle a run that was stopped by what its control says."""
        control = self._control
        if control.is_lost:
            raise LeaseLostError(self._lease.run_id, self._lease.token)
        if (call := control.overdue) is not None:
            error = NodeTimeoutError(call.node, call.limit, kind="run", run_timeout=call.limit)
            await self._settle_failure(error, span)
            return
        await self._settlement.flush_quietly()
        if control.is_cancelled:
            await self._settlement.cancel(span)
        elif control.is_past_deadline:
            deadline = self._run.deadline_at
            at = "" if deadline is None else deadline.isoformat()
            await self._settle_failure(DeadlineExceededError(self._run.id, at), span)
        else:
            await self._settlement.requeue("pause" if control.is_paused else "drain", span)

    async def _settle_failure(self, error: Exception, span: Span) -> None:
        """Queue the run again, or end it with a dead letter."""
        if isinstance(error, (FencedError, StoreUnavailableError)):
            raise error
        self._control.check()
        fail_span(span, type(error).__name__)
        await self._settlement.flush_quietly()
        if isinstance(error, KeyUnavailableError):
            facts = {"run_id": self._run.id, "key": error.key, "error": type(error).__name__}
            logger.warning("run is put back: its key cannot be had", extra=facts)
            await self._settlement.requeue("key", span, _KEY_DELAY)
            return
        failed = await self._failed(span)
        if isinstance(error, INCOMPATIBLE):
            self.refused = error
        await self._settlement.fail(error, failed, self._policies, span)

    async def _failed(self, span: Span) -> Failed:
        started = self._started or AttemptStart(attempt=self._run.attempt, failures={})
        try:
            state = await self._state(self._config(span))
        except FencedError:
            raise
        except Exception:  # noqa: BLE001 -- the failure that is being settled is the news
            run = self._run
            return Failed(None, started.attempt, started.failures, self._begun_at, run.step)
        return failures.count(
            state,
            begun_at=self._begun_at,
            attempt=started.attempt,
            failures=started.failures,
            timed_out=None if self._control.overdue is None else self._control.overdue.node,
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


def _progress(state: StateSnapshot, questions: Sequence[Question]) -> str:
    finished = sum(1 for task in state.tasks if task.result is not None)
    answered = sum(question.answers_recorded for question in questions)
    return progress_of(state.config["configurable"].get("checkpoint_id"), finished, answered)


def _show(span: Span, state: StateSnapshot) -> None:
    checkpoint_id = state.config["configurable"].get("checkpoint_id")
    if checkpoint_id:
        span.set_attribute(CHECKPOINT_ID, checkpoint_id)
    step = (state.metadata or {}).get("step")
    if step is not None:
        span.set_attribute(STEP, step)
