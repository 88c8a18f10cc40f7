"""A nightly job of tasks: one fails, and another process goes on from the snapshot the next day.

python -m examples.nightly_tasks
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from agentflow.tasks import Task, TaskCall, TaskRunner


async def fetch(_: TaskCall) -> list[int]:
    """Fetch the numbers of the day; expensive, and not to be done twice."""
    print("fetch")
    return [3, 1, 2]


def clean(call: TaskCall) -> list[int]:
    """Sort them."""
    print("clean")
    return sorted(call.results["fetch"].data)


def load(call: TaskCall) -> int:
    """Load them into the warehouse, to which there is a connection at run time only."""
    print("load")
    rows: list[int] = call.results["clean"].data
    call.context["warehouse"].append(rows)
    return len(rows)


def report(call: TaskCall) -> str:
    """Report, unless there is nothing to report."""
    print("report")
    return f"{call.results['load'].data} rows"


TASKS = [
    Task(name="fetch", run=fetch),
    Task(name="clean", run=clean, dependencies=["fetch"]),
    Task(name="load", run=load, dependencies=["clean"], needs=["warehouse"]),
    Task(
        name="report",
        run=report,
        dependencies=["load"],
        condition=lambda call: call.results["load"].data > 0,
    ),
]


class BrokenWarehouse:
    """A connection that does not work tonight."""

    def append(self, rows: list[int]) -> None:
        """Fail."""
        raise ConnectionError(f"no warehouse for {len(rows)} rows")


async def tonight() -> str:
    """Run the tasks as far as they go, and return the snapshot as JSON."""
    runner = TaskRunner(TASKS)
    results = await runner.execute(context={"warehouse": BrokenWarehouse()})
    print({name: result.status.value for name, result in results.items()})
    return json.dumps(runner.snapshot())


async def tomorrow(snapshot: str) -> None:
    """Go on from a snapshot, wherever that was taken."""
    warehouse: list[Any] = []
    runner = TaskRunner(TASKS, snapshot=json.loads(snapshot))
    results = await runner.execute(context={"warehouse": warehouse})
    print({name: result.status.value for name, result in results.items()})
    print(results["report"].data, warehouse)


def main() -> None:
    """Run tonight's part here, and tomorrow's in another process."""
    snapshot = asyncio.run(tonight())
    command = [sys.executable, "-m", "examples.nightly_tasks", "--from-snapshot"]
    subprocess.run(command, input=snapshot, text=True, check=True)


if __name__ == "__main__":
    if "--from-snapshot" in sys.argv:
        asyncio.run(tomorrow(sys.stdin.read()))
    else:
        main()
