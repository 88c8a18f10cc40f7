"""Values that are too large for rows are objects, and everything goes on as if they were not."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
import sqlalchemy as sa
from langgraph.graph import END, START, StateGraph

from agentflow import AgentFlow
from agentflow.apart import context_of_object
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.checkpoint.collection import GRACE
from agentflow.codec import Codec
from agentflow.database.engine import parse_url
from agentflow.database.tables import objects as references
from agentflow.database.tables import values
from agentflow.errors import (
    AgentflowError,
    CodecError,
    HashMismatchError,
    MissingBlobError,
    ObjectStoreError,
)
from agentflow.failpoints import arm, disarm
from agentflow.testing.savers.calls import at, checkpoint, ids, load, values_at, writes_at
from agentflow.testing.savers.graphs import CONFIG, DeltaState, chain
from tests.integration.cli import REPOSITORY
from tests.integration.offloaded import (
    KEEP,
    LIMIT,
    Later,
    collect,
    damages,
    everything,
    objects,
    once,
    opened,
    put_kept,
    put_value,
    text,
)
from tests.integration.sealed import in_environment, ring
from tests.integration.test_damage import together
from tests.integration.test_encryption import spellings

KEYED = pytest.mark.parametrize("keys", [None, "one"], ids=["plain", "encrypted"])


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    disarm()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def saver(database_url: str, folder: Path) -> Iterator[Saver]:
    with opened(database_url, folder) as made:
        yield made


def row_sizes(url: str) -> list[int]:
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        found = [len(data) for data in connection.execute(sa.select(values.c.data)).scalars()]
    engine.dispose()
    return found


def test_what_is_large_when_sealed_is_an_object(
    saver: Saver, folder: Path, database_url: str
) -> None:
    put_value(saver, "c1", None, "a" * 100_000)
    put_value(saver, "c2", "c1", text("small", LIMIT))
    assert objects(folder) == []
    put_value(saver, "c3", "c2", text("large"))
    (made,) = objects(folder)
    assert made.stat().st_size > LIMIT
    assert max(row_sizes(database_url)) < LIMIT
    put_kept(saver, "c4", "c3", text("large"))
    assert objects(folder) == [made]
    for name in ("c3", "c4"):
        assert values_at(saver, name)["x"] == text("large")
    assert damages(saver) == []


def test_object_is_durable_before_its_row_is_sent(
    saver: Saver, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_value(saver, "c1", None, "small")
    happened: list[str] = []

    def fsync(handle: int, real: Any = os.fsync) -> None:
        happened.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    for point in ("checkpoint.after_insert", "database.before_commit"):
        arm(point, lambda point=point: happened.append(point))  # type: ignore[misc]
    put_value(saver, "c2", "c1", text("large"))
    (made,) = objects(folder)
    ends = [happened.index("checkpoint.after_insert"), len(happened) - 1]
    assert happened[ends[1]] == "database.before_commit"
    last = happened[ends[0] - 1]
    assert last == str(made.parent)
    assert any(made.name in each for each in happened[: ends[0]])


@KEYED
def test_equal_values_of_a_tenant_are_one_object(
    database_url: str, folder: Path, keys: str | None
) -> None:
    sealing = ring(keys) if keys else None
    with (
        opened(database_url, folder, keys=sealing) as one,
        opened(database_url, folder, keys=sealing) as another,
    ):
        put_value(one, "c1", None, text("x"))
        put_value(another, "c1", None, text("x"), thread="u")
        put_value(another, "c2", "c1", text("y"), thread="u")
        put_value(another, "c3", "c2", text("x"), thread="u")
        assert len(objects(folder)) == 2
        other = one.for_tenant("other")
        put_value(other, "c1", None, text("x"))
        assert len(objects(folder)) == 3
        one.delete_thread("t")
        collect(one)
        assert len(objects(folder)) == 3
        assert values_at(another, "c1", thread="u")["x"] == text("x")
        another.delete_thread("u")
        collect(one)
        assert len(objects(folder)) == 1
        assert values_at(other)["x"] == text("x")


def test_databases_in_one_folder_leave_each_other_alone(
    database_url: str, folder: Path, tmp_path: Path
) -> None:
    with (
        opened(database_url, folder) as one,
        opened(f"sqlite:///{tmp_path / 'other.db'}", folder) as other,
    ):
        for each in (one, other):
            put_value(each, "c1", None, text("x"))
        one.delete_thread("t")
        assert collect(one) == 1
        assert collect(other) == 0
        assert values_at(other)["x"] == text("x")


class TestDamage:
    """Whatever happens to an object, no reader gets another value."""

    @pytest.fixture(params=[None, "one"], ids=["plain", "encrypted"])
    def saver(
        self, request: pytest.FixtureRequest, database_url: str, folder: Path
    ) -> Iterator[Saver]:
        keys = ring(request.param) if request.param else None
        with opened(database_url, folder, keys=keys, tenant="acme") as made:
            put_value(made, "c1", None, text("one"))
            put_value(made, "c2", "c1", [text("two"), text("three")])
            made.put_writes(at("c2"), [("x", text("four"))], "task")
            yield made

    def read(self, saver: Saver) -> list[str]:
        """Read everything, and name what is raised."""
        found = []
        for name in ("c1", "c2"):
            try:
                load(saver, name)
            except AgentflowError as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    def test_object_that_is_missing(self, saver: Saver, folder: Path) -> None:
        whole = everything(saver)
        places = set()
        for path in objects(folder):
            data = path.read_bytes()
            path.unlink()
            (said,) = self.read(saver)
            (reported,) = damages(saver)
            path.write_bytes(data)
            assert said.startswith("MissingBlobError: ")
            assert "'x'" in said
            for part in ("thread 't'", "tenant 'acme'", path.name, "backup"):
                assert part in said
                assert part in reported.message
            assert reported.error == "MissingBlobError"
            assert (reported.tenant, reported.thread_id) == ("acme", "t")
            assert f"checkpoint '{reported.checkpoint_id}'" in said
            places.add((reported.checkpoint_id, reported.channel))
        assert places == {("c1", "x"), ("c2", "x"), ("c2", "")}
        assert everything(saver) == whole
        assert damages(saver) == []

    def test_object_that_has_changed(self, saver: Saver, folder: Path) -> None:
        whole = everything(saver)
        paths = objects(folder)
        contents = [path.read_bytes() for path in paths]
        for number, path in enumerate(paths):
            data = contents[number]
            places = [*range(16), len(data) // 2, len(data) - 1]
            flipped = [data[:i] + bytes((data[i] ^ 1,)) + data[i + 1 :] for i in places]
            swapped = [other for other in contents if other != data]
            for changed in [*flipped, *swapped, data[:-1], data[:5], b"", data + b"x", data * 2]:
                path.write_bytes(changed)
                (said,) = self.read(saver)
                (reported,) = damages(saver)
                named = {"HashMismatchError", "UnknownVersionError", "UnknownKeyError"}
                assert said.partition(":")[0] in named | {"UnencryptedValueError"}
                assert reported.error == said.partition(":")[0]
            path.write_bytes(data)
        assert everything(saver) == whole
        assert damages(saver) == []

    def test_forged_object_is_not_what_the_row_names(
        self, saver: Saver, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if it was sealed for this place, as anybody can who needs no key for that."""
        (path, *_) = objects(folder)
        body = saver._codec.serialize(text("forged"))
        path.write_bytes(saver._codec.seal(body, context_of_object("acme", path.name)))
        (said,) = self.read(saver)
        assert "HashMismatchError" in said
        assert "is not the one that was stored" in said

    def test_reference_that_has_changed(self, saver: Saver, database_url: str) -> None:
        """Of the value, and of what keeps its object from being collected."""
        engine = sa.create_engine(parse_url(database_url))
        whole = damages(saver)
        assert whole == []
        with engine.connect() as connection:
            rows = connection.execute(sa.select(references)).all()
        assert len(rows) == 3
        for name in ("thread", "series", "start", "object"):
            column = references.c[name]
            for row in rows:
                key = [column == getattr(row, column.name) for column in references.primary_key]
                other = f"{row.object}x" if name == "object" else getattr(row, name) + 1_000_000
                with engine.begin() as connection:
                    change = sa.update(references).where(*key).values({name: other})
                    connection.execute(change)
                (reported,) = damages(saver)
                assert "from being collected" in reported.message
                with engine.begin() as connection:
                    connection.execute(
                        sa.update(references)
                        .where(column == other)
                        .values({name: getattr(row, name)})
                    )
        engine.dispose()
        assert damages(saver) == []

    def test_store_that_is_away(self, saver: Saver, folder: Path) -> None:
        whole = everything(saver)
        folder.rename(folder.with_name("away"))
        for said in self.read(saver):
            assert said.startswith("ObjectStoreError: ")
        with pytest.raises(ObjectStoreError, match="does not exist"):
            damages(saver)
        with pytest.raises(ObjectStoreError, match="does not exist"):
            put_value(saver, "c3", "c2", text("new"))
        assert not folder.exists()
        folder.with_name("away").rename(folder)
        assert everything(saver) == whole

    def test_checkpointer_without_the_store(self, saver: Saver, database_url: str) -> None:
        with open_checkpointer(database_url, keys=saver.keys, tenant="acme") as bare:
            for said in self.read(bare):
                assert said.startswith("MissingBlobError: ")
                assert "AGENTFLOW_OFFLOAD" in said
            with pytest.raises(MissingBlobError):
                bare.copy_thread("t", "u")
            assert ids(saver.list(at(thread="u"))) == []


