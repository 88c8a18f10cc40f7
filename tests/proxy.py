"""A wire to a PostgreSQL server on this machine that can be cut, closed, or made to swallow all.

`Proxy` forwards connections until it is told to do harm, and forwards again after `heal`. Of the
protocol it knows where a message and where a reply ends, so that a whole reply can be lost after
the server has done what it was asked to.

The process at the other end can `ask` for harm itself, at the exact place that a test is about; the
wire heals by itself then.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from sqlalchemy.engine import make_url

_LIMIT = 30.0
_AGAIN = 0.01
"""Seconds between two attempts to get a port back."""
_SILENCE = 0.2
"""Seconds after which a server that has not ended its reply waits for its client."""
_READY = b"Z"
"""The type of the message that ends each reply; it says whether a transaction is open."""


@dataclass(kw_only=True)
class _Harm:
    """What is going to be cut, counted from when it was asked for."""

    reply: int = 0
    """Cut in place of this reply, once the server has given it, ..."""
    size: int = 0
    """... or after so many bytes from the server."""
    heals: bool = False
    """Whether new connections are welcome at once."""
    done: Future[bool] = field(default_factory=Future)

    def strikes(self, message: bytes) -> bool:
        """Count a message from the server; whether it is the one to cut at."""
        if self.reply:
            if self.reply == 1:
                return True
            self.reply -= message.startswith(_READY)
            return False
        if self.size <= len(message):
            return True
        self.size -= len(message)
        return False


def ask(address: str) -> None:
    """Ask a proxy in another process for the harm of `Proxy.harm`, and return once it is prepared.

    Whatever comes through the wire after that is subject to it.
    """
    where, _, harm = address.partition("/")
    host, _, port = where.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_LIMIT) as connection:
        connection.sendall(harm.encode() + b"\n")
        assert connection.recv(1) == b"."


class Proxy:
    """Forwards a port of its own to another port of this machine; may be used from any thread."""

    def __init__(self, port: int) -> None:
        """Lead to a server's port."""
        self.port = 0
        self._server_port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._listener: asyncio.Server | None = None
        self._control: asyncio.Server | None = None
        self._wires: set[asyncio.Task[None]] = set()
        self._harm: _Harm | None = None
        self._striking: asyncio.Task[None] | None = None
        self._swallows = False
        self.was_asked = False
        """Whether another process has asked for harm, and it was done."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        self._call(self._listen_for_orders())
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._control is not None:
            self._control.close()
        self.refuse()
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LIMIT)
        self._loop.close()

    def url(self, url: str) -> str:
        """Return the URL that leads to the same database of the server through this wire."""
        # An offer of encryption would stand before the first message.
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        through = make_url(url).set(host="127.0.0.1", port=self.port).update_query_dict(plain)
        return through.render_as_string(hide_password=False)

    def harm(self, how: Literal["cut", "lose"]) -> str:
        """Return what another process gives to `ask`.

        `cut` cuts every connection at once; `lose` loses the reply to what is sent next, after the
        server has done it, and then cuts. New connections are welcome in both cases.
        """
        assert self._control is not None
        return f"127.0.0.1:{self._control.sockets[0].getsockname()[1]}/{how}"

    def refuse(self) -> None:
        """Cut every connection and refuse new ones."""
        self._call(self._refuse())

    def swallow(self) -> None:
        """Take everything from both ends, on old connections and new ones, and deliver nothing."""
        self._swallows = True

    def lose_reply(self, number: int) -> Future[bool]:
        """Let the server do what it is asked, and lose its `number`-th reply from now.

        Then every connection is cut and new ones are refused, until `heal`. The result comes after
        that; it is whether no transaction was left open, so that what was asked is committed.
        """
        self._harm = _Harm(reply=number)
        return self._harm.done

    def cut_after(self, size: int) -> Future[bool]:
        """Cut once the server has said so many more bytes; otherwise as `lose_reply`."""
        self._harm = _Harm(size=size)
        return self._harm.done

    def heal(self) -> None:
        """Forward again; a connection on which something was swallowed is cut."""
        self._harm = None
        self._call(self._heal())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_LIMIT)

    async def _heal(self) -> None:
        if self._swallows:
            self._swallows = False
            # The listener stays: a socket that it accepts while it closes would never be closed.
            await self._cut()
        await self._listen()

    async def _listen(self) -> None:
        async with asyncio.timeout(_LIMIT):
            while self._listener is None:
                try:
                    self._listener = await asyncio.start_server(
                        self._connect, "127.0.0.1", self.port
                    )
                except OSError:
                    # Somebody else's connection has been given the port while nobody listened.
                    await asyncio.sleep(_AGAIN)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _listen_for_orders(self) -> None:
        self._control = await asyncio.start_server(self._obey, "127.0.0.1", 0)

    async def _obey(self, orders: asyncio.StreamReader, replies: asyncio.StreamWriter) -> None:
        if await orders.readline() == b"cut\n":
            await self._refuse()
            await self._listen()
            self.was_asked = True
        else:
            self._harm = _Harm(reply=1, heals=True)
        replies.write(b".")
        await replies.drain()
        replies.close()

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._cut()

    async def _cut(self) -> None:
        wires = list(self._wires)
        for wire in wires:
            wire.cancel()
        await asyncio.gather(*wires, return_exceptions=True)

    async def _end(self) -> None:
        """Let what was accepted in the last moment begin, and so end, and close its sockets."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def _connect(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        wire = asyncio.current_task()
        assert wire is not None
        self._wires.add(wire)
        ends = [to_client]
        pumps: list[asyncio.Task[None]] = []
        # The server may be gone, and `cancel` is how the wire is cut.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            if self._listener is not None:
                server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
                ends.append(to_server)
                pumps.append(asyncio.create_task(self._ask(client, to_server)))
                pumps.append(asyncio.create_task(self._answer(server, to_client)))
                # Whichever end closes first closes the other.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.transport.abort()
        for pump in pumps:
            pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*pumps, return_exceptions=True)
        self._wires.discard(wire)

    async def _ask(self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        while data := await client.read(65536):
            if not self._swallows:
                to_server.write(data)
                await to_server.drain()

    async def _answer(self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while True:
            message = await _read_message(server)
            if self._swallows:
                continue
            harm = self._harm
            if harm is not None and harm.strikes(message):
                self._harm = None
                to_client.write(message[: harm.size])
                is_idle = bool(harm.reply) and await _ends_idle(message, server)
                # Apart from this task, which is about to be cut off itself.
                self._striking = asyncio.create_task(self._strike(harm, is_idle))
                await asyncio.wait([self._striking])
            to_client.write(message)
            await to_client.drain()

    async def _strike(self, harm: _Harm, is_idle: bool) -> None:
        await self._refuse()
        if harm.heals:
            await self._listen()
            self.was_asked = True
        harm.done.set_result(is_idle)


async def _read_message(server: asyncio.StreamReader) -> bytes:
    """Read a type of one byte, a length that counts itself, and the rest."""
    head = await server.readexactly(5)
    return head + await server.readexactly(int.from_bytes(head[1:]) - 4)


async def _ends_idle(message: bytes, server: asyncio.StreamReader) -> bool:
    """Read the rest of a reply; whether no transaction is open after it."""
    with contextlib.suppress(TimeoutError):
        while not message.startswith(_READY):
            async with asyncio.timeout(_SILENCE):
                message = await _read_message(server)
    return message.startswith(_READY) and message.endswith(b"I")
