"""`Journal`: what one attempt does once.

The intent is durable before the call, with every checkpoint before it; the outcome before the call
returns. In between the call runs in a task of its own, so that a node that is cancelled leaves no
doubt about it. What stands in the journal already is returned without a call.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NoReturn

from langgraph.errors import GraphBubbleUp

from agentflow.codec import Codec
from agentflow.control import AsksPerson, AttemptControl
from agentflow.effects.callers import Aside, Caller, running_loop
from agentflow.effects.failures import describe, rebuild
from agentflow.effects.flights import Flight, LeftError
from agentflow.effects.places import Places
from agentflow.effects.policy import (
    EffectContext,
    Happened,
    InDoubt,
    Policy,
    context_of_call,
    is_worth_another,
    outcome_of,
    pause_after,
)
from agentflow.errors import (
    CodecError,
    EffectConflictError,
    EffectInDoubtError,
    FencedError,
    LeaseLostError,
    OutcomeUnknownError,
    RunError,
    StoreUnavailableError,
)
from agentflow.journal import (
    CALLABLE,
    CHECK,
    Begun,
    Effect,
    EffectStatus,
    NewEffect,
    Outcome,
    Resolution,
    differences,
)
from agentflow.storage import RunStore
from agentflow.types import Lease, new_id

_KNOWN = 1000
"""How many records of earlier attempts are read at once; others are looked up one by one."""
_MOST = 10_000
"""How many records an attempt remembers."""
_GRACE = 30.0
"""Seconds for which a node that is cancelled waits for a call without a timeout."""
_LOOK = 0.2
"""Seconds between two looks at a call that an attempt of another run is at."""


Call = Callable[[EffectContext], Awaitable[Any]]


class Journal:
    """The effects of one attempt; safe to use from any thread."""

    def __init__(
        self,
        store: RunStore,
        flush: Callable[[], Awaitable[None]],
        lease: Lease,
        control: AttemptControl,
        *,
        root: str,
        is_fresh: bool,
        codec: Codec,
    ) -> None:
        """Work for one attempt.

        Args:
            store: Where the records are.
            flush: Makes every checkpoint durable that the attempt has put so far.
            lease: What the attempt works under.
            control: Says whether the lease holds.
            root: The run that shares its keys.
            is_fresh: Whether nothing can be known yet of the run's effects.
            codec: Encodes what is kept in databases of the user's.
        """
        self.codec = codec
        self.tenant = lease.tenant
        self.places = Places()
        self.root = root
        self.doubts: dict[str, Effect] = {}
        """The effects about which a person is to be asked, by their ids."""
        self.loop = asyncio.get_running_loop()
        self._store = store
        self._flush = flush
        self._lease = lease
        self._control = control
        self._known: dict[tuple[str, str], Effect] | None = {} if is_fresh else None
        self._flights: dict[tuple[str, str], Flight] = {}
        self._lock = threading.Lock()
        self._is_settling = False
        self._aside: Aside | None = None

    # A call, from the loop of the one who makes it.

    async def run(self, new: NewEffect, policy: Policy, call: Call) -> Any:
        """Return the outcome of an effect: the recorded one, or that of a call.

        Raises:
            EffectConflictError: The key names another effect.
            EffectInDoubtError: It is in doubt, and was declared to fail then.
            InDoubt: It is in doubt, and a person is to be asked.
            LeaseLostError: The attempt is over; nothing was called.
        """
        if self._known is None and new.scope == self.root:
            # All that is on record at once, so that none of it takes a task or a look of its own.
            found = await self._recalled()
            if self._known is None:
                self._known = found
        if (recorded := self._recorded(new)) is not None:
            return outcome_of(recorded, policy)
        if not new.id:
            new = replace(new, id=new_id())
        identity = (new.scope, new.key)
        while True:
            flight, is_first = self._board(identity, new)
            if is_first:
                break
            try:
                return await asyncio.shield(asyncio.wrap_future(flight.ended))
            except LeftError:
                continue  # one of those who waited is the next
        task = asyncio.get_running_loop().create_task(self._fly(identity, flight, policy, call))
        task.add_done_callback(_forget)  # its node may be cancelled when it has ended already
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                await self._outlast(task, flight)
            raise

    def _board(self, identity: tuple[str, str], new: NewEffect) -> tuple[Flight, bool]:
        with self._lock:
            flight = self._flights.get(identity)
            if flight is None:
                limit = _GRACE if new.timeout is None else new.timeout.total_seconds()
                flight = Flight(new, asyncio.get_running_loop(), limit)
                flight.ended.set_running_or_notify_cancel()  # who waits cannot cancel it
                self._flights[identity] = flight
                return flight, True
        _check_same(flight.new.name, flight.new.arguments, new)
        return flight, False

    async def _fly(
        self, identity: tuple[str, str], flight: Flight, policy: Policy, call: Call
    ) -> Any:
        try:
            outcome = await self._perform(flight, policy, call)
        except BaseException as exc:
            self._land(identity)
            is_cancelled = isinstance(exc, asyncio.CancelledError)
            flight.ended.set_exception(self._left() if is_cancelled else exc)
            raise
        self._land(identity)
        flight.ended.set_result(outcome)
        return outcome

    def _left(self) -> Exception:
        """Return what others hear of a call whose caller was cancelled."""
        if self._is_settling or self._control.is_over:
            return LeaseLostError(self._lease.run_id, self._lease.token)
        return LeftError()

    def _land(self, identity: tuple[str, str]) -> None:
        with self._lock:
            del self._flights[identity]

    async def _outlast(self, task: asyncio.Task[Any], flight: Flight) -> None:
        """Wait for a call although its node was cancelled, so that its outcome is known."""
        flight.is_stopping = True
        if not self._control.is_over and not self._control.is_given_up:
            await asyncio.wait([task], timeout=flight.limit)
        if not task.done() and not self._control.is_over:
            task.cancel()
        task.add_done_callback(_forget)

    async def settle(self) -> None:
        """Wait for the calls that are under way, in whichever threads, as long as each may take."""
        self._is_settling = True
        with self._lock:
            flights = list(self._flights.values())
        if flights and not self._control.is_over and not self._control.is_given_up:
            for flight in flights:
                flight.is_stopping = True
            ends = [asyncio.wrap_future(flight.ended) for flight in flights]
            for end in ends:
                end.add_done_callback(_forget)
            await asyncio.wait(ends, timeout=max(flight.limit for flight in flights))

    # What is known, what is in doubt, and the call.

    async def _perform(self, flight: Flight, policy: Policy, call: Call) -> Any:
        self._control.check()
        begun = self._recall(flight.new)
        if begun is None:
            await self._flush()
            begun = await self._begin(flight.new)
        while not begun.is_due:
            effect = begun.effect
            if begun.is_held:
                await asyncio.sleep(_LOOK)
                self._control.check()
                begun = await self._begin(flight.new)
                continue
            if effect.status is EffectStatus.SUCCEEDED:
                return outcome_of(effect, policy)
            has_failed = effect.status is EffectStatus.FAILED
            if has_failed and not is_worth_another(effect, policy, self.codec):
                raise rebuild(effect, self.codec)
            if effect.status is EffectStatus.INTENDED:
                found = await self._clear_up(effect, policy)
                if found is not None:
                    return found.outcome
            await self._flush()
            flight.is_doubtful = effect.status is EffectStatus.INTENDED
            begun = await self._begin(flight.new, retake=effect.attempt)
        return await self._call(flight, begun.effect, policy, call)

    async def _call(self, flight: Flight, effect: Effect, policy: Policy, call: Call) -> Any:
        number = 0
        while True:
            number += 1
            if flight.is_stopping or self._control.is_over:
                await self._take_back(effect, number)
            if policy.admit is not None:
                await self._admit(flight, effect, policy.admit)
            try:
                outcome = await self._timed(call(context_of_call(effect, number)), effect, policy)
            except (FencedError, StoreUnavailableError):
                raise  # of a call inside this one: nothing more is known of it
            except (GraphBubbleUp, AsksPerson, EffectInDoubtError):
                # Somebody is to say something first, of a call inside this one perhaps: with the
                # answer it starts from its top, as a node does.
                await self._leave_uncalled(effect)
                raise
            except Exception as exc:  # noqa: BLE001 -- recorded, and raised again
                error = exc
            else:
                return await self._finish(effect, outcome)
            is_doubtful = effect.on_in_doubt != "retry" and policy.leaves_doubt(error)
            if is_doubtful and (found := await self._look_for(effect, policy, error)) is not None:
                return found.outcome
            pause = pause_after(policy, number, error)
            if pause is None:
                # What was in doubt has not happened, says its function.
                await (self._leave_uncalled(effect) if is_doubtful else self._fail(effect, error))
                raise error
            await asyncio.sleep(pause.total_seconds())

    async def _look_for(self, effect: Effect, policy: Policy, error: Exception) -> Happened | None:
        """Decide about a call that has raised and may have happened all the same."""
        try:
            # With a note of why, for whoever is asked; what is stored stays an intent.
            return await self._clear_up(replace(effect, failure=describe(error)), policy)
        except EffectInDoubtError as doubt:
            raise doubt from error

    async def _admit(
        self, flight: Flight, effect: Effect, admit: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await admit()
        except BaseException:
            # What an earlier attempt may have called stays an intent: this one knows no better.
            if not flight.is_doubtful:
                await self._leave_uncalled(effect)
            raise

    async def _leave_uncalled(self, effect: Effect) -> None:
        """Note that another attempt may make the call: nothing of it has happened."""
        await self._record(effect, Outcome(status=EffectStatus.NOT_CALLED))
        self._keep(replace(effect, status=EffectStatus.NOT_CALLED))

    async def _timed(self, calling: Awaitable[Any], effect: Effect, policy: Policy) -> Any:
        if effect.timeout is None or not policy.can_be_stopped:
            return await calling
        limit = asyncio.timeout(effect.timeout.total_seconds())
        try:
            async with limit:
                return await calling
        except TimeoutError:
            if not limit.expired():
                raise
            text = f"effect {effect.name!r} took longer than its timeout"
            # Whatever else leaves doubt: what was stopped may have happened.
            raise TimeoutError(text) from OutcomeUnknownError()

    async def _clear_up(self, effect: Effect, policy: Policy) -> Happened | None:
        """Decide about an effect in doubt: its outcome, or `None` if it is to be called."""
        if effect.on_in_doubt == "retry":
            return None
        if effect.on_in_doubt == "fail":
            raise EffectInDoubtError(effect.id, effect.name)
        if effect.on_in_doubt == "check" and policy.check is not None:
            found = await policy.check()
            self._control.check()
            if found is None:
                return None
            said = Resolution(happened=True, by=CHECK, outcome=found.outcome)
            self._keep(await self._store.resolve_effect(self._lease.tenant, effect.id, said))
            return found
        self.doubts[effect.id] = effect
        raise InDoubt(effect)

    async def _take_back(self, effect: Effect, number: int) -> NoReturn:
        """Leave an effect uncalled, and say so if nothing of it can have happened."""
        if number == 1:
            await self._store.finish_effect(
                self._lease, effect.id, Outcome(status=EffectStatus.NOT_CALLED)
            )
            self._keep(replace(effect, status=EffectStatus.NOT_CALLED))
        self._control.check()
        raise asyncio.CancelledError

    async def _finish(self, effect: Effect, value: Any) -> Any:
        outcome = Outcome(status=EffectStatus.SUCCEEDED, value=value)
        try:
            await self._record(effect, outcome)
        except CodecError as exc:
            # It has happened, so it is not to be called again, whatever the policy says.
            if effect.compensate is None or effect.on_in_doubt == "retry":
                await self._fail(effect, exc, is_final=True)
            # Else it may have to be undone: it is in doubt until somebody says with what outcome.
            raise
        self._keep(replace(effect, status=EffectStatus.SUCCEEDED, outcome=value))
        return value

    async def _fail(self, effect: Effect, error: Exception, *, is_final: bool = False) -> None:
        failure = describe(error, is_final=is_final)
        await self._record(effect, Outcome(status=EffectStatus.FAILED, failure=failure))
        self._keep(replace(effect, status=EffectStatus.FAILED, failure=failure))

    async def _record(self, effect: Effect, outcome: Outcome) -> None:
        if not await self._store.finish_effect(self._lease, effect.id, outcome):
            # Somebody has decided about it meanwhile; this attempt is not the current one.
            raise LeaseLostError(self._lease.run_id, self._lease.token)

    # What is known already.

    async def _begin(self, new: NewEffect, *, retake: int | None = None) -> Begun:
        self._control.check()
        begun = await self._store.begin_effect(self._lease, new, retake=retake)
        if not begun.is_held:
            self._keep(begun.effect)
        return begun

    def _recall(self, new: NewEffect) -> Begun | None:
        """Return what is known of a key without asking the store."""
        if new.scope != self.root:
            return None
        effect = None if self._known is None else self._known.get((new.scope, new.key))
        if effect is None or effect.status in CALLABLE:
            return None
        _check_same(effect.name, effect.arguments, new)
        return Begun(effect=effect, is_due=False)

    async def _recalled(self) -> dict[tuple[str, str], Effect]:
        # What cannot be read here is read when it is asked for.
        page = await self._store.list_effects(
            self._lease.tenant, scope=self.root, limit=_KNOWN, strict=True, in_rows=True
        )
        return {(each.scope, each.key): each for each in page.items}

    def _recorded(self, new: NewEffect) -> Effect | None:
        """Return an effect that has succeeded, if that is known here."""
        effect = None if self._known is None else self._known.get((new.scope, new.key))
        if effect is None or effect.status is not EffectStatus.SUCCEEDED:
            return None
        self._control.check()
        _check_same(effect.name, effect.arguments, new)
        return effect

    def _keep(self, effect: Effect) -> None:
        if self._known is not None and effect.scope == self.root:
            if len(self._known) >= _MOST:
                self._known.pop(next(iter(self._known)))
            self._known[effect.scope, effect.key] = effect

    # What transactions need.

    async def flush(self) -> None:
        """Make every checkpoint durable that the attempt has put so far."""
        await self._flush()

    def check(self) -> None:
        """Raise `LeaseLostError` if what is done now would be in vain."""
        self._control.check()

    # Callers that are not async.

    def flush_here(self) -> None:
        """Do as `flush` does, for a caller that is not async."""
        self._started_here(self.flush()).result()

    def run_here(self, new: NewEffect, policy: Policy, call: Callable[[EffectContext], Any]) -> Any:
        """Do the same for a caller that is not async; the call is made in the calling thread.

        The rest happens on the attempt's event loop, or, if the caller blocks that, on another.
        """
        if (recorded := self._recorded(new)) is not None:
            return outcome_of(recorded, policy)
        with self._lock:
            flight = self._flights.get((new.scope, new.key))
        running = running_loop()
        if flight is not None and running is not None and flight.loop is running:
            raise RunError(
                f"effect {new.name!r} is under way on this event loop, which a caller that is not "
                "async would block; make the effect async, or the keys differ"
            )
        if (handled := sys.exception()) is not None:
            policy = replace(policy, handled=handled)
        caller = Caller(call)
        ended = self._started_here(self.run(new, policy, caller.ask))
        ended.add_done_callback(lambda _: caller.dismiss())
        caller.serve()
        return ended.result()

    def _started_here(self, doing: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start what an event loop is to do for the calling thread, which will wait for it."""
        loop = self.loop if running_loop() is None else self._aside_loop()
        try:
            return asyncio.run_coroutine_threadsafe(doing, loop)
        except RuntimeError as exc:  # the loop is closed
            doing.close()
            raise LeaseLostError(self._lease.run_id, self._lease.token) from exc

    def _aside_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._aside is None:
                self._aside = Aside()
            return self._aside.loop

    def close(self) -> None:
        """End the thread for callers that block the attempt's loop, if there is one."""
        if self._aside is not None:
            self._aside.close()


_current: ContextVar[Journal | None] = ContextVar("agentflow_journal", default=None)


@contextmanager
def recording(journal: Journal) -> Iterator[None]:
    """Make a journal the current one, for everything that is called from here."""
    token = _current.set(journal)
    try:
        yield
    finally:
        _current.reset(token)
        journal.close()


def current_journal() -> Journal | None:
    """Return the journal of the attempt that the caller runs in; `None` outside of one."""
    return _current.get()


def _check_same(name: str, arguments: Any, new: NewEffect) -> None:
    if name == new.name and arguments is new.arguments:
        return
    differs = differences(arguments, new.arguments, "")
    if name != new.name:
        differs = ["function", *differs]
    if differs:
        raise EffectConflictError(new.name, "run" if new.scope else "", tuple(differs[:5]))


def _forget(ended: asyncio.Future[Any]) -> None:
    """Take note of an exception of which nobody else hears."""
    if not ended.cancelled():
        ended.exception()
