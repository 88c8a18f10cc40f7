"""An object store in a folder of a file system, which several machines may share.

An object is a file that is written under another name, synchronised, renamed, and durable once its
folder is synchronised too. The folder of the store itself is never made: where it is missing, a
disk is not mounted, and what were stored beside it would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from agentflow.errors import ObjectStoreError
from agentflow.failpoints import failpoint
from agentflow.objects.base import FoundObject, ObjectStore, check_name
from agentflow.types import new_id

_HIDDEN = "."
"""With this begin the names of files that are being written; an object's never do."""


class FolderStore(ObjectStore):
    """Objects as files below a folder."""

    def __init__(self, url: str, root: Path) -> None:
        """Use a folder that is there.

        Raises:
            ObjectStoreError: It is not there, or is no folder.
        """
        self.url = url
        self._root = root
        self._durable: set[Path] = set()
        """Folders whose own entries are known to be durable."""
        with self._named():
            self._check()

    def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._named():
            try:
                self._put(path, data)
            except FileNotFoundError:
                # Somebody has removed a folder that was there before.
                self._check()
                self._durable.clear()
                self._put(path, data)
        failpoint("objects.put")

    def touch(self, name: str) -> bool:
        with self._named():
            try:
                os.utime(self._path(name))
            except FileNotFoundError:
                self._check()
                return False
        return True

    def has(self, name: str) -> bool:
        with self._named():
            try:
                self._path(name).stat()
            except FileNotFoundError:
                self._check()
                return False
        return True

    def get(self, name: str) -> bytes | None:
        failpoint("objects.get")
        with self._named():
            try:
                return self._path(name).read_bytes()
            except FileNotFoundError:
                self._check()
                return None

    def list(self, folder: str, after: str, limit: int) -> list[FoundObject]:
        found: list[FoundObject] = []
        with self._named():
            for path, status in self._files(folder, tuple(after.split("/"))):
                if len(found) == limit:
                    break
                if path.name.startswith(_HIDDEN):
                    continue
                name = path.relative_to(self._root).as_posix()
                found.append(FoundObject(name, status.st_size, _time_of(status)))
        return found

    def remove(self, name: str) -> None:
        with self._named():
            self._path(name).unlink(missing_ok=True)

    def remove_unfinished(self, folder: str, before: datetime) -> int:
        count = 0
        with self._named():
            for path, status in self._files(folder, ()):
                if path.name.startswith(_HIDDEN) and _time_of(status) <= before:
                    path.unlink(missing_ok=True)
                    count += 1
        return count

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _check(self) -> None:
        if not self._root.exists():
            raise FileNotFoundError(2, "the folder does not exist; make it, or mount its disk")
        if not self._root.is_dir():
            raise NotADirectoryError(20, "it is no folder")

    def _put(self, path: Path, data: bytes) -> None:
        self._make(path.parent)
        unfinished = path.with_name(f"{_HIDDEN}{path.name}.{new_id()}")
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        _sync(path.parent)

    def _make(self, folder: Path) -> None:
        """Make a folder below the root, and see that it will be found after a crash."""
        if folder == self._root or folder in self._durable:
            return
        self._make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)
        self._durable.add(folder)

    def _files(self, folder: str, after: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the files below a folder behind a place, by the parts of their names."""
        start = self._path(folder)
        yield from _walk(start, start.relative_to(self._root).parts, after)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn what the system says into our own error."""
        try:
            yield
        except OSError as exc:
            raise ObjectStoreError(self.url, exc.strerror or type(exc).__name__) from exc


def _walk(
    folder: Path, parts: tuple[str, ...], after: tuple[str, ...]
) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 -- the names alone
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        here = (*parts, name)
        # What begins `after` may still have something behind it.
        if here < after[: len(here)]:
            continue
        path = folder / name
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_dir():
            yield from _walk(path, here, after)
        elif here > after:
            yield path, status


def _time_of(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
