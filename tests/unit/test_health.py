"""What a worker answers to whoever restarts processes that are not well."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from agentflow.health import serve_health
from agentflow.worker import WorkerStats

WELL = WorkerStats(
    name="w", health="ok", concurrency=10, active=3, claimed=7, abandoned=0, silence=0.5
)


async def ask(port: int, request: bytes) -> tuple[int, Any]:
    """Send a request as it is and return status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), json.loads(body) if body else None


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("stats", "status"),
    [
        (WELL, 200),
        (replace(WELL, health="draining"), 503),
        (replace(WELL, health="overloaded", abandoned=11), 503),
        (replace(WELL, silence=61), 503),
    ],
)
async def test_worker_is_well_while_it_works_and_reaches_its_store(
    stats: WorkerStats, status: int
) -> None:
    async with serve_health(lambda: stats, host="127.0.0.1", port=0) as port:
        code, body = await ask(port, get("/healthz?verbose"))
        assert (code, body["health"], body["abandoned"]) == (status, stats.health, stats.abandoned)
        assert await ask(port, get("/healthz", "HEAD")) == (status, None)


async def test_what_is_no_question_gets_no_answer_and_does_no_harm() -> None:
    async with serve_health(lambda: WELL, host="127.0.0.1", port=0) as port:
        assert (await ask(port, get("/metrics")))[0] == 404
        assert (await ask(port, get("/healthz", "POST")))[0] == 405
        for junk in (b"\r\n\r\n", b"\xff" * 20 + b"\r\n\r\n"):
            assert (await ask(port, junk))[0] == 404
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x" * 100_000)
        writer.close()
        assert (await ask(port, get("/healthz")))[0] == 200
