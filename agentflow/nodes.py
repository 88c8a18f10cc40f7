"""Ready-made nodes: call a model, run its tools, ask a person. Plain LangGraph node callables."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage, ToolCall, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.tools import tool as as_tool

from agentflow.errors import InvalidInputError, MissingDriverError
from agentflow.interrupts import request_approval
from agentflow.types import DecisionType

__all__ = ["approval_node", "llm_node", "tool_node"]

AsyncNode = Callable[[Any, RunnableConfig], Awaitable[dict[str, Any]]]
Prompt = str | Callable[[Any], str | Sequence[BaseMessage]]
Tools = Sequence[BaseTool | Callable[..., Any]]


def llm_node(
    model: BaseChatModel | str,
    *,
    tools: Tools = (),
    prompt: Prompt | None = None,
    messages_key: str = "messages",
) -> AsyncNode:
    """Make a node that calls a chat model with the conversation and appends its answer.

    Args:
        model: A chat model, or `"provider:name"` for LangChain's `init_chat_model`, which is called
            when the node first runs.
        tools: Tools that the model may call; the calls are carried out by a `tool_node`.
        prompt: A system prompt, or a function of the state that returns one or the whole list of
            messages to send.
        messages_key: The channel of the conversation.

    Returns:
        A node that writes `{messages_key: [answer]}`.
    """
    bound = cache(lambda: _bind(model, tools))

    async def call_model(state: Any, config: RunnableConfig) -> dict[str, Any]:
        answer = await bound().ainvoke(_messages(state, prompt, messages_key), config)
        return {messages_key: [answer]}

    return call_model


def tool_node(tools: Tools, *, messages_key: str = "messages") -> AsyncNode:
    """Make a node that carries out the tool calls of the last message, in order.

    An unknown tool, or arguments that the tool refuses, become an error message to the model. An
    exception inside a tool fails the attempt, and the run's retry policy decides.

    Args:
        tools: The tools, as LangChain tools or plain functions.
        messages_key: The channel of the conversation.

    Returns:
        A node that writes one `ToolMessage` for each call.
    """
    known = {tool.name: tool for tool in map(_as_tool, tools)}

    async def call_tools(state: Any, config: RunnableConfig) -> dict[str, Any]:
        last = _get(state, messages_key)[-1]
        calls = last.tool_calls if isinstance(last, AIMessage) else []
        return {messages_key: [await _call_tool(known, call, config) for call in calls]}

    return call_tools


def approval_node(
    proposal: str | Callable[[Any], Any],
    *,
    into: str = "approval",
    title: str | None = None,
    allowed: Sequence[DecisionType] = ("approve", "edit", "reject"),
    when: Callable[[Any], bool] | None = None,
) -> Callable[[Any], dict[str, Any]]:
    """Make a node that asks a person to approve a proposal and writes down the decision.

    Args:
        proposal: The state key that holds the proposal, or a function of the state that makes it.
        into: The channel that gets the decision: a dict with `type`, `proposal` (as approved or
            edited; act on this value only), `message`, `value`, `by` and `at` (ISO 8601).
        title: What the reviewer reads first.
        allowed: The decisions that may be taken.
        when: If it returns false for the state, nobody is asked, and `type` is `not_required`.

    Returns:
        A node that writes `{into: decision}`.
    """

    def ask(state: Any) -> dict[str, Any]:
        subject = proposal(state) if callable(proposal) else _get(state, proposal)
        if when is not None and not when(state):
            return {into: {"type": "not_required", "proposal": subject}}
        result = request_approval(subject, title=title, allowed=allowed)
        decision = asdict(result) | {"proposal": result.proposal}
        return {into: decision | {"at": result.at.isoformat() if result.at else None}}

    return ask


def _bind(model: BaseChatModel | str, tools: Tools) -> Runnable[Any, Any]:
    if isinstance(model, str):
        try:
            from langchain.chat_models import init_chat_model
        except ImportError as exc:
            raise MissingDriverError("langchain", "models") from exc
        model = init_chat_model(model)
    return model.bind_tools(list(tools)) if tools else model


def _messages(state: Any, prompt: Prompt | None, messages_key: str) -> list[BaseMessage]:
    made = prompt(state) if callable(prompt) else prompt
    if made is not None and not isinstance(made, str):
        return list(made)
    conversation = list(_get(state, messages_key))
    return [SystemMessage(made), *conversation] if made else conversation


def _as_tool(item: BaseTool | Callable[..., Any]) -> BaseTool:
    if isinstance(item, BaseTool):
        return item
    made = as_tool(item)
    if not isinstance(made, BaseTool):
        raise InvalidInputError("tool", (f"{item!r}: is not a function that can be a tool",))
    return made


async def _call_tool(
    known: Mapping[str, BaseTool], call: ToolCall, config: RunnableConfig
) -> ToolMessage:
    tool = known.get(call["name"])
    if tool is None:
        return _tool_error(call, f"there is no tool named {call['name']!r}")
    try:
        result = await tool.ainvoke({**call, "type": "tool_call"}, config)
    except ValueError as exc:
        if not _is_about_arguments(exc):
            raise
        return _tool_error(call, f"invalid arguments: {exc}")
    if isinstance(result, ToolMessage):
        return result
    return ToolMessage(str(result), name=call["name"], tool_call_id=call["id"])


def _is_about_arguments(error: ValueError) -> bool:
    """Whether pydantic refused the arguments, as opposed to the tool itself having failed."""
    from pydantic import ValidationError

    trace = error.__traceback__
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return isinstance(error, ValidationError) and "_parse_input" in frames


def _tool_error(call: ToolCall, problem: str) -> ToolMessage:
    return ToolMessage(
        f"Error: {problem}", name=call["name"], tool_call_id=call["id"], status="error"
    )


def _get(state: Any, key: str) -> Any:
    return state[key] if isinstance(state, Mapping) else getattr(state, key)
