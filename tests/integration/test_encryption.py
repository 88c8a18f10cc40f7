"""With keys nothing of a payload can be read or moved, and without the right ones nothing runs."""

from __future__ import annotations

import base64
import secrets
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langgraph.graph import END, START, StateGraph
from psycopg import sql
from sqlalchemy.engine import Engine

from agentflow import AgentFlow, RetryPolicy, effect
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.database.engine import parse_url
from agentflow.database.tables import (
    Length,
    Timestamp,
    effects,
    events,
    metadata,
    runs,
    waits,
)
from agentflow.errors import (
    CodecError,
    HashMismatchError,
    UnencryptedValueError,
    UnknownKeyError,
)
from agentflow.interrupts import proposal_hash
from agentflow.keys import KEY_SIZE, KeyRing
from agentflow.storage import rotation
from agentflow.storage.payloads import KEYS
from agentflow.storage.sql import SqlRunStore
from tests.integration.sealed import (
    OF_RUNS,
    PLACES,
    Calls,
    fill,
    in_environment,
    open_app,
    payloads,
    prune_deltas,
    read_payloads,
    read_rows,
    ring,
    secret,
)
from tests.servers import PostgresServer

FACTS = {
    "anchors": "ns checkpoint_id",
    "checkpoints": "ns checkpoint_id parent_id attempt run_id",
    "dead_letters": "tenant run_id checkpoint_id thread_id graph version reason",
    "effects": (
        "tenant effect_id scope key_hash run_id thread_id graph kind name compensate ns "
        "task_id node status on_in_doubt worker resolved_by"
    ),
    "events": "tenant run_id type prev_hash hash",
    "fingerprints": "tenant digest graph",
    "leases": "tenant thread_id",
    "logs": "tenant event_hash",
    "object_space": "name",
    "objects": "object",
    "pauses": "tenant scope name paused_by",
    "routes": "tenant graph version set_by",
    "runs": (
        "tenant run_id thread_id graph version queue status wake_reason progress "
        "checkpoint_id worker submitted_by traceparent event_hash instance resume_from "
        "rollback root forked_from saga fingerprint"
    ),
    "threads": "tenant thread_id",
    "waits": (
        "tenant wait_id kind run_id thread_id graph ns task_id interrupt_id "
        "checkpoint_id status proposal_hash decision_type decided_by idempotency_key"
    ),
    "workers": "tenant instance name report",
    "writes": "ns checkpoint_id",
}
"""The columns with text by table: ids, names, hashes and statuses, by which rows are searched.

`workers.report` is what `WorkerReport` has: names and numbers. See docs/encryption.md.
"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection around agentflow."""
    made = sa.create_engine(parse_url(database_url))
    yield made
    made.dispose()


def files_of(url: str, request: pytest.FixtureRequest) -> list[Path]:
    """Return every file that the database has."""
    if url.startswith("sqlite"):
        folder = Path(url.removeprefix("sqlite:///")).parent
        assert (folder / "agentflow.db-wal").exists()
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        server.execute(sql.SQL("CHECKPOINT").format())
        folder = server._daemon.folder
    return [path for path in folder.rglob("*") if path.is_file()]


