"""Reading checkpoints: one, or page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple

from agentflow.checkpoint.encoding import (
    Encoder,
    Loaded,
    open_record,
    parts_of,
)
from agentflow.checkpoint.pending import load_writes
from agentflow.checkpoint.recent import CheckpointRows
from agentflow.checkpoint.records import column_text
from agentflow.checkpoint.rows import (
    FoundCheckpoint,
    Head,
    HeadKey,
    Query,
    Rows,
    ThreadKey,
    ThreadState,
)
from agentflow.errors import MissingBlobError

_PAGE = 50
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads for one saver."""

    encoder: Encoder
    observe: Callable[[ThreadKey, ThreadState], None]
    """Told of each thread in which state it was found."""

    def load(
        self, rows: CheckpointRows, key: HeadKey, checkpoint_id: str | None
    ) -> CheckpointTuple | None:
        """Read a checkpoint, or the head of its namespace if no id is given."""
        for attempt in range(_ATTEMPTS):
            found = rows.find_checkpoint(key, checkpoint_id)
            if found is None:
                return None
            if not isinstance(found, FoundCheckpoint):
                if checkpoint_id is None:
                    self.observe(key[:2], replace(found.thread, heads={key[2]: None}))
                return None
            try:
                (item,) = self._complete(rows, [found])
            except MissingBlobError:
                if attempt + 1 < _ATTEMPTS:
                    continue
                # It was there each time, and each time not all of it: nobody is deleting it.
                raise
            return item
        raise AssertionError

    def page(
        self, rows: Rows, query: Query
    ) -> list[tuple[FoundCheckpoint, CheckpointTuple | None]]:
        """Read a page of checkpoints; `None` stands for one that was deleted meanwhile.

        Raises:
            MissingBlobError: A value is missing of one that was not.
        """
        found = rows.list_checkpoints(query)
        items: Sequence[CheckpointTuple | None]
        try:
            items = self._complete(rows, found)
        except MissingBlobError:
            # Deleted, or damaged: that only shows when it is looked for again.
            items = [
                self.load(rows, (each.tenant, each.thread_id, each.row.ns), each.row.checkpoint_id)
                for each in found
            ]
        return list(zip(found, items, strict=True))

    def _complete(
        self, rows: CheckpointRows, found: Sequence[FoundCheckpoint]
    ) -> list[CheckpointTuple]:
        """Add values and writes to rows.

        Raises:
            MissingBlobError: Not all of them are there.
        """
        records = [open_record(self.encoder.codec, each) for each in found]
        pairs = list(zip(found, records, strict=True))
        wanted = [part for each, record in pairs for part in parts_of(each, record.layout)]
        stretches = rows.list_values(wanted) if wanted else {}
        writes = load_writes(rows, self.encoder.codec, pairs)
        items: list[CheckpointTuple] = []
        for (each, record), own in zip(pairs, writes, strict=True):
            items.append(self.encoder.read(each, Loaded(record, stretches, own)))
            row = each.row
            if row.seq == each.head_seq:
                head = Head(row.checkpoint_id, row.seq, row.attempt, record.layout, row.hash)
                state = replace(each.thread, heads={row.ns: head})
                self.observe((each.tenant, each.thread_id), state)
        return items


class Listing:
    """The state of one `list`: where the next page starts, and how many are still wanted."""

    def __init__(
        self,
        reader: Reader,
        tenant: str,
        config: RunnableConfig | None,
        matching: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> None:
        """Start at the newest checkpoint that fits."""
        configurable = (config or {}).get("configurable", {})
        thread_id = configurable.get("thread_id")
        self.matching = matching or {}
        run_id = self.matching.get("run_id")
        self.thread_id = None if thread_id is None else str(thread_id)
        self._reader = reader
        self._before = (before or {}).get("configurable", {}).get("checkpoint_id") or None
        self._horizon: _Horizon | None = None
        self._query = Query(
            tenant=tenant,
            thread_id=self.thread_id,
            ns=configurable.get("checkpoint_ns"),
            checkpoint_id=configurable.get("checkpoint_id") or None,
            # The one metadata key with a column, and an index, of its own.
            run_id=column_text(run_id) if isinstance(run_id, str) else None,
            limit=_PAGE if limit is None or self.matching else max(0, min(limit, _PAGE)),
        )
        self._remaining = limit
        self.is_done = limit is not None and limit <= 0

    def read(self, rows: Rows) -> list[CheckpointTuple]:
        """Read the next page, and return what matches."""
        if self._before is not None:
            self._look_back(rows, self._before)
            self._before = None
        page = self._reader.page(rows, self._query)
        self.is_done = len(page) < self._query.limit
        if page:
            last, row = page[-1][0], page[-1][0].row
            after = row.seq if self.thread_id else (row.checkpoint_id, last.thread_id, row.ns)
            self._query = replace(self._query, after=after)
        if self._horizon is not None:
            horizon = self._horizon
            page = [(f, item) for f, item in page if item and horizon.is_before(rows, f, item)]
        return list(self._matching(item for _, item in page if item is not None))

    def _look_back(self, rows: Rows, before: str) -> None:
        """Find out what "older than that checkpoint" means."""
        query = self._query
        found = rows.locate(query.tenant, self.thread_id, before) if self.thread_id else None
        if found is None or self.thread_id is None:
            self._query = replace(query, before=before)
        elif query.ns in {None, found[0]}:
            self._query = replace(query, before=found[1])
        else:
            # A checkpoint of a subgraph may be durable before that of its parent from which the
            # subgraph was called, so that their numbers say nothing about each other.
            self._horizon = _Horizon(query.tenant, self.thread_id, *found)

    def _matching(self, items: Iterator[CheckpointTuple]) -> Iterator[CheckpointTuple]:
        for item in items:
            if any(item.metadata.get(name) != value for name, value in self.matching.items()):
                continue
            yield item
            if self._remaining is not None:
                self._remaining -= 1
                if self._remaining <= 0:
                    self.is_done = True
                    return


class _Horizon:
    """A checkpoint of another namespace, before which something has to be."""

    def __init__(self, tenant: str, thread_id: str, ns: str, seq: int) -> None:
        self._key = (tenant, thread_id, ns)
        self._seq = seq
        self._numbers: dict[str, int | None] = {}

    def is_before(self, rows: Rows, found: FoundCheckpoint, item: CheckpointTuple) -> bool:
        """Whether the superstep from which a subgraph was called had begun earlier."""
        parent = item.metadata.get("parents", {}).get(self._key[2])
        if parent is None:
            return found.row.seq < self._seq
        if parent not in self._numbers:
            there = rows.find_checkpoint(self._key, parent)
            self._numbers[parent] = there.row.seq if isinstance(there, FoundCheckpoint) else None
        number = self._numbers[parent]
        return number is not None and number < self._seq
