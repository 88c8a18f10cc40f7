"""The stores that the suites run on; a new backend is one more line."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agentflow.storage import RunStore
from tests.conformance.runs import open_store


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[RunStore]:
    """A store on an empty database, in which nothing is damaged in the end."""
    opened = open_store(database_url)
    yield opened
    found = [each async for verified in opened.find_damages() for each in verified.damages]
    await opened.close()
    assert found == []
