"""Listing checkpoints page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from sqlalchemy.engine import Connection

from agentflow.checkpoint.encoding import Encoder
from agentflow.checkpoint.reading import StoredCheckpoint, list_checkpoints, page_key

_PAGE = 50


class Listing:
    """The state of one `list`: where the next page starts, and how many are still wanted."""

    def __init__(
        self,
        encoder: Encoder,
        tenant: str,
        config: RunnableConfig | None,
        matching: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> None:
        """Start at the newest checkpoint that fits."""
        configurable = (config or {}).get("configurable", {})
        self.encoder = encoder
        self.tenant = tenant
        thread_id = configurable.get("thread_id")
        self.thread_id = None if thread_id is None else str(thread_id)
        self.ns = configurable.get("checkpoint_ns")
        self.checkpoint_id = configurable.get("checkpoint_id") or None
        self.before = ((before or {}).get("configurable", {})).get("checkpoint_id") or None
        self.matching = matching or {}
        self.remaining = limit
        self.after_key: tuple[Any, ...] | None = None
        self.is_done = limit is not None and limit <= 0

    def query(self, connection: Connection) -> list[StoredCheckpoint]:
        """Read the next page."""
        wanted = _PAGE
        run_id = self.matching.get("run_id")
        if self.remaining is not None and not self.matching:
            wanted = min(wanted, self.remaining)
        page = list_checkpoints(
            connection,
            self.tenant,
            thread_id=self.thread_id,
            ns=self.ns,
            checkpoint_id=self.checkpoint_id,
            before=self.before,
            # The one metadata key with a column, and an index, of its own.
            run_id=run_id if isinstance(run_id, str) else None,
            after_key=self.after_key,
            limit=wanted,
        )
        self.is_done = len(page) < wanted
        return page

    def take(self, page: Sequence[StoredCheckpoint]) -> Iterator[CheckpointTuple]:
        """Yield what matches, and note where the page ended."""
        if page:
            self.after_key = page_key(page[-1], self.thread_id)
        for stored in page:
            item = self.encoder.read(self.tenant, stored)
            if any(item.metadata.get(name) != value for name, value in self.matching.items()):
                continue
            yield item
            if self.remaining is not None:
                self.remaining -= 1
                if self.remaining <= 0:
                    self.is_done = True
                    return
