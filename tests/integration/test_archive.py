"""Whole threads go to an object store and come back, to any database, or stay where they are."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from langgraph.types import Command

from agentflow.checkpoint import Retention, Saver, archive, open_checkpointer
from agentflow.errors import (
    AgentflowError,
    CodecError,
    ConflictError,
    FencedError,
    HashMismatchError,
    InvalidInputError,
    MissingBlobError,
    NotFoundError,
    ObjectStoreError,
    StoreUnavailableError,
    UnknownVersionError,
    UnsupportedUrlError,
)
from agentflow.failpoints import arm, disarm
from agentflow.testing.savers.calls import acquired, at, ids, lease, load, put_line, writes_at
from agentflow.testing.savers.graphs import DeltaState, asks, chain, letters, logs
from tests.golden import database_v1
from tests.integration.cli import Cli, fresh_cli
from tests.integration.offloaded import (
    Later,
    collect,
    damages,
    everything,
    objects,
    once,
    opened,
    put_value,
    text,
)
from tests.integration.sealed import ring


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    disarm()


@pytest.fixture
def store(tmp_path: Path) -> str:
    folder = tmp_path / "archives"
    folder.mkdir()
    return f"file://{folder}"


@pytest.fixture
def saver(database_url: str) -> Iterator[Saver]:
    with open_checkpointer(database_url) as made:
        yield made


def folder_of(store: str) -> Path:
    return Path(store.removeprefix("file://"))


def test_all_kinds_of_threads_come_back_as_they_were(
    database_url: str, store: str, tmp_path: Path
) -> None:
    """Forks, subgraphs, questions, deltas and pruned ones; here, and in another database."""
    asyncio.run(database_v1._write_threads(database_url))
    with (
        open_checkpointer(database_url) as saver,
        open_checkpointer(f"sqlite:///{tmp_path / 'other.db'}") as other,
    ):
        nodes = [(f"n{n}", lambda _: {"log": ["x" * 99], "notes": {"a": 1}}) for n in range(5)]
        graph = chain(*nodes, state=DeltaState).compile(checkpointer=saver)
        graph.invoke({"log": ["0"]}, {"configurable": {"thread_id": "pruned"}}, durability="sync")
        saver.prune(["pruned"])
        names = sorted({each.config["configurable"]["thread_id"] for each in saver.list(None)})
        whole = {name: everything(saver, name) for name in names}
        for name in names:
            done = saver.archive(name, to=store)
            assert done.checkpoints == len(whole[name])
            assert everything(saver, name) == []
        for here in (saver, other):
            for name in names:
                assert here.restore(name, source=store).checkpoints == len(whole[name])
            assert {name: everything(here, name) for name in names} == whole
            assert damages(here) == []


async def test_restored_thread_is_resumed(database_url: str, store: str, tmp_path: Path) -> None:
    """A question that was open is answered in the other database, and a list goes on there."""
    config: Any = {"configurable": {"thread_id": "t"}}
    graph = chain(("a", logs(text("a"))), ("b", asks("ok?")), ("c", logs("c")))
    async with (
        open_checkpointer(database_url) as saver,
        open_checkpointer(f"sqlite:///{tmp_path / 'other.db'}") as other,
    ):
        await graph.compile(checkpointer=saver).ainvoke({"log": [text("0")]}, config)
        await saver.aarchive("t", to=store)
        await other.arestore("t", source=store)
        here = graph.compile(checkpointer=other)
        output = await here.ainvoke(Command(resume="yes"), config)
        assert output["log"] == [text("0"), text("a"), "ok? yes", "c"]
        again = await here.ainvoke({"log": ["next"]}, config)
        assert again["__interrupt__"]


@pytest.mark.parametrize("names", [(None, None), ("one", "one"), (None, "one")])
def test_objects_of_a_thread_are_in_its_archive(
    database_url: str, store: str, tmp_path: Path, names: tuple[str | None, str | None]
) -> None:
    """It is restored with an object tier, another one, or none."""
    first, second = (ring(name, accept_plaintext=True) if name else None for name in names)
    with opened(database_url, tmp_path / "o", keys=first) as saver:
        put_value(saver, "c1", None, text("x"))
        put_value(saver, "c2", "c1", [text("y"), text("z")])
        saver.put_writes(at("c2"), [("x", text("w"))], "task")
        whole = everything(saver)
        saver.archive("t", to=store)
        assert collect(saver) == 3
    with opened(database_url, tmp_path / "o", keys=second) as saver:
        saver.restore("t", source=store)
        assert everything(saver) == whole
        assert damages(saver) == []
        assert len(objects(tmp_path / "o")) == 3
        saver.delete_thread("t")
        collect(saver)
    with open_checkpointer(f"sqlite:///{tmp_path / 'bare.db'}", keys=second) as bare:
        bare.restore("t", source=store)
        assert everything(bare) == whole
        bare.prune(["t"])
        assert writes_at(bare) == [("task", "x", text("w"))]
        assert damages(bare) == []
    assert objects(tmp_path / "o") == []


def test_archive_belongs_to_its_tenant_and_thread(saver: Saver, store: str) -> None:
    put_line(saver, "c1", "c2")
    made = saver.archive("t", to=store)
    folder = folder_of(store)
    with pytest.raises(NotFoundError, match="archive"):
        saver.for_tenant("other").restore("t", source=store)
    with pytest.raises(NotFoundError, match="archive"):
        saver.restore("u", source=store)
    own = folder / archive.folder_of(("", "t"))
    for moved in (("", "u"), ("other", "t")):
        (folder / archive.folder_of(moved)).mkdir()
        (own / made.archive_id).rename(folder / archive.folder_of(moved) / made.archive_id)
        with pytest.raises(HashMismatchError, match="manifest"):
            saver.for_tenant(moved[0]).restore(moved[1], source=store)
        (folder / archive.folder_of(moved) / made.archive_id).rename(own / made.archive_id)
    (own / made.archive_id).rename(own / "00000000-0000-7000-8000-000000000000")
    with pytest.raises(HashMismatchError, match="manifest"):
        saver.restore("t", source=store)
    assert ids(saver.list(at())) == []


@pytest.mark.parametrize("name", [None, "one"])
def test_damaged_archive_restores_nothing(database_url: str, store: str, name: str | None) -> None:
    keys = ring(name) if name else None
    with open_checkpointer(database_url, keys=keys) as saver:
        graph = letters("a", "b").compile(checkpointer=saver)
        config: Any = {"configurable": {"thread_id": "t"}}
        graph.invoke({"log": [text(0)]}, config)
        head = saver.get_tuple(config)
        assert head is not None
        saver.put_writes(head.config, [("log", ["written"])], "task")
        whole = everything(saver)
        saver.archive("t", to=store)
        paths = objects(folder_of(store))
        contents = [path.read_bytes() for path in paths]
        assert len(paths) == 4  # checkpoints, writes, values, and the manifest
        for path, data in zip(paths, contents, strict=True):
            places = {*range(14), len(data) // 2, len(data) - 1}
            flipped = [data[:i] + bytes((data[i] ^ 1,)) + data[i + 1 :] for i in sorted(places)]
            swapped = [other for other in contents if other != data]
            for changed in [*flipped, *swapped, data[:-1], b"", data + b"x"]:
                path.write_bytes(changed)
                with pytest.raises((CodecError, NotFoundError)):
                    saver.restore("t", source=store)
            path.unlink()
            with pytest.raises((MissingBlobError, NotFoundError)):
                saver.restore("t", source=store)
            path.write_bytes(data)
            assert everything(saver) == []
        saver.restore("t", source=store)
        assert everything(saver) == whole


def test_archive_of_a_newer_program_is_refused(
    saver: Saver, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_line(saver, "c1")
    with monkeypatch.context() as patched:
        patched.setattr(archive, "VERSION", 2)
        saver.archive("t", to=store)
    with pytest.raises(UnknownVersionError, match="upgrade"):
        saver.restore("t", source=store)


def test_thread_that_is_there_is_not_overwritten(saver: Saver, store: str) -> None:
    put_line(saver, "c1", "c2")
    saver.archive("t", to=store, keep=True)
    assert ids(saver.list(at())) == ["c2", "c1"]
    put_line(saver, "other")
    whole = everything(saver)
    with pytest.raises(ConflictError, match="delete it first"):
        saver.restore("t", source=store)
    assert everything(saver) == whole
    saver.delete_thread("t")
    saver.put_writes(at("early"), [("x", 1)], "task")
    with pytest.raises(ConflictError, match="delete it first"):
        saver.restore("t", source=store)


def test_newest_archive_is_restored_unless_one_is_named(saver: Saver, store: str) -> None:
    put_line(saver, "c1")
    first = saver.archive("t", to=store)
    put_line(saver, "d1", "d2")
    saver.archive("t", to=store)
    saver.restore("t", source=store)
    assert ids(saver.list(at())) == ["d2", "d1"]
    saver.delete_thread("t")
    saver.restore("t", source=store, archive_id=first.archive_id)
    assert ids(saver.list(at())) == ["c1"]
    for unknown in ("nope", "../t", ""):
        saver.delete_thread("t")
        with pytest.raises((NotFoundError, InvalidInputError)):
            saver.restore("t", source=store, archive_id=unknown or "none")


def test_thread_that_a_run_holds_stays(saver: Saver, store: str) -> None:
    put_line(saver, "c1")
    saver.archive("t", to=store)
    saver.restore("t", source=store)
    acquired(saver, lease(3))
    for call in (saver.archive, lambda name, to: saver.restore(name, source=to)):
        with pytest.raises(FencedError):
            call("t", to=store)
    assert ids(saver.list(at())) == ["c1"]
    assert len(saver.archive("t", to=store, keep=True).archive_id) > 10
    asyncio.run(saver.release(lease(3)))
    saver.archive("t", to=store)
    acquired(saver, lease(4))
    with pytest.raises(FencedError):
        saver.restore("t", source=store)


def test_token_outlives_the_archive(saver: Saver, store: str) -> None:
    put_line(saver, "c1")
    acquired(saver, lease(7))
    asyncio.run(saver.release(lease(7)))
    saver.archive("t", to=store)
    saver.restore("t", source=store)
    assert asyncio.run(saver.acquire(lease(3))) == 7


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("s3://bucket", UnsupportedUrlError),
        ("file://host/x", InvalidInputError),
        ("file:///no/such/folder", ObjectStoreError),
    ],
)
def test_bad_store_changes_nothing(saver: Saver, url: str, error: type[AgentflowError]) -> None:
    put_line(saver, "c1")
    with pytest.raises(error):
        saver.archive("t", to=url)
    with pytest.raises(error):
        saver.restore("t", source=url)
    with pytest.raises(error):
        Retention(ttl=1, archive=url)
    assert ids(saver.list(at())) == ["c1"]


def test_unknown_thread_is_named(saver: Saver, store: str) -> None:
    for name in ("never", "gone"):
        with pytest.raises(NotFoundError, match=name):
            saver.archive(name, to=store)
        put_line(saver, "c1", thread="gone")
        saver.delete_thread("gone")


def test_thread_that_goes_on_is_archived_as_it_is_then(
    saver: Saver, database_url: str, store: str
) -> None:
    put_line(saver, "c1")
    with open_checkpointer(database_url) as other:
        arm("objects.put", once(lambda: put_line(other, "d1", "d2")))
        saver.archive("t", to=store)
        assert ids(other.list(at())) == []
        other.restore("t", source=store)
        assert ids(other.list(at())) == ["d2", "d1", "c1"]


def test_thread_that_goes_on_behind_its_archive_is_not_deleted(
    saver: Saver, database_url: str, store: str
) -> None:
    put_line(saver, "c1")
    with open_checkpointer(database_url) as other:
        arm("checkpoint.archived", once(lambda: put_line(other, "d1")))
        with pytest.raises(ConflictError, match="was not deleted"):
            saver.archive("t", to=store)
        assert ids(saver.list(at())) == ["d1", "c1"]

        def go_on() -> None:
            put_line(other, f"d{len(list(other.list(at())))}")

        arm("objects.put", go_on)
        with pytest.raises(ConflictError, match="nothing was deleted"):
            saver.archive("t", to=store)
        disarm()
        assert len(ids(saver.list(at()))) > 3


@pytest.mark.parametrize("verb", ["archive", "restore"])
def test_call_whose_reply_was_lost_succeeds_once(saver: Saver, store: str, verb: str) -> None:
    put_line(saver, "c1", "c2")
    whole = everything(saver)
    if verb == "restore":
        saver.archive("t", to=store)

    def lose() -> None:
        raise StoreUnavailableError("the database", "the connection broke", "unknown")

    # The last commit of each; the ones before it may be repeated as well.
    arm("database.after_commit", once(lose))
    if verb == "archive":
        arm("checkpoint.archived", lambda: arm("database.after_commit", once(lose)))
        saver.archive("t", to=store)
        assert everything(saver) == []
        disarm()
    saver.restore("t", source=store)
    assert everything(saver) == whole


def test_sweep_archives_instead_of_deleting(saver: Saver, store: str) -> None:
    graph = letters("a").compile(checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke({"log": ["0"]}, config)
    whole = everything(saver)
    keep = Retention(ttl=timedelta(days=1), archive=store)
    later = Later(timedelta(days=2))
    assert saver.sweep(keep).swept == ()
    said = saver.sweep(keep, clock=later, dry_run=True)
    assert objects(folder_of(store)) == []
    done = saver.sweep(keep, clock=later)
    assert done.swept == said.swept
    assert done.swept[0].is_deleted
    assert everything(saver) == []
    saver.restore("t", source=store)
    assert everything(saver) == whole


def test_thread_is_asked_about_again_once_it_is_archived(saver: Saver, store: str) -> None:
    """A run may have been submitted to it meanwhile."""
    graph = letters("a").compile(checkpointer=saver)
    graph.invoke({"log": ["0"]}, {"configurable": {"thread_id": "t"}})
    whole = everything(saver)
    keep = Retention(ttl=timedelta(days=1), archive=store)

    async def choose(names: Any) -> dict[str, Retention]:
        return {} if objects(folder_of(store)) else dict.fromkeys(names, keep)

    done = asyncio.run(saver.asweep(choose, clock=Later(timedelta(days=2))))
    assert (done.swept, done.spared) == ((), {"unfinished": 1})
    assert everything(saver) == whole


def test_thread_that_is_deleted_meanwhile_does_not_end_the_sweep(saver: Saver, store: str) -> None:
    graph = letters("a").compile(checkpointer=saver)
    for name in ("t0", "t1"):
        graph.invoke({"log": ["0"]}, {"configurable": {"thread_id": name}})
    keep = Retention(ttl=timedelta(days=1), archive=store)
    arm("objects.put", once(lambda: saver.delete_thread("t0")))
    done = saver.sweep(keep, clock=Later(timedelta(days=2)))
    assert [each.thread_id for each in done.swept] == ["t1"]
    assert done.spared == {"unfinished": 1}


def test_part_is_small_although_its_rows_are_large(
    saver: Saver, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_PART_BYTES", 50_000)
    for number in range(10):
        put_value(saver, f"c{number}", f"c{number - 1}" if number else None, text(number, 40_000))
    whole = everything(saver)
    saver.archive("t", to=store)
    assert max(path.stat().st_size for path in objects(folder_of(store))) < 55_000
    saver.restore("t", source=store)
    assert everything(saver) == whole


@pytest.mark.slow
def test_memory_does_not_grow_with_the_thread(sqlite_url: str, store: str, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        thread = f"t{count}"
        with open_checkpointer(sqlite_url, compress=False) as saver:
            for number in range(count):
                parent = f"c{number - 1:04}" if number else None
                put_value(saver, f"c{number:04}", parent, text(number, 200_000), thread=thread)
        with open_checkpointer(sqlite_url, compress=False) as saver:
            load(saver, thread=thread)
            tracemalloc.start()
            saver.archive(thread, to=store)
            saver.restore(thread, source=store)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert len(ids(saver.list(at(thread=thread), limit=None))) == count
        return found

    peak(20)
    assert peak(200) < 1.5 * peak(60)


class TestCommand:
    @pytest.fixture
    def cli(self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
        with open_checkpointer(sqlite_url) as saver:
            for name in ("one", "two"):
                put_line(saver, "c1", "c2", thread=name)
        with open_checkpointer(sqlite_url, tenant="them") as saver:
            put_line(saver, "c1", thread="theirs")
        return fresh_cli(sqlite_url, monkeypatch)

    def test_archive_and_restore(self, cli: Cli, store: str) -> None:
        made = cli.data("checkpoint", "archive", "one", "two", "--to", store)
        assert [(each["thread_id"], each["checkpoints"]) for each in made] == [
            ("one", 2),
            ("two", 2),
        ]
        assert cli.data("checkpoint", "list") == []
        result = cli.ok("checkpoint", "restore", "one", "--from", store)
        assert result.err == "restored 2 checkpoints\n"
        assert len(cli.data("checkpoint", "list", "--thread", "one")) == 2
        named = ("--archive", made[1]["archive_id"], "-o", "json")
        assert json.loads(cli.ok("checkpoint", "restore", "two", "--from", store, *named).out)
        cli.ok("checkpoint", "verify")

    def test_keep_and_tenant(self, cli: Cli, store: str) -> None:
        cli.ok("checkpoint", "archive", "theirs", "--to", store, "--keep", "--tenant", "them")
        assert len(cli.data("checkpoint", "list", "--tenant", "them")) == 1
        assert cli("checkpoint", "restore", "theirs", "--from", store).code == 3

    def test_refused(self, cli: Cli, store: str) -> None:
        assert cli("checkpoint", "archive", "one", "nope", "--to", store).code == 3
        assert len(cli.data("checkpoint", "list")) == 4
        cli.ok("checkpoint", "archive", "one", "--to", store, "--keep")
        there = cli("checkpoint", "restore", "one", "--from", store)
        assert (there.code, "delete it first" in there.err) == (4, True)
        missing = cli("checkpoint", "archive", "one", "--to", "file:///no/such/folder")
        assert (missing.code, "does not exist" in missing.err) == (1, True)
        assert cli("checkpoint", "archive", "one", "--to", "s3://bucket").code == 2
        assert cli("checkpoint", "archive", "one").code == 2

    def test_held(self, cli: Cli, store: str) -> None:
        with closing(sqlite3.connect(cli.url.removeprefix("sqlite:///"))) as connection, connection:
            connection.execute("UPDATE agentflow_threads SET is_leased = TRUE, token = 5")
        assert cli("checkpoint", "archive", "one", "--to", store).code == 4
        assert objects(folder_of(store)) == []