def test_environment_names_the_store(
    saver: Saver, database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_value(saver, "c1", None, text("x"))
    monkeypatch.setenv("AGENTFLOW_OFFLOAD", f"file://{folder}")
    with open_checkpointer(database_url) as other:
        assert values_at(other)["x"] == text("x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_object_that_cannot_be_stored_fails_its_put_alone(
    saver: Saver, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put_value(saver, "c1", None, "small")

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    async def superstep() -> None:
        written = saver.aput_writes(at("c1", thread="t"), [("x", text("large"))], "task")
        other = saver.aput_writes(at("c1", thread="u"), [("x", "small")], "task")
        with pytest.raises(ObjectStoreError, match=os.strerror(number)):
            await written
        await other

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fsync)
        asyncio.run(superstep())
        with pytest.raises(ObjectStoreError):
            put_value(saver, "c2", "c1", text("large"))
    assert ids(saver.list(at())) == ["c1"]
    assert objects(folder) == []
    load(saver)
    put_value(saver, "c3", "c1", text("large"))
    assert values_at(saver)["x"] == text("large")


class TestVerbs:
    """What changes whole threads keeps what they need, and lets go of what they do not."""

    def test_copy_shares_the_objects(self, saver: Saver, folder: Path) -> None:
        put_value(saver, "c1", None, text("x"))
        saver.put_writes(at("c1"), [("x", text("w"))], "task")
        whole, made = everything(saver), objects(folder)
        saver.copy_thread("t", "u")
        assert objects(folder) == made
        saver.delete_thread("t")
        assert collect(saver) == 0
        assert everything(saver, "u") == whole
        assert damages(saver) == []
        saver.delete_thread("u")
        assert collect(saver) == 2
        assert objects(folder) == []

    def test_pruning_lets_go_of_what_only_old_checkpoints_had(
        self, saver: Saver, folder: Path
    ) -> None:
        log: list[str] = []
        for number in range(6):
            log = [*log, text(number)] if number != 3 else log[:1]
            put_value(saver, f"c{number}", f"c{number - 1}" if number else None, log)
            load(saver)
        whole = everything(saver)
        assert len(objects(folder)) == 5
        saver.prune(["t"])
        assert everything(saver)[0][1] == whole[0][1]
        assert collect(saver) == 2
        assert everything(saver)[0][1] == whole[0][1]
        assert damages(saver) == []
        saver.delete_for_runs(["none"])
        saver.prune(["t"], strategy="delete")
        assert collect(saver) == 3
        assert objects(folder) == []

    @pytest.mark.parametrize("carried", [True, False])
    def test_large_writes_stay_as_long_as_their_checkpoint(
        self, saver: Saver, folder: Path, *, carried: bool
    ) -> None:
        """Those that the next checkpoint has carried go to the log when that one is deleted."""
        put_value(saver, "c1", None, "x")
        written = [("x", text("w")), ("y", text("v"))]
        if carried:
            metadata: Any = {"step": 1, "run_id": "r"}
            made = checkpoint("c2", {"x": "c2"}, x=text("w"))
            asyncio.run(
                together(
                    saver,
                    lambda: saver.aput_writes(at("c1"), written, "task"),
                    lambda: saver.aput(at("c1"), made, metadata, {"x": "c2"}),
                )
            )
            assert ids(saver.list(at())) == ["c2", "c1"]
            saver.delete_for_runs(["r"])
        else:
            saver.put_writes(at("c1"), written, "task")
        for _ in range(2):
            saver.prune(["t"])
            collect(saver)
        assert writes_at(saver) == [("task", *each) for each in written]
        assert damages(saver) == []
        assert len(objects(folder)) == 2
        put_value(saver, "c3", "c1", "y")
        saver.prune(["t"])
        collect(saver)
        assert objects(folder) == []
        assert damages(saver) == []

    def test_list_is_cut_off_inside_an_object(self, saver: Saver, folder: Path) -> None:
        """What nobody needs any more of a stretch is gone from the store as well."""
        items = [f"{number} {text(number, 400)}" for number in range(15)]
        put_value(saver, "c1", None, items)
        load(saver)
        put_value(saver, "c2", "c1", items[:14])
        saver.prune(["t"])
        collect(saver)
        assert values_at(saver)["x"] == items[:14]
        assert damages(saver) == []
        (made,) = objects(folder)
        assert items[14] not in made.read_text("latin-1")

    def test_deltas_are_made_from_objects(self, saver: Saver, folder: Path) -> None:
        nodes = [(f"n{n}", lambda _, n=n: {"log": [text(n)]}) for n in range(7)]
        graph = chain(*nodes, state=DeltaState).compile(checkpointer=saver)
        output = graph.invoke({"log": ["first"]}, CONFIG, durability="sync")
        assert objects(folder)
        saver.prune(["t"])
        collect(saver)
        assert graph.get_state(CONFIG).values["log"] == output["log"]
        assert graph.invoke({"log": ["second"]}, CONFIG)["log"][-1] == text(6)
        assert damages(saver) == []


class TestCollection:
    """Nothing goes that somebody may still read or is about to refer to."""

    def test_dry_run_says_what_would_go(self, saver: Saver, folder: Path) -> None:
        put_value(saver, "c1", None, text("x"))
        (size,) = (path.stat().st_size for path in objects(folder))
        put_value(saver, "c1", None, text("y"), thread="u")
        saver.delete_thread("t")
        assert collect(saver, sweeps=1) == 0
        for dry_run in (True, True, False):
            said = saver.sweep(KEEP, clock=Later(4 * GRACE), dry_run=dry_run)
            assert (said.objects, said.object_bytes) == (1, size)
        assert len(objects(folder)) == 1
        assert saver.sweep(KEEP, clock=Later(9 * GRACE), dry_run=True).objects == 0

    def test_young_objects_stay(self, saver: Saver, folder: Path) -> None:
        put_value(saver, "c1", None, text("x"))
        saver.delete_thread("t")
        for _ in range(3):
            assert saver.sweep(KEEP).objects == 0
        assert len(objects(folder)) == 1
        assert saver.sweep(KEEP, clock=Later(GRACE / 2), grace=GRACE / 4).objects == 1

    def test_reader_in_flight_gets_what_it_has_begun_to_read(
        self, saver: Saver, database_url: str, folder: Path
    ) -> None:
        put_value(saver, "c1", None, text("x"))
        # Stored long ago, so that only the reference tells that it was needed until now.
        (path,) = objects(folder)
        os.utime(path, (1, 1))
        swept = []
        with opened(database_url, folder) as other:

            def interfere() -> None:
                other.delete_thread("t")
                swept.append([other.sweep(KEEP).objects for _ in range(3)])

            arm("objects.get", once(interfere))
            assert values_at(saver)["x"] == text("x")
            assert swept == [[0, 0, 0]]
            assert collect(other) == 1

    @pytest.mark.parametrize("was_there", [True, False])
    def test_writer_in_flight_finds_its_object_or_puts_it_again(
        self, saver: Saver, database_url: str, folder: Path, *, was_there: bool
    ) -> None:
        """However long it was stopped between storing an object and committing its row."""
        if was_there:
            put_value(saver, "c1", None, text("x"), thread="before")
            saver.delete_thread("before")
            collect(saver, sweeps=1)
        removed = []
        with opened(database_url, folder) as other:
            put_value(other, "c1", None, "to know the thread", thread="u")
            arm("objects.stored", once(lambda: removed.append(collect(other, sweeps=3))))
            put_value(saver, "c1", None, text("x"))
            assert removed == [1]
        assert values_at(saver)["x"] == text("x")
        assert damages(saver) == []
        assert collect(saver) == 0

    def test_object_of_a_put_that_was_refused_goes(self, saver: Saver, folder: Path) -> None:
        put_value(saver, "c1", None, "x")
        arm("checkpoint.after_insert", once(lambda: (_ for _ in ()).throw(OSError("no"))))
        with pytest.raises(OSError, match="no"):
            put_value(saver, "c2", "c1", text("x"))
        disarm()
        assert len(objects(folder)) == 1
        assert saver.sweep(KEEP).objects == 0
        assert collect(saver, sweeps=1) == 1

    @pytest.mark.usefixtures("saver")
    async def test_app_collects(self, database_url: str, folder: Path) -> None:
        async with AgentFlow(database_url, offload=f"file://{folder}") as app:
            saver = app._saver
            assert isinstance(saver, Saver)
            await asyncio.to_thread(put_value, saver, "c1", None, text("x", 600_000))
            assert len(objects(folder)) == 1
            await saver.adelete_thread("t")
            assert (await app.sweep()).objects == 0
            await saver.asweep(KEEP, clock=Later(2 * GRACE))
            await saver.asweep(KEEP, clock=Later(4 * GRACE))
        assert objects(folder) == []


class TestEncryption:
    """Objects are encrypted as rows are, and rotated with them."""

    def test_no_payload_is_in_any_object_or_archive(
        self, database_url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The twin without keys shows that it would have been found."""
        monkeypatch.setattr("agentflow.codec.COMPRESS_FROM", 1 << 40)
        for keys in (None, ring("one")):
            canary = secrets.token_hex(20)
            where = tmp_path / f"{keys}"
            where.mkdir()
            with opened(database_url, where / "o", keys=keys, tenant=f"{keys}") as saver:
                put_value(saver, "c1", None, f"{canary} {text('x')}")
                saver.put_writes(at("c1"), [("x", f"{canary} {text('y')}")], "task")
                (where / "archive").mkdir()
                saver.archive("t", to=f"file://{where / 'archive'}")
            stored = [path.read_bytes() for path in objects(where)]
            assert len(stored) > 4
            found = [data for data in stored for form in spellings(canary) if form in data]
            assert bool(found) == (keys is None)

    def test_names_do_not_tell_whether_a_guess_is_right(
        self, database_url: str, folder: Path
    ) -> None:
        for name in ("one", "two"):
            with opened(database_url, folder, keys=ring(name), tenant=name) as saver:
                put_value(saver, "c1", None, text("x"))
        with opened(database_url, folder, tenant="one") as plain:
            put_value(plain, "c1", None, text("x"), thread="plain")
        assert len(objects(folder)) == 3

    @pytest.mark.parametrize("before", ["old", None])
    async def test_rotation_seals_objects_anew(
        self, database_url: str, folder: Path, before: str | None
    ) -> None:
        old = ring(before) if before else None
        with opened(database_url, folder, keys=old) as saver:
            put_value(saver, "c1", None, text("x"))
            put_value(saver, "c2", "c1", [text("x"), text("y")])
            saver.put_writes(at("c2"), [("x", text("w"))], "task")
            saver.copy_thread("t", "u")
            whole, stale = everything(saver), objects(folder)
        names = ("new", "old") if before else ("new",)
        both = ring(*names, accept_plaintext=before is None)
        async with (
            opened(database_url, folder, keys=both) as rotating,
            AgentFlow(database_url, keys=both, checkpoints=rotating) as app,
        ):
            assert (await app.rotate_keys()).is_complete
            assert len(objects(folder)) == 2 * len(stale)
        with opened(database_url, folder, keys=ring("new")) as saver:
            assert everything(saver) == everything(saver, "u") == whole
            assert await asyncio.to_thread(damages, saver) == []
            assert await asyncio.to_thread(collect, saver) == len(stale)
            assert not any(path.exists() for path in stale)
            assert everything(saver) == everything(saver, "u") == whole

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [1, 4, 6])
    def test_rotation_that_is_killed_is_resumed(
        self, database_url: str, folder: Path, count: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(database_url, folder, keys=ring("old")) as saver:
            for thread in ("t", "u"):
                put_value(saver, "c1", None, text(thread, 600_000), thread=thread)
                put_value(saver, "c2", "c1", text("x", 600_000), thread=thread)
            whole = [everything(saver, thread) for thread in ("t", "u")]
        monkeypatch.setenv("AGENTFLOW_OFFLOAD", f"file://{folder}")
        victim = [sys.executable, "-m", "tests.integration.rotation_victim"]
        killed = subprocess.run(
            [*victim, database_url, in_environment("new", "old"), str(count)],
            cwd=REPOSITORY,
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        for names in (("new", "old"), ("old", "new")):
            with opened(database_url, folder, keys=ring(*names)) as saver:
                assert [everything(saver, thread) for thread in ("t", "u")] == whole
                assert damages(saver) == []

        async def rotate() -> bool:
            async with AgentFlow(database_url, keys=ring("new", "old")) as app:
                return (await app.rotate_keys()).is_complete

        assert asyncio.run(rotate())
        with opened(database_url, folder, keys=ring("new")) as saver:
            collect(saver)
            assert [everything(saver, thread) for thread in ("t", "u")] == whole
            assert damages(saver) == []
            assert len(objects(folder)) == 3

    def test_wrong_key_or_none_reads_nothing(self, database_url: str, folder: Path) -> None:
        with opened(database_url, folder, keys=ring("one")) as saver:
            put_value(saver, "c1", None, text("x"))
        stored = [path.read_bytes() for path in objects(folder)]
        for keys in (None, ring("two")):
            with (
                opened(database_url, folder, keys=keys) as other,
                pytest.raises(CodecError, match="'one'"),
            ):
                load(other)
        assert [path.read_bytes() for path in objects(folder)] == stored

    def test_plain_object_in_the_place_of_an_encrypted_one(
        self, database_url: str, folder: Path
    ) -> None:
        with opened(database_url, folder, keys=ring("one")) as saver:
            put_value(saver, "c1", None, text("x"))
            (path,) = objects(folder)
            body = saver._codec.serialize(text("x"))
            path.write_bytes(Codec().seal(body, context_of_object("", path.name)))
            with pytest.raises(CodecError, match="not encrypted"):
                load(saver)


class Big(TypedDict):
    blob: bytes
    count: int


@pytest.mark.slow
def test_large_value_is_neither_copied_nor_stored_again_by_the_steps_after(
    sqlite_url: str, tmp_path: Path
) -> None:
    """100 MB beside a counter."""
    size, steps = 100_000_000, 20
    folder = tmp_path / "objects"
    folder.mkdir()
    database = Path(sqlite_url.removeprefix("sqlite:///"))

    def count(state: Big) -> Any:
        return {"count": state["count"] + 1}

    graph: StateGraph[Big, None, Big, Big] = StateGraph(Big)
    graph.add_node("count", count)
    graph.add_edge(START, "count")
    graph.add_conditional_edges("count", lambda s: "count" if s["count"] < steps else END)
    peaks: list[int] = []
    stored: list[list[tuple[str, int]]] = []
    with open_checkpointer(sqlite_url, offload=f"file://{folder}") as saver:
        compiled = graph.compile(checkpointer=saver)
        given: Any = {"blob": os.urandom(size), "count": 0}
        config: Any = {"configurable": {"thread_id": "t"}, "recursion_limit": 100}
        tracemalloc.start()
        try:
            for _ in compiled.stream(given, config, stream_mode="updates", durability="sync"):
                now, peak = tracemalloc.get_traced_memory()
                peaks.append(peak - now)
                stored.append([(p.name, p.stat().st_mtime_ns) for p in objects(folder)])
                tracemalloc.reset_peak()
        finally:
            tracemalloc.stop()
        assert len(peaks) == steps
        assert max(peaks[2:]) < size / 100
        assert all(each == stored[2] for each in stored[3:])
        assert sum(path.stat().st_size for path in database.parent.iterdir()) < size / 10
        found = load(saver, thread="t").checkpoint["channel_values"]
        assert (found["count"], len(found["blob"])) == (steps, size)
        assert found["blob"] == given["blob"]


def test_folder_from_a_backup_serves_a_database_from_a_backup(
    sqlite_url: str, folder: Path, tmp_path: Path
) -> None:
    with opened(sqlite_url, folder) as saver:
        put_value(saver, "c1", None, text("x"))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy / "objects")
    shutil.copy(sqlite_url.removeprefix("sqlite:///"), copy / "agentflow.db")
    with opened(f"sqlite:///{copy / 'agentflow.db'}", copy / "objects") as restored:
        shutil.rmtree(folder)
        assert values_at(restored)["x"] == text("x")
        assert damages(restored) == []


def test_reference_alone_is_no_value(saver: Saver) -> None:
    """Wherever a value stands in its row, what says where one is does not open."""
    codec = saver._codec
    sealed = codec.seal_reference(b"x", b"here")
    with pytest.raises(HashMismatchError, match="says where a value is"):
        codec.unseal(sealed, b"here")
