"""The services' own record of what they were asked and what they did, in a SQLite file.

It stands outside agentflow, and the demo's verdict is read from here. Every request is on disk
before it is acted on; what was applied is kept apart from what was requested.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Literal, TypeAlias

from examples.refunds.shop import Money

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    seq INTEGER PRIMARY KEY,
    path TEXT NOT NULL,
    idempotency_key TEXT,
    body TEXT NOT NULL,
    outcome TEXT  -- replied, or dropped: kept without an answer until its sender was gone
);
CREATE INDEX IF NOT EXISTS requests_by_key ON requests (path, idempotency_key);
CREATE TABLE IF NOT EXISTS payments (
    id INTEGER PRIMARY KEY,
    idempotency_key TEXT NOT NULL,
    order_id TEXT NOT NULL,
    amount INTEGER NOT NULL,
    currency TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS emails (
    id INTEGER PRIMARY KEY,
    idempotency_key TEXT NOT NULL UNIQUE,
    recipient TEXT NOT NULL,
    subject TEXT NOT NULL
);
"""

Outcome: TypeAlias = Literal["replied", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPayment:
    idempotency_key: str
    order_id: str
    money: Money


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the services have seen and done so far."""

    payments_requested: int
    payments_applied: int
    emails_requested: int
    emails_applied: int


class Ledger:
    """The file. One process writes to it; its threads share one connection, one at a time."""

    def __init__(self, path: Path) -> None:
        self._lock = RLock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # Full: a payment that was confirmed must survive the machine, not only the process.
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything done inside together."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def record_request(self, path: str, key: str | None, body: Mapping[str, Any]) -> int:
        """Put a request on record and return its number."""
        with self._lock:
            cursor = self._connection.execute(
                "INSERT INTO requests (path, idempotency_key, body) VALUES (?, ?, ?)",
                (path, key, _canonical(body)),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def record_outcome(self, seq: int, outcome: Outcome) -> None:
        with self._lock:
            self._connection.execute(
                "UPDATE requests SET outcome = ? WHERE seq = ?", (outcome, seq)
            )

    def first_request(self, path: str, key: str | None = None) -> tuple[str, str]:
        """Return key and body of the first request to a path, or of the first with that key."""
        condition, arguments = ("AND idempotency_key = ?", (key,)) if key else ("", ())
        found: tuple[str, str] = self._one(
            f"SELECT idempotency_key, body FROM requests WHERE path = ? {condition} "  # noqa: S608
            "ORDER BY seq LIMIT 1",
            path,
            *arguments,
        )
        return found

    def is_repeat(self, path: str, key: str, body: Mapping[str, Any]) -> bool:
        """Whether a request says the same as the first one with its key."""
        return self.first_request(path, key)[1] == _canonical(body)

    def find_payment(self, key: str) -> int | None:
        found = self._one("SELECT min(id) FROM payments WHERE idempotency_key = ?", key)
        payment_id: int | None = found[0]
        return payment_id

    def add_payment(self, key: str, order_id: str, money: Money) -> int:
        """Move the money. Nothing here stops a second payment under one key: callers do."""
        cursor = self._connection.execute(
            "INSERT INTO payments (idempotency_key, order_id, amount, currency) "
            "VALUES (?, ?, ?, ?)",
            (key, order_id, money.amount, money.currency),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def add_email(self, key: str, recipient: str, subject: str) -> None:
        """Send an e-mail, unless one was sent under this key."""
        self._connection.execute(
            "INSERT INTO emails (idempotency_key, recipient, subject) VALUES (?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (key, recipient, subject),
        )

    def counts(self) -> Counts:
        names = ("payments_requested", "payments_applied", "emails_requested", "emails_applied")
        found = self._one(
            "SELECT (SELECT count(*) FROM requests WHERE path = '/payments'), "
            "(SELECT count(*) FROM payments), "
            "(SELECT count(*) FROM requests WHERE path = '/emails'), "
            "(SELECT count(*) FROM emails)"
        )
        return Counts(**dict(zip(names, found, strict=True)))

    def payments(self) -> list[AppliedPayment]:
        """Return every payment that was made, in order."""
        rows = self._all(
            "SELECT idempotency_key, order_id, amount, currency FROM payments ORDER BY id"
        )
        return [
            AppliedPayment(
                idempotency_key=key, order_id=order, money=Money(amount=amount, currency=currency)
            )
            for key, order, amount, currency in rows
        ]

    def emails(self) -> Counter[str]:
        """Count the e-mails that were sent, by idempotency key."""
        return Counter(key for (key,) in self._all("SELECT idempotency_key FROM emails"))

    def executions(self, event: Literal["started", "finished"]) -> Counter[tuple[str, str]]:
        """Count the node executions that began or finished, by run and node."""
        return self._count_by_node("/executions", event)

    def model_calls(self) -> Counter[tuple[str, str]]:
        """Count the model calls that began, by run and node."""
        return self._count_by_node("/model-calls", "started")

    def model_call_events(self, call: str) -> list[str]:
        """Return what was reported of one model call: `started`, and `finished` if it did."""
        rows = self._all(
            "SELECT json_extract(body, '$.event') FROM requests WHERE path = '/model-calls' "
            "AND json_extract(body, '$.call') = ? ORDER BY seq",
            call,
        )
        return [event for (event,) in rows]

    def payment_requests(self, key: str) -> list[tuple[int, str | None]]:
        """Return number and outcome of each request to pay under a key, in order."""
        return self._all(
            "SELECT seq, outcome FROM requests WHERE path = '/payments' AND idempotency_key = ? "
            "ORDER BY seq",
            key,
        )

    def outcome(self, seq: int) -> str | None:
        """Return what became of a request; `None` while it has no answer."""
        found: str | None = self._one("SELECT outcome FROM requests WHERE seq = ?", seq)[0]
        return found

    def _count_by_node(self, path: str, event: str) -> Counter[tuple[str, str]]:
        rows = self._all(
            "SELECT json_extract(body, '$.run'), json_extract(body, '$.node') FROM requests "
            "WHERE path = ? AND json_extract(body, '$.event') = ?",
            path,
            event,
        )
        return Counter((run, node) for run, node in rows)

    def _one(self, statement: str, *arguments: Any) -> Any:
        with self._lock:
            return self._connection.execute(statement, arguments).fetchone()

    def _all(self, statement: str, *arguments: Any) -> list[Any]:
        with self._lock:
            return self._connection.execute(statement, arguments).fetchall()


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, ensure_ascii=False)
