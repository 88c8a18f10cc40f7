"""DBOS, opened as its documentation does it: what workers of agentflow are compared with.

A workflow is started in the process that executes it, which is faster than a queue of DBOS' own:
that is polled. DBOS is one object for the whole process, so only one database is open at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from dbos import DBOS, DBOSConfig, SetWorkflowID

UNTIL_IDLE = 0.05
"""Seconds after which a workflow that was started waits for its message."""
_TOPIC = "decision"
_received: dict[str, float] = {}
"""When each workflow got its message."""


@DBOS.step()
async def _step(count: int) -> int:
    return count + 1


@DBOS.workflow()
async def _count(steps: int) -> int:
    count = 0
    for _ in range(steps):
        count = await _step(count)
    return count


@DBOS.workflow()
async def _listen(name: str) -> str:
    message = await DBOS.recv_async(_TOPIC, timeout_seconds=60)
    _received[name] = time.perf_counter()
    return str(message)


@asynccontextmanager
async def open_dbos(url: str) -> AsyncIterator[None]:
    """Launch DBOS on a database."""
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": url.replace("postgresql://", "postgresql+psycopg://"),
        "log_level": "ERROR",
        "executor_id": "bench",
        "application_version": "1",
    }
    DBOS(config=config)
    DBOS.launch()
    try:
        yield
    finally:
        await asyncio.to_thread(DBOS.destroy)


async def in_loop_of_its_own(url: str, measure: Callable[[], Awaitable[float]]) -> float:
    """Measure DBOS on a database, in an event loop of its own.

    It makes its own executor the loop's, and leaves it shut down.
    """

    async def launched() -> float:
        async with open_dbos(url):
            return await measure()

    return await asyncio.to_thread(lambda: asyncio.run(launched()))


async def steps_per_second(runs: int, steps: int, at_a_time: int) -> float:
    """Run so many workflows, so many at a time, and return the steps of one second."""
    turn = asyncio.Semaphore(at_a_time)

    async def one() -> None:
        async with turn:
            handle = await DBOS.start_workflow_async(_count, steps)
            assert await handle.get_result() == steps

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(runs):
            group.create_task(one())
    return runs * steps / (time.perf_counter() - began)


async def send_to_recv(name: str) -> float:
    """Return the seconds from sending a message to the workflow that waits for it having it."""
    with SetWorkflowID(name):
        handle = await DBOS.start_workflow_async(_listen, name)
    await asyncio.sleep(UNTIL_IDLE)
    began = time.perf_counter()
    await DBOS.send_async(name, "approve", _TOPIC)
    assert await handle.get_result() == "approve"
    return _received.pop(name) - began