def backup_of(url: str, folder: Path, request: pytest.FixtureRequest) -> bytes:
    """Make a backup with the database's own tool."""
    if not url.startswith("sqlite"):
        server: PostgresServer = request.getfixturevalue("postgres_server")
        return server.dump(url.rpartition("/")[2])
    copy = folder / "backup.db"
    with (
        closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy.read_bytes()


def spellings(canary: str) -> list[bytes]:
    """Return a text as UTF-8, UTF-16 and hexadecimal, and what is in any base64 of it."""
    raw = canary.encode()
    shifted = (base64.b64encode(b"x" * shift + raw) for shift in range(3))
    encoded = [text[4 : len(text) // 4 * 4 - 4] for text in shifted]
    return [raw, canary.encode("utf-16-le"), raw.hex().encode(), *encoded]


def test_text_outside_of_envelopes_is_what_rows_are_searched_by() -> None:
    """A column that is new is sealed, or it is put on this list, and into docs/encryption.md."""
    found = {
        table.name.removeprefix("agentflow_"): names
        for table in metadata.sorted_tables
        if (names := " ".join(each.name for each in table.c if isinstance(each.type, sa.Text)))
    }
    assert found == FACTS
    others = {type(each.type) for table in metadata.sorted_tables for each in table.c}
    assert others == {
        *(sa.Text, sa.LargeBinary, sa.Integer, sa.BigInteger, sa.Boolean),
        *(Length, Timestamp),
    }
    assert {column.table.name for column in OF_RUNS} == set(KEYS), "a table without contexts"


@pytest.mark.slow
@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_no_payload_is_in_any_file_of_the_database(
    database_url: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    is_encrypted: bool,
) -> None:
    """The twin without keys shows that all of them would have been found."""
    # What is compressed would not be found in any case.
    monkeypatch.setattr("agentflow.codec.COMPRESS_FROM", 1 << 40)
    canaries = {place: secrets.token_hex(20) for place in PLACES}
    keys = ring("one") if is_encrypted else None
    async with open_app(database_url, keys, canaries.__getitem__) as app:
        await fill(app, canaries.__getitem__)
        prune_deltas(_saver(app), canaries["delta"])
        contents = [path.read_bytes() for path in files_of(database_url, request)]
        contents.append(backup_of(database_url, tmp_path, request))
    assert all(payloads(database_url).values()), "a column without a payload shows nothing"
    found = {
        place
        for place, canary in canaries.items()
        for spelling in spellings(canary)
        if any(spelling in content for content in contents)
    }
    assert found == (set() if is_encrypted else set(PLACES))


async def test_explicit_keys_win_over_the_environment(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_KEYS", in_environment("outer"))
    async with open_app(database_url, ring("inner")) as app:
        await fill(app)
        assert (await app.get_run("decided")).output["result"] == "output"
    with open_checkpointer(database_url) as saver, pytest.raises(UnknownKeyError, match="'inner'"):
        saver.get_tuple({"configurable": {"thread_id": "decided"}})
    with open_checkpointer(database_url, keys=ring("inner")) as saver:
        assert saver.get_tuple({"configurable": {"thread_id": "decided"}}) is not None


Refused = tuple[KeyRing | None, KeyRing | None, type[CodecError], str]
WRONG: dict[str, Refused] = {
    "a wrong key": (
        ring("one"),
        KeyRing({"one": bytes(KEY_SIZE)}),
        HashMismatchError,
        "the key 'one' has not sealed it here",
    ),
    "a lost key": (ring("one"), ring("two"), UnknownKeyError, "under the key 'one'"),
    "no keys": (ring("one"), None, UnknownKeyError, "AGENTFLOW_KEYS"),
    "plaintext": (None, ring("one"), UnencryptedValueError, "agentflow keys rotate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
async def test_without_the_right_key_nothing_is_read_changed_or_executed(
    database_url: str, case: str
) -> None:
    before, after, error, message = WRONG[case]
    async with open_app(database_url, before) as app:
        await fill(app)
        await app.submit("refund", {"given": "x"}, run_id="queued")
    stored = payloads(database_url)
    calls = Calls()
    async with open_app(database_url, after, calls=calls) as app:
        (waiting,) = [row[-2] for row in _ids(database_url, waits) if row[-1] == "pending"]

        async def list_runs() -> Any:
            page = await app.list_runs()
            assert page.items == ()
            return page.whole()

        attempts: list[Callable[[], Awaitable[Any]]] = [
            lambda: app.get_run("decided"),
            list_runs,
            lambda: app.list_events("decided"),
            lambda: app._store.list_events("", "decided", after=0, limit=9),
            lambda: app.approvals.decide(waiting, "approve", by="ann"),
            lambda: app.drive("queued"),
            lambda: app.state("waiting"),
            lambda: _saver(app).aget_tuple({"configurable": {"thread_id": "waiting"}}),
            lambda: _saver(app).acopy_thread("waiting", "copy"),
        ]
        for attempt in attempts:
            with pytest.raises(error, match=message):
                await attempt()
        graph = app._registry.graphs["refund", "1"].graph.copy(update={"checkpointer": app._saver})
        with pytest.raises(error, match=message):
            await graph.ainvoke(None, {"configurable": {"thread_id": "waiting"}})
    assert (calls, payloads(database_url)) == ([], stored)
    async with open_app(database_url, before) as app:
        assert (await app.drive("queued")).status == "waiting"


def _saver(app: AgentFlow) -> Saver:
    assert isinstance(app._saver, Saver)
    return app._saver


def _ids(url: str, table: sa.Table) -> list[Any]:
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        found = connection.execute(sa.select(table.c.wait_id, table.c.status)).all()
    engine.dispose()
    return [tuple(row) for row in found]


async def test_worker_without_the_key_leaves_a_run_to_others(database_url: str) -> None:
    async with open_app(database_url, ring("one")) as app:
        await app.submit("refund", {"given": "x"}, run_id="queued")
    async with open_app(database_url, ring("two")) as app:
        claim = app._store.claim_runs
        options: dict[str, Any] = {"worker": "w", "queues": ["default"], "limit": 1}
        graphs, lease = [("refund", "1")], app._settings.lease
        assert await claim("", graphs=graphs, lease=lease, **options) == []
    async with open_app(database_url, ring("one", "two")) as app:
        assert [event.type for event in await app.list_events("queued")] == ["run.submitted"]
        assert (await app.drive("queued")).status == "waiting"


async def test_wrong_key_of_the_right_name_writes_nothing(
    database_url: str, engine: Engine
) -> None:
    """What it wrote nobody else could read; so it does not even note what it cannot read."""
    async with open_app(database_url, ring("one")) as app:
        await fill(app)
        await app.submit("refund", {"given": "x"}, run_id="queued")
    stored = payloads(database_url)
    calls = Calls()
    wrong = KeyRing({"one": bytes(KEY_SIZE)})
    async with open_app(database_url, wrong, calls=calls) as app:
        options: dict[str, Any] = {"worker": "w", "queues": ["default"], "limit": 1}
        graphs, lease = [("refund", "1")], app._settings.lease
        attempts: list[Callable[[], Awaitable[Any]]] = [
            lambda: app._store.claim_runs("", graphs=graphs, lease=lease, **options),
            lambda: app.submit("refund", {"given": "x"}, run_id="new"),
            lambda: app.cancel("queued"),
            lambda: app.pause(queue="other", reason="x"),
            app.rotate_keys,
        ]
        for attempt in attempts:
            with pytest.raises(HashMismatchError, match="the key 'one' has not sealed it here"):
                await attempt()
    async with open_checkpointer(database_url, keys=wrong) as saver:
        graph = app._registry.graphs["refund", "1"].graph.copy(update={"checkpointer": saver})
        with pytest.raises(HashMismatchError, match="another key of the same name"):
            await graph.ainvoke({"given": "x"}, {"configurable": {"thread_id": "new"}})
    assert (calls, payloads(database_url)) == ([], stored)
    (row,) = [row for row in read_rows(engine, runs) if row.run_id == "queued"]
    with _moved(engine, runs.c.config, row, row.config[:-1] + bytes((row.config[-1] ^ 1,))):
        async with open_app(database_url, ring("one")) as app:
            # One that is damaged proves nothing.
            await app.submit("refund", {"given": "x"}, run_id="new")
    async with open_app(database_url, ring("one")) as app:
        assert [event.type for event in await app.list_events("queued")] == ["run.submitted"]


def _payer(calls: list[str]) -> Any:
    """Build a graph that makes two calls to the outside; the second time it gets to its end."""

    @effect(key="all", scope="global", name="sealed:once")
    async def once() -> str:
        calls.append("of the tenant")
        return "done"

    @effect(key="own", name="sealed:own")
    async def own() -> str:
        calls.append("of the run")
        return "done"

    async def node(state: dict[str, Any]) -> dict[str, Any]:
        await once()
        await own()
        if len(calls) == 2 and not state.get("is_again"):
            raise ValueError("after the calls")
        return {"result": "end"}

    graph: Any = StateGraph(dict)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_edge("node", END)
    return graph


UNMET: dict[str, tuple[KeyRing | None, KeyRing | None, type[CodecError] | None]] = {
    "a key that is looked up": (
        ring("old"),
        KeyRing({"new": secret("new")}, lookup=secret),
        None,
    ),
    "a lost key": (ring("old"), ring("new"), UnknownKeyError),
    "no keys": (ring("old"), None, UnknownKeyError),
    "plaintext": (None, ring("new"), UnencryptedValueError),
}


@pytest.mark.parametrize("case", UNMET)
async def test_effect_that_another_key_hides_is_not_called_again(
    database_url: str, case: str
) -> None:
    """What cannot be looked for, since its name is hashed by a key that is not here, is refused."""
    before, after, error = UNMET[case]
    calls: list[str] = []
    async with AgentFlow(database_url, keys=before) as app:
        app.register(_payer(calls), name="pay", retry=RetryPolicy(max_attempts=1))
        await app.submit("pay", {}, run_id="first")
        assert (await app.drive("first")).status == "failed"
    assert calls == ["of the tenant", "of the run"]
    async with AgentFlow(database_url, keys=after) as app:
        app.register(_payer(calls), name="pay", retry=RetryPolicy(max_attempts=1))
        await app.submit("pay", {"is_again": True}, run_id="second")
        run = await app.drive("second")
        if error is None:
            assert run.status == "succeeded"
            assert calls[2:] == ["of the run"]
            return
        assert run.error is not None
        assert run.error.type.endswith(error.__name__)
    assert calls == ["of the tenant", "of the run"]


async def test_effect_that_a_killed_rotation_has_left_is_not_called_again(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the old key was taken away too early; with it the run goes on."""
    calls: list[str] = []

    def opened(*names: str) -> AgentFlow:
        app = AgentFlow(sqlite_url, keys=ring(*names))
        app.register(_payer(calls), name="pay", retry=RetryPolicy(max_attempts=1))
        return app

    async with opened("old") as app:
        await app.submit("pay", {}, run_id="one")
        assert (await app.drive("one")).status == "failed"
    with monkeypatch.context() as patch:
        others = {name: key for name, key in KEYS.items() if name != effects.name}
        patch.setattr(rotation, "KEYS", others)
        async with opened("new", "old") as app:
            assert (await app.rotate_keys()).sealed
    calls.append("and is driven again")
    async with opened("new") as app:
        await app.dead_letters.requeue("one")
        run = await app.drive("one")
        assert run.error is not None
        assert run.error.type.endswith("UnknownKeyError")
    async with opened("new", "old") as app:
        await app.dead_letters.requeue("one")
        assert (await app.drive("one")).status == "succeeded"
    assert calls == ["of the tenant", "of the run", "and is driven again"]


async def test_plaintext_is_read_while_it_is_accepted(database_url: str) -> None:
    async with open_app(database_url, None) as app:
        await fill(app)
    async with open_app(database_url, ring("one", accept_plaintext=True)) as app:
        (asked,) = (await app.approvals.list()).items
        await app.approvals.decide(asked.id, "approve", by="ann")
        assert (await app.drive("waiting")).output["result"] == "output"
        assert (await app.get_run("failed")).error is not None


@pytest.mark.slow
@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_payload_that_is_moved_is_refused(
    database_url: str, engine: Engine, *, is_encrypted: bool
) -> None:
    """To the same column of another row, run or tenant, and to another column of the same row."""
    keys = ring("one") if is_encrypted else None
    for tenant in ("", "acme"):
        async with open_app(database_url, keys, tenant=tenant) as app:
            await fill(app)
    moved = 0
    async with open_app(database_url, keys) as app:
        for target in OF_RUNS:
            found = read_rows(engine, target.table)
            there = [row for row in found if row._mapping[target] is not None]
            mine, theirs = ([row for row in there if row.tenant == each] for each in ("", "acme"))
            for place, row in enumerate(mine):
                others = {
                    # The one before it, one of the other tenant's, and the columns beside it.
                    mine[place - 1]._mapping[target],
                    theirs[place % len(theirs)]._mapping[target],
                    *(row._mapping[each] for each in OF_RUNS if each.table is target.table),
                }
                for other in others - {row._mapping[target], None}:
                    with _moved(engine, target, row, other), pytest.raises(HashMismatchError):
                        await read_payloads(app, target.table, row)
                    moved += 1
                await read_payloads(app, target.table, row)
    assert moved > 200


@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_hash_of_a_question_does_not_tell_whether_a_guess_is_right(
    database_url: str, engine: Engine, *, is_encrypted: bool
) -> None:
    """The twin without keys shows where it would."""
    async with open_app(database_url, ring("one") if is_encrypted else None) as app:
        await fill(app)
        (asked,) = (await app.approvals.list()).items
    guess = proposal_hash(asked.request)
    assert asked.proposal_hash == guess
    (row,) = [row for row in read_rows(engine, waits) if row.wait_id == asked.id]
    unkeyed = {
        guess,
        *(sha256(each).hexdigest() for each in (guess.encode(), bytes.fromhex(guess))),
    }
    assert (row.proposal_hash.removeprefix("2:") in unkeyed) is not is_encrypted
    texts = [
        text for each in (runs, waits, events) for row in read_rows(engine, each) for text in row
    ]
    assert guess not in texts


@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_question_under_another_hash_is_refused(
    database_url: str, engine: Engine, *, is_encrypted: bool
) -> None:
    keys = ring("one") if is_encrypted else None
    async with open_app(database_url, keys) as app:
        await fill(app)
        (asked,) = (await app.approvals.list()).items
        rows = read_rows(engine, waits)
        (row,) = [row for row in rows if row.wait_id == asked.id]
        others = [row.proposal_hash[:-1], f"{row.proposal_hash}0", "", asked.proposal_hash, "2:"]
        for other in others:
            with (
                _moved(engine, waits.c.proposal_hash, row, other),
                pytest.raises(HashMismatchError, match=r"waits\.proposal_hash"),
            ):
                await app.approvals.get(asked.id)
        assert await app.approvals.get(asked.id) == asked


async def test_question_that_was_stored_without_its_hash_is_read_and_rotated(
    database_url: str, engine: Engine
) -> None:
    """As agentflow did before: the request alone in the envelope, and a plain hash outside."""
    async with open_app(database_url, ring("one")) as app:
        await fill(app)
        (asked,) = (await app.approvals.list()).items
        assert isinstance(app._store, SqlRunStore)
        codec = app._store._payloads
        place = {"tenant": "", "wait_id": asked.id}
        before = {
            "request": codec.dump(asked.request, waits.c.request, place),
            "proposal_hash": asked.proposal_hash,
        }
        with engine.begin() as connection:
            change = sa.update(waits).where(waits.c.wait_id == asked.id).values(before)
            assert connection.execute(change).rowcount == 1
        assert await app.approvals.get(asked.id) == asked
        done = await app.rotate_keys()
        assert (done.sealed, done.is_complete) == (1, True)
        assert await app.approvals.get(asked.id) == asked
        (row,) = [row for row in read_rows(engine, waits) if row.wait_id == asked.id]
        assert row.proposal_hash.startswith("2:")
        assert (await app.rotate_keys()).sealed == 0
        await app.approvals.decide(asked.id, "approve", by="ann")
        assert (await app.drive("waiting")).status == "succeeded"


class _moved:  # noqa: N801 -- reads as a verb
    """Put a value into a row while the block runs."""

    def __init__(self, engine: Engine, column: sa.Column[Any], row: Any, value: Any) -> None:
        self._engine, self._column, self._row, self._value = engine, column, row, value

    def __enter__(self) -> None:
        self._set(self._value)

    def __exit__(self, *exc_info: object) -> None:
        self._set(self._row._mapping[self._column])

    def _set(self, value: Any) -> None:
        table = self._column.table
        of_row = [column == self._row._mapping[column] for column in table.primary_key.columns]
        with self._engine.begin() as connection:
            connection.execute(sa.update(table).where(*of_row).values({self._column.name: value}))
