"""`llm_node`: a node that calls a chat model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Protocol

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.errors import GraphBubbleUp

from agentflow.budgets import MODEL, Meter, Usage, current_meter
from agentflow.effects import EffectContext, Policy, run_effect
from agentflow.errors import AgentflowError, InvalidInputError
from agentflow.interrupts.plain import to_plain
from agentflow.nodes.history import repaired
from agentflow.nodes.models import is_asking, made, name_of_model, note_of, question, usage_of
from agentflow.nodes.state import read
from agentflow.versions import declare_parts

logger = logging.getLogger(__name__)

Model = BaseChatModel | str
Prompt = str | Callable[[Any], str | Sequence[BaseMessage]]
Tools = Sequence[BaseTool | Callable[..., Any]]
Trim = Callable[[list[BaseMessage]], Sequence[BaseMessage]]


class AsyncNode(Protocol):
    """An async node that passes its configuration on."""

    async def __call__(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        """Return what is written to the state."""
        ...


def llm_node(
    model: Model,
    *,
    tools: Tools = (),
    prompt: Prompt | None = None,
    messages_key: str = "messages",
    fallbacks: Sequence[Model] = (),
    trim: Trim | None = None,
    response_format: Any = None,
    into: str = "structured_response",
) -> AsyncNode:
    """Make a node that calls a chat model with the conversation and appends its answer.

    In a run the answer is kept in the journal before the node returns: a crash after it does not
    pay for it again, if what is sent is the same then (a prompt that tells the time is not).

    An exception of the model fails the attempt, and the run is driven again as its retry policy
    says: after an overload not before the time that the provider has named (`Retry-After`), without
    a worker that waits for it. Give the model's client no retries of its own to have all of them
    there; a model that is given by name gets none.

    What the answer has cost, if its model has a price, stands in the answer as
    `response_metadata["agentflow"]["cost"]`.

    Tool calls in the history that were abandoned are told to the model as such, and listed in the
    answer under `response_metadata["agentflow"]["repaired"]`.

    Args:
        model: A chat model, or `"provider:name"` for LangChain's `init_chat_model`, which is called
            when the node first runs.
        tools: Tools that the model may call; the calls are carried out by a `tool_node`.
        prompt: A system prompt, or a function of the state that returns one or the whole list of
            messages to send.
        messages_key: The channel of the conversation.
        fallbacks: Models to ask, in this order, if the ones before them raise. The exception of the
            first one stands if all do.
        trim: Shortens what is sent, before the system prompt is added; the state keeps all of it.
            LangChain's `trim_messages(max_tokens=..., token_counter=...)` is one.
        response_format: A pydantic model, TypedDict or JSON Schema that the answer has to fit. It
            is written to `into` as plain data.
        into: The channel of the structured answer.

    Returns:
        A node that writes `{messages_key: [answer]}`.

    Raises:
        InvalidInputError: There are tools and a response format.
    """
    if tools and response_format is not None:
        raise InvalidInputError(
            "llm node",
            ("response_format: goes without tools; use a second node for the final answer",),
        )
    models = [_Model(each, tools, response_format) for each in (model, *fallbacks)]

    async def call_model(state: Any, config: RunnableConfig) -> dict[str, Any]:
        messages, odd = repaired(_messages(state, prompt, messages_key, trim))
        if odd:
            logger.warning("tool calls without result", extra={"tool_calls": list(odd)})
        answer, parsed = await _journaled(models, messages, config)
        if odd:
            answer.response_metadata["agentflow"]["repaired"] = list(odd)
        update: dict[str, Any] = {messages_key: [answer]}
        return update if response_format is None else {**update, into: parsed}

    declare_parts(call_model, prompt, trim, messages_key, into)
    return call_model


class _Model:
    """A model as it is asked, made when it is first."""

    def __init__(self, model: Model, tools: Tools, response_format: Any) -> None:
        self._model = model
        self._tools = tools
        self._format = response_format

    @property
    def name(self) -> str:
        """What the model is called in the journal."""
        return name_of_model(self._model)

    @cached_property
    def _bound(self) -> Runnable[Any, Any]:
        model = made(self._model) if isinstance(self._model, str) else self._model
        if self._format is not None:
            return model.with_structured_output(self._format, include_raw=True)
        return model.bind_tools(list(self._tools)) if self._tools else model

    async def ask(
        self, messages: Sequence[BaseMessage], config: RunnableConfig
    ) -> tuple[AIMessage, Any]:
        """Return the answer, and what was parsed from it as plain data."""
        answer = await self._bound.ainvoke(messages, config)
        if self._format is None:
            return answer, None
        if (error := answer["parsing_error"]) is not None:
            raise error
        return answer["raw"], to_plain(answer["parsed"])


async def _journaled(
    models: Sequence[_Model], messages: Sequence[BaseMessage], config: RunnableConfig
) -> tuple[AIMessage, Any]:
    """Return the answer that the journal holds, or ask and have it kept.

    All models are one entry: what was answered by a fallback is not asked of the first one again.
    """
    meter = current_meter()

    async def admit() -> None:
        if meter is not None:
            meter.check_price(models[0].name)
            meter.admit("model")

    async def ask(_: EffectContext) -> dict[str, Any]:
        return await _first(models, messages, config, meter)

    kept = await run_effect(
        ask,
        name=MODEL,
        # Not the messages themselves: each step would store the whole conversation once more.
        arguments={"models": [model.name for model in models], "messages": question(messages)},
        on_in_doubt="retry",
        policy=Policy(admit=admit),
    )
    return kept["answer"], kept["parsed"]


async def _first(
    models: Sequence[_Model],
    messages: Sequence[BaseMessage],
    config: RunnableConfig,
    meter: Meter | None,
) -> dict[str, Any]:
    """Return what is kept of the answer of the first model that has one."""
    first_error: Exception | None = None
    for number, model in enumerate(models):
        if number and meter is not None:
            meter.check_price(model.name)
            meter.admit("model")
        usage: Usage | None = Usage(model_calls=1)
        token = is_asking.set(True)
        try:
            answer, parsed = await model.ask(messages, config)
        except (GraphBubbleUp, AgentflowError):
            raise
        except Exception as error:  # noqa: BLE001 -- whatever a provider's client raises
            first_error = first_error or error
        else:
            usage = usage_of(answer, model.name, meter)
            answer.response_metadata = {**answer.response_metadata, "agentflow": note_of(usage)}
            used = asdict(replace(usage, model_calls=number + 1))
            return {"answer": answer, "parsed": parsed, "usage": used}
        finally:
            is_asking.reset(token)
            if meter is not None:
                meter.end("model", usage)
    assert first_error is not None
    raise first_error


def _messages(
    state: Any, prompt: Prompt | None, messages_key: str, trim: Trim | None
) -> list[BaseMessage]:
    made = prompt(state) if callable(prompt) else prompt
    is_system = made is None or isinstance(made, str)
    conversation: list[Any] = list(read(state, messages_key) if is_system else made or ())
    if trim is not None:
        conversation = list(trim(conversation))
    return [SystemMessage(made), *conversation] if isinstance(made, str) and made else conversation
