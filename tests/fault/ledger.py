"""The effect ledger: the outside world, which remembers everything that was done to it.

Fault tests judge by it and never by agentflow's own tables. It is a process of its own, so that it
outlives every victim, and it acknowledges an entry only after the entry is on disk. It can be told
to hold its acknowledgement: the effect has then happened and its caller does not know, which is
the moment at which a test kills the caller.

One request is one line of JSON over TCP, answered by one line.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

Entry = dict[str, Any]
_LIMIT = 60.0


def record(address: str, **facts: Any) -> int:
    """Enter facts, such as `run`, `step`, `key` and `attempt`; return the entry's number.

    Blocks until the ledger acknowledges: the entry is durable then. In an async node use `arecord`.
    """
    return int(_ask(address, {"record": facts})["entry"])


def find(address: str, **match: Any) -> list[Entry]:
    """Return the entries that have these facts, in the order in which they were made."""
    found: list[Entry] = _ask(address, {"entries": match})["entries"]
    return found


async def arecord(address: str, **facts: Any) -> int:
    """Do as `record` does, without blocking the event loop."""
    return await asyncio.to_thread(record, address, **facts)


class Ledger:
    """The tests' side: starts the ledger's process and reads it."""

    def __init__(self, path: Path) -> None:
        """Take the file that holds the entries, one line each."""
        self.path = path
        self.address = ""
        """Where `record` finds it: text, so that it can be handed to a process."""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.ledger", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt at the terminal is for pytest alone
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"the ledger did not start: exit code {self._process.wait()}")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.communicate(timeout=_LIMIT)

    def entries(self, **match: Any) -> list[Entry]:
        """Return the entries that have these facts, in the order in which they were made."""
        return self._entries({"entries": match})

    def wait_for(self, *, count: int = 1, timeout: float = 30.0, **match: Any) -> list[Entry]:
        """Wait until at least `count` entries have these facts; `TimeoutError` otherwise.

        It blocks: in a test with an event loop, call it through `asyncio.to_thread`.
        """
        entries = self._entries({"entries": match, "count": count, "timeout": timeout})
        if len(entries) < count:
            raise TimeoutError(
                f"{len(entries)} of {count} entries with {match} after {timeout} s; "
                f"all entries: {self.entries()}"
            )
        return entries

    def hold(self, **match: Any) -> None:
        """From now on enter what has these facts, but acknowledge it only after `release`."""
        _ask(self.address, {"hold": match})

    def release(self, **match: Any) -> None:
        """Acknowledge what is held by `hold` with these facts, or all, and hold it no more."""
        _ask(self.address, {"release": match})

    def _entries(self, request: dict[str, Any]) -> list[Entry]:
        timeout = _LIMIT + request.get("timeout", 0)
        entries: list[Entry] = _ask(self.address, request, timeout=timeout)["entries"]
        return entries


def _ask(address: str, request: dict[str, Any], *, timeout: float = _LIMIT) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=timeout) as connection,
        connection.makefile("rw", encoding="utf-8") as lines,
    ):
        lines.write(json.dumps(request) + "\n")
        lines.flush()
        line = lines.readline()
        if not line:
            raise ConnectionError(f"the ledger at {address} closed the connection")
        reply: dict[str, Any] = json.loads(line)
        return reply


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True  # the acknowledgement of a killed caller may be held for ever
    request_queue_size = 128

    def __init__(self, path: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._file = path.open("a", encoding="utf-8")
        self._entries: list[Entry] = []
        self._holds: list[Entry] = []
        self._changed = threading.Condition()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._changed:
            if "record" in request:
                return self._record(request["record"])
            if "entries" in request:
                return self._read(request["entries"], request)
            if "hold" in request:
                self._holds.append(request["hold"])
            else:
                let_go = request["release"]
                self._holds = [hold for hold in self._holds if not _matches(hold, let_go)]
                self._changed.notify_all()
            return {}

    def _record(self, facts: Entry) -> dict[str, Any]:
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._entries.append(facts)
        number = len(self._entries)
        self._changed.notify_all()
        self._changed.wait_for(lambda: not any(_matches(facts, hold) for hold in self._holds))
        return {"entry": number}

    def _read(self, match: Entry, request: dict[str, Any]) -> dict[str, Any]:
        def found() -> list[Entry]:
            return [entry for entry in self._entries if _matches(entry, match)]

        count = request.get("count", 0)
        self._changed.wait_for(lambda: len(found()) >= count, request.get("timeout", 0))
        return {"entries": found()}


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        line = self.rfile.readline()
        if not line.endswith(b"\n"):
            return  # the caller was killed before it had asked
        reply = json.dumps(self.server.answer(json.loads(line))) + "\n"
        try:
            self.wfile.write(reply.encode())
        except ConnectionError:
            return  # the caller was killed while its acknowledgement was held


def _matches(facts: Entry, wanted: Entry) -> bool:
    return wanted.items() <= facts.items()


def main(path: Path) -> None:
    """Serve until standard input ends, which it does however the tests end."""
    server = _Server(path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    print(f"{host!s}:{port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
