"""The outside world in a process of its own: payments and e-mail over HTTP, with a ledger.

    python -m examples.refunds.services --ledger refunds.sqlite --port 8085

- `POST /payments`: made once per `Idempotency-Key`, however often it arrives.
- `POST /emails`: sent each time that it arrives.
- `POST /executions`, `POST /model-calls`: what the agent is doing, to be counted.
- `/control/...`: hold points and counts, for the demo.

The first line on stdout is `{"url": ...}`; with `--port 0` the system chooses the port.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Literal, NamedTuple, Self, TypeAlias, get_args
from urllib.parse import parse_qs, urlsplit

from examples.refunds.holds import Hold, Holds, Request
from examples.refunds.ledger import Ledger
from examples.refunds.shop import Money

Fault: TypeAlias = Literal["double", "drop", "alter", "double-email", "drop-email"]
"""How the services may misbehave on the first payment (pay twice, not at all, or another amount) or
on the first e-mail (send it twice, or not at all)."""

_REPORTS = ("/executions", "/model-calls")
_STOP_INTERVAL = 0.05
"""How often a server looks whether it is to stop, in seconds."""


class Answer(NamedTuple):
    status: HTTPStatus
    body: Mapping[str, Any]


class Services:
    """What the services do with a request, apart from HTTP."""

    def __init__(self, ledger: Ledger, *, fault: Fault | None = None) -> None:
        self.holds = Holds()
        self._ledger = ledger
        self._fault = fault
        self._changed = Condition()
        self._changes = 0

    def receive(self, path: str, key: str | None, body: Mapping[str, Any]) -> Request:
        """Put a request on record, before anything else is done with it."""
        seq = self._ledger.record_request(path, key, body)
        return Request(seq=seq, path=path, key=key, body=body)

    def apply(self, request: Request) -> Answer:
        """Act on a request that is on record."""
        try:
            return self._apply(request)
        except (KeyError, TypeError, ValueError) as problem:
            return Answer(HTTPStatus.BAD_REQUEST, {"error": f"bad request: {problem!r}"})
        finally:
            self._tell_changed()

    def answered(self, request: Request) -> None:
        """Note that the sender has its answer."""
        self._ledger.record_outcome(request.seq, "replied")

    def dropped(self, request: Request) -> None:
        """Note that the sender never got an answer."""
        self._ledger.record_outcome(request.seq, "dropped")
        self._tell_changed()

    def wait_changed(self, since: int, timeout: float) -> Mapping[str, int]:
        """Return the counts as soon as they may differ from those numbered `since`."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != since, timeout)
            changes = self._changes
        return {"changes": changes, **asdict(self._ledger.counts())}

    def _apply(self, request: Request) -> Answer:
        if request.path in _REPORTS:
            return Answer(HTTPStatus.OK, {})
        if request.path not in {"/payments", "/emails"}:
            return Answer(HTTPStatus.NOT_FOUND, {"error": f"no such path: {request.path}"})
        if request.path == "/emails":
            with self._ledger.transaction():
                return self._send(request.seq, request.body)
        if not request.key:
            return Answer(HTTPStatus.BAD_REQUEST, {"error": "an Idempotency-Key is required"})
        with self._ledger.transaction():
            if not self._ledger.is_repeat(request.path, request.key, request.body):
                problem = f"key {request.key!r} was used for another request"
                return Answer(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": problem})
            return self._pay(request.key, request.body)

    def _tell_changed(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def _pay(self, key: str, body: Mapping[str, Any]) -> Answer:
        asked = Money(amount=int(body["amount"]), currency=str(body["currency"]))
        reference, order_id = str(body["reference"]), str(body["order_id"])
        payment_id = self._ledger.find_payment(key)
        if payment_id is None:
            is_first = reference == self._ledger.first_reference("/payments")
            for money in _faulty(asked, self._fault) if is_first else [asked]:
                payment_id = self._ledger.add_payment(key, reference, order_id, money)
        return Answer(HTTPStatus.OK, {"id": f"P-{payment_id}", **body})

    def _send(self, seq: int, body: Mapping[str, Any]) -> Answer:
        reference = str(body["reference"])
        times = 1
        if self._fault is not None and reference == self._ledger.first_reference("/emails"):
            times = {"double-email": 2, "drop-email": 0}.get(self._fault, 1)
        for _ in range(times):
            self._ledger.add_email(seq, reference, str(body["to"]), str(body["subject"]))
        return Answer(HTTPStatus.OK, {})


class Handler(BaseHTTPRequestHandler):
    """Speak HTTP for `Services`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes; do not wait for the first ACK

    def __init__(self, services: Services, *args: Any) -> None:
        self._services = services
        super().__init__(*args)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:  # its sender was killed in the middle of it
            self.close_connection = True
            return
        body = json.loads(content)
        if self.path == "/control/holds":
            self._answer(Answer(HTTPStatus.OK, {"hold": self._services.holds.add(Hold(**body))}))
            return
        request = self._services.receive(self.path, self.headers.get("Idempotency-Key"), body)
        if self._services.holds.pass_by(request, "arrival"):
            answer = self._services.apply(request)
            if self._services.holds.pass_by(request, "reply"):
                self._answer(answer)
                self._services.answered(request)
                return
        self._services.dropped(request)
        self.close_connection = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        options = {name: values[0] for name, values in parse_qs(url.query).items()}
        timeout = float(options.get("timeout", 0))
        if url.path == "/control/counts":
            counts = self._services.wait_changed(int(options.get("since", -1)), timeout)
            self._answer(Answer(HTTPStatus.OK, counts))
            return
        caught = self._services.holds.wait_caught(_hold_id(url.path), timeout)
        self._answer(Answer(HTTPStatus.OK, {"caught": asdict(caught) if caught else None}))

    def do_DELETE(self) -> None:
        self._services.holds.end(_hold_id(self.path))
        self._answer(Answer(HTTPStatus.OK, {}))

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the ledger is the record, and requests hold personal data."""

    def _answer(self, answer: Answer) -> None:
        content = json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """The services on a local port; a client that vanishes is part of the story, not an error."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, services: Services, *, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(Handler, services))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve in a thread, for as long as the context lasts."""
        thread = Thread(target=self.serve_forever, args=[_STOP_INTERVAL])
        with self:
            thread.start()
            try:
                yield self
            finally:
                self.shutdown()
                thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description="Payments and e-mail for the refunds example.")
    parser.add_argument("--ledger", type=Path, required=True, help="the SQLite file to keep")
    parser.add_argument("--port", type=int, default=8085, help="0: any free port")
    parser.add_argument("--fault", choices=get_args(Fault), help="misbehave once")
    options = parser.parse_args()

    ledger = Ledger(options.ledger)
    with Server(Services(ledger, fault=options.fault), port=options.port) as server:
        # `shutdown` waits for the loop that the signal interrupted, so it needs another thread.
        signal.signal(signal.SIGTERM, lambda *_: Thread(target=server.shutdown).start())
        print(json.dumps({"url": server.url}), flush=True)
        server.serve_forever(_STOP_INTERVAL)
    ledger.close()


def _faulty(asked: Money, fault: Fault | None) -> list[Money]:
    """Return the payments that are really made for one that was asked for."""
    match fault:
        case "double":
            return [asked, asked]
        case "drop":
            return []
        case "alter":
            return [Money(amount=asked.amount + 100, currency=asked.currency)]
        case _:
            return [asked]


def _hold_id(path: str) -> int:
    return int(path.rsplit("/", 1)[-1])


if __name__ == "__main__":
    main()
