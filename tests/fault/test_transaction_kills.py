"""Transactions in a database of the user's, whose process is killed: each is booked once."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.fault.booking_victims import BOOKED, MOMENTS, SEATS, open_shop
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer
from tests.fault.ledger import Ledger
from tests.fault.scene import LONG, Scene, open_scene

BOOK = "tests.fault.booking_victims:book"
ENV = {"AGENTFLOW_LEASE": str(LONG)}


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the user's database is."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shop.db'}"
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def scene(
    request: pytest.FixtureRequest, shop: str, ledger: Ledger, forkserver: ForkServer
) -> AsyncIterator[Scene]:
    """Where agentflow's own is: beside it on PostgreSQL, in a file otherwise."""
    is_shared = shop.startswith("postgresql")
    url = shop if is_shared else request.getfixturevalue("sqlite_url")
    async with open_scene(url, ledger, forkserver) as opened:
        yield opened


async def test_process_killed_around_the_users_commit_has_booked_once(
    scene: Scene, shop: str, sampler: Sampler, tally: Tally
) -> None:
    engine = open_shop(shop)
    every = [(moment, what) for what in SEATS for moment in MOMENTS]
    tried = {f"{moment}-{what}": (moment, what) for moment, what in sampler.some(every, 4)}
    for name, at in tried.items():
        victim = scene.forkserver.spawn(BOOK, scene.url, shop, [name], list(at), env=ENV)
        assert await scene.gone(victim) == -signal.SIGKILL, victim.output()
    scene.expire(tried)
    successor = scene.forkserver.spawn(BOOK, scene.url, shop, list(tried), None, env=ENV)
    assert await scene.gone(successor) == 0, successor.output()
    with engine.connect() as connection:
        found = sorted(tuple(row) for row in connection.execute(sa.select(BOOKED)))
    engine.dispose()
    assert found == sorted((name, what) for name in tried for what in SEATS)
    for name in tried:
        run = await scene.app.get_run(name)
        assert run.output["log"] == list(SEATS), (name, run.error)
        asked = await scene.app.approvals.list(run_id=name, status=None)
        assert not asked.items, "never in doubt"
    tally(kills=len(tried))
