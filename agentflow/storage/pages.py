"""Pages of listings: what can be read of some rows, and what cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

from agentflow.errors import CodecError
from agentflow.storage.payloads import Payloads
from agentflow.types import Page, Unreadable

logger = logging.getLogger(__name__)

T = TypeVar("T")
_IDS = ("wait_id", "effect_id", "run_id")
"""By which records are told apart, the narrower ones first."""


def to_page(
    rows: Sequence[sa.Row[Any]],
    payloads: Payloads,
    build: Callable[[sa.Row[Any], Payloads], T],
    cursor: str | None,
) -> Page[T]:
    """Build the records of a page; one that cannot be read does not hide the others."""
    items: list[T] = []
    unreadable: list[Unreadable] = []
    for row in rows:
        try:
            items.append(build(row, payloads))
        except CodecError as exc:
            unreadable.append(_left_out(row, exc))
    return Page(items=tuple(items), cursor=cursor, unreadable=tuple(unreadable))


def _left_out(row: sa.Row[Any], error: CodecError) -> Unreadable:
    columns = row._mapping
    record_id = next(columns[name] for name in _IDS if name in columns)
    facts = {"id": record_id, "error": type(error).__name__, "reason": str(error)}
    logger.warning("record is left out of a listing: it cannot be read", extra=facts)
    clear = {name: columns.get(name) for name in ("status", "graph", "version")}
    if not isinstance(clear["version"], str):
        clear["version"] = None  # that of an approval is a number
    return Unreadable(id=record_id, error=error, **clear)
