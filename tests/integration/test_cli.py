"""Runs, approvals and migrations on the command line, on real SQLite files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agentflow.types import RunStatus, plain
from tests.integration.cli import (
    APP,
    HOSTILE,
    Cli,
    fresh_cli,
)


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


# runs


def test_a_submitted_run_is_listed_and_shown_under_its_records_field_names(cli: Cli) -> None:
    run_id = cli.submit("echo", "hello", "--metadata", "ticket=T-1", "--by", "ann")
    (listed,) = cli.data("run", "list")
    run = cli.run(run_id)
    assert listed == json.loads(json.dumps(plain(run)))
    assert (run.metadata["ticket"], run.submitted_by) == ("T-1", "ann")
    shown = cli.data("run", "show", run_id)
    assert shown == {**listed, "approvals": []}
    assert f"id: {run_id}" in re.sub(" +", " ", cli.ok("run", "show", run_id).out)


def test_each_format_holds_every_run(cli: Cli) -> None:
    ids = [cli.submit("echo", number) for number in range(3)]
    newest_first = ids[::-1]
    assert [run["id"] for run in cli.data("run", "list")] == newest_first
    lines = cli.ok("run", "list", "-o", "jsonl").out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == newest_first
    rows = cli.ok("run", "list").out.splitlines()
    assert [row.split("\t")[0] for row in rows] == ["id", *newest_first]


def test_runs_are_filtered_and_paged(cli: Cli) -> None:
    ids = [cli.submit("echo", number, "--thread-id", f"t{number}") for number in range(3)]
    cli.drive(ids[1])
    assert [r["id"] for r in cli.data("run", "list", "--status", "succeeded")] == [ids[1]]
    assert [r["id"] for r in cli.data("run", "list", "--thread-id", "t2")] == [ids[2]]
    assert cli.data("run", "list", "--graph", "refund") == []
    first = cli.ok("run", "list", "--limit", "2")
    cursor = first.err.strip().partition("--cursor ")[2]
    rest = cli.ok("run", "list", "--cursor", cursor)
    assert [line.split("\t")[0] for line in rest.out.splitlines()[1:]] == [ids[0]]
    assert "--cursor" not in rest.err


def test_the_input_comes_from_a_file_or_from_stdin(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_text('{"proposal": "from a file"}', encoding="utf-8")
    submit = ("run", "submit", "echo", "--app", APP, "-o", "json", "--input")
    from_file = json.loads(cli.ok(*submit, f"@{file}").out)
    from_stdin = json.loads(cli.ok(*submit, "-", stdin='{"proposal": "from stdin"}').out)
    assert from_file["input"] == {"proposal": "from a file"}
    assert from_stdin["input"] == {"proposal": "from stdin"}


def test_submitting_twice_under_one_id_gives_one_run_and_other_input_a_conflict(cli: Cli) -> None:
    assert cli.submit("echo", "a", "--run-id", "r1") == "r1"
    assert cli.submit("echo", "a", "--run-id", "r1") == "r1"
    submit = ("run", "submit", "echo", "--app", APP, "--run-id", "r1")
    again = cli(*submit, "--input", '{"proposal": "b"}')
    assert again.code == 4
    assert "use a new run_id" in again.err
    (run,) = cli.data("run", "list")
    assert run["input"] == {"proposal": "a"}


def test_a_failed_run_shows_its_last_error_and_its_events(cli: Cli) -> None:
    run_id = cli.submit("fail", 1)
    cli.drive(run_id)
    shown = cli.ok("run", "show", run_id, "--events")
    assert "ValueError" in shown.out
    assert "the node says no" in shown.out
    assert "run.submitted" in shown.out
    events = cli.data("run", "show", run_id, "--events")["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


def test_a_parked_run_shows_its_pending_approvals_and_events(cli: Cli) -> None:
    approval = cli.pending()
    shown = cli.ok("run", "show", approval.run_id, "--events")
    assert f"agentflow approval show {approval.id}" in shown.err
    assert "run.parked" in shown.out
    assert cli.data("run", "show", approval.run_id)["approvals"] == [plain(approval)]


def test_cancelling_ends_a_waiting_run(cli: Cli) -> None:
    approval = cli.pending()
    done = cli.ok("run", "cancel", approval.run_id, "--reason", "mistake", "--by", "ann")
    assert "was cancelled" in done.err
    assert cli.run(approval.run_id).status is RunStatus.CANCELLED


def test_waiting_for_a_run_that_nobody_drives_times_out_with_its_status(cli: Cli) -> None:
    submit = ("run", "submit", "echo", "--input", '{"proposal": 1}', "--app", APP)
    waited = cli(*submit, "--wait", "--timeout", "0.05")
    assert waited.code == 1
    assert "still queued after 0.05 s" in waited.err


@pytest.mark.parametrize(("graph", "code"), [("echo", 0), ("fail", 1)])
def test_waiting_prints_the_ended_run_and_fails_if_it_failed(
    cli: Cli, graph: str, code: int
) -> None:
    run_id = cli.submit(graph, "x", "--run-id", "r1")
    cli.drive(run_id)
    submit = ("run", "submit", graph, "--run-id", "r1", "--input", '{"proposal": "x"}')
    waited = cli(*submit, "--app", APP, "--wait", "-o", "json")
    assert waited.code == code
    assert json.loads(waited.out)["id"] == run_id


# approvals


def test_an_approval_is_listed_and_shown_under_its_records_field_names(cli: Cli) -> None:
    approval = cli.pending()
    as_json = json.loads(json.dumps(plain(approval)))
    assert cli.data("approval", "list") == [as_json]
    assert cli.data("approval", "show", approval.id) == as_json
    table = cli.ok("approval", "list").out.splitlines()
    assert table[1].split("\t")[0] == approval.id


def test_without_a_terminal_approving_requires_the_version(cli: Cli) -> None:
    approval = cli.pending()
    refused = cli("approval", "approve", approval.id, "--by", "ann", "--yes")
    assert refused.code == 2
    assert "--if-version" in refused.err
    assert cli.approval(approval.id) == approval
    approve = ("approval", "approve", approval.id, "--by", "ann", "--message", "fine")
    done = cli.ok(*approve, "--comment", "seen", "--if-version", str(approval.version))
    assert "Refund" in done.err
    decided = cli.approval(approval.id)
    assert (decided.decided_by, decided.comment) == ("ann", "seen")
    run = cli.drive(approval.run_id)
    assert run.output["decided"] == {"type": "approve", "proposal": 10, "message": "fine"}


def test_another_version_than_the_current_one_is_refused(cli: Cli) -> None:
    approval = cli.pending()
    stale = str(approval.version + 1)
    for verb in (("approve",), ("reject",), ("edit", "--value", "5")):
        refused = cli(
            "approval", verb[0], approval.id, *verb[1:], "--by", "a", "--if-version", stale
        )
        assert refused.code == 4
        assert "read it again" in refused.err
    assert cli.approval(approval.id) == approval


def test_the_first_decision_stands_and_is_named_to_the_second(cli: Cli) -> None:
    approval = cli.pending()
    cli.ok("approval", "reject", approval.id, "--by", "ann", "--message", "no")
    version = str(approval.version)
    again = cli("approval", "approve", approval.id, "--by", "bob", "--if-version", version)
    assert again.code == 4
    assert "'reject' by 'ann'" in again.err
    run = cli.drive(approval.run_id)
    assert run.output["decided"] == {"type": "reject", "proposal": 10, "message": "no"}


def test_a_decision_that_is_taken_back_is_asked_again(cli: Cli) -> None:
    approval = cli.pending()
    cli.ok("approval", "reject", approval.id, "--by", "ann")
    cli.ok("approval", "reopen", approval.id, "--by", "bob", "--comment", "too fast")
    assert cli.drive(approval.run_id).status is RunStatus.WAITING
    again = cli.approval(approval.id)
    assert (again.status, again.version) == ("pending", approval.version + 1)
    twice = cli("approval", "reopen", approval.id, "--by", "bob")
    assert twice.code == 4
    assert "nothing to reopen" in twice.err


def test_what_was_withdrawn_cannot_be_decided(cli: Cli) -> None:
    approval = cli.pending()
    cli.ok("run", "cancel", approval.run_id)
    late = cli("approval", "reject", approval.id, "--by", "ann")
    assert late.code == 5
    assert "nothing left to decide" in late.err
    assert [a["id"] for a in cli.data("approval", "list", "--status", "withdrawn")] == [approval.id]
    assert [a["id"] for a in cli.data("approval", "list", "--status", "all")] == [approval.id]


def test_an_edited_proposal_is_what_the_run_acts_on(cli: Cli, tmp_path: Path) -> None:
    approval = cli.pending(proposal={"amount": 10})
    (tmp_path / "edited.json").write_text('{"amount": 5}', encoding="utf-8")
    edited = f"@{tmp_path / 'edited.json'}"
    cli.ok("approval", "edit", approval.id, "--by", "ann", "--value", edited)
    run = cli.drive(approval.run_id)
    assert run.output["decided"]["proposal"] == {"amount": 5}


def test_run_is_given_more_of_its_budget(cli: Cli) -> None:
    approval = cli.pending("models", ["one", "two", "three"])
    respond = ("approval", "respond", approval.id, "--by", "ann", "--value")
    assert cli(*respond, '{"more": 0}').code != 0
    assert cli.approval(approval.id) == approval
    cli.ok(*respond, '{"more": 2}')
    assert cli.drive(approval.run_id).output["decided"] == ["fine"] * 3


@pytest.mark.parametrize(
    ("args", "name"), [((), "refund"), (("--action-name", "credit"), "credit")]
)
def test_an_edited_call_is_what_the_graph_gets(cli: Cli, args: tuple[str, ...], name: str) -> None:
    approval = cli.pending("calls", ["refund"])
    given = ("--args", '{"amount": 5}', *args)
    cli.ok("approval", "edit", approval.id, "--by", "ann", *given)
    run = cli.drive(approval.run_id)
    (decision,) = run.output["decided"]["decisions"]
    assert decision["edited_action"] == {"name": name, "args": {"amount": 5}}


def test_several_calls_are_approved_at_once_or_decided_one_by_one(cli: Cli) -> None:
    approval = cli.pending("calls", ["refund", "mail"])
    version = str(approval.version)
    cli.ok("approval", "approve", approval.id, "--by", "ann", "--if-version", version)
    run = cli.drive(approval.run_id)
    assert run.output["decided"] == {"decisions": [{"type": "approve"}, {"type": "approve"}]}
    approval = cli.pending("calls", ["refund", "mail"])
    each = '["approve", {"type": "reject", "message": "no"}]'
    cli.ok("approval", "edit", approval.id, "--by", "ann", "--decisions", each)
    run = cli.drive(approval.run_id)
    answers = run.output["decided"]["decisions"]
    assert [answer["type"] for answer in answers] == ["approve", "reject"]


@pytest.mark.parametrize(
    ("graph", "args", "code", "reason"),
    [
        ("refund", (), 2, "--value"),
        ("refund", ("--value", "1", "--args", "{}"), 2, "--value"),
        ("refund", ("--value", "{"), 2, "--value is not JSON"),
        ("refund", ("--action-name", "x", "--value", "1"), 2, "--action-name needs --args"),
        ("refund", ("--args", "{}"), 2, "use --value"),
        ("refund", ("--decisions", '["approve"]'), 1, "nothing was recorded"),
        ("calls", ("--args", "[1]"), 2, "takes a JSON object"),
        ("calls", ("--value", "5"), 1, "nothing was recorded"),
        ("calls", ("--decisions", "5"), 1, "nothing was recorded"),
        ("calls", ("--decisions", '["approve", "approve"]'), 1, "nothing was recorded"),
    ],
)
def test_a_decision_of_the_wrong_shape_records_nothing(
    cli: Cli, graph: str, args: tuple[str, ...], code: int, reason: str
) -> None:
    approval = cli.pending(graph, ["refund"])
    refused = cli("approval", "edit", approval.id, "--by", "ann", *args)
    assert refused.code == code
    assert reason in refused.err
    assert cli.approval(approval.id) == approval


@pytest.mark.parametrize("form", ["table", "json", "jsonl"])
def test_hidden_characters_of_a_proposal_are_shown(cli: Cli, form: str) -> None:
    approval = cli.pending(proposal={"note": HOSTILE})
    shown = cli.ok("approval", "show", approval.id, "-o", form).out
    assert "pay 10\\u202e000\\u202c EUR\\u200b" in shown
    assert all(line.isprintable() for line in shown.splitlines())


# migrations


def test_migrate_creates_the_schema_once(cli: Cli) -> None:
    before = cli.data("migrate", "status")
    assert before["current"] is None
    assert before["pending"][-1] == before["head"]
    after = {"current": before["head"], "head": before["head"], "pending": []}
    assert cli.data("migrate", "up") == after
    assert cli.data("migrate", "up") == after
    assert "up to date" in cli.ok("migrate", "status").err


# sweep


def test_sweep_deletes_what_its_dry_run_names(cli: Cli) -> None:
    for thread in ("t0", "t1"):
        cli.drive(cli.submit("echo", thread, "--thread-id", thread))
    cli.submit("echo", "queued", "--thread-id", "t1")
    said = cli.data("sweep", "--keep-last", "1", "--dry-run")
    assert said == [{"thread_id": "t0", "checkpoints": 2, "is_deleted": False}]
    assert cli.data("sweep", "--keep-last", "1", "--ttl", "30d") == said
    assert cli.data("sweep", "--keep-last", "1") == []


@pytest.mark.parametrize("ttl", ["30", "d", "0d", "-1d", "30 days", "9999999999999w"])
def test_age_that_makes_no_sense_is_refused(cli: Cli, ttl: str) -> None:
    result = cli("sweep", f"--ttl={ttl}")
    assert result.code == 2
    assert "--ttl" in result.err
