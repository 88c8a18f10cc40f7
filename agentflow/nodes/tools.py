"""`tool_node`: LangGraph's `ToolNode`, with a policy for each tool.

First it is settled what is to become of each call, in their order: arguments that do not fit are
refused, and people are asked. Only then is anything called, and that is what was approved. A node
starts again from its top with each answer; nothing has happened by then.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

from langchain_core.messages import AIMessage, ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt import ToolNode
from langgraph.prebuilt.tool_node import ToolCallRequest, ToolInvocationError
from langgraph.runtime import Runtime
from langgraph.types import Command
from pydantic import ValidationError

from agentflow.budgets import TOOL, Usage, current_meter
from agentflow.effects import EffectContext, Policy, current_journal, run_effect
from agentflow.errors import ApprovalMismatchError, InvalidInputError, StoreError
from agentflow.interrupts import request_approval
from agentflow.interrupts.schemas import problems, to_schema
from agentflow.nodes.outcomes import from_stored, to_stored
from agentflow.nodes.policy import ToolPolicy
from agentflow.nodes.state import find
from agentflow.retry import RetryPolicy
from agentflow.versions import declare_parts

Tools = Sequence[BaseTool | Callable[..., Any]]
Result = ToolMessage | Command[Any]

_REJECTED = "A reviewer has rejected this call; it was not made."


def tool_node(
    tools: Tools,
    *,
    messages_key: str = "messages",
    policies: Mapping[str, ToolPolicy] | None = None,
    policy: ToolPolicy | None = None,
    max_concurrency: int | None = None,
) -> ToolNode:
    """Make a node that carries out the tool calls of the last message.

    It is a `ToolNode` of LangGraph's: it takes what that takes (tools that return a `Command` or an
    artifact, injected state, store and runtime), and stands where that stands, in a graph of one's
    own and in `create_react_agent`. An unknown tool, or arguments that the tool refuses, become an
    error message to the model. Each call that needs somebody's approval is asked about on its own,
    in the order of the calls, before any of them is made.

    Args:
        tools: The tools, as LangChain tools or plain functions.
        messages_key: The channel of the conversation.
        policies: Policies by the names of tools.
        policy: The policy of all other tools.
        max_concurrency: How many calls are made at once; by default all.

    Returns:
        A node that writes one `ToolMessage` for each call, in the order of the calls.

    Raises:
        InvalidInputError: A policy is for a tool that there is not.
    """
    node = PolicyToolNode(
        tools,
        messages_key=messages_key,
        policies=policies or {},
        policy=policy or ToolPolicy(),
        max_concurrency=max_concurrency,
    )
    found = [
        f"policies: there is no tool {name!r}"
        for name in policies or {}
        if name not in node.tools_by_name
    ]
    if max_concurrency is not None and max_concurrency < 1:
        found.append("max_concurrency: must be at least 1")
    if found:
        raise InvalidInputError("tool node", tuple(found))
    own = [each for _, each in sorted((policies or {}).items())]
    approvals = [each.approval for each in own]
    declare_parts(node, *approvals, None if policy is None else policy.approval)
    return node


@dataclass(frozen=True, slots=True)
class _Ruling:
    """What is to become of a call."""

    call: ToolCall
    """What is called."""
    instead: ToolMessage | None = None
    """If set, nothing is."""
    is_edited: bool = False


@dataclass(slots=True)
class _Turn:
    """The calls of one message."""

    rulings: Mapping[str | None, _Ruling]
    turns: asyncio.Semaphore | None = None


_turn: ContextVar[_Turn | None] = ContextVar("agentflow_tool_calls", default=None)


class PolicyToolNode(ToolNode):
    """A `ToolNode` that settles what is to become of calls before it makes any."""

    def __init__(
        self,
        tools: Tools,
        *,
        messages_key: str,
        policies: Mapping[str, ToolPolicy],
        policy: ToolPolicy,
        max_concurrency: int | None,
    ) -> None:
        """See `tool_node`."""
        super().__init__(
            tools,
            messages_key=messages_key,
            wrap_tool_call=self._carry_out,
            awrap_tool_call=self._acarry_out,
        )
        self._policies = policies
        self._policy = policy
        self._most = max_concurrency

    # LangGraph looks at the names and types of these parameters.

    def _func(self, input: Any, config: RunnableConfig, runtime: Runtime) -> Any:
        if self._most is not None:
            config = {**config, "max_concurrency": self._most}
        with self._settled(input, config):
            return super()._func(input, config, runtime)

    async def _afunc(self, input: Any, config: RunnableConfig, runtime: Runtime) -> Any:
        with self._settled(input, config) as turn:
            if self._most is not None:
                turn.turns = asyncio.Semaphore(self._most)
            return await super()._afunc(input, config, runtime)

    @contextmanager
    def _settled(self, input: Any, config: RunnableConfig) -> Iterator[_Turn]:
        """Settle what is to become of each call, for what is called from here."""
        calls, _ = self._parse_input(input)
        state = self._extract_state(input, config)
        asked = _asked_before(config)
        times = Counter(call["id"] for call in calls)
        turn = _Turn(
            {
                call["id"]: _refused(call, f"{times[call['id']]} calls have the same id.")
                if times[call["id"]] > 1
                else self._rule(call, state, asked)
                for call in calls
                if call["name"] in self.tools_by_name
            }
        )
        token = _turn.set(turn)
        try:
            yield turn
        finally:
            _turn.reset(token)

    def _rule(self, call: ToolCall, state: Any, asked: set[str]) -> _Ruling:
        tool, policy = self.tools_by_name[call["name"]], self._policy_of(call["name"])
        injected = self._injected_args[call["name"]]
        check = partial(_argument_problem, tool, injected=injected.all_injected_keys)
        if (problem := check(call["args"])) is not None:
            return _refused(call, problem)
        # Who was asked about it has the last word, although the state may say otherwise by now.
        if call["id"] not in asked and not policy.asks(call["args"], state):
            return _Ruling(call)
        return _decided(call, tool, policy, check)

    def _policy_of(self, name: str) -> ToolPolicy:
        return self._policies.get(name, self._policy)

    # The calls.

    def _carry_out(self, request: ToolCallRequest, execute: Callable[..., Any]) -> Any:
        ruling = _ruling(request)
        if ruling.instead is not None:
            return ruling.instead.model_copy()
        try:
            result = execute(request.override(tool_call=ruling.call))
        except Exception as error:  # noqa: BLE001 -- a tool may raise anything
            return self._failed(ruling.call, error)
        return _told(result, ruling)

    async def _acarry_out(
        self, request: ToolCallRequest, execute: Callable[[ToolCallRequest], Awaitable[Any]]
    ) -> Any:
        ruling = _ruling(request)
        if ruling.instead is not None:
            return ruling.instead.model_copy()
        turn = _turn.get()
        if turn is None or turn.turns is None:
            return await self._call(request, ruling, execute)
        async with turn.turns:
            return await self._call(request, ruling, execute)

    async def _call(
        self,
        request: ToolCallRequest,
        ruling: _Ruling,
        execute: Callable[[ToolCallRequest], Awaitable[Any]],
    ) -> Any:
        """Make a call, unless the journal has what came of it."""
        call, policy = ruling.call, self._policy_of(ruling.call["name"])

        meter, is_recorded = current_meter(), current_journal() is not None

        async def admit() -> None:
            if meter is not None:
                meter.admit("tool")

        async def make(_: EffectContext) -> Any:
            try:
                result = await execute(request.override(tool_call=call))
            except Exception as error:
                if is_recorded and not policy.idempotent and how.leaves_doubt(error):
                    raise  # no message to the model: a person is asked first
                result = self._failed(call, error)
            finally:
                if meter is not None:
                    meter.end("tool", Usage(tool_calls=1))
            return to_stored(_told(result, ruling))

        how = Policy(
            admit=admit,
            retry=None if policy.retry is None else RetryPolicy.of(policy.retry),
            restore=lambda said: to_stored(_said(call, said)),
            in_doubt_on=None if policy.in_doubt_on is None else tuple(policy.in_doubt_on),
        )
        try:
            stored = await run_effect(
                make,
                name=f"{TOOL}{call['name']}",
                key=_key(request, self._messages_key),
                arguments={"args": call["args"]},
                on_in_doubt="retry" if policy.idempotent else "ask",
                timeout=policy.timeout,
                policy=how,
            )
        except TimeoutError as error:
            return self._failed(call, error)
        return from_stored(stored)

    def _failed(self, call: ToolCall, error: Exception) -> ToolMessage:
        """Return what the model is told of an error, if it is to be told."""
        is_ours = isinstance(error, (GraphBubbleUp, StoreError))
        if is_ours or self._policy_of(call["name"]).on_error == "raise":
            raise error
        return _error(call, f"Error: {type(error).__name__}: {error}")


def _ruling(request: ToolCallRequest) -> _Ruling:
    """Return what was settled; calls that never went through a state are made as they are."""
    turn = _turn.get()
    call = request.tool_call
    return _Ruling(call) if turn is None else turn.rulings.get(call["id"], _Ruling(call))


def _key(request: ToolCallRequest, messages_key: str) -> str | None:
    """Return what names a call in the journal, in every attempt.

    Not all models give ids that differ from one answer to the next, so the answer is part of it.
    """
    call_id = request.tool_call["id"]
    if not call_id:
        return None
    state = request.state
    messages = state if isinstance(state, list) else find(state, messages_key)
    for index, message in reversed(list(enumerate(messages or ()))):
        calls = message.tool_calls if isinstance(message, AIMessage) else ()
        if any(call["id"] == call_id for call in calls):
            return f"tool:{message.id or f'#{index}'}:{call_id}"
    return f"tool::{call_id}"


def _asked_before(config: RunnableConfig) -> set[str]:
    """Return the ids of the calls about which this node has asked in earlier attempts."""
    scratchpad = config.get("configurable", {}).get("__pregel_scratchpad")
    answers: Sequence[Any] = scratchpad.resume if scratchpad is not None else ()
    proposals = [each.get("proposal") for each in answers if isinstance(each, Mapping)]
    return {each["id"] for each in proposals if isinstance(each, Mapping) and "id" in each}


def _decided(
    call: ToolCall, tool: BaseTool, policy: ToolPolicy, check: Callable[[Any], str | None]
) -> _Ruling:
    """Ask about a call, and return what was decided."""
    shown = {"name": call["name"], "args": call["args"], "id": call["id"]}
    answer = request_approval(
        shown,
        title=f"Call {call['name']}",
        allowed=policy.allowed,
        policy=policy.reviewers,
        response=None if "respond" in policy.allowed else _form(call, tool),
    )
    match answer.type:
        case "reject":
            return _refused(call, answer.message or _REJECTED)
        case "respond":
            said = answer.value if answer.value is not None else answer.message
            return _Ruling(call, instead=_said(call, said))
    approved = answer.proposal
    fits = isinstance(approved, Mapping) and approved.keys() == shown.keys()
    if not fits or {**approved, "args": None} != {**shown, "args": None}:
        _refuse_mismatch(call)
    if answer.type == "approve" and approved != shown:
        _refuse_mismatch(call)
    made: ToolCall = {**call, "args": approved["args"]}
    if (problem := check(approved["args"])) is not None:
        return _refused(call, f"The reviewer's arguments do not fit. {problem}")
    return _Ruling(made, is_edited=approved["args"] != call["args"])


def _refuse_mismatch(call: ToolCall) -> NoReturn:
    raise ApprovalMismatchError(call["name"], str(call["id"]))


def _form(call: ToolCall, tool: BaseTool) -> dict[str, Any]:
    """Return the JSON Schema of an edited call: the same tool, with arguments that fit it."""
    args = dict(_args_schema(tool))
    parts: dict[str, Any] = {key: args.pop(key) for key in ("$defs", "definitions") if key in args}
    return {
        "type": "object",
        "properties": {
            "name": {"const": call["name"]},
            "id": {"const": call["id"]},
            "args": args,
        },
        "required": ["name", "args", "id"],
        "additionalProperties": False,
        **parts,
    }


def _args_schema(tool: BaseTool) -> dict[str, Any]:
    schema = tool.tool_call_schema
    return schema if isinstance(schema, dict) else to_schema(schema) or {}


def _argument_problem(tool: BaseTool, args: Any, injected: Collection[str]) -> str | None:
    """Return what the model is told about arguments that do not fit."""
    if not isinstance(args, dict):
        return "Invalid arguments: they must be an object"
    # Not `tool_call_schema`, in which validators of the user's own are missing.
    schema = tool.args_schema if tool.args_schema is not None else tool.tool_call_schema
    if isinstance(schema, dict):
        found = problems(schema, args, "args")
        return f"Invalid arguments: {'; '.join(found)}" if found else None
    given = {name: value for name, value in args.items() if name not in injected}
    try:
        cast("Any", schema).model_validate(given)
    except ValidationError as error:
        # What is injected is not there yet.
        told = [each for each in error.errors() if each["loc"][:1] not in {(k,) for k in injected}]
        return ToolInvocationError(tool.name, error, args, told).message if told else None
    return None


def _refused(call: ToolCall, text: str) -> _Ruling:
    return _Ruling(call, instead=_error(call, text))


def _said(call: ToolCall, said: Any) -> ToolMessage:
    """Return what a person says in the tool's place."""
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return ToolMessage(text, name=call["name"], tool_call_id=call["id"])


def _error(call: ToolCall, text: str) -> ToolMessage:
    return ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error")


def _told(result: Any, ruling: _Ruling) -> Any:
    """Tell the model what was really called; its own message still says what it wanted."""
    if ruling.is_edited and isinstance(result, ToolMessage):
        made = json.dumps(ruling.call["args"], ensure_ascii=False)
        text = f"[A reviewer has changed the arguments to {made}.]"
        if isinstance(result.content, str):
            result.content = f"{text}\n{result.content}"
        else:
            result.content = [{"type": "text", "text": text}, *result.content]
    return result
