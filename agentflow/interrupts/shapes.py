"""The shapes in which graphs ask, each read into an `ApprovalRequest` and answered in its own form.

All of it is pure. A shape is recognised only when it is whole: what is almost a `HITLRequest` is
treated as opaque, since an answer in the wrong form would raise inside the graph, after it was
stored. Keys are accepted in JavaScript's case too; keys inside arguments are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, get_args

from agentflow.errors import CodecError, UnknownVersionError
from agentflow.interrupts.plain import digest, to_plain
from agentflow.interrupts.schemas import to_schema
from agentflow.types import Action, ApprovalRequest, Decision, DecisionType

OWN = "agentflow"
HITL = "hitl"
TOOL_APPROVAL = "tool_approval"
HUMAN_INTERRUPT = "human_interrupt"
SCHEMA = "schema"
OPAQUE = "opaque"

PAYLOAD_TYPE = "agentflow.approval"
PAYLOAD_VERSION = 1
DEFAULT_TITLE = "Approval requested"
DECISION_TYPES: tuple[DecisionType, ...] = get_args(DecisionType)

_LONGEST_TITLE = 200
_CAUTIOUS: tuple[DecisionType, ...] = ("approve", "reject")
"""What a call may be answered with when its request does not say."""
_HUMAN_SWITCHES: Mapping[str, DecisionType] = {
    "allow_accept": "approve",
    "allow_edit": "edit",
    "allow_ignore": "reject",
    "allow_respond": "respond",
}
_HUMAN_WORDS: Mapping[DecisionType, str] = {
    "approve": "accept",
    "edit": "edit",
    "reject": "ignore",
    "respond": "response",
}


def to_request(value: Any, response_schema: Any = None) -> ApprovalRequest:
    """Read what an interrupt carries, whoever raised it.

    Args:
        value: The interrupt's value.
        response_schema: The interrupt's `response_schema`: JSON Schema, or a type.

    Raises:
        UnknownVersionError: It was asked by a newer agentflow.
    """
    schema = to_plain(to_schema(response_schema), lenient=True)
    readers: tuple[Callable[[Any, dict[str, Any] | None], ApprovalRequest | None], ...] = (
        _read_own,
        _read_hitl,
        _read_tool_approval,
        _read_human_interrupt,
    )
    for read in readers:
        if request := read(value, schema):
            return request
    title = value[:_LONGEST_TITLE].strip() if isinstance(value, str) else ""
    return ApprovalRequest(
        shape=OPAQUE if schema is None else SCHEMA,
        title=title or DEFAULT_TITLE,
        proposal=to_plain(value, lenient=True),
        # A graph that wants an object of its schema has no form for a plain yes or no.
        allowed=("approve", "reject", "respond") if schema is None else ("respond",),
        response_schema=schema,
    )


def encode(
    request: ApprovalRequest, decision: Decision, *, by: str | None, at: datetime | None
) -> Any:
    """Return what the asking graph expects as its resume value, as plain data.

    The decision must have passed `validate`. Who decided, and when, reaches the graph in our own
    shape only; the others have no place for it.

    Raises:
        CodecError: The request is of a shape that this version does not know.
    """
    each = decision.decisions or (decision,)
    answer: Any
    if request.shape.split("#")[0] == OWN:
        answer = _own_answer(request, decision, by, at)
    elif request.shape == HITL:
        pairs = zip(request.actions, each, strict=True)
        answer = {"decisions": [_tool_answer(action, one) for action, one in pairs]}
    elif request.shape == TOOL_APPROVAL:
        answer = _tool_answer(request.actions[0], each[0])
    elif request.shape == HUMAN_INTERRUPT:
        pairs = zip(request.actions, each, strict=True)
        answer = [_human_answer(action, one) for action, one in pairs]
    elif request.shape not in {SCHEMA, OPAQUE}:
        raise CodecError(f"approval of unknown shape {request.shape!r}; upgrade agentflow here")
    elif decision.type == "respond":
        answer = reply(decision)
    else:
        answer = _with_message({"type": decision.type}, decision)
    return to_plain(answer)


def proposal_hash(request: ApprovalRequest) -> str:
    """Return the SHA-256, in hex, of everything that a reviewer is shown.

    It is taken over canonical JSON; text is not normalised, so look-alikes differ.

    Raises:
        SerializationError: The request holds NaN or what is not plain data.
    """
    return digest(
        {
            "title": request.title,
            "description": request.description,
            "proposal": request.proposal,
            "actions": request.actions,
            "allowed": request.allowed,
            "response_schema": request.response_schema,
        }
    )


def reply(decision: Decision) -> Any:
    """Return what a `respond` says: its value, or its text."""
    return decision.message if decision.value is None else decision.value


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """Return a key in Python's or JavaScript's case, or `None`."""
    return record.get(name, record.get(re.sub("_(.)", lambda m: m[1].upper(), name)))


def branches_of(schema: Mapping[str, Any]) -> dict[DecisionType, dict[str, Any]]:
    """Split the schema of one tool's decision into the form of each type that it allows."""
    found: dict[DecisionType, dict[str, Any]] = {}
    options = schema.get("oneOf", schema.get("anyOf"))
    for option in options if isinstance(options, list) else (schema,):
        branch = _inside(schema, option)
        kind = _inside(schema, _properties(branch).get("type")).get("const")
        if kind in DECISION_TYPES:
            found[kind] = branch
    return found


