"""`effect`: makes a function one whose calls happen once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass, replace
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints, overload
from weakref import WeakValueDictionary

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from agentflow.effects.journal import Call, Journal, current_journal
from agentflow.effects.policy import EffectContext, Happened, Policy
from agentflow.effects.unknown import Classes, are_exceptions
from agentflow.errors import InvalidInputError, RunError
from agentflow.interrupts.plain import to_plain
from agentflow.journal import CHECK, GLOBAL, Effect, NewEffect, OnInDoubt, Scope
from agentflow.retry import LangGraphRetryPolicy, RetryPolicy
from agentflow.types import Duration, new_id, to_timedelta

P = ParamSpec("P")
R = TypeVar("R")

_definitions: WeakValueDictionary[str, Definition] = WeakValueDictionary()
"""Every function with effects that is alive, by name: what has to be undone is found here."""

_context: ContextVar[EffectContext | None] = ContextVar("agentflow_effect", default=None)


def effect_context() -> EffectContext:
    """Return what the call of an effect can know about itself; called inside of it.

    Raises:
        RunError: The caller is not inside the call of an effect.
    """
    context = _context.get()
    if context is None:
        raise RunError("there is no effect here; call effect_context() inside a function with one")
    return context


@contextmanager
def called_as(context: EffectContext) -> Iterator[None]:
    """Make a context the current one, for what a call calls."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


