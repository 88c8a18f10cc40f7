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
    reference TEXT NOT NULL,
    order_id TEXT NOT NULL,
    amount INTEGER NOT NULL,
    currency TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS emails (
    id INTEGER PRIMARY KEY,
    request INTEGER NOT NULL REFERENCES requests,
    reference TEXT NOT NULL,
    recipient TEXT NOT NULL,
    subject TEXT NOT NULL
);
"""

Outcome: TypeAlias = Literal["replied", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPayment:
    idempotency_key: str
    reference: str
    """The run that it was made for."""
    order_id: str
    money: Money


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedPayment:
    """A request to pay; whether money moved is another question."""

    seq: int
    idempotency_key: str
    outcome: str | None


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

    def first_reference(self, path: str) -> str:
        """Return what the first request to a path was for."""
        found: str = self._one(
            "SELECT json_extract(body, '$.reference') FROM requests WHERE path = ? "
            "ORDER BY seq LIMIT 1",
            path,
        )[0]
        return found

    def is_repeat(self, path: str, key: str, body: Mapping[str, Any]) -> bool:
        """Whether a request says the same as the first one with its key."""
        first = self._one(
            "SELECT body FROM requests WHERE path = ? AND idempotency_key = ? ORDER BY seq LIMIT 1",
            path,
            key,
        )
        return bool(first[0] == _canonical(body))

    def find_payment(self, key: str) -> int | None:
        found = self._one("SELECT min(id) FROM payments WHERE idempotency_key = ?", key)
        payment_id: int | None = found[0]
        return payment_id

    def add_payment(self, key: str, reference: str, order_id: str, money: Money) -> int:
        """Move the money. Nothing here stops a second payment under one key: callers do."""
        cursor = self._connection.execute(
            "INSERT INTO payments (idempotency_key, reference, order_id, amount, currency) "
            "VALUES (?, ?, ?, ?, ?)",
            (key, reference, order_id, money.amount, money.currency),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def add_email(self, request: int, reference: str, recipient: str, subject: str) -> None:
        """Send an e-mail. Nothing stops a second one: whoever asks again sends it again."""
        self._connection.execute(
            "INSERT INTO emails (request, reference, recipient, subject) VALUES (?, ?, ?, ?)",
            (request, reference, recipient, subject),
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
            "SELECT idempotency_key, reference, order_id, amount, currency FROM payments "
            "ORDER BY id"
        )
        return [
            AppliedPayment(
                idempotency_key=key,
                reference=reference,
                order_id=order,
                money=Money(amount=amount, currency=currency),
            )
            for key, reference, order, amount, currency in rows
        ]

    def emails(self) -> Counter[str]:
        """Count the e-mails that were sent, by the run that each was for."""
        return Counter(reference for (reference,) in self._all("SELECT reference FROM emails"))

    def email_requests(self) -> Counter[str]:
        """Count the requests to send an e-mail, by the run that each was for."""
        rows = self._all(
            "SELECT json_extract(body, '$.reference') FROM requests WHERE path = '/emails'"
        )
        return Counter(reference for (reference,) in rows)

    def has_sent(self, request: int) -> bool:
        """Whether a request to send an e-mail was acted on."""
        found = self._one("SELECT count(*) FROM emails WHERE request = ?", request)
        return bool(found[0])

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

    def payment_keys(self) -> int:
        """Count the keys under which payments were requested."""
        found: int = self._one(
            "SELECT count(DISTINCT idempotency_key) FROM requests WHERE path = '/payments'"
        )[0]
        return found

    def payment_requests(self, reference: str) -> list[RequestedPayment]:
        """Return every request to pay for a run, in order."""
        rows = self._all(
            "SELECT seq, idempotency_key, outcome FROM requests WHERE path = '/payments' "
            "AND json_extract(body, '$.reference') = ? ORDER BY seq",
            reference,
        )
        return [
            RequestedPayment(seq=seq, idempotency_key=key, outcome=outcome)
            for seq, key, outcome in rows
        ]

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
