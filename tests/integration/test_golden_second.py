"""What the second version of schema and codec left behind: plain and encrypted, in every column.

`tests/golden/database_v2.py` wrote the files. The tests that go on from there are those of
`test_golden_database`, on a copy of each of the two.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentflow import AgentFlow
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.codec import Codec
from agentflow.database.engine import parse_url
from agentflow.database.tables import events
from agentflow.keys import KeyRing
from agentflow.storage.events import hash_event
from agentflow.storage.payloads import Payloads
from tests.golden import database_v2 as v2
from tests.golden import graphs_v1 as graphs
from tests.golden.database_v1 import on
from tests.golden.listing import list_database
from tests.integration.sealed import payloads
from tests.integration.test_golden_database import (  # noqa: F401 -- collected here as well
    app,
    outside,
    saver,
    test_changes_add_up_to_the_state_at_every_checkpoint,
    test_conversation_goes_on,
    test_question_that_is_left_is_answered,
    test_queued_run_starts_on_the_thread_of_an_earlier_one,
    test_run_of_a_killed_worker_goes_on_with_what_was_left,
    test_subgraphs_go_on_where_they_were,
    test_waiting_run_is_approved_and_ends,
)
from tests.servers import no_leaked_files


@pytest.fixture(params=v2.FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether it is the plain or the encrypted one, whose key is in the environment."""
    for name, value in v2.environment(request.param).items():
        monkeypatch.setenv(name, value)
    return str(request.param)


@pytest.fixture
def url(form: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a copy."""
    folder = tmp_path / "golden"
    folder.mkdir()
    file = folder / "agentflow.db"
    with no_leaked_files(folder):
        file.write_bytes(gzip.decompress(v2.database_of(form).read_bytes()))
        yield f"sqlite:///{file}"


LATER = {
    "agentflow_fingerprints.form",
    "agentflow_pauses.reason",
    "agentflow_runs.cancellation",
    "agentflow_runs.retry",
    "agentflow_runs.saga_cause",
    *(f"agentflow_effects.{name}" for name in ("request", "outcome", "comment", "late")),
}
"""Columns that a later revision has added, and which are therefore empty."""


async def test_everything_is_listed_as_it_was_and_nothing_is_damaged(
    form: str,
    url: str,
    saver: Saver,  # noqa: F811 -- the fixture of that name
) -> None:
    expected = json.loads(gzip.decompress(v2.listing_of(form).read_bytes()))
    assert await list_database(url, tenants=v2.TENANTS) == expected
    found = payloads(url)
    found = {column: rows for column, rows in found.items() if column not in LATER}
    assert all(found.values()), "a column without a payload shows nothing"
    async for audited in saver.verify():
        assert audited.damages == []


async def test_pruned_thread_goes_on(url: str) -> None:
    async with open_checkpointer(url) as opened:
        graph = graphs.journal().compile(checkpointer=opened)
        before = (await graph.aget_state(on(v2.PRUNED))).values["entries"]
        assert before == [e for n in range(3) for e in (f"turn {n}", ("noted", 2 * n + 1))]
        result = await graph.ainvoke({"entries": ["again"]}, on(v2.PRUNED))
    assert result["entries"] == [*before, "again", ("noted", 7)]


async def test_hashes_of_events_are_those_that_they_had(form: str, url: str) -> None:
    """Of plain data, salted, as it was before it was sealed."""
    keys = KeyRing.from_text(v2.KEYS) if form == "encrypted" else None
    codec = Codec(keys=keys, unknown="plain")
    engine = sa.create_engine(parse_url(url))
    async with AgentFlow(url) as opened:
        await opened.list_runs()
    with engine.connect() as connection:
        log = connection.execute(sa.select(events)).all()
    engine.dispose()
    assert len(log) > 30
    for event in log:
        assert event.hash == hash_event(event, Payloads(strict=codec, lenient=codec))
