"""Who waits hears soon that something has changed, also in other processes where that can be told.

A notice is a hint without content: it may be lost with a connection or a process, and whoever
listens looks at the database now and then anyway. On PostgreSQL they go to other processes by
`NOTIFY`, from a thread and a connection of their own: inside a transaction that writes, `NOTIFY`
makes its commit wait for those of all others.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import closing
from typing import Any

from sqlalchemy.engine import URL

from agentflow.config import Settings
from agentflow.database.engine import connect_bare
from agentflow.types import new_id

logger = logging.getLogger(__name__)

_CHANNEL = "agentflow"
_COMPANY = 0.01
"""Seconds between two notices of a process; what comes in between is told together."""
_PAUSE = 1.0
"""Seconds before a broken connection is made again."""
_MOST_TEXT = 7000
"""Characters of a notice; PostgreSQL takes less than 8000 bytes. A longer one leaves topics out."""
_FAREWELL = 2.0
"""Seconds that closing waits for a thread; one that is stuck in the network ends with us."""

Wake = Callable[[], None]


class Notices:
    """Tells of changes by kind, and calls back those who listen."""

    def __init__(self, url: URL, settings: Settings) -> None:
        """Connect to nothing before something is told or listened to."""
        self._lock = threading.Lock()
        # By kind and topic; the topic of those who want to hear of everything is empty.
        self._listeners: dict[str, dict[str, list[Wake]]] = {}
        self._is_closed = False
        self._sender: _Sender | None = None
        self._receiver: _Receiver | None = None
        self._is_remote = url.get_backend_name() == "postgresql"
        self._url, self._settings = url, settings
        self._name = new_id()

    @property
    def hears_others(self) -> bool:
        """Whether notices of other processes arrive, as far as is known."""
        return self._receiver is not None and self._receiver.is_listening

    def tell(self, *kinds: str) -> None:
        """Say, after the commit, that something of these kinds has changed."""
        self._wake(kinds)
        if not self._is_remote:
            return
        with self._lock:
            if self._is_closed:
                return
            if self._sender is None:
                self._sender = _Sender(self._connect, self._name)
            self._sender.tell(kinds)

    def subscribe(self, kind: str, wake: Wake) -> Callable[[], None]:
        """Call `wake`, from any thread, at each notice of a kind; return what ends that.

        A kind may have a topic, as `kind:topic`: then only at notices of that topic, or of none.
        """
        base, _, topic = kind.partition(":")
        with self._lock:
            wakes = self._listeners.setdefault(base, {}).setdefault(topic, [])
            wakes.append(wake)
            if self._is_remote and self._receiver is None and not self._is_closed:
                self._receiver = _Receiver(self._connect, self._name, self._wake)

        def end() -> None:
            with self._lock:
                if wake in wakes:
                    wakes.remove(wake)
                if topic and not wakes and self._listeners[base].get(topic) is wakes:
                    del self._listeners[base][topic]

        return end

    def close(self) -> None:
        """Tell what is still to be told, and end the threads."""
        with self._lock:
            self._is_closed = True
            threads = [self._sender, self._receiver]
        for thread in threads:
            if thread is not None:
                thread.close()

    def _wake(self, kinds: Collection[str]) -> None:
        with self._lock:
            wakes = [wake for kind in kinds for wake in self._concerned(kind)]
        for wake in wakes:
            wake()

    def _concerned(self, kind: str) -> list[Wake]:
        base, _, topic = kind.partition(":")
        by_topic = self._listeners.get(base, {})
        topics = {"", topic} if topic else by_topic.keys()
        return [wake for each in topics for wake in by_topic.get(each, ())]

    def _connect(self) -> Any:
        return connect_bare(self._url, self._settings)


class _Sender:
    """Notifies: at once after a silence, else once per `_COMPANY`."""

    def __init__(self, connect: Callable[[], Any], name: str) -> None:
        self._connect = connect
        self._name = name
        self._kinds: set[str] = set()
        self._lock = threading.Lock()
        self._has_some = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="agentflow-notify", daemon=True)
        self._thread.start()

    def tell(self, kinds: Collection[str]) -> None:
        with self._lock:
            self._kinds.update(kinds)
        self._has_some.set()

    def close(self) -> None:
        self._closing.set()
        self._has_some.set()
        self._thread.join(_FAREWELL)

    def _serve(self) -> None:
        while True:
            try:
                with closing(self._connect()) as connection:
                    while self._send(connection):
                        self._closing.wait(_COMPANY)
                return
            except Exception as exc:  # noqa: BLE001 -- a lost hint costs others one look
                logger.info("cannot notify", extra={"error": type(exc).__name__})
            if self._closing.wait(_PAUSE):
                return

    def _send(self, connection: Any) -> bool:
        """Wait for something to tell and tell it; say whether there may be more."""
        if not self._closing.is_set():
            self._has_some.wait()
        self._has_some.clear()
        with self._lock:
            kinds, self._kinds = self._kinds, set()
        if kinds:
            text = f"{self._name} {' '.join(sorted(kinds))}"
            if len(text) > _MOST_TEXT:
                bases = {kind.partition(":")[0] for kind in kinds}
                text = f"{self._name} {' '.join(sorted(bases))}"
            connection.execute("SELECT pg_notify(%s, %s)", (_CHANNEL, text))
        return not self._closing.is_set() or bool(self._kinds)


class _Receiver:
    """Listens to other processes."""

    def __init__(
        self, connect: Callable[[], Any], name: str, wake: Callable[[Collection[str]], None]
    ) -> None:
        self._connect = connect
        self._name = name
        self._wake = wake
        self.is_listening = False
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="agentflow-listen", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.send(b".")
        self._thread.join(_FAREWELL)
        self._stop.close()

    def _serve(self) -> None:
        with self._stopped, selectors.DefaultSelector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            is_again = False
            while True:
                try:
                    with closing(self._connect()) as connection:
                        if self._listen(connection, selector, is_again=is_again):
                            return
                except Exception as exc:  # noqa: BLE001 -- without notices there is polling
                    logger.info("cannot listen", extra={"error": type(exc).__name__})
                if selector.select(_PAUSE):
                    return
                is_again = True

    def _listen(
        self, connection: Any, selector: selectors.DefaultSelector, *, is_again: bool
    ) -> bool:
        """Pass notices on until the connection breaks, or, saying so, until it is to end."""
        ((backend,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
        if backend != connection.info.backend_pid:
            # A pooler hands out sessions by the transaction: nobody would hear anything.
            selector.select()
            return True
        connection.execute(f"LISTEN {_CHANNEL}")
        if is_again:
            self._wake(("due", "settled", "stop"))  # whatever was missed
        selector.register(connection, selectors.EVENT_READ)
        self.is_listening = True
        try:
            while True:
                for notice in connection.notifies(timeout=0):
                    sender, *kinds = notice.payload.split(" ")
                    if sender != self._name:
                        self._wake(kinds)
                if any(key.fileobj is self._stopped for key, _ in selector.select()):
                    return True
        finally:
            self.is_listening = False
            selector.unregister(connection)
