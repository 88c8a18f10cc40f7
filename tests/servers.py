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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import psycopg
import pymysql
from psycopg import sql

_START_LIMIT = 30.0
_STOP_LIMIT = 30.0
_NOT_YET = (psycopg.OperationalError, pymysql.err.OperationalError)
"""What the drivers raise while a server does not answer."""


class ServerUnavailableError(Exception):
    """A server's programs are not installed, or it does not start; the message says which."""


class PostgresServer:
    """A PostgreSQL server of our own, durable as in production: nothing is tuned for speed.

    `kill()` followed by `start()` is a crash and a recovery of the same data on the same port.
    """

    def __init__(self) -> None:
        self.port = 0
        self._programs = _find_postgres()
        self._daemon = _Daemon("PostgreSQL")
        self._databases = 0

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
        self.port = self._daemon.start(self.port, self._command, self._connect)

    @property
    def is_running(self) -> bool:
        """Whether it was started and neither stopped nor killed."""
        return self._daemon.is_running

    def stop(self, *, immediately: bool = False) -> None:
        """Shut the server down; open connections are cut.

        Immediately, it writes nothing more, and recovers from its log when it is started again.
        """
        self._daemon.end(signal.SIGQUIT if immediately else signal.SIGINT)

    def kill(self) -> None:
        """Crash the server: no shutdown, no checkpoint."""
        self._daemon.end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.stop()
        self._daemon.remove_folder()

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
        with self._connect(self.port) as connection:
            connection.execute(statement)

    def dump(self, database: str) -> bytes:
        """Return what `pg_dump` makes of a database."""
        options = ["--host=127.0.0.1", f"--port={self.port}", "--username=agentflow"]
        command = [str(self._programs / "pg_dump"), *options, database]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout

    def log(self) -> str:
        """Return the end of what the server wrote about itself."""
        return self._daemon.log()

    def _create_cluster(self) -> None:
        options = ["--no-sync", "--auth=trust", "--username=agentflow", "--locale=C", "-E", "UTF8"]
        done = subprocess.run(
            [self._programs / "initdb", *options, "-D", self._daemon.folder / "data"],
            cwd=self._daemon.folder,
            capture_output=True,
            check=False,
            timeout=_START_LIMIT,
            **self._daemon.account,
        )
        if done.returncode != 0:
            raise ServerUnavailableError(f"initdb failed: {done.stderr.decode(errors='replace')}")

    def _command(self, port: int) -> list[str | Path]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "max_connections": "600",
        }
        return [
            self._programs / "postgres",
            *("-D", self._daemon.folder / "data"),
            *(f"--{name}={value}" for name, value in settings.items()),
        ]

    def _connect(self, port: int) -> psycopg.Connection:
        url = f"postgresql://agentflow@127.0.0.1:{port}/postgres"
        return psycopg.connect(url, autocommit=True, connect_timeout=5)


