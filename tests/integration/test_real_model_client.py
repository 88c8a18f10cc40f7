"""The refund agent with a real model client: `langchain_openai` against a local OpenAI-like server.

The server answers chat completions, whole and streamed, from the example's script, so what the
client makes of tool calls, usage and chunks can be compared with the scripted model itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_messages
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

CASES = {case.ticket["id"]: case for case in read_cases()}
PAID_AT_ONCE, HELD, WITHOUT_ORDER = CASES["T-1001"], CASES["T-1015"], CASES["T-1022"]


class OpenAIServer(ThreadingHTTPServer):
    """Speaks enough of the OpenAI API for a chat model, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), partial(OpenAIHandler, self.requests))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class OpenAIHandler(BaseHTTPRequestHandler):
    def __init__(self, requests: list[dict[str, Any]], *args: Any) -> None:
        self._requests = requests
        super().__init__(*args)

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._requests.append(body)
        model = ScriptedChatModel(script=answer).bind_tools(body.get("tools", []))
        messages = convert_to_messages(body["messages"])
        if body.get("stream"):
            events = [_chunk(chunk) for chunk in model.stream(messages)]
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            self._reply("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))
        else:
            self._reply("application/json", json.dumps(_completion(model.invoke(messages))))

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _reply(self, content_type: str, text: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _completion(message: Any) -> dict[str, Any]:
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["args"])},
        }
        for call in message.tool_calls
    ]
    spoken = {"role": "assistant", "content": message.text or None}
    choice = {
        "index": 0,
        "message": spoken | ({"tool_calls": calls} if calls else {}),
        "finish_reason": "tool_calls" if calls else "stop",
    }
    return {**_head("chat.completion"), "choices": [choice], "usage": _usage(message)}


def _chunk(chunk: Any) -> dict[str, Any]:
    calls = [
        {
            "index": piece["index"],
            "type": "function",
            "function": {"name": piece["name"], "arguments": piece["args"]},
        }
        | ({"id": piece["id"]} if piece["id"] else {})
        for piece in chunk.tool_call_chunks
    ]
    event = _head("chat.completion.chunk")
    if chunk.usage_metadata:  # the last event of a stream holds the usage, and no choice
        return {**event, "choices": [], "usage": _usage(chunk)}
    delta = {"role": "assistant", "content": chunk.text} | ({"tool_calls": calls} if calls else {})
    return {**event, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def _head(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1_700_000_000, "model": "scripted"}


def _usage(message: AIMessage | AIMessageChunk) -> dict[str, int]:
    usage = message.usage_metadata
    assert usage is not None
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
    }


@pytest.fixture
def openai_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("AGENTFLOW_MODEL", "openai:scripted")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        yield server
        server.shutdown()


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
