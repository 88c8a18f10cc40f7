"""`make demo`, as a user runs it: it passes, and it notices a payment service that cheats.

One fault is tried here. That each is noticed is shown by `tests/unit/test_refunds_verdict.py` and
`tests/integration/test_refunds_services.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


def demo(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.refunds.demo", *options],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )


def test_demo_adds_up_on_every_database(database_url: str, tmp_path: Path) -> None:
    ended = demo(tmp_path, "--db", database_url)
    assert ended.returncode == 0, ended.stderr
    assert "48 succeeded" in ended.stdout
    assert "6 approve, 3 edit, 3 reject" in ended.stdout
    assert "looks into the mail log and finds it, so it is not sent again" in ended.stdout
    assert "looks into the mail log and finds nothing, so it is sent" in ended.stdout
    assert "48, for 48 tickets" in ended.stdout


def test_demo_fails_when_one_payment_goes_wrong(tmp_path: Path) -> None:
    ended = demo(tmp_path, "--fault", "double")
    assert ended.returncode == 1
    (problem,) = [line for line in ended.stderr.splitlines() if "does not add up" in line]
    assert " and " in problem


def test_demo_names_an_option_that_it_does_not_know(tmp_path: Path) -> None:
    ended = demo(tmp_path, "--fault", "steal")
    assert ended.returncode == 2
    assert "steal" in ended.stderr
