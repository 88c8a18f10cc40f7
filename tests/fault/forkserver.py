"""A warm server that forks the processes which tests kill.

Starting a Python process and importing LangGraph takes most of a second; a fault test needs many.
The server imports everything once and then forks: a victim is ready after milliseconds and is a
real process, with its own memory, connections and exit code. The server itself starts no thread
and opens no connection, because neither survives a fork intact.

One request is one line of JSON over a socket pair, answered by one line. The server ends, with all
of its victims, when the other end of the pair is closed, however the tests ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

PRELOADED = (
    "agentflow",
    "langchain_core.messages",
    "langgraph.graph",
    "langgraph.prebuilt",
    "alembic.command",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    # What victims run: importing it anew in each would take longer than what they do.
    "tests.fault.calls",
    "tests.fault.graphs",
    "tests.fault.misbehaviour",
    "tests.fault.savers",
)
_START_LIMIT = 60.0
_REPLY_LIMIT = 30.0


class ForkServer:
    """The tests' side: starts the server process and asks it for victims."""

    def __init__(self, folder: Path) -> None:
        """Take the folder that receives one log for the server and one for each victim."""
        self.victims: list[Victim] = []
        """Those that were spawned since `kill_all`, whether they still run or not."""
        self._folder = folder
        self._spawned = 0
        self._asking = threading.Lock()  # tests wait for several victims from several threads
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        with theirs, (self._folder / "forkserver.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fault.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt at the terminal is for pytest alone
            )
        self._socket = ours
        self._socket.settimeout(_START_LIMIT)
        self._lines = ours.makefile("r", encoding="utf-8")
        self._receive()
        self._socket.settimeout(_REPLY_LIMIT)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lines.close()
        self._socket.close()
        if self._process is not None:
            self._process.wait(_REPLY_LIMIT)

    def spawn(self, target: str, *args: Any, env: dict[str, str] | None = None) -> Victim:
        """Run `module:function` in a new process, with arguments that JSON can carry.

        A coroutine function is run to its end. The exit code is 0 once the function returns, 1 if
        it raises, and what it says if it raises `SystemExit`.
        """
        self._spawned += 1
        log = self._folder / f"{self._spawned:03d}-{target.rpartition(':')[2]}.log"
        reply = self._ask(target=target, args=args, env=env or {}, log=str(log))
        victim = Victim(pid=reply["pid"], target=target, log=log, server=self)
        self.victims.append(victim)
        return victim

    def kill_all(self) -> None:
        """Kill every victim that is left, wait for its end, and forget them all."""
        for victim in self.victims:
            victim.kill()
            victim.wait(_REPLY_LIMIT)
        self.victims.clear()

    def reap(self, pid: int) -> int:
        """Collect the exit code of a process that has ended."""
        return int(self._ask(reap=pid)["returncode"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        with self._asking:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            return self._receive()

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            log = (self._folder / "forkserver.log").read_text(errors="replace")
            raise RuntimeError(f"the fork server ended:\n{log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply


@dataclass(kw_only=True, eq=False)
class Victim:
    """A process that a test may kill, stop and continue.

    Its pid stays its own until `wait` has returned, since the server does not collect it earlier.
    """

    pid: int
    target: str
    log: Path
    server: ForkServer = field(repr=False)
    returncode: int | None = None
    """As in `subprocess`: the exit code, or minus the signal's number; `None` before `wait`."""

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if the process has ended."""
        if self.returncode is None:
            os.kill(self.pid, how)

    def has_ended(self) -> bool:
        """Whether the process has ended, for whatever reason."""
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self.returncode is not None

    def stop(self) -> None:
        """Freeze the process, as a paused machine would; returns once it no longer runs."""
        self.kill(signal.SIGSTOP)
        # The signal is delivered to each thread on its own: ask the kernel until all have stopped.
        while self.returncode is None and not _is_stopped_or_ended(self.pid):
            time.sleep(0.001)

    def resume(self) -> None:
        """Let a stopped process continue."""
        self.kill(signal.SIGCONT)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the process to end and return its exit code; `TimeoutError` if it does not.

        It blocks: in a test with an event loop, call it through `asyncio.to_thread`.
        """
        if self.returncode is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                if not select.select([pidfd], [], [], timeout)[0]:
                    raise TimeoutError(f"{self} still runs after {timeout} s:\n{self.output()}")
            finally:
                os.close(pidfd)
            self.returncode = self.server.reap(self.pid)
        return self.returncode

    def output(self) -> str:
        """Return what the process has written to its standard output and error so far."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(errors="replace")
        return ""


def _is_stopped_or_ended(pid: int) -> bool:
    states = []
    for status in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The state follows the command's name, which stands in parentheses and may hold any.
            states.append(status.read_text().rpartition(")")[2].split()[0])
    return all(state in "TtZX" for state in states)


def serve(connection: socket.socket) -> None:
    """Answer requests until the tests' end of the pair is closed, then kill what still runs."""
    for name in PRELOADED:
        importlib.import_module(name)
    # Asked of the kernel, since a thread that native code started is not in `threading`.
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        raise RuntimeError(f"an import started {len(threads) - 1} thread(s): a fork loses them")
    gc.collect()
    gc.freeze()  # so that a victim's collector does not copy the pages that all of them share

    victims: set[int] = set()
    with connection.makefile("rw", encoding="utf-8") as lines:
        _reply(lines, ready=os.getpid())
        for line in lines:
            request = json.loads(line)
            if "reap" in request:
                _, status = os.waitpid(request["reap"], 0)
                victims.remove(request["reap"])
                _reply(lines, returncode=os.waitstatus_to_exitcode(status))
                continue
            pid = os.fork()
            if pid == 0:
                _become_victim(connection, **request)
            victims.add(pid)
            _reply(lines, pid=pid)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _reply(lines: Any, **reply: Any) -> None:
    lines.write(json.dumps(reply) + "\n")
    lines.flush()


def _become_victim(
    connection: socket.socket, target: str, args: list[Any], env: dict[str, str], log: str
) -> NoReturn:
    """Run the target in the forked process and end it, without returning to the server's loop."""
    code = 1
    try:
        # Closed by number: the buffered file above it still belongs to the server.
        os.close(connection.fileno())
        _redirect_output(log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        random.seed()  # or all victims would draw the server's random numbers
        os.environ.update(env)
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        if inspect.iscoroutinefunction(function):
            asyncio.run(function(*args))
        else:
            function(*args)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 - reported in the log and by the exit code
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect_output(log: str) -> None:
    # Unbuffered enough for a post-mortem: what was written before a SIGKILL is in the file.
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
