"""What a redaction hook returns is stored, and is what a run goes on with."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import StateGraph
from langgraph.types import Interrupt

from agentflow import AgentFlow
from agentflow.checkpoint import open_checkpointer
from agentflow.types import Approval, ApprovalRequest, Decision, RunFailure
from tests.integration.graphs import asks, chain, logs
from tests.integration.sealed import fill, open_app, payloads

CARD = "4111111111111111"
CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}


class Redact:
    """Takes card numbers out of texts, and notes where it was asked."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.types: dict[str, type] = {}

    def __call__(self, place: str, value: Any) -> Any:
        self.places[place] += 1
        self.types[place] = type(value)
        return _without_cards(value)


def _without_cards(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"\d{16}", "[card]", value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_cards, value))
    if isinstance(value, dict):
        return {key: _without_cards(item) for key, item in value.items()}
    if isinstance(value, Interrupt):
        return Interrupt(value=_without_cards(value.value), id=value.id)
    return value


def stored(url: str) -> bytes:
    return b"".join(row[-1] for rows in payloads(url).values() for row in rows)


async def test_graph_is_resumed_with_what_was_stored(database_url: str) -> None:
    redact = Redact()
    graph = chain(("first", logs(f"paid with {CARD}")), ("ask", asks(f"refund {CARD}?")))
    async with open_checkpointer(database_url, compress=False, redact=redact) as saver:
        compiled = graph.compile(checkpointer=saver)
        await compiled.ainvoke({"log": ["start"], "value": {"card": CARD}}, CONFIG)
    assert CARD.encode() not in stored(database_url)
    assert {"channel:log", "channel:value", "channel:__interrupt__", "metadata"} <= set(
        redact.places
    )
    async with open_checkpointer(database_url) as saver:
        state = (await graph.compile(checkpointer=saver).aget_state(CONFIG)).values
    assert state == {"log": ["start", "paid with [card]"], "value": {"card": "[card]"}}


def test_list_that_grows_is_stored_as_it_is_redacted(database_url: str) -> None:
    graph = chain(*((f"n{n}", logs(f"{n}: {CARD} {'.' * 99}")) for n in range(6)))
    expected = ["start", *(f"{n}: [card] {'.' * 99}" for n in range(6))]
    with open_checkpointer(database_url, compress=False, redact=Redact()) as saver:
        compiled = graph.compile(checkpointer=saver)
        for turn in range(1, 4):
            compiled.invoke({"log": ["start"]}, CONFIG)
            assert compiled.get_state(CONFIG).values["log"] == expected * turn
        lengths = [len(each.values.get("log", [])) for each in compiled.get_state_history(CONFIG)]
    assert max(lengths) == 21
    assert CARD.encode() not in stored(database_url)


async def test_hook_sees_every_payload_of_a_run_as_what_it_is(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    redact = Redact()
    app = open_app(sqlite_url, None)
    other = AgentFlow(sqlite_url, redact=redact)
    other._registry = app._registry
    await app.aclose()
    async with other:
        await fill(other)
    places = {place: redact.types[place] for place in redact.places if "." in place}
    assert places == {
        "runs.input": dict,
        "runs.config": dict,
        "runs.metadata": dict,
        "runs.output": dict,
        "runs.error": RunFailure,
        "runs.failures": dict,
        "runs.cancellation": dict,
        "runs.retry": dict,
        "runs.saga_cause": dict,
        "waits.request": ApprovalRequest,
        "waits.decision": Decision,
        "waits.comment": str,
        "events.data": dict,
        "dead_letters.cause": RunFailure,
        "pauses.reason": str,
        "effects.request": dict,
        "effects.outcome": dict,
        "effects.comment": str,
        "effects.late": list,
    }


async def test_same_submission_and_decision_are_known_again(database_url: str) -> None:
    """Though what is stored of them is not what is given."""

    def redact(place: str, value: Any) -> Any:
        if place == "waits.decision":
            return Decision(type=value.type)
        return _without_cards(value)

    graph = chain(("ask", asks("?")))
    async with AgentFlow(database_url, redact=redact) as app:
        app.register(graph, name="g")
        for _ in range(2):
            await app.submit("g", {"value": CARD}, run_id="r")
        assert (await app.get_run("r")).input == {"value": "[card]"}
        await app.drive("r")
        (asked,) = await app.handle("r").approvals()
        decided = [
            await app.approvals.decide(
                asked.id,
                {"type": "respond", "message": CARD},
                by="ann",
                idempotency_key="key",
            )
            for _ in range(2)
        ]
    assert decided[0] == decided[1]
    assert decided[0].decision == Decision(type="respond")


async def test_hash_of_a_question_is_that_of_what_is_shown(database_url: str) -> None:
    """Or it would tell what was taken out of it to whoever tries all the numbers."""

    def redact(place: str, value: Any) -> Any:
        if isinstance(value, ApprovalRequest):
            return replace(value, proposal=_without_cards(value.proposal))
        return _without_cards(value)

    def number(card: str) -> StateGraph[Any, Any, Any, Any]:
        return chain(("ask", asks({"pay with": card})))

    asked: list[Approval] = []
    for run_id, card in (("one", CARD), ("two", CARD[::-1])):
        async with AgentFlow(database_url, redact=redact) as app:
            app.register(number(card), name="g", version=run_id)
            await app.submit("g", {"value": 1}, run_id=run_id, version=run_id)
            await app.drive(run_id)
            asked += await app.handle(run_id).approvals()
            (event,) = [
                each for each in await app.list_events(run_id) if each.type == "approval.requested"
            ]
            assert event.data["proposal_hash"] == asked[-1].proposal_hash
    assert asked[0].proposal_hash == asked[1].proposal_hash
    assert asked[0].request == asked[1].request
