"""What has to be mended in LangGraph for graphs to run durably, as long as it is broken there."""

from __future__ import annotations

from collections.abc import Generator

from langgraph.pregel._loop import AsyncPregelLoop


class _Nothing:
    """A put that was never made, for those who wait for it."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


def mend() -> None:
    """Let a subgraph with `checkpointer=False` run under `durability="sync"`.

    LangGraph (1.2) waits after each superstep for the loop's last put, and fails with
    `AttributeError` where the loop has no checkpointer to put with. Safe to call again.
    """
    if not hasattr(AsyncPregelLoop, "_put_checkpoint_fut"):
        AsyncPregelLoop._put_checkpoint_fut = _Nothing()  # type: ignore[assignment]  # awaited only
