"""The hook that holds a full run against the requirements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.requirements import REQUIREMENTS, find_problems

MAPPING = {"S0-1": ("t.py::a", "t.py::b"), "S0-2": ("t.py::a",)}


SUITES = Path("agentflow/testing/savers")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({"t.py::a": {"passed"}, "t.py::b[1]": {"passed"}, "t.py::b[2]": {"failed"}}, []),
        ({"t.py::a": {"passed"}}, ["S0-1: t.py::b is missing or was deselected"]),
        (
            {"t.py::a": {"passed"}, "t.py::b[1]": {"passed"}, "t.py::b[2]": {"passed", "skipped"}},
            ["S0-1: t.py::b was skipped"],
        ),
        (
            {"t.py::a": {"skipped"}, "t.py::b": {"passed"}},
            ["S0-1: t.py::a was skipped", "S0-2: t.py::a was skipped"],
        ),
    ],
)
def test_requirement_needs_all_of_its_tests(
    outcomes: dict[str, set[str]], expected: list[str]
) -> None:
    assert find_problems(MAPPING, outcomes) == expected


def test_ids_are_those_of_the_requirements_and_files_are_there() -> None:
    for requirement, tests in REQUIREMENTS.items():
        assert re.fullmatch(r"S[0-3]-\d+", requirement)
        assert tests
        for test in tests:
            file, _, name = test.partition("::")
            inherited, _, method = name.rpartition("::")
            places = [Path(file), *(SUITES.glob("*.py") if inherited else ())]
            assert any(f"def {method}(" in place.read_text() for place in places), test
