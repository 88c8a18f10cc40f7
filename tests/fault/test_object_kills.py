"""Processes killed between an object and its row, during collection, and during an archive.

Whatever a row refers to is there, whatever was acknowledged is there, and what is left over goes.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from agentflow.checkpoint.collection import GRACE
from agentflow.errors import AgentflowError
from tests.fault.forkserver import ForkServer
from tests.fault.object_victims import ARCHIVER, COLLECTOR, RESTORER, WRITER
from tests.fault.test_saver_kills import wait_until_alone
from tests.integration.offloaded import (
    KEEP,
    Later,
    collect,
    damages,
    everything,
    objects,
    opened,
    put_value,
    text,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def kill(forkserver: ForkServer, url: str, target: str, *args: Any) -> None:
    """Let a process kill itself, and wait until the server has noticed."""
    victim = forkserver.spawn(target, url, *args)
    assert victim.wait() == -signal.SIGKILL, victim.output()
    wait_until_alone(url)


def test_writer_killed_between_its_object_and_its_row(
    database_url: str, folder: Path, forkserver: ForkServer
) -> None:
    points = {
        "objects.put": False,
        "objects.stored": False,
        "checkpoint.after_insert": False,
        "database.before_commit": False,
        "database.after_commit": True,
    }
    with opened(database_url, folder) as saver:
        for point in points:
            put_value(saver, "c1", None, text(f"{point} 1"), thread=point)
    for point in points:
        kill(forkserver, database_url, WRITER, str(folder), point, point, 1)
    with opened(database_url, folder) as saver:
        assert damages(saver) == []
        assert len(objects(folder)) == 2 * len(points)
        for point, is_committed in points.items():
            names = ["c2", "c1"] if is_committed else ["c1"]
            assert [each[0] for each in everything(saver, point)] == names
        # The objects of the dead stay for the grace period, and serve whoever comes again.
        assert saver.sweep(KEEP).objects == 0
        put_value(saver, "c2", "c1", text("objects.put 2"), thread="objects.put")
        assert collect(saver, sweeps=1) == 3
        for point in points:
            for name, values, *_ in everything(saver, point):
                assert values["x"] == text(f"{point} {name[1:]}")
        assert damages(saver) == []


def test_collector_killed_anywhere(database_url: str, folder: Path, forkserver: ForkServer) -> None:
    with opened(database_url, folder) as saver:
        for number in range(8):
            put_value(saver, "c1", None, text(number), thread=f"t{number}")
        for number in range(5):
            saver.delete_thread(f"t{number}")
        whole = [everything(saver, f"t{number}") for number in range(5, 8)]
    left = [8]
    for point, number in (
        ("database.before_commit", 1),
        ("database.after_commit", 1),
        ("database.before_commit", 2),
        ("objects.removed", 1),
        ("objects.removed", 2),
    ):
        kill(forkserver, database_url, COLLECTOR, str(folder), point, number)
        with opened(database_url, folder) as saver:
            assert [everything(saver, f"t{number}") for number in range(5, 8)] == whole
            assert damages(saver) == []
        left.append(len(objects(folder)))
    assert left[-3:] == [8, 7, 5]
    with opened(database_url, folder) as saver:
        assert collect(saver) == 2
        assert len(objects(folder)) == 3
        assert [everything(saver, f"t{number}") for number in range(5, 8)] == whole
        for number in range(5, 8):
            saver.delete_thread(f"t{number}")
        assert collect(saver) == 3
        assert objects(folder) == []


def test_archiver_killed_anywhere_loses_nothing(
    database_url: str, folder: Path, forkserver: ForkServer, tmp_path: Path
) -> None:
    """The thread is there, or its archive is, or both are."""
    store = tmp_path / "archives"
    store.mkdir()
    url = f"file://{store}"
    points = {
        ("objects.put", 1): True,
        ("objects.put", 3): True,
        ("checkpoint.archived", 1): True,
        ("database.before_commit", 2): True,
        ("database.after_commit", 2): False,
    }
    with opened(database_url, folder) as saver:
        for number, _ in enumerate(points):
            put_value(saver, "c1", None, text(number), thread=f"t{number}")
            put_value(saver, "c2", "c1", "small", thread=f"t{number}")
        whole = [everything(saver, f"t{number}") for number, _ in enumerate(points)]
    for number, (point, passed) in enumerate(points):
        args = (f"t{number}", point, passed, url)
        kill(forkserver, database_url, ARCHIVER, str(folder), *args)
    with opened(database_url, folder) as saver:
        assert damages(saver) == []
        for number, is_there in enumerate(points.values()):
            found = everything(saver, f"t{number}")
            assert found == (whole[number] if is_there else [])
            if is_there:
                saver.archive(f"t{number}", to=url)
            assert everything(saver, f"t{number}") == []
        assert collect(saver) == len(points)
        for number, _ in enumerate(points):
            saver.restore(f"t{number}", source=url)
            assert everything(saver, f"t{number}") == whole[number]


def test_restorer_killed_anywhere_leaves_all_or_nothing(
    database_url: str, folder: Path, forkserver: ForkServer, tmp_path: Path
) -> None:
    store = tmp_path / "archives"
    store.mkdir()
    url = f"file://{store}"
    points = {
        ("objects.put", 1): False,
        ("database.before_commit", 3): False,
        ("database.after_commit", 3): True,
    }
    with opened(database_url, folder) as saver:
        put_value(saver, "c1", None, text("t"))
        put_value(saver, "c2", "c1", "small")
        whole = everything(saver)
        for number, _ in enumerate(points):
            saver.copy_thread("t", f"t{number}")
            saver.archive(f"t{number}", to=url)
        saver.delete_thread("t")
        collect(saver)
        assert objects(folder) == []
    for number, (point, passed) in enumerate(points):
        args = (f"t{number}", point, passed, url)
        kill(forkserver, database_url, RESTORER, str(folder), *args)
    with opened(database_url, folder) as saver:
        for number, is_there in enumerate(points.values()):
            found = everything(saver, f"t{number}")
            assert found == (whole if is_there else [])
            if not is_there:
                saver.restore(f"t{number}", source=url)
            assert everything(saver, f"t{number}") == whole
        assert damages(saver) == []
        assert len(objects(folder)) == 1
        with pytest.raises(AgentflowError, match="there already"):
            saver.restore("t0", source=url)
        assert saver.sweep(KEEP, clock=Later(9 * GRACE)).objects == 0
