"""Pausing, dead letters, the doctor, restored backups and workers on the command line."""

from __future__ import annotations

import json
import logging
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from agentflow.cli.workers import _JsonFormatter, status_line
from agentflow.types import RunStatus
from agentflow.worker import WorkerStats
from tests.integration.cli import APP, Cli, finish, fresh_cli, start


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_run_is_paused_and_resumed(cli: Cli) -> None:
    run_id = cli.submit("echo", 1)
    paused = cli.data("run", "pause", run_id, "--reason", "look", "--by", "ann")
    assert (paused["status"], bool(paused["paused_at"])) == ("queued", True)
    assert "paused_at:" in cli.ok("run", "show", run_id).out
    assert cli.data("run", "resume", run_id)["paused_at"] is None
    cli.drive(run_id)
    refused = cli("run", "pause", run_id)
    assert (refused.code, "is succeeded" in refused.err) == (4, True)
    shown = cli.data("run", "show", run_id, "--events")
    (event,) = [each for each in shown["events"] if each["type"] == "run.paused"]
    assert event["data"] == {"reason": "look", "by": "ann"}


@pytest.mark.parametrize("scope", [("--graph", "echo"), ("--queue", "default"), ("--all",)])
def test_scopes_are_paused_listed_and_resumed(cli: Cli, scope: tuple[str, ...]) -> None:
    assert "nothing is paused" in cli.ok("pause").err
    made = cli.data("pause", *scope, "--reason", "incident", "--by", "ann")
    assert cli.data("pause") == [made]
    assert (made["scope"], made["name"]) == (scope[0].strip("-"), "".join(scope[1:]))
    assert "goes on" in cli.ok("resume", *scope).err
    assert "was not paused" in cli.ok("resume", *scope).err
    assert cli.data("pause") == []


@pytest.mark.parametrize("args", [("resume",), ("pause", "--all", "--graph", "g")])
def test_what_is_paused_or_resumed_has_to_be_said(cli: Cli, args: tuple[str, ...]) -> None:
    refused = cli(*args)
    assert (refused.code, "exclude each other" in refused.err) == (2, True)


def test_dead_letter_is_listed_shown_requeued_once_and_discarded(cli: Cli) -> None:
    run_id = cli.submit("fail", 1)
    cli.drive(run_id)
    (listed,) = cli.data("dead-letter", "list", "--graph", "fail", "--reason", "exhausted")
    assert cli.data("dead-letter", "show", run_id) == listed
    shown = cli.ok("dead-letter", "show", run_id)
    assert "| the node says no" in shown.out
    assert f"agentflow checkpoint show {run_id} {listed['checkpoint_id']}" in shown.err
    assert cli("dead-letter", "requeue", run_id, "--checkpoint", "nope").code == 3
    assert cli.data("dead-letter", "requeue", run_id, "--by", "ann")["status"] == "queued"
    refused = cli("dead-letter", "requeue", run_id)
    assert (refused.code, "it is queued" in refused.err) == (4, True)
    cli.drive(run_id)
    assert cli.data("dead-letter", "discard", run_id)["status"] == "failed"
    assert "no dead letters" in cli.ok("dead-letter", "list").err
    assert cli("dead-letter", "show", run_id).code == 4
    assert cli("dead-letter", "discard", "nope").code == 3


def test_busy_thread_is_refused_or_interrupted(cli: Cli) -> None:
    run_id = cli.pending().run_id
    again = ("--thread-id", run_id, "--app", APP)
    refused = cli("run", "submit", "echo", "--input", "{}", "--on-busy", "reject", *again)
    assert (refused.code, run_id in refused.err) == (4, True)
    new = cli.submit("echo", 2, "--thread-id", run_id, "--on-busy", "rollback")
    assert cli.run(run_id).status is RunStatus.CANCELLED
    assert cli.drive(new).output["decided"] == 2


def test_deadlines_are_shown(cli: Cli) -> None:
    run_id = cli.submit("echo", 1, "--run-timeout", "3600", "--start-timeout", "60")
    shown = cli.ok("run", "show", run_id).out
    assert "deadline_at:" in shown
    assert "start_deadline_at:" in shown


def test_doctor_says_by_its_exit_code_whether_there_is_a_problem(cli: Cli) -> None:
    healthy = cli.data("doctor")
    assert healthy["level"] == "ok"
    assert {"database", "migrations", "clock", "leases", "dead_letters", "versions"} <= {
        check["name"] for check in healthy["checks"]
    }
    cli.submit("echo", 1)
    sick = cli("doctor", "-o", "json")
    assert sick.code == 1
    (check,) = [c for c in json.loads(sick.out)["checks"] if c["level"] == "problem"]
    assert "echo@1" in check["message"]
    assert "versions\tproblem" in cli("doctor").out


def test_restored_database_lists_what_is_unfinished_and_goes_on_when_told(cli: Cli) -> None:
    run_id = cli.submit("echo", 1)
    report = cli.data("restore", "--reason", "disk lost", "--by", "ann")
    assert (report["restored"]["epoch"], report["restored"]["unfinished"]) == (1, 1)
    assert [run["id"] for run in report["unfinished"]] == [run_id]
    assert "agentflow restore --resume" in json.dumps(cli.data("pause")) + cli("doctor").out
    assert "everything goes on" in cli.ok("restore", "--resume").err
    assert "was not paused" in cli.ok("restore", "--resume").err
    assert cli.drive(run_id).status is RunStatus.SUCCEEDED


@pytest.mark.slow
def test_worker_tells_its_health_and_logs_as_json(
    cli: Cli, started: list[subprocess.Popen[str]]
) -> None:
    worker = start("worker", "--app", APP, "--db", cli.url, "--health-port", "0", "-o", "jsonl")
    started.append(worker)
    assert worker.stderr is not None
    told = ""
    while "healthz" not in told:
        told = worker.stderr.readline()
    with urllib.request.urlopen(told.split()[-1], timeout=10) as answer:  # noqa: S310 -- our own
        health = json.load(answer)
    assert (health["health"], health["concurrency"]) == ("ok", 10)
    worker.terminate()
    assert finish(worker).code == 0


def test_log_record_is_one_object_in_a_line() -> None:
    record = logging.makeLogRecord(
        {"name": "agentflow.x", "levelname": "INFO", "msg": "two\nlines", "run_id": "r"}
    )
    text = _JsonFormatter().format(record)
    assert "\n" not in text
    entry = json.loads(text)
    assert (entry["message"], entry["run_id"], entry["level"]) == ("two\nlines", "r", "info")


def test_live_line_says_what_the_worker_does() -> None:
    stats = WorkerStats(
        name="w", health="ok", concurrency=10, active=3, claimed=7, abandoned=2, silence=61.0
    )
    assert status_line(stats) == (
        "worker w · ok · 3 of 10 driven · 7 claimed · 2 threads stuck · "
        "the database has been silent for 61 s"
    )
