"""The command line as processes of its own: on a terminal, from another folder, as workers."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentflow.types import Decision, RunStatus
from tests.integration.cli import (
    APP,
    HOSTILE,
    REPOSITORY,
    Cli,
    finish,
    fresh_cli,
    start,
)


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


# on a terminal


def _on_a_terminal(cli: Cli, *args: str, answer: str | None) -> tuple[int, str]:
    """Run a command whose streams are a terminal; return its exit code and what was shown."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "agentflow", *args, "--db", cli.url]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        try:
            shown = _converse(ours, answer)
        finally:
            os.close(ours)
        return process.wait(30), shown


def _converse(terminal: int, answer: str | None) -> str:
    shown = b""
    while select.select([terminal], [], [], 30)[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux tells that the other side has closed
            break
        if not data:
            break
        shown += data
        if answer is not None and b"[y/N]" in shown:
            os.write(terminal, answer.encode())
            answer = None
    return shown.decode()


@pytest.mark.slow
def test_on_a_terminal_approving_shows_the_proposal_and_asks(cli: Cli) -> None:
    approval = cli.pending(proposal={"note": HOSTILE})
    approve = ("approval", "approve", approval.id, "--by", "ann")
    code, shown = _on_a_terminal(cli, *approve, answer="n\n")
    assert code == 1
    assert "nothing was recorded" in shown
    assert cli.approval(approval.id) == approval
    code, shown = _on_a_terminal(cli, *approve, answer="y\n")
    assert code == 0, shown
    question = shown.index(f"Approve version {approval.version}?")
    assert shown.index("pay 10\\u202e000\\u202c EUR\\u200b") < question
    assert cli.approval(approval.id).decided_by == "ann"


@pytest.mark.slow
def test_on_a_terminal_yes_approves_without_a_question(cli: Cli) -> None:
    approval = cli.pending()
    approve = ("approval", "approve", approval.id, "--by", "ann", "--yes")
    code, shown = _on_a_terminal(cli, *approve, answer=None)
    assert code == 0, shown
    assert "[y/N]" not in shown
    assert cli.approval(approval.id).decision == Decision(type="approve")


@pytest.mark.slow
def test_a_table_on_a_terminal_shows_ids_whole(cli: Cli) -> None:
    run_id = cli.submit("echo", "x")
    code, shown = _on_a_terminal(cli, "run", "list", answer=None)
    assert code == 0
    assert run_id in shown


OWN_APP = """
import os
from agentflow import AgentFlow
url_at_import = os.environ.get("AGENTFLOW_DB_URL")
app = AgentFlow("sqlite:///own.db")
class holder:
    app = AgentFlow(url_at_import)
"""


@pytest.mark.slow
def test_the_app_is_found_in_the_current_folder_and_db_overrides_its_url(tmp_path: Path) -> None:
    (tmp_path / "my_app.py").write_text(OWN_APP, encoding="utf-8")
    (tmp_path / "broken_app.py").write_text("1 / 0", encoding="utf-8")
    own = finish(start("run", "list", cwd=tmp_path, AGENTFLOW_APP="my_app:app"))
    assert (own.code, own.out, own.err) == (0, "", "no runs\n")
    assert (tmp_path / "own.db").exists()
    args = ("run", "list", "--app", "my_app:holder.app", "--db", "sqlite:///other.db")
    assert finish(start(*args, cwd=tmp_path)).code == 0
    assert (tmp_path / "other.db").exists()
    broken = finish(start("run", "list", "--app", "broken_app:app", cwd=tmp_path))
    assert broken.code == 2
    assert "its import failed with ZeroDivisionError: division by zero" in broken.err
    assert "Traceback" not in broken.err


# start-up


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], ["run", "submit", "--help"], ["version"]])
def test_help_and_version_import_nothing_slow(args: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["agentflow", *{args!r}]
from agentflow.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
slow = {{"langgraph", "langchain_core", "sqlalchemy", "alembic"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "agentflow" in done.stdout or "version" in done.stdout


# workers


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _wait_for(cli: Cli, run_id: str, status: str, worker: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while cli.run(run_id).status != status:
        assert worker.poll() is None, worker.communicate()
        assert time.monotonic() < deadline, cli.run(run_id)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_run_is_submitted_driven_approved_and_finished_by_separate_processes(
    cli: Cli, started: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    common = ("--app", APP, "--db", cli.url)
    submit = ("run", "submit", "refund", "--input", '{"proposal": 10}', *common)
    submitted = finish(start(*submit))
    run_id = submitted.out.strip()
    assert submitted.code == 0
    for status in (RunStatus.WAITING, RunStatus.SUCCEEDED):
        worker = start("worker", *common, "--concurrency", "2", "--name", "w1")
        started.append(worker)
        _wait_for(cli, run_id, status, worker)
        worker.send_signal(number)
        ended = finish(worker)
        assert (ended.code, ended.out) == (0, ""), ended
        assert re.match(
            r"worker w1 \(pid \d+\) started: concurrency 2, queues default\n", ended.err
        )
        if status is RunStatus.WAITING:
            (approval,) = cli.data("approval", "list")
            approve = ("approval", "approve", approval["id"], "--by", "ann", "--db", cli.url)
            decided = finish(start(*approve, "--if-version", str(approval["version"])))
            assert decided.code == 0, decided
    assert cli.run(run_id).output["decided"]["type"] == "approve"


@pytest.mark.slow
def test_a_worker_takes_runs_of_its_queues_only(
    cli: Cli, started: list[subprocess.Popen[str]]
) -> None:
    other = cli.submit("echo", 1, "--queue", "other")
    mine = [cli.submit("echo", 1, "--queue", queue) for queue in ("a", "b")]
    queues = ("--queue", "a", "--queue", "b")
    worker = start("worker", *queues, "--app", APP, "--db", cli.url)
    started.append(worker)
    for run_id in mine:
        _wait_for(cli, run_id, RunStatus.SUCCEEDED, worker)
    assert cli.run(other).status is RunStatus.QUEUED
    worker.terminate()
    assert finish(worker).code == 0
