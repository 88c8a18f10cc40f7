"""A local server that speaks OpenAI's chat completions API, and fails as told."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_messages

from agentflow.testing import ScriptedChatModel


@dataclass(frozen=True)
class Failure:
    """How one request fails."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: Literal["", "before", "within"] = ""
    """The connection is closed before the answer, or within it."""
    hangs: bool = False
    """The answer does not come until the server is closed."""


class OpenAIServer(ThreadingHTTPServer):
    """Answers from a script, whole or streamed, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, script: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        self.failures: deque[Failure] = deque()
        """What the next requests get instead of an answer, in this order."""
        self.closing = threading.Event()
        self.on_request: Callable[[dict[str, Any]], None] = lambda _: None
        self.script = script
        super().__init__(("127.0.0.1", 0), partial(_Handler, self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving(script: Any) -> Iterator[OpenAIServer]:
    """Serve from a thread."""
    with OpenAIServer(script) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, api: OpenAIServer, *args: Any) -> None:
        self._api = api
        super().__init__(*args)

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._api.requests.append(body)
        self._api.on_request(body)
        failure = self._api.failures.popleft() if self._api.failures else Failure()
        if failure.hangs:
            self._api.closing.wait()
        if failure.hangs or failure.cut == "before":
            self.close_connection = True
            return
        if failure.status:
            text = json.dumps({"error": {"message": "told to fail", "type": "test"}})
            self._reply("application/json", text, status=failure.status, headers=failure.headers)
            return
        model = ScriptedChatModel(script=self._api.script).bind_tools(body.get("tools", []))
        messages = convert_to_messages(body["messages"])
        is_cut = failure.cut == "within"
        if body.get("stream"):
            events = [_chunk(chunk) for chunk in model.stream(messages)]
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            self._reply("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]), is_cut=is_cut)
        else:
            text = json.dumps(_completion(model.invoke(messages)))
            self._reply("application/json", text, is_cut=is_cut)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _reply(
        self,
        content_type: str,
        text: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        is_cut: bool = False,
    ) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if is_cut else content)
        self.close_connection = self.close_connection or is_cut


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
