"""`transaction`: makes a function that writes to the user's database one that commits once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from agentflow.effects import outside
from agentflow.effects.definition import check_function, name_of, new_effect
from agentflow.effects.journal import Journal, current_journal
from agentflow.effects.outside import Found, Rows
from agentflow.errors import InvalidInputError
from agentflow.interrupts.plain import to_plain
from agentflow.journal import Scope

F = TypeVar("F", bound=Callable[..., Any])

_TRIES = 10
_FIRST_PAUSE = 0.02


def transaction(
    engine: Engine | AsyncEngine | Callable[[], Engine | AsyncEngine],
    *,
    key: str | Callable[..., str] | None = None,
    scope: Scope = "run",
    name: str | None = None,
) -> Callable[[F], Callable[..., Any]]:
    """Make a function one that writes to a database of the user's exactly once.

    It gets a connection first, inside a transaction that it neither commits nor rolls back. A row
    of the table `effect_journal` of the same database (`agentflow migrate journal --url ...`)
    commits together with what it writes; when the node runs again, the outcome is read from there.
    So it is never in doubt. If another transaction is in the way (a serialization failure, a
    deadlock), all of it is tried again. An exception rolls back, and nothing is recorded.

    Outside of a run it only runs in a transaction, with a warning once.

    Example:
        ```python
        @transaction(engine, key=lambda order_id, amount: f"book-{order_id}")
        def book(connection, order_id, amount):
            connection.execute(insert(bookings).values(order=order_id, amount=amount))
        ```

    Args:
        engine: SQLAlchemy's engine, or a function that returns it; an async one for an async
            function.
        key: What names this call: a text, or a function of the same arguments without the
            connection. By default its place in the graph and its arguments do.
        scope: Where the key is unique: in the `run` and its forks, or in the whole tenant
            (`global`).
        name: What it is called in the journal; by default `module:qualname`.

    Raises:
        InvalidInputError: The engine and the function do not fit together.
        JournalMissingError: When it is called: the database has no table `effect_journal`.
        EffectConflictError: When it is called: the key names another function, or other arguments.
    """

    def decorate(function: F) -> Callable[..., Any]:
        check_function("transaction", function, name)
        return _Transaction(engine, function, key=key, scope=scope, name=name).wrapped()

    return decorate


class _Transaction:
    def __init__(
        self,
        engine: Engine | AsyncEngine | Callable[[], Engine | AsyncEngine],
        function: Callable[..., Any],
        *,
        key: str | Callable[..., str] | None,
        scope: Scope,
        name: str | None,
    ) -> None:
        self._engine = engine
        self._function = function
        self._key = key
        self._scope: Scope = scope
        self._name = name or name_of(function)
        self._signature = inspect.signature(function)
        self._is_async = inspect.iscoroutinefunction(function)
        self._is_checked = False
        self._has_warned = False
        if not callable(engine):
            self._check(engine)

    def wrapped(self) -> Callable[..., Any]:
        if self._is_async:

            @functools.wraps(self._function)
            async def awaited(*args: Any, **named: Any) -> Any:
                return await self._run_async(args, named)

            return awaited

        @functools.wraps(self._function)
        def called(*args: Any, **named: Any) -> Any:
            return self._run(args, named)

        return called

    def _run(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        engine = self._checked()
        assert isinstance(engine, Engine)
        journal = self._journal()
        if journal is None:
            with engine.begin() as connection:
                return self._function(connection, *args, **named)
        rows = self._rows(journal, args, named)
        journal.flush_here()
        for number in range(1, _TRIES + 1):
            journal.check()
            try:
                with engine.begin() as connection:
                    if (found := self._enter(connection, rows)) is not None:
                        return found.outcome
                    outcome = self._function(connection, *args, **named)
                    rows.finish(connection, outcome)
                return outcome
            except sa.exc.DBAPIError as error:
                time.sleep(_pause(error, number))
        raise AssertionError

    async def _run_async(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        engine = self._checked()
        assert isinstance(engine, AsyncEngine)
        journal = self._journal()
        if journal is None:
            async with engine.begin() as connection:
                return await self._function(connection, *args, **named)
        rows = self._rows(journal, args, named)
        await journal.flush()
        for number in range(1, _TRIES + 1):
            journal.check()
            try:
                async with engine.begin() as connection:
                    found = await connection.run_sync(self._enter, rows)
                    if found is not None:
                        return found.outcome
                    outcome = await self._function(connection, *args, **named)
                    await connection.run_sync(rows.finish, outcome)
                return outcome
            except sa.exc.DBAPIError as error:
                await asyncio.sleep(_pause(error, number))
        raise AssertionError

    def _enter(self, connection: Connection, rows: Rows) -> Found | None:
        """Return what was committed before, or hold everybody else off."""
        if not self._is_checked:
            outside.check_exists(connection)
            self._is_checked = True
        found = rows.find(connection)
        if found is None:
            try:
                rows.claim(connection)
            except sa.exc.IntegrityError as error:
                raise _FirstError(error.statement, error.params, error.orig) from error  # type: ignore[arg-type]  # it has one
        return found

    def _rows(self, journal: Journal, args: tuple[Any, ...], named: Mapping[str, Any]) -> Rows:
        bound = self._signature.bind(None, *args, **named)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        key = self._key(*args, **named) if callable(self._key) else self._key
        new = new_effect(
            journal,
            name=self._name,
            key=key,
            arguments=to_plain(given, "arguments", lenient=key is not None),
            scope=self._scope,
            on_in_doubt="retry",
            kind="transaction",
        )
        return Rows(journal.codec, journal.tenant, new)

    def _journal(self) -> Journal | None:
        journal = current_journal()
        if journal is None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"transaction {self._name!r} is called outside of a run: nothing keeps it from "
                "being committed twice",
                stacklevel=4,
            )
        return journal

    def _checked(self) -> Engine | AsyncEngine:
        engine = self._engine() if callable(self._engine) else self._engine
        self._check(engine)
        return engine

    def _check(self, engine: object) -> None:
        if not isinstance(engine, (Engine, AsyncEngine)):
            problem = "engine: must be an engine of SQLAlchemy's"
            raise InvalidInputError("transaction", (problem,))
        if isinstance(engine, AsyncEngine) != self._is_async:
            problem = "engine: an async function goes with an async engine, and only with that"
            raise InvalidInputError("transaction", (problem,))


class _FirstError(sa.exc.IntegrityError):
    """Somebody else has just begun or committed the same transaction."""


def _pause(error: sa.exc.DBAPIError, number: int) -> float:
    """Return how long to wait until the next try; raises the error if there is none."""
    is_other = isinstance(error, _FirstError)
    if number == _TRIES or not (is_other or outside.is_worth_another(error)):
        raise error
    pause: float = _FIRST_PAUSE * 2 ** min(number - 1, 5)
    return pause * random.uniform(0.5, 1)  # noqa: S311 -- jitter
