"""A conversation as providers accept it: each tool call answered, each answer called for.

A history loses that when a run is cancelled between the call and its result, when somebody rejects
a call and speaks on, or when it is trimmed in between. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

ABANDONED = "This call was abandoned: it is not known whether it was carried out."
"""What a model is told of a call whose result never came."""


def repaired(messages: Sequence[BaseMessage]) -> tuple[list[BaseMessage], tuple[str, ...]]:
    """Return a conversation in which calls and results fit, and the ids of what did not.

    A call without a result gets one that says that it was abandoned; results come right behind
    their calls; a result of which there is no call is left out.
    """
    results = {
        message.tool_call_id: message for message in messages if isinstance(message, ToolMessage)
    }
    made: list[BaseMessage] = []
    odd: list[str] = []
    used: set[str] = set()
    for message in messages:
        if isinstance(message, ToolMessage):
            continue
        made.append(message)
        if not isinstance(message, AIMessage):
            continue
        for call in [*message.tool_calls, *message.invalid_tool_calls]:
            call_id = call["id"]
            if call_id is None:
                continue
            result = None if call_id in used else results.get(call_id)
            if result is None:
                odd.append(call_id)
                result = ToolMessage(
                    ABANDONED, name=call["name"], tool_call_id=call_id, status="error"
                )
            used.add(call_id)
            made.append(result)
    odd += [call_id for call_id in results if call_id not in used]
    return made, tuple(odd)
