"""The scripted chat model: the same answer every time, by every door of LangChain's interface."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from agentflow.testing import Reply, ScriptedChatModel


@tool
def look_up(order_id: str) -> str:
    """Look up an order."""
    return order_id


CALL = AIMessage(
    content="One moment please",
    tool_calls=[
        {"name": "look_up", "args": {"order_id": "R-10001", "note": "grüße, 東京"}, "id": "call_1"},
        {"name": "look_up", "args": {}, "id": "call_2"},
    ],
)


def whole(chunks: Sequence[Any]) -> AIMessageChunk:
    message = reduce(add, chunks)
    assert isinstance(message, AIMessageChunk)
    return message


def test_sequence_answers_by_position_in_the_conversation() -> None:
    model = ScriptedChatModel(script=["first", "second"])
    opening: list[BaseMessage] = [HumanMessage("hello")]
    assert model.invoke(opening).content == "first"
    assert model.invoke(opening).content == "first", "a call that is repeated gets the same answer"
    assert model.invoke([*opening, AIMessage("first"), HumanMessage("more")]).content == "second"


def test_exhausted_sequence_says_what_to_do() -> None:
    model = ScriptedChatModel(script=["only"])
    with pytest.raises(IndexError, match=r"has 1 replies .* add a reply"):
        model.invoke([HumanMessage("a"), AIMessage("only"), HumanMessage("b")])


def test_function_sees_messages_and_bound_tools() -> None:
    def script(messages: list[BaseMessage], tools: list[dict[str, Any]]) -> Reply:
        names = [described["function"]["name"] for described in tools]
        return f"{messages[-1].text} with {names}"

    model = ScriptedChatModel(script=script)
    assert model.invoke("work").content == "work with []"
    assert model.bind_tools([look_up]).invoke("work").content == "work with ['look_up']"


def test_function_without_tools_parameter_sees_messages_only() -> None:
    model = ScriptedChatModel(script=lambda messages: messages[-1].text.upper())
    assert model.bind_tools([look_up], tool_choice="any").invoke("work").content == "WORK"


async def test_async_call_gives_the_same_answer() -> None:
    model = ScriptedChatModel(script=[CALL])
    now, later = model.invoke("hi"), await model.ainvoke("hi")
    assert isinstance(now, AIMessage)
    assert isinstance(later, AIMessage)
    assert (now.content, now.tool_calls, now.usage_metadata) == (
        later.content,
        later.tool_calls,
        later.usage_metadata,
    )


def test_answers_are_copies_with_ids_of_their_own() -> None:
    model = ScriptedChatModel(script=[CALL])
    assert model.invoke("hi").id != model.invoke("hi").id
    assert CALL.id is None
    assert CALL.usage_metadata is None


@pytest.mark.parametrize("reply", ["", "one", "two  words \n here", CALL, AIMessage(content=[])])
async def test_streamed_chunks_add_up_to_the_whole_answer(reply: Reply) -> None:
    model = ScriptedChatModel(script=[reply])
    expected = model.invoke("hi")
    for message in (
        whole(list(model.stream("hi"))),
        whole([chunk async for chunk in model.astream("hi")]),
    ):
        assert isinstance(expected, AIMessage)
        assert message.text == expected.text
        assert message.tool_calls == expected.tool_calls
        assert message.usage_metadata == expected.usage_metadata
        assert message.response_metadata == expected.response_metadata


def test_a_stream_has_many_pieces() -> None:
    chunks = list(ScriptedChatModel(script=[CALL]).stream("hi"))
    assert [chunk.text for chunk in chunks if chunk.text] == ["One ", "moment ", "please"]
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert [piece["name"] for piece in pieces if piece["name"]] == ["look_up", "look_up"]
    assert len(pieces) > 4, "arguments arrive in several pieces"
    assert chunks[-1].chunk_position == "last"


def test_malformed_tool_call_is_streamed_as_it_is() -> None:
    broken = {"name": "look_up", "args": "[oops", "id": "call_1", "error": None}
    model = ScriptedChatModel(script=[AIMessage(content="", invalid_tool_calls=[broken])])
    message = whole(list(model.stream("hi")))
    assert message.tool_calls == []
    assert [call["args"] for call in message.invalid_tool_calls] == ["[oops"]


def test_callbacks_see_every_token() -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.text = ""

        def on_llm_new_token(self, token: str | list[Any], **_: Any) -> None:
            assert isinstance(token, str)
            self.text += token

    seen = Tokens()
    list(ScriptedChatModel(script=["one two three"]).stream("hi", {"callbacks": [seen]}))
    assert seen.text == "one two three"


def test_usage_is_counted_or_taken_from_the_reply() -> None:
    counted = ScriptedChatModel(script=["three little words"]).invoke("two words")
    assert isinstance(counted, AIMessage)
    assert counted.usage_metadata == {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
    own = {"input_tokens": 70, "output_tokens": 7, "total_tokens": 77}
    model = ScriptedChatModel(script=[AIMessage(content="x", usage_metadata=own)])
    answer = model.invoke("hi")
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata == own


def test_stop_words_end_the_answer() -> None:
    model = ScriptedChatModel(script=["one two three"])
    assert model.invoke("hi", stop=["three", " two"]).content == "one"
    assert model.invoke("hi", stop=["four"]).content == "one two three"


def test_structured_output_comes_from_a_tool_call() -> None:
    class Verdict(BaseModel):
        kind: str

    call = {"name": "Verdict", "args": {"kind": "refund"}, "id": "1"}
    model = ScriptedChatModel(script=[AIMessage(content="", tool_calls=[call])])
    assert model.with_structured_output(Verdict).invoke("hi") == Verdict(kind="refund")


async def test_latency_is_spent_inside_the_call_and_can_be_cancelled() -> None:
    model = ScriptedChatModel(script=["never"], latency=timedelta(hours=1))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await model.ainvoke("hi")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(model.astream("hi"))


@pytest.mark.parametrize("latency", [0.001, timedelta(milliseconds=1)])
def test_latency_takes_seconds_or_a_timedelta(latency: timedelta | float) -> None:
    assert ScriptedChatModel(script=["x"], latency=latency).invoke("hi").content == "x"


def test_a_text_is_not_a_sequence_of_replies() -> None:
    with pytest.raises(ValueError, match="script"):
        ScriptedChatModel(script="hello")
