"""Real servers for tests: each on a free port, in a temporary folder, stopped by its process.

Nobody's running server is used, and nothing outlives the test session. `install_servers.sh` fetches
the programs; this module finds and runs them. It owns no fixtures: those are in `conftest.py`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg
from psycopg import sql

_START_LIMIT = 30.0
_STOP_LIMIT = 30.0


class ServerUnavailableError(Exception):
    """A server's programs are not installed, or it does not start; the message says which."""


class PostgresServer:
    """A PostgreSQL server of our own, durable as in production: nothing is tuned for speed.

    `kill()` followed by `start()` is a crash and a recovery of the same data on the same port.
    """

    def __init__(self) -> None:
        self.port = 0
        self._programs = _find_programs()
        # Not below pytest's own folder, which only its owner may enter.
        self._folder = Path(tempfile.mkdtemp(prefix="agentflow-postgres-"))
        self._account = _unprivileged_account()
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        if "user" in self._account:
            shutil.chown(self._folder, self._account["user"], self._account["group"])

    def __enter__(self) -> Self:
        try:
            self._create_cluster()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server and return once it answers."""
        # Only the first start may look for another port: afterwards clients hold URLs to this one.
        chosen = self.port != 0
        deadline = time.monotonic() + _START_LIMIT
        while not self._try_start(self.port if chosen else _free_port(), deadline):
            # The port was taken meanwhile, or a crashed predecessor has not let go of its memory.
            if time.monotonic() > deadline:
                raise ServerUnavailableError(f"PostgreSQL does not start:\n{self.log()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Shut the server down; open connections are cut."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Crash the server: no shutdown, no checkpoint."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://agentflow@127.0.0.1:{self.port}/{database}"

    def create_database(self, template: str = "template1") -> str:
        """Create a database as a copy of another one and return its name."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is still connected to it."""
        self.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def execute(self, statement: sql.Composed) -> None:
        """Run one administrative statement, outside of a transaction."""
        with self._connect() as connection:
            connection.execute(statement)

    def log(self) -> str:
        """Return the end of what the server wrote about itself."""
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / "log").read_text(errors="replace")[-4000:]
        return ""

    def _create_cluster(self) -> None:
        options = ["--no-sync", "--auth=trust", "--username=agentflow", "--locale=C", "-E", "UTF8"]
        done = subprocess.run(
            [self._programs / "initdb", *options, "-D", self._folder / "data"],
            cwd=self._folder,
            capture_output=True,
            check=False,
            timeout=_START_LIMIT,
            **self._account,
        )
        if done.returncode != 0:
            raise ServerUnavailableError(f"initdb failed: {done.stderr.decode(errors='replace')}")

    def _try_start(self, port: int, deadline: float) -> bool:
        """Run the server until it answers; false if it ended instead."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "max_connections": "200",
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres",
                    *("-D", self._folder / "data"),
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # An interrupt typed at the terminal is for pytest, which then stops the server.
                start_new_session=True,
                **self._account,
            )
        self.port = port
        while self._process.poll() is None:
            with contextlib.suppress(psycopg.OperationalError), self._connect():
                return True
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(0.02)  # a server tells nobody when it is ready; it has to be asked
        return False

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self.url("postgres"), autocommit=True, connect_timeout=5)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextlib.contextmanager
def no_leaked_connections(port: int) -> Iterator[None]:
    """Fail if this process holds more connections to a local port afterwards than before."""
    before = _connections_to(port)
    yield
    leaked = _connections_to(port) - before
    assert not leaked, f"{len(leaked)} connection(s) to the database were left open: close the app"


@contextlib.contextmanager
def no_leaked_files(folder: Path) -> Iterator[None]:
    """Fail if this process still has a file below a folder open afterwards."""
    yield
    opened = {Path(file.path) for file in psutil.Process().open_files()}
    leaked = sorted(path.name for path in opened if path.is_relative_to(folder))
    assert not leaked, f"{', '.join(leaked)} was left open: close the app"


def _connections_to(port: int) -> set[int]:
    """Return this process's own ends of its connections to a local port."""
    return {
        connection.laddr.port
        for connection in psutil.Process().net_connections("tcp")
        if connection.raddr
        and connection.raddr.port == port
        and connection.status == psutil.CONN_ESTABLISHED
    }


def _find_programs() -> Path:
    """Return the folder of one version's programs: the one on the PATH, else the newest."""
    on_path = shutil.which("initdb")
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    newest_first = sorted(debian, key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in [*([Path(on_path).resolve().parent] if on_path else []), *newest_first]:
        if all((folder / program).exists() for program in ("initdb", "postgres")):
            return folder
    raise ServerUnavailableError("PostgreSQL is not installed (make test installs it where it may)")


def _unprivileged_account() -> dict[str, Any]:
    """Return the arguments that make `subprocess` drop root, which PostgreSQL refuses to run as."""
    if os.geteuid() != 0:
        return {}
    for user in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(user)
            return {"user": user, "group": entry.pw_gid, "extra_groups": []}
    raise ServerUnavailableError("PostgreSQL refuses to run as root and there is no other account")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
