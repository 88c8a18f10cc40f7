"""Checkpoints are found by their numbers, also before PostgreSQL knows anything of their table."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig

from agentflow.checkpoint import open_checkpointer
from agentflow.database.session import Session
from tests.integration.graphs import State, chain

pytestmark = pytest.mark.postgres
LONG = 40


async def note(state: State) -> State:
    return {"log": ["noted"]}


async def test_head_of_a_long_thread_is_found_without_reading_the_thread(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = open_checkpointer(postgres_url)
    try:
        graph = chain(*((f"note{i}", note) for i in range(LONG))).compile(checkpointer=saver)
        config: RunnableConfig = {"configurable": {"thread_id": "t"}}
        await graph.ainvoke({}, {**config, "recursion_limit": LONG + 5})
        saved = [each async for each in saver.alist(config)]
        asked: list[tuple[str, Any]] = []
        fetch = Session.fetch

        def noted(session: Session, sql: str, parameters: Any = ()) -> Any:
            asked.append((sql, parameters))
            return fetch(session, sql, parameters)

        monkeypatch.setattr(Session, "fetch", noted)
        # The head, and one before it, whose successor carries its writes.
        await saver.aget_tuple(config)
        await saver.aget_tuple(saved[LONG // 2].config)
        monkeypatch.undo()
        plans = [await _plan(saver, *each) for each in asked if "agentflow_checkpoints" in each[0]]
        assert len(plans) == 3, "the head, one before it, and its writes"
        for plan in plans:
            # The number of the one that is wanted would be looked for with each of the thread.
            assert "seq = (SubPlan" not in plan
    finally:
        await saver.aclose()


async def _plan(saver: Any, sql: str, parameters: Any) -> str:
    def explain(session: Session) -> str:
        return "\n".join(row[0] for row in session.fetch(f"EXPLAIN {sql}", parameters))

    plan: str = await saver._database.query(explain)
    return plan
