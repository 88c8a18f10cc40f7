"""A chat model that answers from a script: deterministic, offline, with LangChain's interface.

It owns the replies and the time they take. It keeps no state between calls, so a process that was
killed and started again gets the same answers, and so does a node that is executed twice.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from agentflow.types import to_timedelta

Reply: TypeAlias = str | AIMessage
"""What a script answers: a text, or a whole message with tool calls or usage of its own."""

_ARGS_PIECE = 16
"""How many characters of a tool call's arguments one streamed chunk carries."""


class ScriptedChatModel(BaseChatModel):
    """Answer from a script.

    A sequence answers by position: the reply to a conversation that holds *n* AI messages is
    number *n*. A callable is given the messages and returns the reply; if it has a parameter named
    `tools`, it is also given the bound tools, as OpenAI tool descriptions. Either way the answer
    depends on the conversation alone.

    Usage is counted in words unless the reply brings its own. Streaming yields a word, or a piece
    of a tool call's arguments, at a time; the chunks add up to the reply that `invoke` returns.

    Example:
        ```python
        model = ScriptedChatModel(script=["Which order?", "Refunded."], latency=0.2)
        model.invoke("Where is my money?").content  # "Which order?"
        ```
    """

    script: Sequence[Reply] | Callable[..., Reply]
    latency: timedelta | float = 0.0
    """How long each call takes before its first word; seconds or a `timedelta`."""
    model_name: str = "scripted"

    @property
    def _llm_type(self) -> str:
        return "agentflow-scripted"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return this model with tools; the script decides whether to call one."""
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        time.sleep(self._seconds())
        return _result(self._answer(messages, stop, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        await asyncio.sleep(self._seconds())
        return _result(self._answer(messages, stop, kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        time.sleep(self._seconds())
        for chunk in _chunks(self._answer(messages, stop, kwargs)):
            generation = ChatGenerationChunk(message=chunk)
            if run_manager is not None:
                run_manager.on_llm_new_token(generation.text, chunk=generation)
            yield generation

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        await asyncio.sleep(self._seconds())
        for chunk in _chunks(self._answer(messages, stop, kwargs)):
            generation = ChatGenerationChunk(message=chunk)
            if run_manager is not None:
                await run_manager.on_llm_new_token(generation.text, chunk=generation)
            yield generation

    def _seconds(self) -> float:
        return to_timedelta(self.latency).total_seconds()

    def _answer(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> AIMessage:
        reply = self._reply(messages, kwargs.get("tools") or [])
        # A copy, because LangChain gives the message it gets an id: shared, two answers would have
        # the same one, and `add_messages` would take the second for a correction of the first.
        message = (
            AIMessage(content=reply) if isinstance(reply, str) else reply.model_copy(deep=True)
        )
        if isinstance(message.content, str):
            message.content = _cut(message.content, stop or [])
        if message.usage_metadata is None:
            message.usage_metadata = _usage(messages, message)
        message.response_metadata.setdefault("model_name", self.model_name)
        return message

    def _reply(self, messages: list[BaseMessage], tools: list[dict[str, Any]]) -> Reply:
        if callable(self.script):
            if "tools" in inspect.signature(self.script).parameters:
                return self.script(messages, tools=tools)
            return self.script(messages)
        position = sum(isinstance(message, AIMessage) for message in messages)
        if position >= len(self.script):
            raise IndexError(
                f"the script has {len(self.script)} replies and the conversation already holds "
                f"{position} AI messages; add a reply, or script with a function"
            )
        return self.script[position]


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])


def _cut(text: str, stop: list[str]) -> str:
    ends = [end for word in stop if (end := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def _usage(messages: list[BaseMessage], answer: AIMessage) -> UsageMetadata:
    read = sum(len(message.text.split()) for message in messages)
    written = len(answer.text.split()) + sum(
        len(json.dumps(call["args"]).split()) for call in answer.tool_calls
    )
    return UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written)


def _chunks(message: AIMessage) -> Iterator[AIMessageChunk]:
    """Split a message as a provider would stream it."""
    for piece in _content_pieces(message.content):
        yield AIMessageChunk(content=piece, id=message.id)
    for index, call in enumerate([*message.tool_calls, *message.invalid_tool_calls]):
        yield _call_chunk(message, index, name=call["name"], call_id=call["id"], args="")
        args = call["args"] if isinstance(call["args"], str) else json.dumps(call["args"])
        for start in range(0, len(args), _ARGS_PIECE):
            yield _call_chunk(message, index, args=args[start : start + _ARGS_PIECE])
    yield AIMessageChunk(
        content="",
        id=message.id,
        additional_kwargs=message.additional_kwargs,
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
        chunk_position="last",
    )


def _content_pieces(content: str | list[str | dict[Any, Any]]) -> Iterator[Any]:
    if not isinstance(content, str):
        yield content
        return
    start = 0
    while start < len(content):
        space = content.find(" ", start)
        end = len(content) if space < 0 else space + 1
        yield content[start:end]
        start = end


def _call_chunk(
    message: AIMessage,
    index: int,
    *,
    args: str,
    name: str | None = None,
    call_id: str | None = None,
) -> AIMessageChunk:
    piece = tool_call_chunk(name=name, args=args, id=call_id, index=index)
    return AIMessageChunk(content="", id=message.id, tool_call_chunks=[piece])
