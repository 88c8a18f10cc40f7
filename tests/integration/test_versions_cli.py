"""Versions on the command line: fingerprints in CI, routes, migrations, and runs as files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agentflow.types import RunStatus
from tests.integration import releases
from tests.integration.cli import Cli, Result, fresh_cli

FIRST, SECOND = ("--app", "tests.integration.releases:first"), (
    "--app",
    "tests.integration.releases:second",
)  # fmt: skip


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


def waiting(cli: Cli, run_id: str) -> None:
    """Drive a run of the first release to its question."""

    async def drive() -> None:
        async with releases.first.with_url(cli.url) as app:
            await app.submit("refund", {"log": []}, run_id=run_id)
            assert (await app.drive(run_id)).status is RunStatus.WAITING

    asyncio.run(drive())


DOCS = Path(__file__).parents[2] / "docs" / "versions.md"


def assert_documented(result: Result) -> None:
    """See that the documents show what a command prints, line by line, apart from the layout."""
    shown = {" ".join(line.split()) for line in DOCS.read_text(encoding="utf-8").splitlines()}
    printed = f"{result.out}\n{result.err}".splitlines()
    assert {" ".join(line.split()) for line in printed if line} <= shown


def test_fingerprints_are_committed_and_a_change_is_told_with_the_runs_it_stops(
    cli: Cli, tmp_path: Path
) -> None:
    waiting(cli, "r-17")
    file = tmp_path / "fingerprints.json"
    file.write_text(cli.ok("graph", "fingerprint", *FIRST).out)
    checked = cli.ok("graph", "fingerprint", "--check", str(file), "--url", cli.url, *FIRST)
    assert "no graph has changed" in checked.err
    assert "no unfinished run would be stopped" in checked.err
    changed = cli("graph", "fingerprint", "--check", str(file), *SECOND, "-o", "jsonl")
    assert changed.code == 1
    assert [json.loads(line) for line in changed.out.splitlines()] == [
        {
            "graph": "refund@1",
            "kind": "node_removed",
            "change": "node 'pay' was renamed to 'wire'",
        },
        {"graph": "refund@2", "kind": "added", "change": "it is new"},
    ]
    stopped = cli("graph", "fingerprint", "--check", str(file), "--url", cli.url, *SECOND)
    assert (stopped.code, "1 unfinished runs would be stopped" in stopped.err) == (1, True)
    assert_documented(stopped)
    (run,) = json.loads(cli("graph", "check", *SECOND, "-o", "json").out)
    assert (run["run_id"], run["verdict"], run["action"]) == ("r-17", "ahead", "refuse")
    (run,) = cli.data("graph", "check", *FIRST)
    assert run["verdict"] == "same"


@pytest.mark.parametrize("content", [None, "", "{}x", "[]", '{"refund@1": {}}', "changed", "newer"])
def test_file_that_has_no_fingerprints_is_a_usage_error(
    cli: Cli, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "file"
    if content in {"changed", "newer"}:
        made = json.loads(cli.ok("graph", "fingerprint", *FIRST).out)
        if content == "newer":
            made["refund@1"]["form"] = 99
        else:
            made["refund@1"]["graph"]["context"] = "other"
        file.write_text(json.dumps(made))
    elif content is not None:
        file.write_text(content)
    result = cli("graph", "fingerprint", "--check", str(file), *FIRST)
    assert (result.code, "--check" in result.err) == (2, True)


def test_routes_are_set_shown_and_cleared(cli: Cli) -> None:
    assert "newest version" in cli.ok("graph", "route").err
    (made,) = cli.data("graph", "route", "refund", "2", "--share", "0.1", "--by", "ann")
    assert (made["version"], made["share"], made["by"]) == ("2", 0.1, "ann")
    assert cli.data("graph", "route", "refund") == [made]
    assert cli.data("graph", "route", "refund", "2", "--clear") == []
    assert cli("graph", "route", "refund", "2").code == 2
    assert cli("graph", "route", "refund", "--share", "1").code == 2


def test_waiting_runs_are_migrated_after_a_dry_run(cli: Cli) -> None:
    waiting(cli, "r-17")
    assert_documented(
        cli.ok("run", "migrate", "--graph", "refund", "--to", "2", "--dry-run", *SECOND)
    )
    waiting(cli, "r2")
    (dry, _) = cli.data("run", "migrate", "--graph", "refund", "--dry-run", *SECOND)
    assert (dry["outcome"], dry["to_version"]) == ("would_migrate", "2")
    one = cli.ok("run", "migrate", "r2", "--by", "ann", *SECOND)
    assert "run r2 is waiting, at version '2'" in one.err
    done = cli.ok("run", "migrate", "--graph", "refund", "--to", "2", *SECOND)
    assert "1 runs were migrated to version '2', 0 not" in done.err
    assert "no run needs it" in cli.ok("run", "migrate", "--graph", "refund", *SECOND).err
    refused = cli("run", "migrate", "--graph", "refund", "--to", "1", *SECOND)
    assert (refused.code, "no migration leads there" in refused.out) == (1, True)
    for wrong in ((), ("r1", "--graph", "refund")):
        assert cli("run", "migrate", *wrong, *SECOND).code == 2


def test_run_is_exported_to_a_file_and_imported_elsewhere(cli: Cli, tmp_path: Path) -> None:
    waiting(cli, "r1")
    file = tmp_path / "r1.json"
    said = cli.ok("run", "export", "r1", "--to", str(file))
    assert "not encrypted" in said.err
    assert cli("run", "export", "r1", "--to", str(file)).code == 2, "it is not overwritten"
    assert json.loads(cli.ok("run", "export", "r1").out)["content"]["run_id"] == "r1"
    other = Cli(f"sqlite:///{tmp_path}/other.db")
    imported: Any = other.data("run", "import", str(file), "--by", "bob")
    assert (imported["id"], imported["status"]) == ("r1", "waiting")
    assert other("run", "import", str(file)).code == 4
    assert other("run", "import", str(tmp_path / "none")).code == 2
    (approval,) = other.data("approval", "list")
    other.ok("approval", "approve", approval["id"], "--by", "ann", "--if-version", "1")
