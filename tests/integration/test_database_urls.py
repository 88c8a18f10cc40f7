"""Databases that cannot be used, and ones that many processes start to use at once."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.database import migrate
from agentflow.database.engine import parse_url
from agentflow.errors import StoreUnavailableError, UnsupportedUrlError
from tests.integration.graphs import chain, logs

SECRET = "hunter2-secret"


@pytest.mark.parametrize(
    "url",
    [
        f"mongodb://ada:{SECRET}@host/db",
        f"mysql://ada:{SECRET}@host/db",
        f"postgresql+asyncpg://ada:{SECRET}@host/db",
        "sqlite+aiosqlite:///x.db",
        "agents.db",
        "",
        "sqlite:",
        f"://{SECRET}",
    ],
)
def test_unsupported_url_is_refused_at_once_without_its_password(url: str) -> None:
    for use in (open_checkpointer, migrate.up, migrate.status):
        with pytest.raises(UnsupportedUrlError, match="use one of: memory://") as refused:
            use(url)
        assert SECRET not in str(refused.value)
    if url:
        with pytest.raises(UnsupportedUrlError):
            AgentFlow(url)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_way_to_say_postgres_is_understood(scheme: str) -> None:
    assert parse_url(f"{scheme}://h/db").drivername == "postgresql+psycopg"


HIDDEN_DRIVER = """
import sys

finders = sys.meta_path[:]

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "psycopg":
            return None
        return next((s for f in finders if (s := f.find_spec(name, path, target))), None)

sys.meta_path[:] = [Hide()]
from agentflow import AgentFlow
from agentflow.errors import MissingDriverError
try:
    AgentFlow("postgresql://ada:hunter2-secret@host/db")
except MissingDriverError as error:
    assert "hunter2" not in str(error)
    print(error)
AgentFlow("sqlite:///never-made.db")
"""


def test_missing_driver_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN_DRIVER],
        check=False,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert 'pip install "agentflow[postgres]"' in done.stdout, done.stderr
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == [], "nothing connects before the first use"


def unused_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("kind", ["refused", "folder", "no file"])
async def test_database_that_cannot_be_reached_is_named_without_its_password(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.db").mkdir()
    url = {
        "refused": f"postgresql://ada:{SECRET}@127.0.0.1:{unused_port()}/db",
        "folder": f"sqlite:///{tmp_path / 'folder.db'}",
        "no file": f"sqlite:///{tmp_path / 'none' / 'x.db'}",
    }[kind]
    app = AgentFlow(url)
    app.register(chain(("a", logs("a"))), name="g")
    for call in (app.get_run("r"), app.submit("g", {}), app.list_runs()):
        with pytest.raises(StoreUnavailableError, match="cannot reach") as refused:
            await call
        assert SECRET not in f"{refused.value} {refused.value!r} {refused.value.store}"
    await app.aclose()
    with open_checkpointer(url) as saver, pytest.raises(StoreUnavailableError):
        saver.get_tuple({"configurable": {"thread_id": "t"}})


CREATE = """
import asyncio, sys
from agentflow import AgentFlow
from tests.integration.graphs import chain, logs

async def main():
    async with AgentFlow(sys.argv[1]) as app:
        app.register(chain(("a", logs("a"))), name="g")
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        handle = await app.submit("g", {}, run_id=sys.argv[2])
        await app.drive(handle.id)

asyncio.run(main())
"""


def start(url: str, run_id: str) -> subprocess.Popen[bytes]:
    """Start a process that has imported everything and waits to be let go."""
    command = [sys.executable, "-W", "ignore", "-c", CREATE, url, run_id]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def let_go(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all are ready, then let them go at once."""
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == b"ready\n"
        each.stdout.close()
    for each in processes:
        assert each.stdin is not None
        each.stdin.write(b"go\n")
        each.stdin.close()


@pytest.mark.slow
async def test_processes_that_start_on_an_empty_database_at_once_all_work(
    request: pytest.FixtureRequest, database_url: str
) -> None:
    if database_url.startswith("postgresql"):
        server = request.getfixturevalue("postgres_server")
        name = server.create_database()
        database_url = server.url(name)
    starting = [start(database_url, f"r{i}") for i in range(3)]
    await asyncio.to_thread(let_go, starting)
    assert [await asyncio.to_thread(each.wait, 60) for each in starting] == [0, 0, 0]
    async with AgentFlow(database_url) as app:
        runs = (await app.list_runs(status="succeeded")).items
        assert sorted(run.id for run in runs) == ["r0", "r1", "r2"]
    engine = sa.create_engine(parse_url(database_url))
    with engine.connect() as connection:
        versions = connection.execute(sa.text("SELECT version_num FROM agentflow_schema")).all()
    engine.dispose()
    assert len(versions) == 1
