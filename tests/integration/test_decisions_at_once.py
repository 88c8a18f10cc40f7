"""Two who decide at the same moment: the second one waits for the first, and sees its answer."""

from __future__ import annotations

import asyncio

import pytest

from agentflow import AgentFlow, request_approval
from agentflow.errors import AlreadyResolvedError
from agentflow.failpoints import arm, disarm
from agentflow.types import Approval
from tests.integration.graphs import State, chain
from tests.integration.locks import wait_for_lock

pytestmark = pytest.mark.postgres


async def ask(state: State) -> State:
    return {"log": [request_approval({"who": "ada"}).type]}


@pytest.mark.parametrize("is_offered", [True, False])
async def test_who_had_to_wait_for_the_run_sees_what_was_decided_meanwhile(
    postgres_url: str, *, is_offered: bool
) -> None:
    """Its statement began before: what it has read of the question is what that was."""
    async with AgentFlow(postgres_url) as first, AgentFlow(postgres_url) as second:
        for app in (first, second):
            app.register(chain(("ask", ask)), name="g")
        handle = await first.submit("g", {})
        await first.drive(handle.id)
        (approval,) = await handle.approvals()
        loop = asyncio.get_running_loop()
        late: list[asyncio.Future[Approval]] = []

        def decide_too() -> None:
            """Let the other one begin, and wait until the server says that it waits."""
            disarm()
            deciding = asyncio.run_coroutine_threadsafe(
                second.approvals.decide(approval, "reject", by="bob"), loop
            )
            late.append(asyncio.wrap_future(deciding, loop=loop))
            wait_for_lock(postgres_url, deciding)

        arm("database.before_commit", decide_too)
        if is_offered:
            async with second.worker():
                await first.approvals.decide(approval, "approve", by="ada")
                with pytest.raises(AlreadyResolvedError):
                    await late[0]
        else:
            await first.approvals.decide(approval, "approve", by="ada")
            with pytest.raises(AlreadyResolvedError):
                await late[0]
        decided = await first.approvals.get(approval.id)
        assert (decided.decided_by, decided.decision and decided.decision.type) == (
            "ada",
            "approve",
        )
