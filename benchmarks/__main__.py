"""Measures agentflow beside a floor and LangGraph's savers and writes `docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import report
from benchmarks.durability import check_postgres, check_sqlite
from benchmarks.lab import Lab
from benchmarks.results import Result
from benchmarks.workloads import WORKLOADS
from tests.servers import PostgresServer

_DOCS = Path(__file__).parents[1] / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, and write the page and the raw figures."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    usual = [name for name, workload in WORKLOADS.items() if not workload.is_long]
    names = [name for name in WORKLOADS if name in (options.only or usual)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentflow-bench-")))
        needs_postgres = any(WORKLOADS[name].needs_postgres for name in names)
        server = stack.enter_context(PostgresServer()) if needs_postgres else None
        lab = Lab(folder=folder, server=server, rounds=options.rounds)
        results = asyncio.run(_measure(lab, names))
    environment = report.Environment.current(given)
    is_long = all(WORKLOADS[name].is_long for name in names)
    stem = "benchmarks-long" if is_long else "benchmarks"
    page = (
        report.long_page(results, environment)
        if is_long
        else report.page(results, environment, options.rounds)
    )
    figures = report.raw_figures(results, environment, options.rounds)
    text = json.dumps(figures, indent=1) + "\n"
    if options.json_only:
        print(text, end="")
    elif options.no_write or (options.only and not is_long):
        print(f"\n{page}", end="")
    else:
        _DOCS.mkdir(exist_ok=True)
        (_DOCS / f"{stem}.md").write_text(page)
        (_DOCS / f"{stem}.json").write_text(text)
        print(f"\nWrote {_DOCS / stem}.md and {stem}.json beside it.")


async def _measure(lab: Lab, names: Sequence[str]) -> dict[str, Result]:
    """Measure the workloads one after the other and show each result at once."""
    await check_sqlite(lab)
    if lab.server is not None:
        await check_postgres(lab)
    results: dict[str, Result] = {}
    for name in names:
        began = time.perf_counter()
        results[name] = await WORKLOADS[name].measure(lab)
        _show(f"{name} ({time.perf_counter() - began:.0f} s)")
        for row in results[name].rows:
            _show(f"  {report.line(row)}")
    return results


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        choices=list(WORKLOADS),
        metavar="NAME",
        help="measure only this workload (may repeat; writes nothing, but long ones write "
        f"benchmarks-long.md): {', '.join(WORKLOADS)}",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each figure is measured (default: 5)"
    )
    parser.add_argument("--no-write", action="store_true", help="print the page, write nothing")
    parser.add_argument(
        "--json-only", action="store_true", help="print the raw figures, write nothing"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _show(text: str) -> None:
    # Progress is no part of what is printed for programs.
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
