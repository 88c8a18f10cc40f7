"""What the first landed version left behind is loaded, listed and continued.

`tests/golden/database_v1.py` wrote the file, and shows what is in it. Each test works on a copy.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.types import Command

from agentflow import AgentFlow
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.database import migrate
from agentflow.errors import (
    AlreadyResolvedError,
    FencedError,
    HashMismatchError,
    IdempotencyConflictError,
    RunCancelledError,
    RunFailedError,
    SupersededError,
)
from agentflow.types import AuditEvent
from tests.conformance.runs import open_store
from tests.golden import database_v1 as v1
from tests.golden import graphs_v1 as graphs
from tests.golden.database_v1 import on, place
from tests.golden.graphs_v1 import Outside
from tests.golden.listing import list_run, list_thread, show, show_approval, show_checkpoint
from tests.servers import no_leaked_files

LISTING: dict[str, dict[str, Any]] = json.loads(v1.LISTING.read_text())
THREADS = [(tenant, name) for tenant in LISTING for name in LISTING[tenant]["threads"]]
GRAPHS: dict[str, Callable[[], graphs.Graph]] = {
    "chat": graphs.chat,
    "things": graphs.things,
    "forks": graphs.letters,
    "subgraphs": lambda: graphs.subgraphs(Outside()),
    "failed": lambda: graphs.fetches(Outside()),
    "questions": lambda: graphs.questions(Outside()),
    "delta": graphs.journal,
}


def unpack(file: Path) -> str:
    """Write the golden database to `file` and return its URL."""
    file.write_bytes(gzip.decompress(v1.DATABASE.read_bytes()))
    return f"sqlite:///{file}"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The URL of a copy."""
    folder = tmp_path / "golden"
    folder.mkdir()
    with no_leaked_files(folder):
        yield unpack(folder / "agentflow.db")


@pytest.fixture
async def saver(url: str) -> AsyncIterator[Saver]:
    """A checkpointer on a copy."""
    async with open_checkpointer(url) as opened:
        yield opened


@pytest.fixture
def outside() -> Outside:
    """A world in which everything works, and nothing has been done by this process."""
    return Outside()


@pytest.fixture
async def app(url: str, outside: Outside) -> AsyncIterator[AgentFlow]:
    """An app on a copy, with the graphs of its runs."""
    async with AgentFlow(url) as opened:
        graphs.register(opened, outside)
        yield opened


def load(saver: Saver, thread: str = "numbers") -> CheckpointTuple:
    """Load what must be there."""
    found = saver.get_tuple(on(thread))
    assert found is not None
    return found


def assert_same(value: Any, expected: Any) -> None:
    """Compare values, and their types all the way down."""
    assert value == expected
    assert show(value) == show(expected)


@pytest.mark.parametrize(("tenant", "thread"), THREADS)
async def test_thread_is_listed_as_it_was(url: str, tenant: str, thread: str) -> None:
    """Ids, parents, steps, values, versions and pending writes, in their order; and the heads."""
    expected = LISTING[tenant]["threads"][thread]
    async with open_checkpointer(url, tenant=tenant) as saver:
        assert await list_thread(saver, thread) == expected


@pytest.mark.parametrize(("tenant", "thread"), THREADS)
def test_each_checkpoint_is_found_by_its_id(url: str, tenant: str, thread: str) -> None:
    with open_checkpointer(url, tenant=tenant) as saver:
        for expected in LISTING[tenant]["threads"][thread]["checkpoints"]:
            found = saver.get_tuple(place(thread, expected["id"], expected["ns"]))
            assert found is not None
            assert show_checkpoint(found) == expected


async def test_listing_over_all_threads_misses_none(saver: Saver) -> None:
    expected = {
        (thread, each["ns"], each["id"])
        for thread, listed in LISTING[""]["threads"].items()
        for each in listed["checkpoints"]
    }
    listed = [item.config["configurable"] async for item in saver.alist(None)]
    found = [(each["thread_id"], each["checkpoint_ns"], each["checkpoint_id"]) for each in listed]
    assert (len(found), set(found)) == (len(expected), expected)


