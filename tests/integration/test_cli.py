"""The command line on real SQLite files, in this process and as processes of their own.

This module is also the app that the commands are given: `--app tests.integration.test_cli:app`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from typer.testing import CliRunner

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.cli.program import program
from agentflow.types import Approval, Decision, Run, RunStatus, plain

REPOSITORY = Path(__file__).parents[2]
APP = "tests.integration.test_cli:app"
HOSTILE = "pay 10\u202e000\u202c EUR\u200b"


class State(TypedDict, total=False):
    proposal: Any
    decided: Any


def _ask(state: State) -> State:
    result = request_approval(state["proposal"], title="Refund")
    return {
        "decided": {"type": result.type, "proposal": result.proposal, "message": result.message}
    }


def _ask_about_calls(state: State) -> State:
    calls = [{"name": name, "args": {"amount": 10}} for name in state["proposal"]]
    configs = [
        {"action_name": name, "allowed_decisions": ["approve", "edit", "reject"]}
        for name in state["proposal"]
    ]
    return {"decided": interrupt({"action_requests": calls, "review_configs": configs})}


def _echo(state: State) -> State:
    return {"decided": state["proposal"]}


def _fail(state: State) -> State:
    raise ValueError("the node says no")


def _graph(node: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    return builder


app = AgentFlow("sqlite:///never-used.db")
app.register(_graph(_ask), name="refund")
app.register(_graph(_ask_about_calls), name="calls")
app.register(_graph(_echo), name="echo")
app.register(_graph(_fail), name="fail", retry=RetryPolicy(max_attempts=1))

not_an_app = {"name": "app"}


class Unlucky(AgentFlow):
    """A user's app with a fault of its own."""

    def with_url(self, url: str) -> AgentFlow:
        raise RuntimeError("a fault\nwith details that stay out of sight")


unlucky = Unlucky("sqlite:///never-used.db")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """The command line with a database of its own."""

    url: str

    def __call__(self, *args: str, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(program, [*args, "--db", self.url], input=stdin)
        return Result(result.exit_code, result.stdout, result.stderr)

    def ok(self, *args: str, stdin: str | None = None) -> Result:
        result = self(*args, stdin=stdin)
        assert result.code == 0, result
        return result

    def data(self, *args: str) -> Any:
        return json.loads(self.ok(*args, "-o", "json").out)

    def submit(self, graph: str, proposal: Any, *args: str) -> str:
        given = json.dumps({"proposal": proposal})
        return self.ok("run", "submit", graph, "--input", given, "--app", APP, *args).out.strip()

    def drive(self, run_id: str) -> Run:
        async def drive() -> Run:
            async with app.with_url(self.url) as here:
                return await here.drive(run_id)

        return asyncio.run(drive())

    def run(self, run_id: str) -> Run:
        async def get() -> Run:
            async with AgentFlow(self.url) as here:
                return await here.get_run(run_id)

        return asyncio.run(get())

    def approval(self, approval_id: str) -> Approval:
        async def get() -> Approval:
            async with AgentFlow(self.url) as here:
                return await here.approvals.get(approval_id)

        return asyncio.run(get())

    def pending(self, graph: str = "refund", proposal: Any = 10) -> Approval:
        """Submit a run, drive it to its question and return that."""
        run_id = self.submit(graph, proposal)
        assert self.drive(run_id).status is RunStatus.WAITING
        (approval,) = self.data("approval", "list", "--run-id", run_id)
        return self.approval(approval["id"])


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AGENTFLOW_DB_URL", "AGENTFLOW_APP", "AGENTFLOW_DEBUG"):
        # Set before it is deleted, so that whatever a command sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTFLOW_STORE_TIMEOUT", "2")


@pytest.fixture
def cli(sqlite_url: str) -> Cli:
    return Cli(sqlite_url)


def _process(*args: str, cwd: Path = REPOSITORY, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agentflow", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=30)
    return Result(process.returncode, out, err)


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


# bad input


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
        ("run", "list", "--app", "tests.integration.test_cli:nope"),
        2,
        "no attribute 'nope'",
    ),
    "app is something else": (
        ("run", "list", "--app", "tests.integration.test_cli:not_an_app"),
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
    "unknown command": (("run", "pause"), 2, "pause"),
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
    args: tuple[str, ...], url: str, code: int, reason: str
) -> None:
    refused = Cli(url)(*args)
    assert (refused.code, refused.out) == (code, "")
    assert reason in refused.err
    assert "secret" not in refused.err
    assert refused.err.count("\n") == 1


def test_a_missing_driver_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "psycopg" else find_spec(name)
    )
    refused = Cli("postgresql://host/x")("run", "list")
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
    args = ("run", "list", "--app", "tests.integration.test_cli:unlucky")
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
    own = _finish(_process("run", "list", cwd=tmp_path, AGENTFLOW_APP="my_app:app"))
    assert (own.code, own.out, own.err) == (0, "", "no runs\n")
    assert (tmp_path / "own.db").exists()
    args = ("run", "list", "--app", "my_app:holder.app", "--db", "sqlite:///other.db")
    assert _finish(_process(*args, cwd=tmp_path)).code == 0
    assert (tmp_path / "other.db").exists()
    broken = _finish(_process("run", "list", "--app", "broken_app:app", cwd=tmp_path))
    assert broken.code == 2
    assert "its import failed with ZeroDivisionError: division by zero" in broken.err
    assert "Traceback" not in broken.err


# start-up, migrations, workers


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


def test_migrate_creates_the_schema_once(cli: Cli) -> None:
    before = cli.data("migrate", "status")
    assert before["current"] is None
    assert before["pending"][-1] == before["head"]
    after = {"current": before["head"], "head": before["head"], "pending": []}
    assert cli.data("migrate", "up") == after
    assert cli.data("migrate", "up") == after
    assert "up to date" in cli.ok("migrate", "status").err


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
    submitted = _finish(_process(*submit))
    run_id = submitted.out.strip()
    assert submitted.code == 0
    for status in (RunStatus.WAITING, RunStatus.SUCCEEDED):
        worker = _process("worker", *common, "--concurrency", "2", "--name", "w1")
        started.append(worker)
        _wait_for(cli, run_id, status, worker)
        worker.send_signal(number)
        ended = _finish(worker)
        assert (ended.code, ended.out) == (0, ""), ended
        assert re.match(
            r"worker w1 \(pid \d+\) started: concurrency 2, queues default\n", ended.err
        )
        if status is RunStatus.WAITING:
            (approval,) = cli.data("approval", "list")
            approve = ("approval", "approve", approval["id"], "--by", "ann", "--db", cli.url)
            decided = _finish(_process(*approve, "--if-version", str(approval["version"])))
            assert decided.code == 0, decided
    assert cli.run(run_id).output["decided"]["type"] == "approve"


@pytest.mark.slow
def test_a_worker_takes_runs_of_its_queues_only(
    cli: Cli, started: list[subprocess.Popen[str]]
) -> None:
    other = cli.submit("echo", 1, "--queue", "other")
    mine = [cli.submit("echo", 1, "--queue", queue) for queue in ("a", "b")]
    queues = ("--queue", "a", "--queue", "b")
    worker = _process("worker", *queues, "--app", APP, "--db", cli.url)
    started.append(worker)
    for run_id in mine:
        _wait_for(cli, run_id, RunStatus.SUCCEEDED, worker)
    assert cli.run(other).status is RunStatus.QUEUED
    worker.terminate()
    assert _finish(worker).code == 0
