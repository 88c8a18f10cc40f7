"""`durable_model`: a chat model whose calls are in the journal, wherever it is used.

It is a copy of the model, of a class of its own that is derived from the model's: whoever looks at
its class, binds tools to it or asks it for structured answers finds what he knows. Only what calls
the provider is other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from types import new_class
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.utils.utils import LC_ID_PREFIX

from agentflow.budgets import MODEL, Meter, OverBudget, Usage, current_meter
from agentflow.effects import EffectContext, Journal, Policy, current_journal, run_effect
from agentflow.effects.definition import new_effect
from agentflow.errors import InvalidInputError
from agentflow.interrupts.plain import digest, to_plain
from agentflow.journal import NewEffect
from agentflow.nodes.models import is_asking, made, name_of_model, note_of, question, usage_of
from agentflow.types import new_id

M = TypeVar("M", bound=BaseChatModel)

Messages = list[BaseMessage]
Stop = list[str] | None
Kept = dict[str, Any]
"""What is kept of an answer: `answers`, one message in general, and `usage`."""

_stops: ContextVar[list[OverBudget]] = ContextVar("agentflow_model_stops")
"""What has stopped the calls of one `agenerate`."""


def durable_model(model: M | str) -> M:
    """Return a copy of a chat model whose calls happen once, like those of `llm_node`.

    For models that are called by code that is not one's own, such as LangGraph's
    `create_react_agent` and LangChain's `create_agent`, and in nodes that call a model themselves.
    In a run, an answer is kept in the journal before it is returned, and counts for budgets; after
    a crash, who asks the same at the same place gets it without another call. What was under way is
    asked again. Outside of a run it is the model that it was.

    It streams as the model does; what comes from the journal comes in one piece, and so does what
    is streamed by callers that are not async. Give its client no retries of its own to leave all
    waiting to the run's retry policy.

    Example:
        ```python
        agent = create_agent(durable_model(ChatOpenAI(model="gpt-4o", max_retries=0)), tools)
        ```

    Args:
        model: A chat model, or `"provider:name"` for LangChain's `init_chat_model`.

    Returns:
        An instance of a class that is derived from the model's.

    Raises:
        InvalidInputError: It is no chat model, but something that is made of one.
    """
    original = made(model) if isinstance(model, str) else model
    if not isinstance(original, BaseChatModel):
        raise InvalidInputError(
            "durable model",
            ("model: must be a chat model; bind tools and the like to what durable_model returns",),
        )
    copied = original.model_copy()
    if not isinstance(copied, _Durable):
        # The same fields and the same layout: pydantic's own way to have another class.
        object.__setattr__(copied, "__class__", _durable_class(type(copied)))
    return cast("M", copied)


@cache
def _durable_class(cls: type[BaseChatModel]) -> type[BaseChatModel]:
    """Derive a class that streams if the given one does: LangChain looks at who overrides what."""
    bases: list[type] = [_Durable, cls]
    if cls._stream is not BaseChatModel._stream:
        bases.insert(0, _Streams)
    if cls._astream is not BaseChatModel._astream:
        bases.insert(0, _StreamsAsync)
    # Traces, and LangChain where it tells providers apart, go by the name.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return new_class(cls.__name__, tuple(bases), exec_body=lambda space: space.update(names))


if TYPE_CHECKING:
    _Base = BaseChatModel
else:
    _Base = object  # the model's own class, in the end


class _Durable(_Base):
    """What is not streamed."""

    __slots__ = ()

    # Providers' own events would go past the journal; LangChain makes them of the stream then.
    _stream_chat_model_events = None
    _astream_chat_model_events = None

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        stops: list[OverBudget] = []
        token = _stops.set(stops)
        try:
            return await super().agenerate(*args, **kwargs)
        except Exception:
            if stops:
                # LangChain takes what is no `Exception` for an answer, and stumbles over it.
                raise stops[0] from None
            raise
        finally:
            _stops.reset(token)

    async def _agenerate(
        self,
        messages: Messages,
        stop: Stop = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ask = super()._agenerate
        if _is_plain():
            return await ask(messages, stop, run_manager, **kwargs)

        async def call() -> ChatResult:
            return await ask(messages, stop, run_manager, **kwargs)

        return _result(await _Question(self, messages, stop, kwargs).ask(call))

    def _generate(
        self,
        messages: Messages,
        stop: Stop = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ask = super()._generate  # type: ignore[safe-super]  # the model's own
        if _is_plain():
            return ask(messages, stop, run_manager, **kwargs)
        asked = _Question(self, messages, stop, kwargs)
        return _result(asked.ask_here(lambda: ask(messages, stop, run_manager, **kwargs)))


class _Streams(_Base):
    """What is streamed to callers that are not async, when all of it is there."""

    __slots__ = ()

    def _stream(
        self,
        messages: Messages,
        stop: Stop = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        ask = super()._stream
        if _is_plain():
            yield from ask(messages, stop, run_manager, **kwargs)
            return

        def call() -> ChatResult:
            return generate_from_stream(ask(messages, stop, run_manager, **kwargs))

        yield _chunk(_Question(self, messages, stop, kwargs).ask_here(call))


class _StreamsAsync(_Base):
    """What is streamed."""

    __slots__ = ()

    async def _astream(
        self,
        messages: Messages,
        stop: Stop = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        ask = super()._astream
        if _is_plain():
            async for plain in ask(messages, stop, run_manager, **kwargs):
                yield plain
            return
        coming: asyncio.Queue[ChatGenerationChunk | None] = asyncio.Queue()
        message_id = _new_message_id()

        async def call() -> ChatResult:
            seen = []
            async for chunk in ask(messages, stop, run_manager, **kwargs):
                if chunk.message.id is None:
                    chunk.message.id = message_id
                seen.append(deepcopy(chunk))  # who reads the stream changes what he gets
                coming.put_nowait(chunk)
            return generate_from_stream(iter(seen))

        asking = asyncio.create_task(_Question(self, messages, stop, kwargs).ask(call))
        asking.add_done_callback(lambda _: coming.put_nowait(None))
        try:
            # The last piece is held back until the answer is durable.
            last: ChatGenerationChunk | None = None
            while (chunk := await coming.get()) is not None:
                if last is not None:
                    yield last
                last = chunk
            kept = await asking
            if last is None:
                last = _chunk(kept)
            else:
                note = kept["answers"][0].response_metadata["agentflow"]
                told = {**last.message.response_metadata, "agentflow": note}
                last.message.response_metadata = told
            yield last
        finally:
            await _let_go(asking)


class _Question:
    """One call of a model, as it is in the journal and in budgets."""

    def __init__(
        self, model: BaseChatModel, messages: Messages, stop: Stop, options: dict[str, Any]
    ) -> None:
        self._name = name_of_model(model)
        self._meter: Meter | None = current_meter()
        how = to_plain({**options, "stop": stop}, lenient=True)
        self._arguments = {
            "models": [self._name],
            "messages": question(messages),
            "options": digest(how),
        }

    async def ask(self, call: Callable[[], Awaitable[ChatResult]]) -> Kept:
        """Return what the journal holds, or have it asked."""

        async def make(_: EffectContext) -> Kept:
            with self._counted() as used:
                used.append(self._kept(await call()))
                return used[0]

        kept: Kept = await run_effect(
            make,
            name=MODEL,
            arguments=self._arguments,
            on_in_doubt="retry",
            policy=Policy(admit=self._admit),
        )
        return kept

    def ask_here(self, call: Callable[[], ChatResult]) -> Kept:
        """Do the same for a caller that is not async."""
        journal = cast("Journal", current_journal())

        def make(_: EffectContext) -> Kept:
            with self._counted() as used:
                used.append(self._kept(call()))
                return used[0]

        new: NewEffect = new_effect(
            journal,
            name=MODEL,
            key=None,
            arguments=self._arguments,
            scope="run",
            on_in_doubt="retry",
        )
        policy = Policy(admit=self._admit, can_be_stopped=False)
        return cast("Kept", journal.run_here(new, policy, make))

    async def _admit(self) -> None:
        if self._meter is not None:
            self._meter.check_price(self._name)
            try:
                self._meter.admit("model")
            except OverBudget as stop:
                _stops.get([]).append(stop)
                raise

    @contextmanager
    def _counted(self) -> Iterator[list[Kept]]:
        """Count a call, also one that fails; what it has used is read from what is kept."""
        used: list[Kept] = []
        token = is_asking.set(True)
        try:
            yield used
        finally:
            is_asking.reset(token)
            if self._meter is not None:
                usage = Usage(**used[0]["usage"]) if used else Usage(model_calls=1)
                self._meter.end("model", usage)

    def _kept(self, result: ChatResult) -> Kept:
        answers = [_whole(result, each) for each in result.generations]
        usage = usage_of(answers[0], self._name, self._meter)
        told = answers[0].response_metadata
        answers[0].response_metadata = {**told, "agentflow": note_of(usage)}
        return {"answers": answers, "usage": asdict(usage)}


async def _let_go(asking: asyncio.Task[Kept]) -> None:
    """End a call to which nobody listens any more; an answer that comes soon is kept."""
    if not asking.done():
        asking.cancel()
        await asyncio.wait([asking])
    if not asking.cancelled():
        asking.exception()  # heard of, also if nobody has waited for it


def _is_plain() -> bool:
    """Whether a call is none for the journal: there is none, or it holds the call already."""
    return current_journal() is None or is_asking.get()


def _new_message_id() -> str:
    # LangChain would give each attempt's answer another one, and tools' calls are known by it.
    return f"{LC_ID_PREFIX}-{new_id()}"


def _whole(result: ChatResult, generation: ChatGeneration) -> BaseMessage:
    """Return a message with all that LangChain would add to it."""
    message = generation.message.model_copy()
    if message.id is None:
        message.id = _new_message_id()
    message.response_metadata = {
        **(result.llm_output or {}),
        **(generation.generation_info or {}),
        **message.response_metadata,
    }
    return message


def _result(kept: Kept) -> ChatResult:
    # Copies: LangChain, and who gets them, change messages in place.
    answers: Sequence[AIMessage] = kept["answers"]
    return ChatResult(generations=[ChatGeneration(message=deepcopy(each)) for each in answers])


def _chunk(kept: Kept) -> ChatGenerationChunk:
    """Return an answer as a stream of one piece."""
    answer: AIMessage = kept["answers"][0]
    parts = answer.model_dump(exclude={"type", "tool_calls", "invalid_tool_calls"})
    calls = [
        tool_call_chunk(
            name=call["name"],
            args=call["args"] if isinstance(call["args"], str) else json.dumps(call["args"]),
            id=call["id"],
            index=index,
        )
        for index, call in enumerate([*answer.tool_calls, *answer.invalid_tool_calls])
    ]
    chunk = AIMessageChunk(**parts, tool_call_chunks=calls, chunk_position="last")
    return ChatGenerationChunk(message=chunk)
