"""The refund agent with a real model client: `langchain_openai` against a local OpenAI-like server.

The server answers chat completions, whole and streamed, from the example's script, so what the
client makes of tool calls, usage and chunks can be compared with the scripted model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI

from agentflow import AgentFlow
from agentflow.testing import ScriptedChatModel
from agentflow.types import RunStatus
from examples.refunds.client import ServiceClient
from examples.refunds.graph import build_graph
from examples.refunds.ledger import Ledger
from examples.refunds.script import answer, chat_model
from examples.refunds.services import Server, Services
from examples.refunds.shop import Case, read_cases
from tests.openai_server import OpenAIServer, serving

CASES = {case.ticket["id"]: case for case in read_cases()}
PAID_AT_ONCE, HELD, WITHOUT_ORDER = CASES["T-1001"], CASES["T-1015"], CASES["T-1022"]


@pytest.fixture
def openai_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    with serving(answer) as server:
        monkeypatch.setenv("AGENTFLOW_MODEL", "openai:scripted")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def services_url(ledger: Ledger) -> Iterator[str]:
    with Server(Services(ledger)).running() as server:
        yield server.url


async def refund(case: Case, model: BaseChatModel, services_url: str) -> dict[str, Any]:
    """Run the agent on one ticket, with its review if it is held, and return its output."""
    services = ServiceClient(services_url)
    async with AgentFlow("memory://") as app:
        app.register(build_graph(model, services), name="refund")
        handle = await app.submit("refund", {"ticket": case.ticket})
        run = await app.drive(handle.id)
        for approval in await handle.approvals():
            assert case.review is not None
            edited = {**approval.request.proposal, "amount": case.review.amount}
            await app.approvals.decide(approval.id, {"type": "edit", "value": edited}, by="alice")
            run = await app.drive(handle.id)
    await services.aclose()
    assert run.status is RunStatus.SUCCEEDED
    output: dict[str, Any] = run.output
    return output


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", [PAID_AT_ONCE, HELD, WITHOUT_ORDER], ids=lambda c: c.ticket["id"])
async def test_openai_client_and_scripted_model_do_the_same(
    case: Case,
    openai_server: OpenAIServer,
    services_url: str,
    ledger: Ledger,
    *,
    streamed: bool,
) -> None:
    real = chat_model()
    assert isinstance(real, ChatOpenAI)
    real.streaming = streamed
    output = await refund(case, real, services_url)

    assert {bool(request.get("stream")) for request in openai_server.requests} == {streamed}
    assert [payment.money for payment in ledger.payments()] == (
        [case.refund] if case.refund else []
    )

    scripted = await refund(case, ScriptedChatModel(script=answer), services_url)
    assert _said(output) == _said(scripted)


async def test_openai_client_is_offered_one_tool_in_each_call(
    openai_server: OpenAIServer, services_url: str
) -> None:
    await refund(PAID_AT_ONCE, chat_model(), services_url)
    offered = [
        [tool["function"]["name"] for tool in request["tools"]]
        for request in openai_server.requests
    ]
    assert offered == [["look_up_order"], ["propose_refund"]]


def _said(output: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the model said, without what only one of the clients adds."""
    return [
        (
            message.text,
            message.tool_calls,
            {key: message.usage_metadata[key] for key in ("input_tokens", "output_tokens")},
        )
        for message in output["messages"]
        if isinstance(message, AIMessage) and message.usage_metadata is not None
    ]