async def test_listing_is_narrowed_by_metadata_and_by_a_checkpoint(saver: Saver) -> None:
    threads = LISTING[""]["threads"]

    def ids(thread: str) -> list[str]:
        return [each["id"] for each in threads[thread]["checkpoints"]]

    of_run = saver.alist(None, filter={"run_id": "run-failed"})
    assert [item.checkpoint["id"] async for item in of_run] == ids("run-failed")
    by_hand = saver.alist(on("forks"), filter={"source": "update"})
    assert [item.checkpoint["id"] async for item in by_hand] == ids("forks")[:1]
    older = saver.alist(on("chat"), before=place("chat", ids("chat")[4]), limit=3)
    assert [item.checkpoint["id"] async for item in older] == ids("chat")[5:8]


@pytest.mark.parametrize("thread", GRAPHS)
async def test_graph_finds_its_state(saver: Saver, thread: str) -> None:
    graph = GRAPHS[thread]().compile(checkpointer=saver)
    assert_same((await graph.aget_state(on(thread))).values, v1.EXPECTED[thread])


def test_conversation_goes_on(url: str) -> None:
    with open_checkpointer(url) as saver:
        graph = graphs.chat().compile(checkpointer=saver)
        before = v1.EXPECTED["chat"]
        after = graph.invoke(graphs.say(14, "again"), on("chat"))
        texts = [message.text for message in after["messages"]]
        assert texts == [*(m.text for m in before["messages"]), "again", "re: again"]
        assert_same(after["messages"][:14], before["messages"])
        assert (after["topic"], after["turns"]) == ("weather", 7)
        assert len(list(graph.get_state_history(on("chat")))) == 21


async def test_subgraphs_go_on_where_they_were(saver: Saver, outside: Outside) -> None:
    """The one that asks takes its answer two levels down; the other remembers its calls."""
    graph = graphs.subgraphs(outside).compile(checkpointer=saver)
    (asked,) = (await graph.aget_state(on("subgraphs"), subgraphs=True)).interrupts
    assert asked.value == "two?"
    result = await graph.ainvoke(Command(resume={asked.id: "second"}), on("subgraphs"))
    assert_same(result, {"entry": "two", "count": 2, "answer": "second"})
    assert outside.calls == []
    result = await graph.ainvoke({"entry": "three"}, on("subgraphs"))
    assert (result["count"], result["__interrupt__"][0].value) == (3, "three?")


async def test_failed_superstep_runs_only_what_failed(saver: Saver, outside: Outside) -> None:
    graph = graphs.fetches(outside).compile(checkpointer=saver)
    tasks = (await graph.aget_state(on("failed"))).tasks
    errors = [task.error and str(task.error) for task in tasks]
    assert errors == [None, "ConnectionError('shaky is down')"]
    result = await graph.ainvoke(None, on("failed"))
    log = ["plan", ("fetched", "steady"), ("fetched", "shaky"), "join"]
    assert_same(result, {"log": log})
    assert outside.calls == ["shaky"]


async def test_question_that_is_left_is_answered(saver: Saver, outside: Outside) -> None:
    graph = graphs.questions(outside).compile(checkpointer=saver)
    (asked,) = (await graph.aget_state(on("questions"))).interrupts
    assert_same(asked.value, {"question": "right", "to": graphs.CUSTOMER})
    result = await graph.ainvoke(Command(resume={asked.id: graphs.Level.HIGH}), on("questions"))
    answers = [("left", ("tuple", 1)), ("right", graphs.Level.HIGH), ("in all", 2)]
    assert_same(result, {"answers": answers, "by": graphs.CUSTOMER})
    assert outside.calls == ["right"]