def own_shape(times_asked_again: int) -> str:
    """Return our shape's name; the n-th repetition of a question is `agentflow#n`."""
    return f"{OWN}#{times_asked_again}" if times_asked_again else OWN


def _read_own(value: Any, _: dict[str, Any] | None) -> ApprovalRequest | None:
    if not isinstance(value, Mapping) or value.get("type") != PAYLOAD_TYPE:
        return None
    version = value.get("v")
    if isinstance(version, int) and version > PAYLOAD_VERSION:
        raise UnknownVersionError(version, PAYLOAD_VERSION, "approval request")
    allowed, times = _allowed(value.get("allowed")), value.get("asked_again", 0)
    is_whole = version == PAYLOAD_VERSION and "proposal" in value and isinstance(times, int)
    if not is_whole or not allowed:
        return None
    policy, schema = value.get("policy"), value.get("response_schema")
    return ApprovalRequest(
        shape=own_shape(times),
        title=value.get("title") or DEFAULT_TITLE,
        proposal=to_plain(value["proposal"], lenient=True),
        allowed=allowed,
        response_schema=dict(schema) if isinstance(schema, Mapping) else None,
        policy=dict(policy) if isinstance(policy, Mapping) else None,
        key=value.get("key"),
    )


def _read_hitl(value: Any, schema: dict[str, Any] | None) -> ApprovalRequest | None:
    if not isinstance(value, Mapping):
        return None
    calls, configs = field_of(value, "action_requests"), field_of(value, "review_configs")
    if not _is_list_of_mappings(calls) or not _is_list_of_mappings(configs):
        return None
    by_name = {field_of(config, "action_name"): config for config in reversed(configs)}
    actions = []
    for call in calls:
        config = by_name.get(call.get("name"), {})
        permitted = field_of(config, "allowed_decisions")
        args_schema = field_of(config, "args_schema")
        action = _action(
            call.get("name"),
            call.get("args"),
            _CAUTIOUS if permitted is None else _allowed(permitted),
            call.get("description"),
            args_schema if isinstance(args_schema, Mapping) else None,
        )
        actions.append(action)
    return _about_actions(HITL, actions, schema)


def _read_tool_approval(value: Any, schema: dict[str, Any] | None) -> ApprovalRequest | None:
    if not isinstance(value, Mapping) or value.get("type") != "tool_approval":
        return None
    branches = branches_of(schema) if schema else {}
    edited = _inside(schema or {}, _properties(branches.get("edit", {})).get("edited_action"))
    action = _action(
        value.get("name"),
        value.get("args"),
        tuple(branches) or DECISION_TYPES,
        value.get("description"),
        _inside(schema or {}, _properties(edited).get("args")) or None,
    )
    return _about_actions(TOOL_APPROVAL, [action], schema)


def _read_human_interrupt(value: Any, schema: dict[str, Any] | None) -> ApprovalRequest | None:
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    asked = [value] if isinstance(value, Mapping) else value
    if not _is_list_of_mappings(asked):
        return None
    actions = []
    for one in asked:
        call, config = field_of(one, "action_request"), field_of(one, "config")
        if not isinstance(call, Mapping) or not isinstance(config, Mapping):
            return None
        allowed = tuple(
            kind for switch, kind in _HUMAN_SWITCHES.items() if field_of(config, switch) is True
        )
        actions.append(
            _action(call.get("action"), call.get("args"), allowed, one.get("description"))
        )
    return _about_actions(HUMAN_INTERRUPT, actions, schema)


