"""Decisions: read from what clients send, and checked before a graph sees them.

An answer that makes its node raise is stored all the same and stays: every later answer is ignored.
So whatever a graph would refuse has to be refused here, with all that is wrong in one error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentflow.errors import InvalidDecisionError, SerializationError
from agentflow.interrupts.plain import to_plain
from agentflow.interrupts.schemas import problems
from agentflow.interrupts.shapes import (
    DECISION_TYPES,
    SCHEMA,
    TOOL_APPROVAL,
    branches_of,
    edited_call,
    encode,
    reply,
)
from agentflow.types import Action, ApprovalRequest, Decision, DecisionType

_KEYS = {
    "type": "type",
    "message": "message",
    "value": "value",
    "edited_action": "edited_action",
    "editedAction": "edited_action",
    "decisions": "decisions",
}


def parse_decision(approval_id: str, decision: Decision | Mapping[str, Any] | str) -> Decision:
    """Read a decision from its type alone, from a mapping, or from a record.

    A mapping has the keys of `Decision`, in Python's or JavaScript's case. With `decisions` its
    type may be left out; it then is theirs, or `edit` if they differ.

    Raises:
        InvalidDecisionError: It is not a decision; nothing about the request is checked here.
    """
    found: list[str] = []
    parsed = _parse(decision, "", found)
    if parsed is None or found:
        raise InvalidDecisionError(approval_id, tuple(found))
    return parsed


def validate(approval_id: str, request: ApprovalRequest, decision: Decision) -> None:
    """Check that a decision answers a request in full and within what the request allows.

    Raises:
        InvalidDecisionError: It does not; every problem is named as `path: what is wrong`, without
            the values.
    """
    decision = parse_decision(approval_id, decision)
    if request.actions:
        found = _actions_problems(request, decision)
    elif decision.decisions:
        found = ["decisions: one thing is asked here; give one decision"]
    else:
        found = _plain_problems(request, decision)
    if request.actions and not found and request.response_schema is not None:
        found = _encoded_problems(request, decision)
    if found:
        raise InvalidDecisionError(approval_id, tuple(found))


def schema_is_for(allowed: Sequence[DecisionType]) -> DecisionType:
    """Return which decision's value the `response_schema` of our own shape describes.

    That of a `respond`; where none is allowed, the edited proposal is the only value there is.
    """
    return "respond" if "respond" in allowed else "edit"


def _parse(raw: Any, path: str, found: list[str]) -> Decision | None:
    raw = _as_mapping(raw)
    if raw is None:
        found.append(f"{path or 'decision'}: must be the type of a decision, or an object")
        return None
    before, prefix = len(found), f"{path}." if path else ""
    if unknown := [str(key)[:40] for key in raw if key not in _KEYS]:
        found.append(f"{path or 'decision'}: has unknown keys: {', '.join(unknown[:5])}")
    if "edited_action" in raw and "editedAction" in raw:
        found.append(f"{prefix}edited_action: is given twice, in both spellings")
    given = {_KEYS[key]: value for key, value in raw.items() if key in _KEYS and value is not None}
    decisions = _parse_each(given.get("decisions", ()), path, found)
    kind = _parse_type(given.get("type"), decisions, prefix, found)
    message = given.get("message")
    if message is not None and not isinstance(message, str):
        found.append(f"{prefix}message: must be text")
    value = _parse_plain(given.get("value"), f"{prefix}value", found)
    edited = _parse_plain(given.get("edited_action"), f"{prefix}edited_action", found)
    if edited is not None:
        found += _edited_action_problems(edited, prefix)
    if len(found) > before or kind is None:
        return None
    return Decision(
        type=kind, message=message, value=value, edited_action=edited, decisions=decisions
    )


def _as_mapping(raw: Any) -> Mapping[Any, Any] | None:
    if isinstance(raw, str):
        return {"type": raw}
    if isinstance(raw, Decision):
        return {
            "type": raw.type,
            "message": raw.message,
            "value": raw.value,
            "edited_action": raw.edited_action,
            "decisions": raw.decisions or None,
        }
    return raw if isinstance(raw, Mapping) else None


def _parse_each(raw: Any, path: str, found: list[str]) -> tuple[Decision, ...]:
    name = f"{path}.decisions" if path else "decisions"
    if raw and path:
        found.append(f"{name}: decisions cannot hold decisions")
        return ()
    if not isinstance(raw, (list, tuple)):
        found.append(f"{name}: must be a list of decisions")
        return ()
    parsed = [_parse(one, f"{name}[{i}]", found) for i, one in enumerate(raw)]
    return tuple(one for one in parsed if one)


def _parse_type(
    raw: Any, decisions: tuple[Decision, ...], prefix: str, found: list[str]
) -> DecisionType | None:
    kinds = {decision.type for decision in decisions}
    if raw is None and kinds:
        return kinds.pop() if len(kinds) == 1 else "edit"
    if not isinstance(raw, str) or raw not in DECISION_TYPES:
        found.append(f"{prefix}type: must be one of {', '.join(DECISION_TYPES)}")
        return None
    if kinds and raw not in kinds and not (raw == "edit" and len(kinds) > 1):
        # A "reject" on the record that approves every call would deceive whoever reads it later.
        found.append(f"{prefix}type: none of the decisions is of this type")
    return next(kind for kind in DECISION_TYPES if kind == raw)


def _parse_plain(raw: Any, path: str, found: list[str]) -> Any:
    try:
        return to_plain(raw, path)
    except SerializationError as error:
        found.append(f"{error.path}: {error.hint}")
        return None


def _edited_action_problems(edited: Any, prefix: str) -> list[str]:
    path = f"{prefix}edited_action"
    if not isinstance(edited, Mapping):
        return [f"{path}: must be an object with name and args"]
    found = []
    if unknown := [str(key)[:40] for key in edited if key not in {"name", "args"}]:
        found.append(f"{path}: has unknown keys: {', '.join(unknown[:5])}")
    if not isinstance(edited.get("name", ""), str):
        found.append(f"{path}.name: must be text")
    if not isinstance(edited.get("args"), Mapping):
        found.append(f"{path}.args: must be an object")
    return found


def _plain_problems(request: ApprovalRequest, decision: Decision) -> list[str]:
    found = _unexpected(decision, request.allowed, "")
    if decision.edited_action is not None:
        found.append("edited_action: this is not about the call of a tool; give value")
    if found:
        return found
    schema = request.response_schema
    if decision.type == "edit":
        if decision.value is None:
            return ["value: an edit needs the edited proposal"]
        was, now = _json_type(request.proposal), _json_type(decision.value)
        if was not in {now, "null"}:
            return [f"value: must stay of type {was}, as the proposal is"]
    elif decision.type == "respond" and reply(decision) is None:
        return ["value: a respond needs a value or a message"]
    if schema is None or (
        request.shape != SCHEMA and decision.type != schema_is_for(request.allowed)
    ):
        return []
    return problems(schema, decision.value if decision.type == "edit" else reply(decision), "value")


def _actions_problems(request: ApprovalRequest, decision: Decision) -> list[str]:
    actions = request.actions
    if not decision.decisions and len(actions) == 1:
        return _action_problems(request, 0, decision, "")
    if len(decision.decisions) != len(actions):
        due = f"{len(actions)} are due, one for each action in the order asked"
        return [f"decisions: {due}; {len(decision.decisions)} given"]
    found = [
        f"{name}: belongs inside decisions"
        for name in ("message", "value", "edited_action")
        if getattr(decision, name) is not None
    ]
    for index, one in enumerate(decision.decisions):
        found += _action_problems(request, index, one, f"decisions[{index}].")
    return found


def _action_problems(
    request: ApprovalRequest, index: int, decision: Decision, prefix: str
) -> list[str]:
    action = request.actions[index]
    found = _unexpected(decision, action.allowed, prefix)
    if found:
        return found
    if decision.type == "respond":
        if not isinstance(reply(decision), str):
            return [f"{prefix}message: a respond needs the text that stands for the tool's result"]
        if decision.message is not None and decision.value is not None:
            return [f"{prefix}value: a respond to a call takes either message or value"]
    if decision.type == "edit":
        return _edit_problems(request, action, decision, prefix)
    return []


def _edit_problems(
    request: ApprovalRequest, action: Action, decision: Decision, prefix: str
) -> list[str]:
    path = f"{prefix}edited_action"
    if decision.value is not None:
        return [f"{prefix}value: an edit of a call is given as edited_action"]
    if decision.edited_action is None:
        return [f"{path}: an edit needs the edited call"]
    call = edited_call(action, decision)
    if call["name"] == action.name:
        schema = action.args_schema
        return problems(schema, call["args"], f"{path}.args") if schema is not None else []
    if request.shape == TOOL_APPROVAL:
        return [f"{path}.name: must stay the tool that was asked about"]
    if any(call["name"] == other.name for other in request.actions):
        # Decisions are matched by position alone: this one most likely stands at the wrong one.
        return [f"{path}.name: is another action of this request; decisions go by position"]
    return []


def _encoded_problems(request: ApprovalRequest, decision: Decision) -> list[str]:
    """Check the whole answer, where the asking graph says what it must look like."""
    answer, schema = encode(request, decision, by=None, at=None), request.response_schema or {}
    if request.shape == TOOL_APPROVAL and (branches := branches_of(schema)):
        # As the asking side does, only the form that the type names. An edit has been checked
        # against its parts, which also works for a tool whose schema was copied in with its
        # references pointing nowhere.
        if answer["type"] == "edit":
            return []
        schema = branches[answer["type"]]
    return problems(schema, answer, "answer")


def _unexpected(decision: Decision, allowed: Sequence[DecisionType], prefix: str) -> list[str]:
    if decision.type not in allowed:
        return [f"{prefix}type: is not allowed here; allowed: {', '.join(allowed) or 'none'}"]
    # An approval that carries an edit would be carried out without it.
    found = []
    if decision.edited_action is not None and decision.type != "edit":
        found.append(f"{prefix}edited_action: only an edit takes one")
    if decision.value is not None and decision.type not in {"edit", "respond"}:
        found.append(f"{prefix}value: only an edit or a respond takes one")
    return found


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "array"
