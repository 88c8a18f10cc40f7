"""Ready-made nodes: call a model, run its tools, ask a person. Plain LangGraph node callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, Protocol

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.prebuilt import ToolNode

from agentflow.errors import MissingDriverError
from agentflow.interrupts import request_approval
from agentflow.types import DecisionType

__all__ = ["approval_node", "llm_node", "tool_node"]

Prompt = str | Callable[[Any], str | Sequence[BaseMessage]]
Tools = Sequence[BaseTool | Callable[..., Any]]


class Node(Protocol):
    """A node that needs the state alone."""

    def __call__(self, state: Any) -> dict[str, Any]:
        """Return what is written to the state."""
        ...


class AsyncNode(Protocol):
    """An async node that passes its configuration on."""

    async def __call__(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        """Return what is written to the state."""
        ...


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


def tool_node(tools: Tools, *, messages_key: str = "messages") -> ToolNode:
    """Make a node that carries out the tool calls of the last message, at the same time.

    It is LangGraph's own `ToolNode`. An unknown tool, or arguments that the tool refuses, become an
    error message to the model. An exception inside a tool fails the attempt, and the run's retry
    policy decides.

    Args:
        tools: The tools, as LangChain tools or plain functions.
        messages_key: The channel of the conversation.

    Returns:
        A node that writes one `ToolMessage` for each call, in the order of the calls.
    """
    return ToolNode(tools, messages_key=messages_key)


def approval_node(
    proposal: str | Callable[[Any], Any],
    *,
    into: str = "approval",
    title: str | None = None,
    allowed: Sequence[DecisionType] = ("approve", "edit", "reject"),
    response: Any = None,
    when: Callable[[Any], bool] | None = None,
) -> Node:
    """Make a node that asks a person to approve a proposal and writes down the decision.

    Args:
        proposal: The state key that holds the proposal, or a function of the state that makes it.
        into: The channel that gets the decision: a dict with `type`, `proposal` (as approved or
            edited; act on this value only), `message`, `value`, `by` and `at` (ISO 8601).
        title: What the reviewer reads first.
        allowed: The decisions that may be taken.
        response: A type that an edited proposal must fit; checked before the decision is stored.
        when: If it returns false for the state, nobody is asked, and `type` is `not_required`.

    Returns:
        A node that writes `{into: decision}`.
    """

    def ask(state: Any) -> dict[str, Any]:
        subject = proposal(state) if callable(proposal) else _get(state, proposal)
        if when is not None and not when(state):
            return {into: {"type": "not_required", "proposal": subject}}
        result = request_approval(subject, title=title, allowed=allowed, response=response)
        decision = asdict(result) | {"proposal": result.proposal}
        return {into: decision | {"at": result.at.isoformat() if result.at else None}}

    return ask


def _bind(model: BaseChatModel | str, tools: Tools) -> Runnable[Any, Any]:
    if isinstance(model, str):
        try:
            from langchain.chat_models import init_chat_model
        except ImportError as exc:
            raise MissingDriverError("langchain", None) from exc
        model = init_chat_model(model)
    return model.bind_tools(list(tools)) if tools else model


def _messages(state: Any, prompt: Prompt | None, messages_key: str) -> list[BaseMessage]:
    made = prompt(state) if callable(prompt) else prompt
    if made is not None and not isinstance(made, str):
        return list(made)
    conversation = list(_get(state, messages_key))
    return [SystemMessage(made), *conversation] if made else conversation


def _get(state: Any, key: str) -> Any:
    return state[key] if isinstance(state, Mapping) else getattr(state, key)
