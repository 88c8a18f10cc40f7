"""`make chaos`: every fault test at full count, and the figures published.

    python -m tests.fault.chaos [--only SECTION ...] [--seed N] [--soak MINUTES] [--limit MINUTES]

Runs the fault tests with every position instead of a sample, and writes what they counted to
`docs/faults.md`, with the seed and the commit. It can be run in pieces: a section that is run
replaces what stood there of it, and leaves the others. It exits non-zero if a test fails; the
figures are written all the same, with the failure in them.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_FIGURES = _ROOT / "docs" / "faults.md"
_TEST_LIMIT = 3600
_PATIENCE = 120.0
"""Seconds for pytest to stop its servers, once it is told to end."""
_MODULES = {
    "kills": ("test_kills",),
    "refunds": ("test_refunds_kills",),
    "transitions": ("test_transitions",),
    "recovery": ("test_recovery", "test_attempts", "test_misbehaviour"),
    "effects": (
        "test_effects",
        "test_transaction_kills",
        "test_reopening",
        "test_agent_kills",
        "test_task_kills",
    ),
    "zombies": ("test_zombies", "test_uncommitted", "test_races"),
    "outages": ("test_outage",),
    "savers": ("test_saver_kills",),
    "fuzz": ("test_fuzz",),
    "soak": ("test_soak",),
}
"""Section to its modules."""
_HEAD = """# What the faults did

Written by `make chaos`; not edited by hand. The claims themselves, and what each fault is, stand in
the tests: one that is `passed` found nothing against it. Each section says when, from which commit
and seed it was run, and is repeated by the command that it names.
"""


@dataclass
class Line:
    """What became of one test on one kind of database, over all of its variants."""

    outcomes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: float = 0.0


Lines = Mapping[tuple[str, str, str], Line]
"""By module, test and database."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    seed: int
    soak: float
    limit: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description="Every fault test at full count.")
    parser.add_argument("--only", nargs="+", choices=list(_MODULES), default=list(_MODULES))
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--soak", type=float, default=5.0, help="minutes of it, per database")
    parser.add_argument("--limit", type=float, help="minutes after which a section is stopped")
    chosen = parser.parse_args()
    options = Options(seed=chosen.seed, soak=chosen.soak, limit=chosen.limit)
    codes = [run(section, options) for section in chosen.only]
    return max(codes)


def run(section: str, options: Options) -> int:
    """Run the tests of a section and publish what they counted; return pytest's exit code."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = _test(section, options, report)
        lines = read_report(report) if report.exists() else {}
    minutes = (time.monotonic() - began) / 60
    publish(section, render(section, lines, options, minutes=minutes, code=code))
    return code


def _test(section: str, options: Options, report: Path) -> int:
    command = [
        *(sys.executable, "-m", "pytest", "-m", "fault"),
        *(f"tests/fault/{module}.py" for module in _MODULES[section]),
        *("--timeout", str(_TEST_LIMIT)),
        # The older form is the one that has a place for what a test counts.
        *("-o", "junit_family=xunit1", f"--junitxml={report}"),
    ]
    env = {
        **os.environ,
        "AGENTFLOW_FAULT_FULL": "1",
        "AGENTFLOW_FAULT_SEED": str(options.seed),
        "AGENTFLOW_FAULT_MINUTES": str(options.soak),
    }
    with subprocess.Popen(command, cwd=_ROOT, env=env) as tests:
        try:
            return tests.wait(None if options.limit is None else 60 * options.limit)
        except subprocess.TimeoutExpired:
            # As at the terminal: what was counted so far is reported.
            tests.send_signal(signal.SIGINT)
            return tests.wait(_PATIENCE)


def read_report(path: Path) -> Lines:
    """Add up what the tests counted."""
    lines: dict[tuple[str, str, str], Line] = defaultdict(Line)
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 -- pytest wrote it
        name, _, variant = case.attrib["name"].partition("[")
        module = case.attrib["classname"].rpartition(".")[2]
        line = lines[module, name, _database(variant)]
        bad = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        line.outcomes[bad[0] if bad else "passed"] += 1
        line.seconds += float(case.attrib["time"])
        for fact in case.iter("property"):
            line.counts[fact.attrib["name"]] += int(fact.attrib["value"])
    return lines


def _database(variant: str) -> str:
    known = ("postgres-and-sqlite", "sqlite", "postgres", "mariadb")
    return next((name for name in known if name in variant), "-")


def render(section: str, lines: Lines, options: Options, *, minutes: float, code: int) -> str:
    """Return the figures of a section as Markdown."""
    rows = []
    total: dict[str, int] = defaultdict(int)
    for (module, name, database), line in sorted(lines.items()):
        for word, count in line.counts.items():
            total[word] += count
        outcome = _listed(line.outcomes)
        test = f"`{module}.py::{name}`"
        rows.append(
            f"| {test} | {database} | {outcome} | {_listed(line.counts)} | {line.seconds:.0f} s |"
        )
    command = f"python -m tests.fault.chaos --only {section} --seed {options.seed}"
    if section == "soak":
        command += f" --soak {options.soak:g}"
    endings = {0: "passed", 2: f"stopped after {options.limit} minutes"}
    return "\n".join(
        [
            f"## {section.capitalize()}",
            "",
            f"- when: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, in {minutes:.0f} minutes",
            f"- pytest: {endings.get(code, 'failed')}",
            f"- commit: {_commit()}",
            f"- seed: {options.seed} (`{command}`)",
            f"- machine: {os.cpu_count()} CPUs, Python {platform.python_version()}",
            f"- in all: {_listed(total) or 'nothing counted'}",
            "",
            "| test | database | variants | counted | time |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word.replace('_', ' ')}" for word, count in sorted(counts.items()))


def publish(section: str, text: str) -> None:
    """Put a section into the figures, in the place of what stood there of it."""
    stored = _FIGURES.read_text(encoding="utf-8") if _FIGURES.exists() else ""
    _, *parts = re.split(r"^## ", stored, flags=re.MULTILINE)
    known = {part.partition("\n")[0].lower(): f"## {part}" for part in parts}
    known[section] = text
    ordered = [known[name].rstrip() for name in _MODULES if name in known]
    _FIGURES.write_text("\n\n".join([_HEAD.rstrip(), *ordered]) + "\n", encoding="utf-8")
    print(f"wrote {section} to {_FIGURES.relative_to(_ROOT)}")


def _commit() -> str:
    git = ["git", "-C", str(_ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    # The figures themselves change with each section.
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!docs/faults.md"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{commit or 'unknown'}{', with uncommitted changes' if changed else ''}"


if __name__ == "__main__":
    sys.exit(main())
