"""Rotation seals everything by the current key, and can be killed at any point."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.checkpoint.records import Place, unpack_record
from agentflow.checkpoint.rows import CheckpointRow
from agentflow.codec import Codec
from agentflow.database.engine import parse_url
from agentflow.database.tables import anchors, checkpoints, events, pauses, runs, threads
from agentflow.errors import (
    HashMismatchError,
    InvalidInputError,
    UnencryptedValueError,
    UnknownKeyError,
)
from agentflow.keys import KeyRing
from agentflow.storage import rotation
from agentflow.storage.events import GENESIS, hash_event
from agentflow.storage.payloads import Payloads
from agentflow.storage.sql import SqlRunStore
from agentflow.upkeep import Rotation
from tests.golden import database_v1 as v1
from tests.golden.listing import list_database
from tests.integration.cli import REPOSITORY, Cli, fresh_cli
from tests.integration.graphs import chain, logs
from tests.integration.sealed import fill, in_environment, open_app, payloads, prune_deltas, ring

pytestmark = pytest.mark.slow

TENANTS = ("", "acme")


async def fill_all(url: str, keys: KeyRing | None) -> None:
    """Fill two tenants, and leave an anchor and a base behind."""
    for tenant in TENANTS:
        async with open_app(url, keys, tenant=tenant) as app:
            await fill(app)
    with open_checkpointer(url, keys=keys) as saver:
        prune_deltas(saver)


async def listed(
    url: str, monkeypatch: pytest.MonkeyPatch, *names: str, plain: bool = False
) -> Any:
    """List everything with the keys of these names."""
    with monkeypatch.context() as patch:
        patch.setenv("AGENTFLOW_KEYS", in_environment(*names))
        patch.setenv("AGENTFLOW_ACCEPT_PLAINTEXT", str(int(plain)))
        return await list_database(url, tenants=TENANTS)


def sealed_by(url: str, name: str) -> set[bool]:
    """Say of all payloads whether they are sealed by the key of this name."""
    codec = Codec(keys=ring(name))
    rows = [row for column in payloads(url).values() for row in column]
    return {codec.is_current(row[-1]) for row in rows}


def assert_chained(url: str, keys: KeyRing) -> None:
    """Compute the hashes of all audit events again."""
    codec = Codec(keys=keys, unknown="plain")
    store = Payloads(strict=codec, lenient=codec)
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        found = connection.execute(sa.select(runs)).all()
        log = connection.execute(sa.select(events).order_by(events.c.seq)).all()
    engine.dispose()
    assert found
    for run in found:
        previous = GENESIS
        for event in [e for e in log if (e.tenant, e.run_id) == (run.tenant, run.run_id)]:
            assert (event.prev_hash, event.hash) == (previous, hash_event(event, store))
            previous = event.hash
        assert previous == run.event_hash


def assert_linked(url: str, keys: KeyRing) -> None:
    """Hold what each checkpoint says of its parent's hash against the parent, or its anchor."""
    codec = Codec(keys=keys, unknown="plain")
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        places = {
            row.id: (row.tenant, row.thread_id) for row in connection.execute(sa.select(threads))
        }
        rows = [CheckpointRow(*row) for row in connection.execute(sa.select(checkpoints))]
        kept = connection.execute(sa.select(anchors)).all()
    engine.dispose()
    hashes = {(row.thread, row.ns, row.checkpoint_id): row.hash for row in rows}
    for row in kept:
        context = Place(*places[row.thread], row.ns).context_of_anchor(row.checkpoint_id, row.seq)
        hashes[row.thread, row.ns, row.checkpoint_id] = codec.unseal(row.data, context)
    linked = 0
    for made in rows:
        record = unpack_record(codec, made, Place(*places[made.thread], made.ns))
        if record.parent_hash is not None:
            assert hashes[made.thread, made.ns, made.parent_id or ""] == record.parent_hash
            linked += 1
    assert linked > 10


async def rotate(url: str, keys: KeyRing) -> Rotation:
    async with AgentFlow(url, keys=keys) as app:
        return await app.rotate_keys()


