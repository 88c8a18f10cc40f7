"""How an attempt is stopped, and what the code inside of it can ask.

An attempt is told to stop by others: by the thread that keeps its lease, by its worker, by somebody
who cancels the run. `AttemptControl` is where they say so. It is also what the calls of agentflow's
that are made inside a node find as the current attempt, in whichever thread the node runs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from uuid import UUID

from langgraph.runtime import RunControl

from agentflow.errors import LeaseLostError
from agentflow.types import Lease, StopReason

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def monotonic() -> float:
    """Return seconds on a clock that no one can set, and that goes on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


class AsksPerson(BaseException):
    """Stops the attempt, since a person has to be asked something.

    It is no interrupt of LangGraph's, which matches answers by their position in a node.
    """


@dataclass(frozen=True, slots=True)
class NodeCall:
    """A call of a node whose time is limited."""

    node: str
    limit: float
    """Seconds that it may take."""
    deadline: float


class AttemptControl:
    """How others stop an attempt, once each; safe to use from any thread."""

    def __init__(self) -> None:
        """Start with nothing asked, and without a lease."""
        self.run_control = RunControl()
        self.is_lost = False
        """The lease is gone, as far as is known here."""
        self.is_cancelled = False
        """Somebody cancelled the run."""
        self.is_past_deadline = False
        """The run should have ended by now."""
        self.is_paused = False
        """Somebody paused the run."""
        self.is_settling = False
        """The outcome is being written. If the lease does not hold, the store refuses it."""
        self.is_isolated = False
        """The run is suspected of killing its workers, and has not made progress yet."""
        self.is_given_up = False
        """Whoever drives the run is going away."""
        self.overdue: NodeCall | None = None
        """The call that has taken longer than it may."""
        self.lease: Lease | None = None
        """What the attempt works under."""
        self._valid_until = float("inf")
        self._is_over = False
        self._shields = 0
        self._watched: dict[UUID, NodeCall] = {}
        self._changed: Callable[[], None] = _do_nothing
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    # What stops the attempt.

    def drain(self) -> None:
        """Stop before the next superstep, with the state saved."""
        self.run_control.request_drain("drain")

    def stop(self, reason: StopReason) -> None:
        """Stop as somebody has asked for; at once or, for a pause, before the next superstep.

        A shielded section is waited for.
        """
        if reason == "pause":
            self.is_paused = True
            self.run_control.request_drain(reason)
            return
        with self._lock:
            if self.is_cancelled or self.is_past_deadline:
                return  # a node that cleans up after itself is not interrupted again
            self.is_cancelled = reason == "cancel"
            self.is_past_deadline = reason == "deadline"
            is_shielded = self._shields > 0
        # A node that does not let itself be cancelled is the last one.
        self.run_control.request_drain(reason)
        if not is_shielded:
            self._interrupt()

    def lose(self) -> None:
        """Stop at once: the lease is gone and nothing may be written any more."""
        with self._lock:
            if self.is_lost:
                return
            self.is_lost = True
        self.run_control.request_drain("lost")
        self._interrupt()

    def give_up(self) -> None:
        """Stop at once, and let somebody else go on: this process is going away."""
        self.is_given_up = True
        self.run_control.request_drain("drain")
        self._interrupt()

    def _time_out(self, call: NodeCall) -> None:
        with self._lock:
            if self.overdue is not None:
                return
            self.overdue = call
        self.run_control.request_drain("timeout")
        self._interrupt()

    def attach(self, task: asyncio.Task[None]) -> None:
        """Say which task does the work."""
        with self._lock:
            self._loop, self._task = task.get_loop(), task
            is_stopped = self._is_stopped()
        if is_stopped:
            task.cancel()

    def _is_stopped(self) -> bool:
        return (
            self.is_lost
            or self.is_cancelled
            or self.is_past_deadline
            or self.is_given_up
            or self.overdue is not None
        )

    def _interrupt(self) -> None:
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            # A loop that was closed has nothing left to cancel.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)

    # The lease, as this machine knows it.

    def hold(self, lease: Lease, *, until: float) -> None:
        """Work under a lease that holds until then by `monotonic`, if nobody extends it.

        The same lease under another token is not shorter for that.
        """
        self._valid_until = until if self.lease is None else max(until, self._valid_until)
        self.lease = lease

    def extend(self, until: float) -> None:
        """Note that the lease was extended."""
        self._valid_until = max(self._valid_until, until)

    def end(self) -> None:
        """Note that the attempt is over: whatever is still running inside of it is in vain."""
        self._is_over = True

    @property
    def is_over(self) -> bool:
        """Whether nothing that is still done here can count.

        The clock is read each time: a process that was stopped and continues has not heard from
        anybody that it is late.
        """
        return self._is_over or self.is_lost or monotonic() >= self._valid_until

    def check(self) -> None:
        """Raise unless what is done here counts.

        Raises:
            LeaseLostError: The attempt has ended, or its lease has, or is about to.
        """
        if self.is_over and self.lease is not None:
            raise LeaseLostError(self.lease.run_id, self.lease.token)

    # Calls of nodes whose time is limited.

    def on_change(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever `next_look` may have come nearer."""
        self._changed = changed

    def watch(self, call_id: UUID, node: str, limit: float) -> None:
        """Stop the attempt if a call of a node takes longer than `limit` seconds."""
        with self._lock:
            self._watched[call_id] = NodeCall(node, limit, monotonic() + limit)
        self._changed()

    def unwatch(self, call_id: UUID) -> None:
        """Note that a call has ended."""
        with self._lock:
            self._watched.pop(call_id, None)

    @property
    def next_look(self) -> float:
        """When to `look` next."""
        with self._lock:
            return min([self._valid_until, *(call.deadline for call in self._watched.values())])

    def look(self) -> None:
        """Stop the attempt if its time is up; called by another thread than the attempt's."""
        now = monotonic()
        if now >= self._valid_until:
            self.lose()
            return
        with self._lock:
            late = [call for call in self._watched.values() if now >= call.deadline]
            for call_id in [i for i, call in self._watched.items() if call in late]:
                del self._watched[call_id]
        if late:
            self._time_out(late[0])

    # Sections that a cancellation waits for.

    def enter_shield(self) -> None:
        """Put off cancellations that come from now on."""
        with self._lock:
            self._shields += 1

    def leave_shield(self) -> bool:
        """Let cancellations through again, and say whether one was put off."""
        with self._lock:
            self._shields -= 1
            is_due = self._shields == 0 and (self.is_cancelled or self.is_past_deadline)
        if is_due:
            self._interrupt()
        return is_due


_current: ContextVar[AttemptControl | None] = ContextVar("agentflow_attempt", default=None)


@contextmanager
def entered(control: AttemptControl) -> Iterator[None]:
    """Make an attempt the current one, for everything that is called from here."""
    token = _current.set(control)
    try:
        yield
    finally:
        _current.reset(token)


def current_attempt() -> AttemptControl | None:
    """Return the attempt that the caller runs in; `None` outside of one."""
    return _current.get()


def check_attempt() -> None:
    """Raise if the caller runs in an attempt that has lost its lease or has ended.

    Raises:
        LeaseLostError: What the caller is about to do would be in vain.
    """
    if (control := _current.get()) is not None:
        control.check()


class shield:  # noqa: N801 -- used like a function, as `contextlib.suppress` is
    """Let a cancellation wait until a section of a node is through.

    Use it with `async with` in an async node and with `with` in any other. A run that is cancelled
    or reaches its deadline meanwhile stops when the section is left; so do the nodes beside it. It
    does not hold up the loss of the lease, a node's timeout, or the end of the process. Outside of
    a run it does nothing.

    Example:
        ```python
        async def transfer(state):
            async with shield():
                receipt = await bank.transfer(state["amount"])
                await ledger.book(receipt)
            return {"receipt": receipt}
        ```

    Raises:
        LeaseLostError: The attempt is over already; the section is not begun.
    """

    def __init__(self) -> None:
        """Prepare a section."""
        self._control: AttemptControl | None = None

    def __enter__(self) -> Self:
        """Begin the section."""
        self._control = current_attempt()
        if self._control is not None:
            self._control.check()
            self._control.enter_shield()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the section."""
        if self._control is not None:
            self._control.leave_shield()

    async def __aenter__(self) -> Self:
        """Begin the section."""
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the section; if the run was cancelled meanwhile, this is where it stops."""
        is_cancelled = self._control is not None and self._control.leave_shield()
        if is_cancelled and exc is None:
            # The cancellation is on its way through LangGraph's tasks, and ends this wait.
            await asyncio.get_running_loop().create_future()


def _do_nothing() -> None:
    pass