@overload
def effect(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def effect(
    *,
    key: str | Callable[..., str] | None = None,
    scope: Scope = "run",
    on_in_doubt: OnInDoubt | None = None,
    check: Callable[..., Any] | None = None,
    in_doubt_on: Sequence[type[Exception]] | None = None,
    retry: RetryPolicy | LangGraphRetryPolicy | None = None,
    timeout: Duration | None = None,
    compensate: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def effect(
    function: Callable[..., Any] | None = None,
    /,
    *,
    key: str | Callable[..., str] | None = None,
    scope: Scope = "run",
    on_in_doubt: OnInDoubt | None = None,
    check: Callable[..., Any] | None = None,
    in_doubt_on: Sequence[type[Exception]] | None = None,
    retry: RetryPolicy | LangGraphRetryPolicy | None = None,
    timeout: Duration | None = None,
    compensate: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Any:
    """Make a function one whose calls happen once, whatever becomes of the process.

    Called inside a node, sync or async, it first makes the intent durable, then calls the function,
    then makes the outcome durable. When the node runs again, the outcome is returned without a
    call. If a process dies in between, whether the call happened is not known: see `on_in_doubt`.
    Outside of a run it is an ordinary function, with a warning once.

    An exception is recorded like an outcome and raised again, unless `retry` says that it is worth
    another call, or `on_in_doubt="retry"` that calls may be repeated. Where they may not, one that
    leaves open whether the call has happened (a connection that broke, a time that ran out) is no
    outcome: the effect is in doubt, whatever `retry` says.

    Example:
        ```python
        @effect(key=lambda order: f"refund-{order.id}", on_in_doubt="ask", timeout=30)
        async def refund(order: Order) -> Receipt:
            return await bank.refund(order, idempotency_key=effect_context().idempotency_key)
        ```

    Args:
        function: The function, where the decorator is used without arguments.
        key: What names this effect: a text, or a function of the same arguments. By default its
            place in the graph and its arguments do.
        scope: Where the key is unique: in the `run` and its forks, or in the whole tenant
            (`global`).
        on_in_doubt: `ask` a person (the default), `check` by a function, `retry` since it is
            idempotent, or `fail` the run.
        check: With `check`: called with the same arguments. It returns `Happened(outcome)` if the
            call has happened, and `None` if not.
        in_doubt_on: The exceptions after which the call may have happened, also as what another one
            was raised from. By default `TimeoutError`, `ConnectionResetError`,
            `ConnectionAbortedError`, `BrokenPipeError` and what HTTP clients say of a server that
            has hung up; `OutcomeUnknownError` always is one.
        retry: Which exceptions are worth another call, how often, and after how long.
        timeout: How long a call may take; longer, and it is in doubt. What is not async cannot be
            stopped, and goes on.
        compensate: Undoes it, if the run fails for good or is cancelled: called with the outcome
            and, by name, those of the arguments that it has parameters for. If it is an effect
            itself, its options hold; otherwise exceptions are worth five calls.
        name: What it is called in the journal; by default `module:qualname`.

    Raises:
        InvalidInputError: The arguments do not fit together.
    """
    if function is not None and not callable(function):
        raise InvalidInputError("effect", ("give its options by name: @effect(key=...)",))
    wanted = on_in_doubt or ("check" if check is not None else "ask")
    _check_options(wanted, scope, check, timeout, in_doubt_on)

    def decorate(target: Callable[..., Any]) -> Any:
        check_function("effect", target, name)
        return Definition(
            target,
            key=key,
            scope=scope,
            on_in_doubt=wanted,
            check=check,
            in_doubt_on=None if in_doubt_on is None else tuple(in_doubt_on),
            retry=None if retry is None else RetryPolicy.of(retry),
            timeout=timeout,
            compensate=compensate,
            name=name,
        ).wrapped()

    return decorate if function is None else decorate(function)


def _check_options(
    on_in_doubt: str,
    scope: str,
    check: Callable[..., Any] | None,
    timeout: Duration | None,
    in_doubt_on: Any,
) -> None:
    found = []
    if in_doubt_on is not None and not are_exceptions(in_doubt_on):
        found.append("in_doubt_on: must be a list of classes of exceptions")
    if on_in_doubt not in get_args(OnInDoubt):
        found.append(f"on_in_doubt: must be one of {', '.join(get_args(OnInDoubt))}")
    if scope not in get_args(Scope):
        found.append(f"scope: must be one of {', '.join(get_args(Scope))}")
    if (on_in_doubt == "check") != (check is not None):
        found.append('check: goes with on_in_doubt="check", which needs it')
    if timeout is not None and to_timedelta(timeout).total_seconds() <= 0:
        found.append("timeout: must be above 0")
    if found:
        raise InvalidInputError("effect", tuple(found))


class Definition:
    """A function whose calls are effects."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        key: str | Callable[..., str] | None,
        scope: Scope,
        on_in_doubt: OnInDoubt,
        check: Callable[..., Any] | None,
        in_doubt_on: Classes | None,
        retry: RetryPolicy | None,
        timeout: Duration | None,
        compensate: Callable[..., Any] | None,
        name: str | None,
    ) -> None:
        """See `effect`."""
        self.function = function
        self.name = name or name_of(function)
        self.compensate = compensate
        self._key = key
        self._scope: Scope = scope
        self.on_in_doubt: OnInDoubt = on_in_doubt
        self._check = check
        self.retry = retry
        self.timeout = None if timeout is None else to_timedelta(timeout)
        self._signature = inspect.signature(function)
        self._is_async = inspect.iscoroutinefunction(function)
        self.in_doubt_on = in_doubt_on
        self._policy = Policy(
            retry=retry,
            can_be_stopped=self._is_async,
            restore=self._restore,
            in_doubt_on=in_doubt_on,
        )
        self._warned = False

    def wrapped(self) -> Callable[..., Any]:
        """Return the function to call in its place."""
        function = self.function
        if self._is_async:

            @functools.wraps(function)
            async def awaited(*args: Any, **named: Any) -> Any:
                journal = self._journal()
                if journal is None:
                    with called_as(_alone()):
                        return await function(*args, **named)
                new, policy = self._prepare(journal, args, named)

                async def call(context: EffectContext) -> Any:
                    with called_as(context):
                        return await function(*args, **named)

                return await journal.run(new, policy, call)

            made: Callable[..., Any] = awaited
        else:

            @functools.wraps(function)
            def called(*args: Any, **named: Any) -> Any:
                journal = self._journal()
                if journal is None:
                    with called_as(_alone()):
                        return function(*args, **named)
                new, policy = self._prepare(journal, args, named)

                def call(context: EffectContext) -> Any:
                    with called_as(context):
                        return function(*args, **named)

                return journal.run_here(new, policy, call)

            made = called
        made.__agentflow_effect__ = self  # type: ignore[attr-defined]
        _definitions[self.name] = self
        return made

    def _journal(self) -> Journal | None:
        journal = current_journal()
        if journal is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"effect {self.name!r} is called outside of a run: nothing keeps it from "
                "happening twice",
                stacklevel=3,
            )
        return journal

    def _prepare(
        self, journal: Journal, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[NewEffect, Policy]:
        bound = self._signature.bind(*args, **named)
        bound.apply_defaults()
        key = self._key(*args, **named) if callable(self._key) else self._key
        # A key that is given names the call; without one, all of the arguments have to.
        arguments = to_plain(dict(bound.arguments), "arguments", lenient=key is not None)
        new = new_effect(
            journal,
            name=self.name,
            key=key,
            arguments=arguments,
            scope=self._scope,
            on_in_doubt=self.on_in_doubt,
            timeout=self.timeout,
            compensate=None if self.compensate is None else name_of(self.compensate),
        )
        if self._check is None:
            return new, self._policy
        return new, replace(self._policy, check=self._checking(args, named))

    def _checking(
        self, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> Callable[[], Awaitable[Happened | None]]:
        check = self._check
        assert check is not None

        async def ask() -> Happened | None:
            if inspect.iscoroutinefunction(check):
                found = await check(*args, **named)
            else:
                found = await asyncio.to_thread(check, *args, **named)
            if found is None or isinstance(found, Happened):
                return found
            raise InvalidInputError("effect", ("check: must return Happened(outcome) or None",))

        return ask

    def restored(self, effect: Effect) -> Any:
        """Return the outcome of an effect, as its function would have returned it."""
        is_plain = effect.resolved_by not in {None, CHECK}
        return self._restore(effect.outcome) if is_plain else effect.outcome

    def outcome_problem(self, plain: Any) -> str | None:
        """Return why the function's own type cannot be built from what a person gave."""
        try:
            self._restore(plain)
        except ValidationError as exc:
            paths = (".".join(map(str, each["loc"])) or "it" for each in exc.errors())
            return f"does not fit what {self.name} returns: {', '.join(sorted(set(paths)))}"
        return None

    def outcome_schema(self) -> dict[str, Any] | None:
        """Return the JSON Schema of what a person has to give for an outcome, if there is one."""
        adapter = self._adapter()
        try:
            return None if adapter is None else adapter.json_schema()
        except PydanticUserError:
            return None

    def _restore(self, plain: Any) -> Any:
        """Build an outcome of the function's own type from what a person gave."""
        adapter = self._adapter()
        return plain if adapter is None else adapter.validate_python(plain)

    def _adapter(self) -> TypeAdapter[Any] | None:
        """Return what builds the function's own type, if it says that it returns one."""
        try:
            returned: Any = get_type_hints(self.function).get("return")
        except Exception:  # noqa: BLE001 -- names that are not there when it is called
            return None
        is_typed = isinstance(returned, type) and (
            issubclass(returned, BaseModel) or is_dataclass(returned)
        )
        return TypeAdapter(returned) if is_typed else None


def _alone() -> EffectContext:
    """Return what a call outside of a run can know about itself: it is like no other."""
    made = new_id()
    return EffectContext(
        effect_id=made, key=made, idempotency_key=made, attempt=1, call=1, may_have_run=False
    )


def find_definition(name: str) -> Definition | None:
    """Return the function of an effect, if it was decorated in this process."""
    return _definitions.get(name)


def check_function(what: str, target: Any, name: str | None) -> None:
    """Refuse what is not called as a function is, or has no name.

    Raises:
        InvalidInputError: It is.
    """
    found = []
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        found.append("function: must not be a generator; its outcome is what it returns")
    elif not inspect.isroutine(target) and not isinstance(target, functools.partial):
        found.append("function: must be a function or a method")
    elif name is None and not hasattr(target, "__qualname__"):
        found.append("name: has to be given, since the function has none")
    if found:
        raise InvalidInputError(what, tuple(found))


def name_of(function: Callable[..., Any]) -> str:
    """Return what a function is called in the journal."""
    return f"{function.__module__}:{function.__qualname__}"


def new_effect(
    journal: Journal,
    *,
    name: str,
    key: str | None,
    arguments: Mapping[str, Any],
    scope: Scope,
    on_in_doubt: OnInDoubt,
    timeout: Any = None,
    **others: Any,
) -> NewEffect:
    """Return an effect that is called from here."""
    if key is not None and not (isinstance(key, str) and key):  # type: ignore[redundant-expr]  # user code made it
        raise InvalidInputError("effect", (f"key: must be text that is not empty, for {name}",))
    place = journal.places.here()
    return NewEffect(
        id="",  # if it is needed, which it is not for what is on record: an id costs as much
        scope=GLOBAL if scope == "global" else journal.root,
        key=key if key is not None else f"@{journal.places.key(place, name, arguments)}",
        name=name,
        arguments=arguments,
        ns=place.ns,
        task_id=place.task_id,
        node=place.node,
        on_in_doubt=on_in_doubt,
        timeout=timeout,
        **others,
    )


async def run_effect(
    call: Call,
    *,
    name: str,
    arguments: Mapping[str, Any],
    key: str | None = None,
    scope: Scope = "run",
    on_in_doubt: OnInDoubt = "ask",
    timeout: Duration | None = None,
    policy: Policy | None = None,
) -> Any:
    """Call something as an effect, without a decorated function; for nodes of our own.

    Args:
        call: Makes the call; it is given an `EffectContext`.
        name: What it is called in the journal.
        arguments: Plain data (see `interrupts.plain.to_plain`) that says what is called.
        key: Names it; by default its place in the graph and its arguments do.
        scope: Where the key is unique.
        on_in_doubt: `check` needs a function in `policy`.
        timeout: How long a call may take.
        policy: The rest.

    Returns:
        The outcome. Outside of a run, simply that of the call.
    """
    journal = current_journal()
    if journal is None:
        return await call(_alone())
    new = new_effect(
        journal,
        name=name,
        key=key,
        arguments=arguments,
        scope=scope,
        on_in_doubt=on_in_doubt,
        timeout=None if timeout is None else to_timedelta(timeout),
    )
    return await journal.run(new, policy or Policy(), call)
