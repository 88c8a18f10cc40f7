"""`durable_model`: a chat model whose answers are kept, in nodes and agents of others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, SecretStr

from agentflow import AgentFlow, RetryPolicy
from agentflow.budgets import Budget
from agentflow.errors import InvalidInputError
from agentflow.nodes import durable_model, llm_node
from agentflow.testing import ScriptedChatModel
from agentflow.types import Run, RunStatus
from tests.openai_server import Failure, OpenAIServer, serving

SOON = RetryPolicy(initial_interval=0.01, jitter=False)
GO = {"messages": [HumanMessage("What is tea?")]}


class Calls:
    """A model that tells how often it was called."""

    def __init__(self, reply: str | AIMessage = "leaves in hot water") -> None:
        self.count = 0
        self.reply = reply
        self.model = durable_model(ScriptedChatModel(script=self._script))

    def _script(self, _: Sequence[AnyMessage]) -> str | AIMessage:
        self.count += 1
        return self.reply


class Crash:
    """Fails once, where a process could die."""

    def __init__(self) -> None:
        self.has_happened = False

    def happen(self) -> None:
        if not self.has_happened:
            self.has_happened = True
            raise RuntimeError


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


async def drive(app: AgentFlow, node: Callable[..., Any], **options: Any) -> Run:
    graph = StateGraph(MessagesState)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    app.register(graph, name="g", retry=SOON, **options)
    return await app.drive((await app.submit("g", GO)).id)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_answer_is_not_asked_for_again(app: AgentFlow, kind: str, *, streams: bool) -> None:
    calls, crash, seen = Calls(), Crash(), []

    async def node(state: MessagesState) -> dict[str, Any]:
        if streams:
            return end([piece async for piece in calls.model.astream(state["messages"])])
        return end([await calls.model.ainvoke(state["messages"])])

    def in_thread(state: MessagesState) -> dict[str, Any]:
        if streams:
            return end(list(calls.model.stream(state["messages"])))
        return end([calls.model.invoke(state["messages"])])

    def end(pieces: Sequence[Any]) -> dict[str, Any]:
        seen.append(pieces)
        crash.happen()
        return {"messages": [AIMessage("".join(each.text for each in pieces))]}

    run = await drive(app, node if kind == "async" else in_thread)
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert run.output["messages"][-1].text == calls.reply
    first, second = seen
    assert first[0].id == second[0].id
    assert len(second) == 1
    assert (len(first) > 1) == (streams and kind == "async"), "it streams while it is asked"
    assert calls.count == 1


async def test_stream_that_is_left_is_kept_whole(app: AgentFlow) -> None:
    calls, crash = Calls(), Crash()

    async def node(state: MessagesState) -> dict[str, Any]:
        stream = calls.model.astream(state["messages"])
        piece = await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
        crash.happen()
        return {"messages": [AIMessage(piece.text)]}

    run = await drive(app, node)
    assert run.output["messages"][-1].text == calls.reply
    assert calls.count == 1


class Tea(BaseModel):
    """A tea."""

    name: str


async def test_structured_answer_and_same_question_without_it_are_two(app: AgentFlow) -> None:
    calls, crash = (
        Calls(AIMessage("", tool_calls=[ToolCall(name="Tea", args={"name": "mint"}, id="t")])),
        Crash(),
    )

    async def node(state: MessagesState) -> dict[str, Any]:
        await calls.model.ainvoke(state["messages"])
        tea = await calls.model.with_structured_output(Tea).ainvoke(state["messages"])
        crash.happen()
        return {"messages": [AIMessage(repr(tea))]}

    run = await drive(app, node)
    assert run.output["messages"][-1].text == "Tea(name='mint')"
    assert calls.count == 2


async def test_within_llm_node_a_call_is_one(app: AgentFlow) -> None:
    calls = Calls()
    run = await drive(app, llm_node(calls.model), budget=Budget(model_calls=1))
    assert run.status is RunStatus.SUCCEEDED, run.error
    assert len((await app.effects.list(run_id=run.id)).items) == 1


def test_outside_of_a_run_it_is_the_model() -> None:
    model = ScriptedChatModel(script=["x"])
    durable = durable_model(model)
    assert isinstance(durable, ScriptedChatModel)
    assert durable.model_dump() == model.model_dump()
    assert durable.invoke("hi").text == "x"
    assert type(durable_model(durable)) is type(durable)
    assert type(model) is ScriptedChatModel


def test_what_is_made_of_a_model_is_refused() -> None:
    model: Any = ScriptedChatModel(script=["x"]).bind(stop=["."])
    with pytest.raises(InvalidInputError, match="must be a chat model"):
        durable_model(model)


async def test_calls_of_a_prebuilt_agent_are_counted_and_kept(app: AgentFlow) -> None:
    """A run that asks for more goes on behind the answers that it has."""
    asked, looked = [], []

    @tool
    async def look(topic: str) -> str:
        """Look."""
        looked.append(topic)
        return "seen"

    def script(messages: Sequence[AnyMessage]) -> AIMessage:
        turn = sum(isinstance(each, ToolMessage) for each in messages)
        asked.append(turn)
        call = ToolCall(name="look", args={"topic": str(turn)}, id=f"c{turn}")
        return AIMessage("" if turn < 2 else "done", tool_calls=[call] if turn < 2 else [])

    agent = create_agent(durable_model(ScriptedChatModel(script=script)), [look])
    app.register(agent, name="a", budget=Budget(model_calls=2, on_exceeded="ask"))
    handle = await app.submit("a", GO)
    run = await app.drive(handle.id)
    assert run.status is RunStatus.WAITING, run.error
    (approval,) = await handle.approvals()
    await app.approvals.decide(approval.id, "approve", by="ada")
    run = await app.drive(handle.id)
    assert run.output["messages"][-1].text == "done"
    assert (asked, looked) == ([0, 1, 2], ["0", "1"])


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(lambda _: "an answer in pieces") as opened:
        yield opened


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
async def test_real_client_fails_once_answers_and_is_left_alone(
    app: AgentFlow, server: OpenAIServer, *, streaming: bool
) -> None:
    server.failures.append(Failure(cut="within"))
    crash = Crash()
    model = durable_model(
        ChatOpenAI(
            model="gpt-test",
            base_url=server.url,
            api_key=SecretStr("-"),
            max_retries=0,
            streaming=streaming,
        )
    )
    assert isinstance(model, ChatOpenAI)

    async def node(state: MessagesState) -> dict[str, Any]:
        answer = await model.ainvoke(state["messages"])
        crash.happen()
        return {"messages": [answer]}

    run = await drive(app, node)
    assert run.status is RunStatus.SUCCEEDED, run.error
    answer = run.output["messages"][-1]
    assert answer.text == "an answer in pieces"
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["model_provider"] == "openai"
    assert len(server.requests) == 2
