"""`make chaos`: every fault test at full count, a soak of random faults, and the figures published.

    python -m tests.fault.chaos [--seed N] [--minutes M]

Runs the fault tests with every position instead of a sample, and writes what they counted to
`docs/faults.md`, with the seed and the commit. It exits non-zero if a test fails; the figures are
written all the same, with the failure in them.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
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


@dataclass
class Line:
    """What became of one test on one kind of database, over all of its variants."""

    outcomes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Every fault test at full count.")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--minutes", type=float, default=5.0, help="of random faults, per database")
    options = parser.parse_args()

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "tests/fault", "-m", "fault"),
                *("--timeout", str(600 + 120 * options.minutes)),
                # The older form is the one that has a place for what a test counts.
                *("-o", "junit_family=xunit1", f"--junitxml={report}"),
            ],
            cwd=_ROOT,
            env={
                **os.environ,
                "AGENTFLOW_FAULT_FULL": "1",
                "AGENTFLOW_FAULT_SEED": str(options.seed),
                "AGENTFLOW_FAULT_MINUTES": str(options.minutes),
            },
            check=False,
        )
        if not report.exists():
            return ended.returncode
        lines = read_report(report)
    minutes = (time.monotonic() - began) / 60
    text = render(lines, seed=options.seed, soak=options.minutes, minutes=minutes)
    _FIGURES.write_text(text, encoding="utf-8")
    print(f"wrote {_FIGURES.relative_to(_ROOT)}")
    return ended.returncode


def read_report(path: Path) -> dict[tuple[str, str, str], Line]:
    """Add up what the tests counted, by module, test and database."""
    lines: dict[tuple[str, str, str], Line] = defaultdict(Line)
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 -- pytest wrote it
        name, _, variant = case.attrib["name"].partition("[")
        module = case.attrib["classname"].rpartition(".")[2]
        database = next((d for d in ("sqlite", "postgres") if d in variant), "-")
        line = lines[module, name, database]
        bad = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        line.outcomes[bad[0] if bad else "passed"] += 1
        line.seconds += float(case.attrib["time"])
        for fact in case.iter("property"):
            line.counts[fact.attrib["name"]] += int(fact.attrib["value"])
    return lines


def render(
    lines: Mapping[tuple[str, str, str], Line], *, seed: int, soak: float, minutes: float
) -> str:
    """Return the figures as Markdown."""
    rows = []
    for (module, name, database), line in sorted(lines.items()):
        outcome = ", ".join(f"{count} {word}" for word, count in sorted(line.outcomes.items()))
        counts = ", ".join(
            f"{count} {word.replace('_', ' ')}" for word, count in sorted(line.counts.items())
        )
        test = f"`{module}.py::{name}`"
        rows.append(f"| {test} | {database} | {outcome} | {counts} | {line.seconds:.0f} s |")
    total: dict[str, int] = defaultdict(int)
    for line in lines.values():
        for word, count in line.counts.items():
            total[word] += count
    return "\n".join(
        [
            "# What the faults did",
            "",
            "Written by `make chaos`; not edited by hand. The claims themselves, and what each",
            "fault is, stand in the tests: one that is `passed` found nothing against it. One that",
            "is `skipped` documents a known limit (its reason stands there).",
            "",
            f"- when: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, in {minutes:.0f} minutes",
            f"- commit: {_commit()}",
            f"- seed: {seed} (`python -m tests.fault.chaos --seed {seed} --minutes {soak:g}`)",
            f"- machine: {os.cpu_count()} CPUs, Python {platform.python_version()}",
            f"- in all: {total['kills']} processes killed, {total['zombies']} stopped past a lease",
            "",
            "| test | database | variants | counted | time |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _commit() -> str:
    git = ["git", "-C", str(_ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{commit or 'unknown'}{', with uncommitted changes' if changed else ''}"


if __name__ == "__main__":
    sys.exit(main())
