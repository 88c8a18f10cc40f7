"""The fork server that fault tests rely on does what they assume of it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.forkserver import ForkServer

HERE = "tests.unit.test_forkserver"

pytestmark = pytest.mark.slow  # starting the server imports everything once


def test_victim_ends_with_the_exit_code_of_its_function(forkserver: ForkServer) -> None:
    assert forkserver.spawn(f"{HERE}:print_environment", "FLAVOUR").wait() == 0
    assert forkserver.spawn(f"{HERE}:exit_with", 7).wait() == 7
    failed = forkserver.spawn(f"{HERE}:divide_by_zero")
    assert failed.wait() == 1
    assert "ZeroDivisionError" in failed.output()


def test_victim_gets_arguments_environment_and_a_log(forkserver: ForkServer) -> None:
    victim = forkserver.spawn(f"{HERE}:print_environment", "FLAVOUR", env={"FLAVOUR": "vanilla"})
    assert victim.wait() == 0
    assert victim.output() == "vanilla\n"
    assert "FLAVOUR" not in os.environ


def test_coroutine_function_is_run_to_its_end(forkserver: ForkServer) -> None:
    victim = forkserver.spawn(f"{HERE}:say_it_later")
    assert victim.wait() == 0
    assert victim.output() == "later\n"


def test_killed_victim_reports_its_signal_and_keeps_what_it_wrote(forkserver: ForkServer) -> None:
    victim = forkserver.spawn(f"{HERE}:print_then_wait")
    wait_for_output(victim.output, "waiting")
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert victim.output() == "waiting\n"
    victim.kill()  # harmless: its pid is no longer its own


def test_stopped_victim_does_not_run_until_it_is_resumed(forkserver: ForkServer) -> None:
    victim = forkserver.spawn(f"{HERE}:print_then_wait")
    wait_for_output(victim.output, "waiting")
    victim.stop()
    victim.kill(signal.SIGTERM)
    with pytest.raises(TimeoutError, match="still runs"):
        victim.wait(timeout=0.05)
    victim.resume()
    assert victim.wait() == -signal.SIGTERM


def test_unknown_target_fails_in_the_victim_not_in_the_server(forkserver: ForkServer) -> None:
    victim = forkserver.spawn(f"{HERE}:no_such_function")
    assert victim.wait() == 1
    assert "no_such_function" in victim.output()
    assert forkserver.spawn(f"{HERE}:exit_with", 0).wait() == 0


def test_victims_are_warm_processes_of_their_own(forkserver: ForkServer) -> None:
    victims = [forkserver.spawn(f"{HERE}:print_pid_and_threads") for _ in range(5)]
    assert [victim.wait() for victim in victims] == [0] * 5
    assert {victim.output() for victim in victims} == {f"{v.pid} True 1\n" for v in victims}


def wait_for_output(read: Callable[[], str], text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in read():
        assert time.monotonic() < deadline, f"no {text!r} in {read()!r}"
        time.sleep(0.005)


def print_environment(name: str) -> None:
    print(os.environ.get(name))


def exit_with(code: int) -> None:
    sys.exit(code)


def divide_by_zero() -> None:
    print(1 // 0)


async def say_it_later() -> None:
    print("later")


def print_then_wait() -> None:
    print("waiting")
    signal.pause()


def print_pid_and_threads() -> None:
    threads = list(Path("/proc/self/task").iterdir())
    print(os.getpid(), "langgraph.graph" in sys.modules, len(threads))
