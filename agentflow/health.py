"""Answers `GET /healthz` about a worker, for whoever restarts processes that are not well.

200 and what the worker says about itself while it is well; 503 when it is draining, asks to be
replaced, or has not reached its store for too long. Plain HTTP without a framework: a worker needs
no web server, and this is no API.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus

from agentflow.worker import WorkerStats

_MOST_BYTES = 8192
_TIMEOUT = 5.0
"""Seconds in which a client has to ask."""


@asynccontextmanager
async def serve_health(
    stats: Callable[[], WorkerStats], *, host: str, port: int, silence: float = 60.0
) -> AsyncIterator[int]:
    """Serve `/healthz` meanwhile, and yield the port.

    Args:
        stats: What to tell; `Worker.stats`.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        silence: Seconds after which a store that does not answer makes the worker unwell.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(request, stats(), silence))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # not somebody who wanted to know
        finally:
            writer.close()

    server = await asyncio.start_server(answer, host, port, limit=_MOST_BYTES)
    async with server:
        yield server.sockets[0].getsockname()[1]


def _response(request: bytes, stats: WorkerStats, silence: float) -> bytes:
    method, path, *_ = [*request.split(b"\r\n", 1)[0].split(b" "), b"", b""]
    if path.split(b"?", 1)[0] not in {b"/healthz", b"/"}:
        return _encode(HTTPStatus.NOT_FOUND, {"error": "the path is /healthz"})
    if method not in {b"GET", b"HEAD"}:
        return _encode(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "use GET"})
    is_well = stats.health == "ok" and stats.silence <= silence
    status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
    return _encode(status, asdict(stats), is_head=method == b"HEAD")


def _encode(status: HTTPStatus, body: object, *, is_head: bool = False) -> bytes:
    text = json.dumps(body).encode() + b"\n"
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if is_head else text)