@pytest.mark.parametrize("before", ["old", None])
async def test_rotation_leaves_nothing_that_needs_the_old_key(
    database_url: str, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    names = ("new", "old") if before else ("new",)
    await fill_all(database_url, ring(before) if before else None)
    listing = await listed(database_url, monkeypatch, *names, plain=before is None)
    assert all(payloads(database_url).values()), "there is something in every column"
    done = await rotate(database_url, ring(*names, accept_plaintext=before is None))
    assert done.is_complete
    assert done.sealed > 100
    assert sealed_by(database_url, "new") == {True}
    assert await listed(database_url, monkeypatch, "new") == listing
    assert_chained(database_url, ring("new"))
    assert_linked(database_url, ring("new"))
    assert await rotate(database_url, ring("new")) == Rotation(sealed=0, is_complete=True)
    async with open_app(database_url, ring("new")) as app:
        (asked,) = (await app.approvals.list()).items
        await app.approvals.decide(asked.id, "approve", by="ann")
        assert (await app.drive("waiting")).output["result"] == "output"
    assert_chained(database_url, ring("new"))


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
async def test_rotation_that_is_killed_is_resumed(
    database_url: str, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    await fill_all(database_url, ring("old"))
    listing = await listed(database_url, monkeypatch, "old")
    victim = [sys.executable, "-m", "tests.integration.rotation_victim"]
    killed = subprocess.run(  # noqa: ASYNC221 -- nothing else runs here
        [*victim, database_url, in_environment("new", "old"), str(count)],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert await listed(database_url, monkeypatch, "new", "old") == listing
    assert await listed(database_url, monkeypatch, "old", "new") == listing
    assert False in sealed_by(database_url, "new")
    assert (await rotate(database_url, ring("new", "old"))).is_complete
    assert sealed_by(database_url, "new") == {True}
    assert await listed(database_url, monkeypatch, "new") == listing
    assert_chained(database_url, ring("new"))
    assert_linked(database_url, ring("new"))


async def test_golden_database_is_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "agentflow.db"
    file.write_bytes(gzip.decompress(v1.DATABASE.read_bytes()))
    url = f"sqlite:///{file}"
    listing = await list_database(url, tenants=TENANTS)
    plain = ring("one", accept_plaintext=True)
    assert_chained(url, plain)
    assert (await rotate(url, plain)).is_complete
    assert sealed_by(url, "one") == {True}
    assert await listed(url, monkeypatch, "one") == listing
    assert_chained(url, ring("one"))


async def test_damaged_event_breaks_the_chain(tmp_path: Path) -> None:
    """Though rotation does not: the hash covers type and time, which are not sealed."""
    url = f"sqlite:///{tmp_path / 'agentflow.db'}"
    async with open_app(url, ring("one")) as app:
        await fill(app)
    engine = sa.create_engine(parse_url(url))
    with engine.begin() as connection:
        connection.execute(
            sa.update(events).where(events.c.type == "run.failed").values(type="run.succeeded")
        )
    engine.dispose()
    with pytest.raises(AssertionError):
        assert_chained(url, ring("one"))


async def test_plaintext_is_encrypted_only_where_it_is_accepted(database_url: str) -> None:
    """What somebody has put there meanwhile must not become trusted by being encrypted."""
    await fill_all(database_url, None)
    before = payloads(database_url)
    with pytest.raises(UnencryptedValueError):
        await rotate(database_url, ring("one"))
    assert payloads(database_url) == before


async def test_rotation_without_the_old_key_changes_nothing(database_url: str) -> None:
    await fill_all(database_url, ring("old"))
    before = payloads(database_url)
    with pytest.raises(UnknownKeyError, match="'old'"):
        await rotate(database_url, ring("new"))
    with pytest.raises(HashMismatchError, match="has not sealed it here"):
        await rotate(database_url, KeyRing({"new": bytes(32), "old": bytes(32)}))
    assert payloads(database_url) == before


async def test_checkpointer_goes_on_across_a_rotation(database_url: str) -> None:
    """Also the one that remembers the thread, and what of a list is stored."""
    graph = chain(*((f"n{n}", logs(f"{n} {'.' * 99}")) for n in range(4)))
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    async with open_checkpointer(database_url, keys=ring("old", "new")) as saver:
        compiled = graph.compile(checkpointer=saver)
        await compiled.ainvoke({"log": ["first"]}, config)
        assert (await rotate(database_url, ring("new", "old"))).is_complete
        assert len((await compiled.ainvoke({"log": ["second"]}, config))["log"]) == 10
        history = [each async for each in compiled.aget_state_history(config)]
    assert_linked(database_url, ring("new", "old"))
    assert (await rotate(database_url, ring("new", "old"))).is_complete
    assert_linked(database_url, ring("new"))
    async with open_checkpointer(database_url, keys=ring("new")) as saver:
        compiled = graph.compile(checkpointer=saver)
        again = [each async for each in compiled.aget_state_history(config)]
        assert [each.values for each in again] == [each.values for each in history]


@pytest.mark.parametrize("before", ["old", None])
def test_pruning_between_a_new_key_and_its_rotation_damages_nothing(
    database_url: str, before: str | None
) -> None:
    """What is sealed anew keeps its hash, and the key that this is under."""
    graph = chain(*((f"n{n}", logs(f"{n} {'.' * 99}")) for n in range(4)))
    with open_checkpointer(database_url, keys=ring(before) if before else None) as saver:
        for run_id in ("one", "two"):
            config: RunnableConfig = {
                "configurable": {"thread_id": "t"},
                "metadata": {"run_id": run_id},
            }
            graph.compile(checkpointer=saver).invoke({"log": ["first"]}, config)
        saver.copy_thread("t", "u")
    both = ring("new", "old", accept_plaintext=True)
    with open_checkpointer(database_url, keys=both) as saver:
        saver.prune(["u"])
        (kept,) = saver.list({"configurable": {"thread_id": "u"}})
        saver.delete_for_runs(["two"])
        assert len(kept.checkpoint["channel_values"]["log"]) == 10
        before_that = list(saver.list({"configurable": {"thread_id": "t"}}))
        assert [len(each.checkpoint["channel_values"]["log"]) for each in before_that[:2]] == [5, 4]


async def test_value_that_changes_meanwhile_is_not_overwritten(database_url: str) -> None:
    """Between reading and writing; here a queue is paused again, for another reason."""
    async with open_app(database_url, ring("old")) as app:
        await fill(app)
    async with open_app(database_url, ring("new", "old")) as app:
        store = app._store
        assert isinstance(store, SqlRunStore)
        page = await store._database.read(partial(rotation._read, pauses, None))
        changes = [
            change for row in page for change in rotation._changes(store._payloads, pauses, row)
        ]
        assert [change.row["name"] for change in changes] == ["unused"]
        await app.resume(queue="unused")
        again = await app.pause(queue="unused", reason="another")
        assert await store._database.write(partial(rotation._apply, changes)) == 0
        assert await app.list_pauses() == (again,)
        assert (await app.rotate_keys()).is_complete
    assert sealed_by(database_url, "new") == {True}


async def test_rotation_tells_of_a_process_that_has_the_old_key_first(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_app(sqlite_url, ring("new", "old")) as app:
        await app.submit("refund", {"given": "x"}, run_id="first")

        async def late(tell: Any, rotate: Any = app._store.rotate_keys) -> int:
            async with open_app(sqlite_url, ring("old", "new")) as other:
                await other.submit("refund", {"given": "x"})
            count: int = await rotate(tell)
            return count

        monkeypatch.setattr(app._store, "rotate_keys", late)
        assert not (await app.rotate_keys()).is_complete


async def test_without_keys_there_is_nothing_to_rotate(sqlite_url: str) -> None:
    async with AgentFlow(sqlite_url) as app:
        with pytest.raises(InvalidInputError, match="AGENTFLOW_KEYS"):
            await app.rotate_keys()


@pytest.fixture
def cli(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return fresh_cli(sqlite_url, monkeypatch)


def test_command_rotates_and_tells_how_much(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = cli.submit("echo", 1)
    monkeypatch.setenv("AGENTFLOW_KEYS", in_environment("one"))
    refused = cli("keys", "rotate")
    assert (refused.code, "accept plaintext" in refused.err) == (1, True)
    monkeypatch.setenv("AGENTFLOW_ACCEPT_PLAINTEXT", "1")
    done = cli.ok("keys", "rotate", "-o", "json")
    assert '"is_complete": true' in done.out
    assert "runs: 2 rows looked through, 4 sealed" in done.err or "everything" in done.err
    monkeypatch.delenv("AGENTFLOW_ACCEPT_PLAINTEXT")
    assert cli.run(run_id).input == {"proposal": 1}
    assert "sealed:      0" in cli.ok("keys", "rotate").out
