"""The threads in which an event loop runs what is not async: above all, synchronous nodes.

LangGraph hands synchronous nodes, edges and tools to the event loop's default executor. The usual
one is too small for many runs at a time, and a node in it that never returns would take one of its
few threads for good and keep the process from ending. `NodeThreads` takes its place: a call that
belongs to an attempt gets a thread of its own, up to a number that calls do not count against
whose attempt is over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from agentflow.control import AttemptControl, current_attempt

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_USUAL_SIZE = min(32, (os.cpu_count() or 1) + 4)
"""As many as Python's own default has: what a node calls may need threads too."""


class _Call:
    """Something to run for an attempt."""

    def __init__(self, control: AttemptControl, function: Callable[[], Any]) -> None:
        self.control = control
        self.function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function()
        except BaseException as exc:  # noqa: BLE001 -- handed to the one who waits
            self.future.set_exception(exc)
            del self.future  # of which the traceback would keep this frame
        else:
            self.future.set_result(result)


class NodeThreads(ThreadPoolExecutor):
    """An event loop's default executor; see `on_loop`.

    Calls that belong to no attempt go to the executor that it replaces, or else to a usual pool.
    Threads of nodes are daemons: those of nodes that never return do not keep the process.
    """

    def __init__(self, replaced: ThreadPoolExecutor | None) -> None:
        """Run what belongs to no attempt in `replaced`, if there is one."""
        super().__init__(thread_name_prefix="agentflow-loop")
        self._replaced = replaced
        self._asked = 0
        self._queue_of_calls: deque[_Call] = deque()
        self._running: set[_Call] = set()
        self._idle = 0
        self._count = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in a thread."""
        control = current_attempt()
        if control is None:
            if self._replaced is not None:
                return self._replaced.submit(fn, *args, **kwargs)
            return super().submit(fn, *args, **kwargs)
        call = _Call(control, lambda: fn(*args, **kwargs))
        # A thread may have made the call, and given it up, before this one goes on.
        future = call.future
        with self._changed:
            if self._is_closed:
                raise RuntimeError("cannot run a node after its event loop was shut down")
            self._queue_of_calls.append(call)
            try:
                self._serve_more()
            except RuntimeError:
                # No more threads can be had; if there are some, one of them will come to it.
                if self._count == 0:
                    self._queue_of_calls.remove(call)
                    raise
        return future

    def abandoned(self) -> int:
        """Count the threads in nodes whose attempt is over."""
        with self._changed:
            return self._abandoned()

    def forsake(self, control: AttemptControl) -> None:
        """Stop counting on the threads of an attempt that is over."""
        with self._changed:
            left = [call for call in self._running if call.control is control]
            self._serve_more()
        if left:
            logger.warning("node goes on after its attempt", extra={"threads": len(left)})

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 -- the signature is Python's
        """End the idle threads; one that is still in a node is not waited for."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().shutdown(wait, cancel_futures=cancel_futures)
        if self._replaced is not None:
            self._replaced.shutdown(wait, cancel_futures=cancel_futures)

    def resize(self, change: int) -> int:
        """Ask for more threads, or for fewer, and return how many are asked for now."""
        with self._changed:
            self._asked += change
            self._serve_more()
            return self._asked

    @property
    def _size(self) -> int:
        return max(self._asked, _USUAL_SIZE) + self._abandoned()

    def _abandoned(self) -> int:
        return sum(call.control.is_over for call in self._running)

    def _serve_more(self) -> None:
        while len(self._queue_of_calls) > self._idle and self._count < self._size:
            threading.Thread(target=self._serve, name="agentflow-node", daemon=True).start()
            self._count += 1
            self._idle += 1  # until it has taken its first call
        self._changed.notify(len(self._queue_of_calls))

    def _serve(self) -> None:
        while (call := self._take()) is not None:
            call.run()
            with self._changed:
                self._running.discard(call)
                is_surplus = self._count > self._size
                if not is_surplus:
                    self._idle += 1
                else:
                    self._count -= 1
            if is_surplus:
                return

    def _take(self) -> _Call | None:
        """Wait for a call; the thread counts as idle meanwhile."""
        with self._changed:
            while not self._queue_of_calls:
                if self._is_closed:
                    self._idle -= 1
                    self._count -= 1
                    return None
                self._changed.wait()
            self._idle -= 1
            call = self._queue_of_calls.popleft()
            self._running.add(call)
            return call


_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, NodeThreads] = WeakKeyDictionary()


@contextmanager
def on_loop(size: int) -> Iterator[NodeThreads]:
    """Let the running event loop have at least `size` threads for nodes meanwhile."""
    loop = asyncio.get_running_loop()
    threads = _by_loop.get(loop)
    if threads is None:
        replaced = getattr(loop, "_default_executor", None)  # no loop shows it otherwise
        threads = _by_loop[loop] = NodeThreads(
            replaced if isinstance(replaced, ThreadPoolExecutor) else None
        )
        loop.set_default_executor(threads)
    threads.resize(size)
    try:
        yield threads
    finally:
        threads.resize(-size)