class PgBouncer:
    """A connection pooler in transaction mode: each transaction may get another server connection.

    Everything but the mode and the size of the pool is as PgBouncer has it by default; above all,
    it refuses startup parameters that it does not know.
    """

    def __init__(self, server: PostgresServer, *, pool_size: int = 2) -> None:
        """Stand in front of a running server, with so many connections to it per database."""
        self.port = 0
        self._server = server
        self._pool_size = pool_size
        self._program = _find_pgbouncer()
        self._daemon = _Daemon("PgBouncer")

    def __enter__(self) -> Self:
        try:
            self.port = self._daemon.start(0, self._command, self._connect)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop it; whoever is connected is cut."""
        self._daemon.end(signal.SIGTERM)  # at once, where SIGINT would wait for the clients
        self._daemon.remove_folder()

    def url(self, database: str) -> str:
        """Return the URL of one of the server's databases, by way of the pooler."""
        return f"postgresql://agentflow@127.0.0.1:{self.port}/{database}"

    def connections(self, side: Literal["CLIENTS", "SERVERS"], database: str) -> int:
        """Count its connections for a database: from clients, or to the server."""
        with self._connect(self.port) as console:
            rows = console.execute(f"SHOW {side}").fetchall()
        return sum(database in row for row in rows)

    def log(self) -> str:
        """Return the end of what it wrote about itself."""
        return self._daemon.log()

    def _command(self, port: int) -> list[str | Path]:
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": self._daemon.folder / "users",
            "admin_users": "agentflow",
            "pool_mode": "transaction",
            "default_pool_size": self._pool_size,
            "max_client_conn": 500,
        }
        lines = [
            "[databases]",
            f"* = host=127.0.0.1 port={self._server.port}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        (self._daemon.folder / "users").write_text('"agentflow" ""\n')
        (self._daemon.folder / "pgbouncer.ini").write_text("\n".join([*lines, ""]))
        return [self._program, self._daemon.folder / "pgbouncer.ini"]

    def _connect(self, port: int) -> psycopg.Connection:
        # Its own console, which looks like a database but knows no statement that is prepared.
        url = f"postgresql://agentflow@127.0.0.1:{port}/pgbouncer"
        return psycopg.connect(
            url, autocommit=True, connect_timeout=5, cursor_factory=psycopg.ClientCursor
        )


class MariaDBServer:
    """A MariaDB server of our own, durable as in production; a database of the user's, not ours.

    Databases are made as the server does by default, in Latin-1 and blind to case.
    """

    def __init__(self) -> None:
        self.port = 0
        self._install, self._program = _find_mariadb()
        self._daemon = _Daemon("MariaDB")
        self._databases = 0

    def __enter__(self) -> Self:
        try:
            self._create_data()
            self.port = self._daemon.start(0, self._command, self._connect)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and remove its data."""
        self._daemon.end(signal.SIGTERM)
        self._daemon.remove_folder()

    def url(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"mariadb://root@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create a database and return its name."""
        self._databases += 1
        name = f"test_{self._databases}"
        self._execute(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database."""
        self._execute(f"DROP DATABASE {name}")

    def log(self) -> str:
        """Return the end of what the server wrote about itself."""
        return self._daemon.log()

    def _execute(self, statement: str) -> None:
        with self._connect(self.port) as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def _create_data(self) -> None:
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        done = subprocess.run(
            [self._install, *self._settings(), *options],
            cwd=self._daemon.folder,
            capture_output=True,
            check=False,
            timeout=_START_LIMIT,
            **self._daemon.account,
        )
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise ServerUnavailableError(f"mariadb-install-db failed: {said}")

    def _command(self, port: int) -> list[str | Path]:
        return [
            self._program,
            *self._settings(),
            "--bind-address=127.0.0.1",
            f"--port={port}",
            "--socket=",
            f"--pid-file={self._daemon.folder / 'pid'}",
        ]

    def _settings(self) -> list[str]:
        # `--no-defaults` has to be the first. The log is small, since a data folder is as large.
        data = self._daemon.folder / "data"
        return ["--no-defaults", f"--datadir={data}", "--innodb-log-file-size=8M"]

    def _connect(self, port: int) -> pymysql.Connection[Any]:
        return pymysql.connect(host="127.0.0.1", port=port, user="root", connect_timeout=5)


class _Daemon:
    """One server program: its folder and account, its process, and what it wrote about itself."""

    def __init__(self, name: str) -> None:
        self.account = _unprivileged_account(name)
        # Not below pytest's own folder, which only its owner may enter.
        self.folder = Path(tempfile.mkdtemp(prefix=f"agentflow-{name.lower()}-"))
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        if "user" in self.account:
            shutil.chown(self.folder, self.account["user"], self.account["group"])

    def start(
        self,
        port: int,
        command: Callable[[int], list[str | Path]],
        connect: Callable[[int], AbstractContextManager[object]],
    ) -> int:
        """Run the program and return its port once it answers; 0 stands for any that is free."""
        deadline = time.monotonic() + _START_LIMIT
        while True:
            chosen = port or _free_port()
            if self._try_start(command(chosen), partial(connect, chosen), deadline):
                return chosen
            # The port was taken meanwhile, or a crashed predecessor has not let go of its memory.
            if time.monotonic() > deadline:
                raise ServerUnavailableError(f"{self._name} does not start:\n{self.log()}")
            time.sleep(0.05)

    def _try_start(
        self,
        command: list[str | Path],
        connect: Callable[[], AbstractContextManager[object]],
        deadline: float,
    ) -> bool:
        """Run the server until it answers; false if it ended instead."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # An interrupt typed at the terminal is for pytest, which then stops the server.
                start_new_session=True,
                **self.account,
            )
        while self._process.poll() is None:
            with contextlib.suppress(*_NOT_YET), connect():
                return True
            if time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                break
            time.sleep(0.02)  # a server tells nobody when it is ready; it has to be asked
        return False

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def end(self, how: signal.Signals) -> None:
        """Send a signal and wait for the end of the process, if there is one."""
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log(self) -> str:
        """Return the end of what the program wrote."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "log").read_text(errors="replace")[-4000:]
        return ""

    def remove_folder(self) -> None:
        """Remove everything that it has stored."""
        shutil.rmtree(self.folder, ignore_errors=True)


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


def _find_postgres() -> Path:
    """Return the folder of one version's programs: the one on the PATH, else the newest."""
    on_path = shutil.which("initdb")
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    newest_first = sorted(debian, key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in [*([Path(on_path).resolve().parent] if on_path else []), *newest_first]:
        if all((folder / program).exists() for program in ("initdb", "postgres")):
            return folder
    raise ServerUnavailableError("PostgreSQL is not installed (make test installs it where it may)")


def _find_pgbouncer() -> str:
    """Return the program; Debian puts it where only root's PATH leads."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if found is None:
        raise ServerUnavailableError(
            "PgBouncer is not installed (make test installs it where it may)"
        )
    return found


def _find_mariadb() -> tuple[str, str]:
    """Return the program that makes a data folder, and the server, which is among root's."""
    install = shutil.which("mariadb-install-db")
    server = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
    # The first asks this one for its options; Debian has it in the package of the client.
    if install is None or server is None or shutil.which("my_print_defaults") is None:
        raise ServerUnavailableError(
            "MariaDB is not installed (make test installs it where it may)"
        )
    return install, server


def _unprivileged_account(name: str) -> dict[str, Any]:
    """Return the arguments that make `subprocess` drop root, which the servers refuse to run as."""
    if os.geteuid() != 0:
        return {}
    for user in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(user)
            return {"user": user, "group": entry.pw_gid, "extra_groups": []}
    raise ServerUnavailableError(f"{name} refuses to run as root and there is no other account")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