async def test_each_line_of_a_forked_thread_goes_on(saver: Saver) -> None:
    graph = graphs.letters().compile(checkpointer=saver)
    history = [each async for each in graph.aget_state_history(on("forks"))]
    assert (await graph.ainvoke(None, on("forks")))["log"] == ["start", "a", "by hand", "c"]
    unfinished = [each for each in history[1:] if each.next == ("c",)]
    assert len(unfinished) == 2
    for old in unfinished:
        assert (await graph.ainvoke(None, old.config))["log"] == ["start", "a", "b", "c"]
    await graph.aupdate_state(history[-1].config, {"log": ["anew"]}, as_node="b")
    assert (await graph.ainvoke(None, on("forks")))["log"] == ["anew", "c"]


async def test_function_takes_its_answer_and_repeats_no_task(
    saver: Saver, outside: Outside
) -> None:
    function = graphs.totals(saver, outside)
    (asked,) = (await function.aget_state(on("functional"))).interrupts
    assert asked.value == {"save": 26}
    answer: Command[Any] = Command(resume={asked.id: "yes"})
    assert await function.ainvoke(answer, on("functional")) == "total 26"
    assert outside.calls == []
    result = await function.ainvoke([1], on("functional"))
    assert result["__interrupt__"][0].value == {"save": 28}


async def test_changes_add_up_to_the_state_at_every_checkpoint(saver: Saver) -> None:
    graph = graphs.journal().compile(checkpointer=saver)
    entries = v1.EXPECTED["delta"]["entries"]
    history = [each async for each in graph.aget_state_history(on("delta"))]
    # Each turn has three checkpoints: before its input, with it, and with its note.
    lengths = [n for turn in range(7) for n in (2 * turn, 2 * turn + 1, 2 * turn + 2)]
    assert_same(
        [each.values.get("entries", []) for each in reversed(history)],
        [entries[:length] for length in lengths],
    )
    result = await graph.ainvoke({"entries": ["again"]}, on("delta"))
    assert_same(result["entries"], [*entries, "again", ("noted", 15)])


def test_numbers_as_versions_go_on_as_numbers(url: str) -> None:
    """For a caller who never loaded what is carried on, for one who did, and for a graph."""
    with open_checkpointer(url) as saver:
        for number in (6, 7):
            config = place("numbers", v1.id_of(5)) if number == 6 else load(saver).config
            made = v1.checkpoint(number, {"x": number, "y": 1}, {"x": f"x{number}"})
            saver.put(config, made, {"step": number}, {"x": number})
        assert load(saver).checkpoint["channel_values"] == {"x": "x7", "y": {"kept": (1, 2)}}
        result = graphs.pair().compile(checkpointer=saver).invoke({"x": "x8"}, on("numbers"))
        assert_same(result, {"x": ("x8", "changed"), "y": {"kept": (1, 2)}})
        versions = load(saver).checkpoint["channel_versions"]
        assert {type(version) for version in versions.values()} == {int}


def test_emptied_channel_stays_empty_until_it_is_filled(url: str) -> None:
    with open_checkpointer(url) as saver:
        assert load(saver, "emptied").checkpoint["channel_values"] == {"x": "x3"}
        made = v1.checkpoint(6, {"x": 4, "y": 3}, {"x": "x4"})
        saver.put(load(saver, "emptied").config, made, {"step": 6}, {"x": 4})
        assert load(saver, "emptied").checkpoint["channel_values"] == {"x": "x4"}
        made = v1.checkpoint(7, {"x": 4, "y": 4}, {"y": "y4"})
        saver.put(load(saver, "emptied").config, made, {"step": 7}, {"y": 4})
        filled = {"x": "x4", "y": "y4"}
        assert load(saver, "emptied").checkpoint["channel_values"] == filled


async def test_runs_and_approvals_are_listed_as_they_were(app: AgentFlow) -> None:
    runs = (await app.list_runs()).items
    assert {run.id: run.status.value for run in runs} == v1.STATUSES
    assert {run.id: await list_run(app, run) for run in runs} == LISTING[""]["runs"]
    assert [run.id for run in runs] == list(LISTING[""]["runs"])
    approvals = (await app.approvals.list(status=None)).items
    assert [show_approval(each) for each in approvals] == LISTING[""]["approvals"]
    for run in runs:
        assert_same(run.input, graphs.input_of(run.id))