def _action(
    name: Any,
    args: Any,
    allowed: tuple[DecisionType, ...],
    description: Any,
    args_schema: Mapping[str, Any] | None = None,
) -> Action | None:
    if not isinstance(name, str) or not isinstance(args, Mapping):
        return None
    return Action(
        name=name,
        args=to_plain(args, lenient=True),
        allowed=allowed,
        description=description if isinstance(description, str) else None,
        args_schema=args_schema,
    )


def _about_actions(
    shape: str, found: Sequence[Action | None], schema: dict[str, Any] | None
) -> ApprovalRequest | None:
    actions = tuple(action for action in found if action)
    if len(actions) < len(found):
        return None
    return ApprovalRequest(
        shape=shape,
        title=", ".join(dict.fromkeys(action.name for action in actions))[:_LONGEST_TITLE],
        proposal=[{"name": action.name, "args": action.args} for action in actions],
        allowed=tuple(
            kind for kind in DECISION_TYPES if any(kind in action.allowed for action in actions)
        ),
        actions=actions,
        response_schema=schema,
        description=actions[0].description if len(actions) == 1 else None,
    )


def _own_answer(
    request: ApprovalRequest, decision: Decision, by: str | None, at: datetime | None
) -> dict[str, Any]:
    answer = {
        "type": decision.type,
        "proposal": decision.value if decision.type == "edit" else request.proposal,
        "message": decision.message,
        "value": reply(decision) if decision.type == "respond" else None,
        "by": by,
        "at": at.isoformat() if at else None,
        "asked_hash": digest(request.proposal),
    }
    if request.key is not None:
        answer["asked_key"] = request.key
    _, _, times = request.shape.partition("#")
    return answer | ({"asked_again": int(times)} if times else {})


def _tool_answer(action: Action, decision: Decision) -> dict[str, Any]:
    if decision.type == "edit":
        return {"type": "edit", "edited_action": edited_call(action, decision)}
    if decision.type == "respond":
        return {"type": "respond", "message": reply(decision)}
    if decision.type == "reject":
        return _with_message({"type": "reject"}, decision)
    return {"type": decision.type}


def _human_answer(action: Action, decision: Decision) -> dict[str, Any]:
    args: Any = None
    if decision.type == "edit":
        call = edited_call(action, decision)
        args = {"action": call["name"], "args": call["args"]}
    elif decision.type == "respond":
        args = reply(decision)
    return {"type": _HUMAN_WORDS[decision.type], "args": args}


def edited_call(action: Action, decision: Decision) -> dict[str, Any]:
    """Return the edited call; one that names no tool is a call of the same tool."""
    edited = decision.edited_action or {}
    return {"name": edited.get("name", action.name), "args": edited.get("args")}


def _with_message(answer: dict[str, Any], decision: Decision) -> dict[str, Any]:
    return answer if decision.message is None else answer | {"message": decision.message}


def _allowed(value: Any) -> tuple[DecisionType, ...]:
    if not isinstance(value, (list, tuple)):
        return ()
    return tuple(dict.fromkeys(kind for kind in value if kind in DECISION_TYPES))


def _is_list_of_mappings(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) for item in value)
    )


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(schema.get("properties"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _inside(root: Mapping[str, Any], part: Any) -> dict[str, Any]:
    """Return a part of a schema so that it stands alone: its reference followed, with its `$defs`.

    Its own definitions win: a tool described by plain JSON Schema brings them along, written as
    if it were the whole document.
    """
    if not isinstance(part, Mapping):
        return {}
    seen: set[str] = set()
    while isinstance(reference := part.get("$ref"), str) and reference not in seen:
        seen.add(reference)
        target = _mapping(root.get("$defs")).get(reference.removeprefix("#/$defs/"))
        if not isinstance(target, Mapping):
            return {}
        part = target
    definitions = {**_mapping(root.get("$defs")), **_mapping(part.get("$defs"))}
    return {**part, "$defs": definitions} if definitions else dict(part)
