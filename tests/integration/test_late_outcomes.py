"""Two attempts that end one effect at the same moment, the older one too late."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from agentflow.failpoints import arm, disarm
from agentflow.journal import EffectStatus, Outcome
from tests.conformance.runs import EXPIRED, claim, open_store, running, types_of_events
from tests.conformance.test_run_store_effects import DONE, new
from tests.integration.locks import wait_for_lock

pytestmark = pytest.mark.postgres


async def test_who_had_to_wait_for_the_run_sees_what_came_too_late_meanwhile(
    postgres_url: str,
) -> None:
    """Or else what its event says of the effect would not be what stands there."""
    first, second = open_store(postgres_url), open_store(postgres_url)
    late = Outcome(status=EffectStatus.SUCCEEDED, value="late")
    zombie = await running(first, "r")
    effect = (await first.begin_effect(zombie, new())).effect
    await first.extend_leases([zombie], EXPIRED)
    owner = await claim(second, "r")
    await second.extend_leases([owner], timedelta(minutes=1))
    assert (await second.begin_effect(owner, new(), retake=effect.attempt)).is_due
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Future[bool]] = []

    def end_too() -> None:
        """Let the owner begin, and wait until the server says that it waits."""
        disarm()
        waiting = asyncio.run_coroutine_threadsafe(
            second.finish_effect(owner, effect.id, DONE), loop
        )
        ending.append(asyncio.wrap_future(waiting, loop=loop))
        wait_for_lock(postgres_url, waiting)

    arm("database.before_commit", end_too)
    assert not await first.finish_effect(zombie, effect.id, late)
    assert await ending[0]
    ended = await first.get_effect("", effect.id)
    assert ended.status is EffectStatus.SUCCEEDED
    assert [each["value"] for each in ended.late] == ["late"]
    assert (await types_of_events(first, "r"))[-2:] == ["effect.late_outcome", "effect.succeeded"]
    assert [each async for found in first.find_damages() for each in found.damages] == []
    await first.close()
    await second.close()
