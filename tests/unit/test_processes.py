"""Whether a process has ended is said only where it is known."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agentflow.processes import has_ended, own_mark

PRINT = "from agentflow.processes import own_mark; print(own_mark()); input()"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="marks are made from /proc")
def test_process_has_ended_when_it_is_not_there_any_more() -> None:
    own = own_mark()
    assert own is not None
    command = [sys.executable, "-c", PRINT]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        mark = child.stdout.readline().strip()
        assert not has_ended(mark)
        child.communicate("")
    assert has_ended(mark)
    assert not has_ended(own)
    space, number, started = own.split("/")
    assert has_ended(f"{space}/{number}/{int(started) - 1}"), "another one had the number"
    assert not has_ended(f"other:{space.partition(':')[2]}/{mark.partition('/')[2]}")
    assert not has_ended("nonsense")