async def test_waiting_run_is_approved_and_ends(app: AgentFlow, outside: Outside) -> None:
    (asked,) = (await app.approvals.list()).items
    assert asked.run_id == "run-waiting"
    await app.approvals.decide(asked.id, "approve", by="cy", version=asked.version)
    run = await app.drive("run-waiting")
    assert (run.status, run.output["outcome"]) == ("succeeded", "paid 40 for run-waiting")
    assert_same(run.output["order"], graphs.input_of("run-waiting")["order"])
    assert_same(run.output["log"], [("quoted", 40), ("approve", "cy")])
    assert outside.calls == ["approve", "pay"]


async def test_decided_run_ends_when_it_is_driven(app: AgentFlow, outside: Outside) -> None:
    (decided,) = (await app.approvals.list(status=None, run_id="run-decided")).items
    again = await app.approvals.decide(decided.id, "approve", by="bob", idempotency_key="key-1")
    assert again == decided
    with pytest.raises(AlreadyResolvedError):
        await app.approvals.decide(decided.id, "reject", by="cy")
    run = await app.drive("run-decided")
    assert run.output["outcome"] == "paid 40 for run-decided"
    assert run.output["log"][-1] == ("approve", "bob")
    assert outside.calls == ["approve", "pay"]


async def test_queued_run_starts_on_the_thread_of_an_earlier_one(
    app: AgentFlow, outside: Outside
) -> None:
    assert (await app.drive("run-queued")).status == "waiting"
    (asked,) = await app.handle("run-queued").approvals()
    await app.approvals.decide(asked.id, "approve", by="cy")
    run = await app.drive("run-queued")
    log = [("quoted", 40), ("edit", "ann"), ("quoted", 40), ("approve", "cy")]
    assert_same(run.output["log"], log)
    assert outside.calls == ["quote", "approve", "pay"]
    head = (await app.state("run-queued")).metadata
    assert head is not None
    assert (head.get("user"), head.get("source_of")) == ("ada", "golden")


async def test_run_of_a_killed_worker_goes_on_with_what_was_left(
    app: AgentFlow, outside: Outside
) -> None:
    run = await app.drive("run-killed")
    assert (run.status, run.claims) == ("succeeded", 3)
    assert run.output["outcome"] == "paid 40 for run-killed"
    assert outside.calls == ["pay"]
    types = [event.type for event in await app.list_events("run-killed")]
    assert types[-4:] == ["run.recovered", "run.claimed", "run.resumed", "run.succeeded"]


def test_thread_of_a_killed_worker_is_still_closed(url: str) -> None:
    with open_checkpointer(url) as saver:
        config = load(saver, "run-killed").config
        with pytest.raises(FencedError):
            saver.put_writes(config, [("log", [])], "task")


async def test_worker_drives_whatever_is_due(app: AgentFlow) -> None:
    async with app.worker():
        for run_id in ("run-decided", "run-killed"):
            assert (await app.wait(run_id, timeout=30)).status == "succeeded"
        assert (await app.wait("run-queued", until="parked", timeout=30)).status == "waiting"


async def test_dead_letter_has_its_error_and_can_be_restarted(
    app: AgentFlow, url: str, outside: Outside
) -> None:
    run = await app.get_run("run-failed")
    assert run.dead_letter
    assert run.error is not None
    assert (run.error.type, run.error.node) == ("builtins.ConnectionError", "take")
    assert "the bank is down" in (run.error.traceback or "")
    store = open_store(url)
    letter = await store.find_dead_letter("", "run-failed")
    await store.close()
    assert letter is not None
    assert (letter.cause, letter.checkpoint_id) == (run.error, run.checkpoint_id)
    assert (letter.attempts, letter.claims) == (1, 2)
    with pytest.raises(RunFailedError):
        await app.handle("run-failed").result()
    options: dict[str, Any] = {"run_id": "run-failed", "on_existing": "restart_if_failed"}
    await app.submit("charge", graphs.input_of("run-failed"), **options)
    assert (await app.drive("run-failed")).output["outcome"] == "charged"
    assert outside.calls == ["take"]


