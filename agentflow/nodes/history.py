"""A conversation as providers accept it: each tool call answered, each answer called for.

A history loses that when a run is cancelled between the call and its result, when somebody rejects
a call and speaks on, or when it is trimmed in between. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

ABANDONED = "This call was abandoned: it is not known whether it was carried out."
"""What a model is told of a call whose result never came."""


def repaired(messages: Sequence[BaseMessage]) -> tuple[list[BaseMessage], tuple[str, ...]]:
    """Return a conversation in which calls and results fit, and the ids of what did not.

    A call without a result gets one that says that it was abandoned; results come right behind
    their calls; a result of which there is no call is left out.
    """
    open_calls: dict[str, tuple[int, str]] = {}
    """The newest call of each id, by the place of its result: some models use ids once more."""
    results: dict[tuple[int, str], ToolMessage] = {}
    stray: list[str] = []
    for index, message in enumerate(messages):
        for call_id, _ in _calls(message):
            open_calls[call_id] = (index, call_id)
        if isinstance(message, ToolMessage):
            place = open_calls.get(message.tool_call_id)
            if place is None or place in results:
                stray.append(message.tool_call_id)
            else:
                results[place] = message
    made: list[BaseMessage] = []
    abandoned: list[str] = []
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            continue
        made.append(message)
        for call_id, name in _calls(message):
            result = results.get((index, call_id))
            if result is None:
                abandoned.append(call_id)
                result = ToolMessage(ABANDONED, name=name, tool_call_id=call_id, status="error")
            made.append(result)
    return made, (*abandoned, *stray)


def _calls(message: BaseMessage) -> Iterator[tuple[str, str | None]]:
    """Yield the ids and tools of a message's calls."""
    if isinstance(message, AIMessage):
        for call in (*message.tool_calls, *message.invalid_tool_calls):
            if call["id"] is not None:
                yield call["id"], call["name"]
