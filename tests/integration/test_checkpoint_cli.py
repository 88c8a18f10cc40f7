"""`agentflow checkpoint`: what it prints, its exit codes, and that it needs no graph."""

from __future__ import annotations

import json
import os
import pty
import select
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.testing.savers.graphs import letters
from tests.golden.database_v1 import on
from tests.integration.cli import REPOSITORY, Cli, finish, fresh_cli, start
from tests.integration.test_golden_database import unpack
from tests.servers import no_leaked_files

foreign = AgentFlow("sqlite:///never-used.db", checkpoints=InMemorySaver())
TEXT = "a text that is too long for the row of each checkpoint; " * 4


@pytest.fixture
def cli(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A command line on a database with two threads, one of another tenant."""
    for tenant, name in (("", "mine"), ("them", "theirs")):
        with open_checkpointer(database_url, tenant=tenant) as saver:
            graph = letters("a", "b").compile(checkpointer=saver)
            graph.invoke({"log": [TEXT]}, {**on(name), "metadata": {"run_id": "run-1"}})
    return fresh_cli(database_url, monkeypatch)


@pytest.fixture
def sqlite_cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    with open_checkpointer(sqlite_url) as saver:
        for name in ("one", "two"):
            letters("a").compile(checkpointer=saver).invoke({"log": [TEXT]}, on(name))
    return fresh_cli(sqlite_url, monkeypatch)


@pytest.fixture
def golden_url(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "golden"
    folder.mkdir()
    with no_leaked_files(folder):
        yield unpack(folder / "agentflow.db")


def change(cli: Cli, sql: str) -> None:
    with closing(sqlite3.connect(cli.url.removeprefix("sqlite:///"))) as connection, connection:
        assert connection.execute(sql).rowcount > 0


class TestList:
    def test_newest_come_first(self, cli: Cli) -> None:
        found = cli.data("checkpoint", "list")
        assert [each["step"] for each in found] == [2, 1, 0, -1]
        assert {each["thread_id"] for each in found} == {"mine"}
        assert found[0]["parent_id"] == found[1]["checkpoint_id"]
        assert found[0]["run_id"] == "run-1"

    def test_table_has_a_line_for_each(self, cli: Cli) -> None:
        lines = cli.ok("checkpoint", "list", "--limit", "2").out.splitlines()
        assert lines[0].split("\t")[:3] == ["thread_id", "ns", "checkpoint_id"]
        assert len(lines) == 3

    def test_narrowed(self, cli: Cli) -> None:
        assert len(cli.data("checkpoint", "list", "--thread", "mine", "--limit", "1")) == 1
        theirs = json.loads(cli.ok("checkpoint", "list", "--tenant", "them", "--json").out)
        assert {each["thread_id"] for each in theirs} == {"theirs"}

    def test_nothing_found(self, cli: Cli) -> None:
        result = cli.ok("checkpoint", "list", "--thread", "nope")
        assert (result.out, result.err) == ("", "no checkpoints\n")


class TestShow:
    def test_newest_by_default(self, cli: Cli) -> None:
        shown = cli.data("checkpoint", "show", "mine")
        assert shown["values"]["log"] == [TEXT, "a", "b"]
        assert shown["metadata"]["step"] == shown["step"] == 2

    def test_by_id(self, cli: Cli) -> None:
        (_, _, before, _) = cli.data("checkpoint", "list")
        shown = cli.data("checkpoint", "show", "mine", before["checkpoint_id"])
        assert shown["values"]["log"] == [TEXT]
        assert {"channel": "log", "value": ["a"]}.items() <= shown["writes"][0].items()

    def test_for_people(self, cli: Cli) -> None:
        out = cli.ok("checkpoint", "show", "theirs", "--tenant", "them").out
        assert "thread_id:     theirs" in out
        assert "values:\n" in out
        assert TEXT in out

    @pytest.mark.parametrize("named", [["nope"], ["mine", "nope"], ["mine", "--ns", "nope"]])
    def test_unknown(self, cli: Cli, named: list[str]) -> None:
        result = cli("checkpoint", "show", *named)
        assert (result.code, result.out) == (3, "")
        assert "no checkpoint" in result.err

    @pytest.mark.slow
    def test_classes_that_are_not_here_are_shown_as_plain_data(self, golden_url: str) -> None:
        """In a process of its own, which has imported none of them."""
        args = ("checkpoint", "show", "things", "--db", golden_url, "--json")
        code, out, err = finish(start(*args))
        assert (code, err) == (0, "")
        assert '"type": "tests.golden.graphs_v1:' in out
        assert json.loads(out)["values"]

    @pytest.mark.slow
    def test_checkpoint_of_a_subgraph(self, golden_url: str) -> None:
        code, out, _ = finish(
            start("checkpoint", "list", "--thread", "subgraphs", "--db", golden_url, "--json")
        )
        assert code == 0
        (found, *_) = [each for each in json.loads(out) if each["ns"]]
        for named in ([found["checkpoint_id"]], ["--ns", found["ns"]]):
            args = ("checkpoint", "show", "subgraphs", *named, "--db", golden_url, "--json")
            code, out, _ = finish(start(*args))
            assert (code, json.loads(out)["ns"]) == (0, found["ns"])

    def test_damaged(self, sqlite_cli: Cli) -> None:
        change(sqlite_cli, "UPDATE agentflow_checkpoints SET hash = x'00'")
        for command in (["show", "one"], ["list"]):
            result = sqlite_cli("checkpoint", *command)
            assert result.code == 1
            assert "is damaged" in result.err


class TestVerify:
    def test_clean(self, cli: Cli) -> None:
        result = cli.ok("checkpoint", "verify")
        assert result.out == ""
        assert result.err.startswith("verified 2 threads, 8 checkpoints, ")
        assert "checkpoints/s)" in result.err
        assert result.err.endswith("everything is as it was stored\n")

    def test_narrowed(self, cli: Cli) -> None:
        for narrowed in (["--thread", "mine"], ["--tenant", "them"]):
            assert "1 threads, 4 checkpoints" in cli.ok("checkpoint", "verify", *narrowed).err
        result = cli("checkpoint", "verify", "--thread", "nope")
        assert (result.code, "no thread 'nope'" in result.err) == (3, True)

    def test_damage_is_named_and_the_exit_code_tells(self, sqlite_cli: Cli) -> None:
        change(sqlite_cli, "DELETE FROM agentflow_values")
        change(sqlite_cli, "UPDATE agentflow_checkpoints SET step = 7 WHERE step = 0")
        result = sqlite_cli("checkpoint", "verify")
        assert result.code == 1
        for name in ("MissingBlobError: ", "HashMismatchError: ", "'one'", "'two'", "'log'"):
            assert name in result.out
        # Of each thread a record, a list, and perhaps a write that is kept as a part of the list.
        count = len(result.out.splitlines())
        assert count >= 4
        assert f"{count} things are damaged; nothing was changed" in result.err
        of_one = sqlite_cli("checkpoint", "verify", "--thread", "one").out.splitlines()
        assert of_one == [line for line in result.out.splitlines() if "'one'" in line]

    @pytest.mark.parametrize("output", ["json", "jsonl"])
    def test_damage_as_data(self, sqlite_cli: Cli, output: str) -> None:
        change(sqlite_cli, "UPDATE agentflow_checkpoints SET run_id = 'x' WHERE step = 0")
        result = sqlite_cli("checkpoint", "verify", "-o", output)
        assert result.code == 1
        found: list[Any] = (
            json.loads(result.out)
            if output == "json"
            else [json.loads(line) for line in result.out.splitlines()]
        )
        assert [(each["error"], each["thread_id"]) for each in found] == [
            ("HashMismatchError", "one"),
            ("HashMismatchError", "two"),
        ]
        assert all(each["checkpoint_id"] for each in found)

    @pytest.mark.slow
    def test_progress_is_shown_on_a_terminal_only(self, sqlite_cli: Cli) -> None:
        args = ("checkpoint", "verify", "--db", sqlite_cli.url)
        assert "verifying" not in finish(start(*args)).err
        assert "verifying" in on_terminal(*args)

    def test_golden_database(self, golden_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fresh_cli(golden_url, monkeypatch).ok("checkpoint", "verify")


def on_terminal(*args: str) -> str:
    """Run a command on a terminal and return what it shows."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "agentflow", *args],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], 30)[0]:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(30) == 0
    finally:
        os.close(ours)
    return shown.decode()


class TestPrune:
    def test_keeps_the_newest(self, cli: Cli) -> None:
        assert cli.data("checkpoint", "prune", "mine") == [
            {"thread_id": "mine", "deleted": 3, "kept": 1}
        ]
        assert [each["step"] for each in cli.data("checkpoint", "list")] == [2]
        cli.ok("checkpoint", "verify")

    def test_dry_run_deletes_nothing(self, cli: Cli) -> None:
        result = cli.ok("checkpoint", "prune", "mine", "--dry-run", "--delete")
        assert result.out == "thread_id\tdeleted\tkept\nmine\t4\t0\n"
        assert result.err == "4 checkpoints would be deleted\n"
        assert len(cli.data("checkpoint", "list")) == 4

    def test_delete(self, cli: Cli) -> None:
        cli.ok("checkpoint", "prune", "theirs", "--delete", "--tenant", "them")
        assert cli.data("checkpoint", "list", "--tenant", "them") == []
        assert len(cli.data("checkpoint", "list")) == 4

    def test_unknown_thread_stops_all(self, cli: Cli) -> None:
        result = cli("checkpoint", "prune", "mine", "theirs")
        assert (result.code, "no thread 'theirs'" in result.err) == (3, True)
        assert len(cli.data("checkpoint", "list")) == 4

    def test_thread_with_a_run_that_has_not_ended(self, cli: Cli) -> None:
        """Waiting for an answer it holds nothing, and would begin again from nothing."""
        run_id = cli.submit("refund", 10)
        cli.drive(run_id)
        before = cli.data("checkpoint", "list", "--thread", run_id)
        for options in ([], ["--delete"], ["--dry-run"]):
            result = cli("checkpoint", "prune", "mine", run_id, *options)
            assert result.code == 4
            assert f"{run_id!r}, which is waiting" in result.err
        assert cli.data("checkpoint", "list", "--thread", run_id) == before
        assert len(cli.data("checkpoint", "list", "--thread", "mine")) == 4
        cli.ok("run", "cancel", run_id)
        cli.ok("checkpoint", "prune", run_id)

    def test_thread_that_a_run_holds(self, sqlite_cli: Cli) -> None:
        change(sqlite_cli, "UPDATE agentflow_threads SET is_leased = TRUE, token = 5")
        assert sqlite_cli("checkpoint", "prune", "one").code == 4


def test_checkpointer_that_is_not_ours(sqlite_cli: Cli) -> None:
    app = "tests.integration.test_checkpoint_cli:foreign"
    result = sqlite_cli("checkpoint", "list", "--app", app)
    assert result.code == 2
    assert "not agentflow's" in result.err