async def test_ended_runs_stay_as_they_ended(app: AgentFlow, outside: Outside) -> None:
    result = await app.handle("run-succeeded").result()
    assert_same(result["order"], graphs.Order("A-17", 25, ("tea",)))
    assert result["outcome"] == "paid 25 for A-17"
    with pytest.raises(RunCancelledError):
        await app.handle("run-cancelled").result()
    (withdrawn,) = (await app.approvals.list(status="withdrawn")).items
    with pytest.raises(SupersededError):
        await app.approvals.decide(withdrawn.id, "approve", by="cy")
    for run_id in ("run-succeeded", "run-cancelled"):
        before = await app.get_run(run_id)
        assert await app.drive(run_id) == before
    assert outside.calls == []


async def test_submission_is_known_by_its_id_and_its_input(app: AgentFlow) -> None:
    options: dict[str, Any] = {"run_id": "run-succeeded", "thread_id": "account-7"}
    again = await app.submit("refund", graphs.input_of("run-succeeded"), **options)
    assert await again.status() == "succeeded"
    with pytest.raises(IdempotencyConflictError):
        await app.submit("refund", graphs.input_of("another"), **options)
    assert len((await app.list_runs()).items) == len(v1.STATUSES)


async def test_new_audit_events_are_chained_to_the_old_ones(app: AgentFlow) -> None:
    await app.cancel("run-waiting")
    await app.drive("run-decided")
    for run_id in v1.STATUSES:
        log: tuple[AuditEvent, ...] = await app.list_events(run_id)
        assert [event.seq for event in log] == list(range(1, len(log) + 1))
        hashes = ["0" * 64, *(event.hash for event in log)]
        assert [event.prev_hash for event in log] == hashes[:-1]


async def test_old_file_is_kept_when_it_is_migrated(url: str, tmp_path: Path) -> None:
    async with AgentFlow(url) as app:
        await app.list_runs()
    assert migrate.status(url).current == migrate.HEAD
    backups = sorted(path.name for path in tmp_path.rglob("*.bak"))  # noqa: ASYNC240 -- nothing else runs here
    if migrate.HEAD == v1.REVISION:
        assert backups == []
        return
    assert backups == [f"agentflow.db.{v1.REVISION}.bak"]
    unpack(tmp_path / "original.db")
    assert dump(tmp_path / "golden" / backups[0]) == dump(tmp_path / "original.db")


@pytest.mark.parametrize(
    "column",
    ["checkpoints.body", "checkpoints.metadata", "checkpoints.channels", "writes.value"],
)
def test_damage_that_is_older_stops_the_migration_and_nothing_is_changed(
    url: str, column: str
) -> None:
    table, name = column.split(".")
    file = Path(url.removeprefix("sqlite:///"))
    of_one = "tenant = 'acme'" if table == "checkpoints" else "thread_id = 'run-waiting'"
    with closing(sqlite3.connect(file)) as connection, connection:
        change = f"UPDATE agentflow_{table} SET {name} = substr({name}, 2) WHERE {of_one}"
        assert connection.execute(change).rowcount > 0
    before = dump(file)
    with (
        open_checkpointer(url) as saver,
        pytest.raises(HashMismatchError, match="restore it from a backup") as raised,
    ):
        saver.get_tuple(on("chat"))
    for named in ("checkpoint '1f", *(("'acme'",) if "acme" in of_one else ("'run-waiting'",))):
        assert named in str(raised.value)
    assert dump(file) == before
    assert migrate.status(url).current == v1.REVISION


def dump(file: Path) -> list[str]:
    """Return a database as the statements that make it."""
    connection = sqlite3.connect(file)
    statements = list(connection.iterdump())
    connection.close()
    return statements
