"""`llm_node` with LangChain's OpenAI client, against a local server that speaks OpenAI's API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    HumanMessage,
    ToolCall,
    trim_messages,
)
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from agentflow import AgentFlow, RetryPolicy
from agentflow.errors import InvalidInputError
from agentflow.nodes import llm_node
from agentflow.nodes.history import ABANDONED
from agentflow.testing import ScriptedChatModel
from agentflow.types import RunStatus
from tests.integration.spans import facts, recorded
from tests.openai_server import Failure, OpenAIServer, serving

SOON = RetryPolicy(initial_interval=0.01, jitter=False)
GO = {"messages": [HumanMessage("What is tea?")]}


class State(MessagesState):
    structured_response: dict[str, Any]


def answer(messages: Sequence[AnyMessage]) -> str:
    return f"answer to: {messages[-1].text}"


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(answer) as opened:
        yield opened


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


def client(server: OpenAIServer, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    defaults = {"model": "gpt-test", "api_key": "none", "max_retries": 0}
    return ChatOpenAI(base_url=server.url, **{**defaults, **options})


def graph_of(node: Any) -> StateGraph[State, None, State, State]:
    graph = StateGraph(State)
    graph.add_node("model", node)
    graph.add_edge(START, "model")
    return graph


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure(status=500), "APIError"),
        (Failure(status=503, headers={"Retry-After": "0.01"}), "APIError"),
        (Failure(status=429, headers={"Retry-After": "0.01"}), "RateLimitError"),
        (Failure(cut="before"), "ConnectionError"),
        (Failure(cut="within"), ""),
        (Failure(hangs=True), "TimeoutError"),
    ],
    ids=["500", "503", "429", "cut-before", "cut-within", "timeout"],
)
async def test_provider_that_fails_is_asked_again_by_another_attempt(
    app: AgentFlow,
    server: OpenAIServer,
    failure: Failure,
    error: str,
    *,
    streaming: bool,
) -> None:
    server.failures.append(failure)
    model = client(server, streaming=streaming, timeout=0.3 if failure.hangs else 20)
    app.register(graph_of(llm_node(model)), name="g", retry=SOON)
    handle = await app.submit("g", GO)
    run = await app.drive(handle.id)
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert run.output["messages"][-1].text == "answer to: What is tea?"
    retried = [each.data for each in await app.list_events(run.id) if each.type == "run.retried"]
    assert len(retried) == 1
    assert retried[0]["error"].endswith(error)
    assert len(server.requests) == 2


async def test_overload_is_waited_for_in_the_row_as_long_as_the_provider_says(
    app: AgentFlow, server: OpenAIServer
) -> None:
    server.failures.append(Failure(status=429, headers={"Retry-After": "600"}))
    app.register(graph_of(llm_node(client(server))), name="g", retry=SOON)
    handle = await app.submit("g", GO)
    async with app.worker():
        delays = []
        async for event in app.events(handle.id):
            if event.type == "run.retried":
                delays.append(event.data["delay"])
                break
    assert delays == [600.0]
    assert (await app.get_run(handle.id)).status is RunStatus.QUEUED
    assert len(server.requests) == 1


async def test_request_that_is_wrong_in_itself_is_a_dead_letter_at_once(
    app: AgentFlow, server: OpenAIServer
) -> None:
    server.failures.append(Failure(status=401))
    app.register(graph_of(llm_node(client(server))), name="g", retry=SOON)
    handle = await app.submit("g", GO)
    run = await app.drive(handle.id)
    assert (run.status, run.claims) == (RunStatus.FAILED, 1)
    assert len(server.requests) == 1


async def test_fallbacks_are_asked_in_their_order(app: AgentFlow, server: OpenAIServer) -> None:
    server.failures += [Failure(status=500), Failure(status=401)]
    models = [client(server, model=f"gpt-{number}") for number in range(3)]
    app.register(graph_of(llm_node(models[0], fallbacks=models[1:])), name="g", retry=SOON)
    handle = await app.submit("g", GO)
    run = await app.drive(handle.id)
    assert run.status is RunStatus.SUCCEEDED
    assert [each["model"] for each in server.requests] == ["gpt-0", "gpt-1", "gpt-2"]


async def test_error_of_the_first_model_stands_if_all_fail(
    app: AgentFlow, server: OpenAIServer
) -> None:
    server.failures += [Failure(status=429), Failure(status=500)]
    node = llm_node(client(server), fallbacks=[client(server)])
    app.register(graph_of(node), name="g", retry=RetryPolicy(max_attempts=1))
    run = await app.drive((await app.submit("g", GO)).id)
    assert run.error is not None
    assert run.error.type.endswith("RateLimitError")


async def test_tokens_are_streamed_and_add_up(server: OpenAIServer) -> None:
    graph: Any = graph_of(llm_node(client(server))).compile()
    chunks = [chunk async for chunk, _ in graph.astream(GO, stream_mode="messages")]
    texts = [chunk.text for chunk in chunks if isinstance(chunk, AIMessageChunk) and chunk.text]
    assert len(texts) > 1
    assert "".join(texts) == "answer to: What is tea?"


class Tea(BaseModel):
    """What is said of tea."""

    name: str
    degrees: int


async def test_structured_answer_is_written_as_plain_data(
    app: AgentFlow, server: OpenAIServer
) -> None:
    server.script = lambda _: '{"name": "green", "degrees": 80}'
    node = llm_node(client(server), response_format=Tea)
    app.register(graph_of(node), name="g")
    run = await app.drive((await app.submit("g", GO)).id)
    assert run.output["structured_response"] == {"name": "green", "degrees": 80}
    assert isinstance(run.output["messages"][-1], AIMessage)
    assert server.requests[0]["response_format"]["json_schema"]["name"] == "Tea"


async def test_answer_that_does_not_fit_its_form_is_asked_for_again(app: AgentFlow) -> None:
    forms: list[dict[str, Any]] = [{"name": "green", "degrees": each} for each in ("hot", 80)]
    told = iter(forms)

    def script(messages: Sequence[AnyMessage]) -> AIMessage:
        return AIMessage("", tool_calls=[ToolCall(name="Tea", args=next(told), id="t")])

    node = llm_node(ScriptedChatModel(script=script), response_format=Tea)
    app.register(graph_of(node), name="g", retry=SOON)
    run = await app.drive((await app.submit("g", GO)).id)
    assert run.output["structured_response"] == {"name": "green", "degrees": 80}
    assert run.claims == 2


async def test_history_is_trimmed_and_repaired_in_what_is_sent_and_whole_in_the_state(
    app: AgentFlow, server: OpenAIServer
) -> None:
    history: list[AnyMessage] = [
        HumanMessage("long ago"),
        AIMessage("indeed"),
        HumanMessage("look it up"),
        AIMessage("", tool_calls=[ToolCall(name="look_up", args={}, id="l1")]),
        HumanMessage("never mind"),
    ]
    node = llm_node(
        client(server),
        prompt="Be brief.",
        trim=trim_messages(max_tokens=3, token_counter=len, start_on="human").invoke,
    )
    app.register(graph_of(node), name="g")
    run = await app.drive((await app.submit("g", {"messages": history})).id)
    sent = [(each["role"], each["content"]) for each in server.requests[0]["messages"]]
    assert sent == [
        ("system", "Be brief."),
        ("user", "look it up"),
        ("assistant", None),
        ("tool", ABANDONED),
        ("user", "never mind"),
    ]
    *before, last = run.output["messages"]
    assert [each.text for each in before] == [each.text for each in history]
    assert last.response_metadata["agentflow"] == {"repaired": ["l1"]}


async def test_model_by_name_leaves_all_waiting_to_the_run(
    app: AgentFlow, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    server.failures.append(Failure(status=500))
    app.register(graph_of(llm_node("openai:gpt-test")), name="g", retry=SOON)
    run = await app.drive((await app.submit("g", GO)).id)
    assert (run.status, run.claims) == (RunStatus.SUCCEEDED, 2)
    assert len(server.requests) == 2


async def test_span_of_the_node_tells_what_its_model_has_used(
    app: AgentFlow, server: OpenAIServer
) -> None:
    app.register(graph_of(llm_node(client(server))), name="g")
    with recorded() as spans:
        run = await app.drive((await app.submit("g", GO)).id)
        (span,) = spans.named("agentflow.node")
    used = run.output["messages"][-1].usage_metadata
    assert facts(span)["gen_ai.usage.input_tokens"] == used["input_tokens"] > 0
    assert facts(span)["gen_ai.usage.output_tokens"] == used["output_tokens"] > 0


def test_tools_and_a_format_are_refused_together() -> None:
    with pytest.raises(InvalidInputError):
        llm_node(ScriptedChatModel(script=["x"]), tools=[answer], response_format=Tea)
