"""The object store in a folder: names, pages, what is durable when, and what goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agentflow.errors import InvalidInputError, ObjectStoreError, UnsupportedUrlError
from agentflow.objects import ObjectStore, open_objects


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "the objects"
    made.mkdir()
    return made


@pytest.fixture
def store(folder: Path) -> ObjectStore:
    return open_objects(f"file://{folder}")


def names(store: ObjectStore, folder: str = "a") -> list[str]:
    return [each.name for each in store.list(folder, "", 100)]


def files(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def test_object_is_found_by_its_name_until_it_is_removed(store: ObjectStore) -> None:
    assert (store.get("a/b"), store.has("a/b"), store.touch("a/b")) == (None, False, False)
    store.put("a/b", b"one")
    store.put("a/b", b"two")
    assert (store.get("a/b"), store.has("a/b"), store.touch("a/b")) == (b"two", True, True)
    store.remove("a/b")
    store.remove("a/b")
    assert store.get("a/b") is None


def test_listing_goes_page_by_page_through_one_folder(store: ObjectStore) -> None:
    put = [f"a/{first}/{second}" for first in ("0", "00", "0-1", "f") for second in ("1", "2", "z")]
    for name in [*put, "a/top", "b/other", "aa/other"]:
        store.put(name, name.encode())
    listed: list[str] = []
    after = ""
    while page := store.list("a", after, 4):
        listed += [each.name for each in page]
        after = page[-1].name
        assert all(each.size == len(each.name) for each in page)
    assert sorted(listed) == sorted([*put, "a/top"])
    assert len(set(listed)) == len(listed)
    assert store.list("nothing", "", 9) == []


def test_touched_object_counts_as_put_now(store: ObjectStore, folder: Path) -> None:
    store.put("a/b", b"x")
    os.utime(folder / "a/b", (1, 1))
    assert store.list("a", "", 1)[0].put_at == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    store.touch("a/b")
    assert datetime.now(UTC) - store.list("a", "", 1)[0].put_at < timedelta(minutes=1)


@pytest.mark.parametrize(
    "name", ["", "/", "../x", "a/../../x", "/etc/passwd", "a//b", ".a", "a/.b", "A", "a\x00", "ä"]
)
def test_name_that_might_lead_elsewhere_is_refused(store: ObjectStore, name: str) -> None:
    for call in (store.get, store.touch, store.remove, lambda name: store.put(name, b"")):
        with pytest.raises(InvalidInputError, match="name"):
            call(name)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("s3://bucket", UnsupportedUrlError, "s3"),
        ("/var/lib/objects", UnsupportedUrlError, "file:///folder"),
        ("", UnsupportedUrlError, "file:///folder"),
        ("file:objects", InvalidInputError, "from the root on"),
        ("file://objects", InvalidInputError, "from the root on"),
        ("file://host/objects", InvalidInputError, "from the root on"),
        ("file:///", InvalidInputError, "from the root on"),
        ("file:///tmp?x=1", InvalidInputError, "from the root on"),
        ("file:///tmp#x", InvalidInputError, "from the root on"),
        ("file:///tmp%00x", InvalidInputError, "from the root on"),
        ("file://[", InvalidInputError, "malformed"),
        (7, InvalidInputError, "malformed"),
        ("file:///no/such/folder", ObjectStoreError, "does not exist"),
        ("file:///etc/hostname", ObjectStoreError, "no folder"),
        (f"file:///{'x' * 300}", ObjectStoreError, "too long"),
    ],
)
def test_url_that_is_none_is_refused(url: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_objects(url)


def test_spaces_are_written_as_in_any_url(folder: Path) -> None:
    open_objects(f"file://localhost{folder}".replace(" ", "%20")).put("a/b", b"x")
    assert files(folder) == ["a/b"]


def test_object_is_durable_before_it_has_its_name_and_its_name_when_put_returns(
    store: ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def fsync(handle: int, real: Any = os.fsync) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        kind = "folder" if path.is_dir() else "file"
        seen.append(f"{kind} {path.parent.relative_to(folder.parent) if kind == 'file' else path}")
        if kind == "file":
            assert path.read_bytes() == b"x"
            assert "a/b/c" not in files(folder)
        elif path == folder / "a/b":
            assert "a/b/c" in files(folder)
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    store.put("a/b/c", b"x")
    into = f"file {(folder / 'a/b').relative_to(folder.parent)}"
    assert seen == [f"folder {folder}", f"folder {folder / 'a'}", into, f"folder {folder / 'a/b'}"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS])
def test_put_that_fails_is_named_and_leaves_what_was_there(
    store: ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store.put("a/b", b"before")

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fsync)
        with pytest.raises(ObjectStoreError, match=os.strerror(number)) as caught:
            store.put("a/b", b"after")
        with pytest.raises(ObjectStoreError):
            store.put("new/b", b"after")
    assert str(folder) in str(caught.value)
    assert store.get("a/b") == b"before"
    assert files(folder) == ["a/b"]


def test_folder_that_is_gone_is_not_made_again(store: ObjectStore, folder: Path) -> None:
    """A disk that is not mounted any more must not be mistaken for an empty one."""
    store.put("a/b", b"x")
    shutil.rmtree(folder / "a")
    store.put("a/b", b"x")
    shutil.rmtree(folder)
    for call in (store.get, store.has, store.touch, lambda name: store.put(name, b"x")):
        with pytest.raises(ObjectStoreError, match="does not exist"):
            call("a/b")
    assert not folder.exists()


def test_what_a_killed_put_leaves_is_no_object_and_goes(store: ObjectStore, folder: Path) -> None:
    store.put("a/b", b"x")
    (folder / "a" / ".b.1").write_bytes(b"half")
    now = datetime.now(UTC)
    assert names(store) == ["a/b"]
    assert store.remove_unfinished("a", now - timedelta(hours=1)) == 0
    assert store.remove_unfinished("a", now + timedelta(hours=1)) == 1
    assert files(folder) == ["a/b"]
