"""Bad input on the command line: what it says, its exit code, and that nothing is written."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentflow.cli.program import program
from tests.integration.cli import (
    APP,
    Cli,
    fresh_cli,
)


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


def _rows(url: str) -> dict[str, int]:
    """Count the rows of every table of our own."""
    file = Path(url.removeprefix("sqlite:///"))
    if not file.exists():
        return {}
    connection = sqlite3.connect(file)
    try:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        counts = {
            name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
            for (name,) in names
            if "schema" not in name
        }
    finally:
        connection.close()
    return {name: count for name, count in counts.items() if count}


SUBMIT = ("run", "submit", "--input", "{}")
BAD_INPUT = {
    "unknown graph": ((*SUBMIT, "nope", "--app", APP), 3, "app.register"),
    "unregistered version": ((*SUBMIT, "echo", "--version", "9", "--app", APP), 3, "'echo@9'"),
    "input against the schema": (
        ("run", "submit", "echo", "--input", "5", "--app", APP),
        1,
        "invalid",
    ),
    "input that is not JSON": (
        ("run", "submit", "echo", "--input", "{a: 1}", "--app", APP),
        2,
        "--input is not JSON",
    ),
    "metadata without a value": (
        (*SUBMIT, "echo", "--app", APP, "--metadata", "a"),
        2,
        "--metadata takes key=value",
    ),
    "submit without an app": ((*SUBMIT, "echo"), 2, "--app is missing"),
    "worker without an app": (("worker",), 2, "--app is missing"),
    "app module missing": ((*SUBMIT, "x", "--app", "no_such_module:app"), 2, "no_such_module"),
    "app without a colon": (("run", "list", "--app", "module"), 2, "module:attribute"),
    "app attribute missing": (
        ("run", "list", "--app", "tests.integration.cli:nope"),
        2,
        "no attribute 'nope'",
    ),
    "app is something else": (
        ("run", "list", "--app", "tests.integration.cli:not_an_app"),
        2,
        "it is a dict, not an AgentFlow",
    ),
    "unknown run": (("run", "show", "nope"), 3, "no run 'nope'"),
    "cancel of an unknown run": (("run", "cancel", "nope"), 3, "no run 'nope'"),
    "unknown approval": (("approval", "show", "nope"), 3, "no approval 'nope'"),
    "decision on an unknown approval": (
        ("approval", "reject", "nope", "--by", "ann"),
        3,
        "no approval 'nope'",
    ),
    "status out of the set": (("run", "list", "--status", "paused"), 2, "paused"),
    "limit below one": (("run", "list", "--limit", "0"), 2, "--limit"),
    "cursor made up": (("run", "list", "--cursor", "nonsense"), 1, "cursor"),
    "decision by nobody": (("approval", "reject", "nope"), 2, "--by"),
    "decision by an empty name": (("approval", "reject", "nope", "--by", ""), 2, "--by"),
    "unknown command": (("run", "halt"), 2, "halt"),
    "pause of an unknown run": (("run", "pause", "nope"), 3, "no run 'nope'"),
    "requeue of an unknown run": (("dead-letter", "requeue", "nope"), 3, "no run 'nope'"),
}


@pytest.mark.parametrize(("args", "code", "reason"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_says_what_to_do_and_writes_no_row(
    cli: Cli, args: tuple[str, ...], code: int, reason: str
) -> None:
    refused = cli(*args)
    assert (refused.code, refused.out) == (code, "")
    assert reason in refused.err
    assert "Traceback" not in refused.err
    assert _rows(cli.url) == {}


@pytest.mark.parametrize(
    ("url", "code", "reason"),
    [
        ("oracle://host/x", 2, "unsupported storage URL scheme 'oracle'"),
        ("nonsense", 2, "unsupported storage URL"),
        ("postgresql://user:secret@127.0.0.1:1/x", 1, "cannot reach"),
        ("sqlite:////no/such/folder/x.db", 1, "cannot reach"),
    ],
)
@pytest.mark.parametrize(
    "args",
    [("run", "list"), ("approval", "list"), ("migrate", "status"), ("migrate", "up")],
    ids=" ".join,
)
def test_a_database_that_cannot_be_used_is_an_error_of_one_line(
    cli: Cli, args: tuple[str, ...], url: str, code: int, reason: str
) -> None:
    refused = replace(cli, url=url)(*args)
    assert (refused.code, refused.out) == (code, "")
    assert reason in refused.err
    assert "secret" not in refused.err
    assert refused.err.count("\n") == 1


def test_a_missing_driver_is_named_with_the_extra_that_brings_it(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "psycopg" else find_spec(name)
    )
    refused = replace(cli, url="postgresql://host/x")("run", "list")
    assert refused.code == 1
    assert 'pip install "agentflow[postgres]"' in refused.err


def test_in_json_an_error_is_an_object_with_its_code(cli: Cli) -> None:
    refused = cli("run", "show", "nope", "-o", "json")
    error = json.loads(refused.err)["error"]
    assert error["code"] == "not_found"
    assert "no run 'nope'" in error["message"]
    usage = cli("approval", "approve", "x", "--by", "ann", "-o", "jsonl")
    assert json.loads(usage.err)["error"]["code"] == "usage"


def test_a_fault_that_is_not_ours_is_short_and_its_traceback_on_request(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", "list", "--app", "tests.integration.cli:unlucky")
    failed = cli(*args)
    assert failed.code == 1
    assert failed.err.splitlines() == [
        "error: RuntimeError: a fault",
        "hint: --debug or AGENTFLOW_DEBUG=1 shows the traceback",
    ]
    assert "Traceback" in cli(*args, "--debug").err
    monkeypatch.setenv("AGENTFLOW_DEBUG", "1")
    assert "Traceback" in cli(*args).err


# where the app and the database come from


def test_options_may_precede_the_command_and_those_after_it_count(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_id = cli.submit("echo", 1)
    before = CliRunner().invoke(program, ["--db", cli.url, "-o", "jsonl", "run", "list"])
    assert json.loads(before.stdout)["id"] == run_id
    monkeypatch.setenv("AGENTFLOW_DB_URL", cli.url)
    from_environment = CliRunner().invoke(program, ["run", "list", "-o", "jsonl"])
    assert json.loads(from_environment.stdout)["id"] == run_id
    other = f"sqlite:///{tmp_path / 'other.db'}"
    after = CliRunner().invoke(program, ["--db", cli.url, "run", "list", "--db", other])
    assert (after.exit_code, after.stdout) == (0, "")
