"""Questions in each shape in which graphs ask, and answers to them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from agentflow.interrupts import encode, parse_decision, to_request, validate

AT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
AMOUNT_SCHEMA = {
    "type": "object",
    "properties": {"amount": {"type": "integer", "minimum": 1}},
    "required": ["amount"],
    "additionalProperties": False,
}


def own(proposal: Any = "pay", **changes: Any) -> dict[str, Any]:
    return {
        "type": "agentflow.approval",
        "v": 1,
        "title": "Refund",
        "proposal": proposal,
        "allowed": ["approve", "edit", "reject"],
        "policy": None,
        "response_schema": None,
        "key": None,
        **changes,
    }


def hitl(*calls: tuple[str, dict[str, Any], list[str]], **config: Any) -> dict[str, Any]:
    return {
        "action_requests": [{"name": name, "args": args} for name, args, _ in calls],
        "review_configs": [
            {"action_name": name, "allowed_decisions": allowed, **config}
            for name, _, allowed in calls
        ],
    }


def human(action: str = "send", **switches: bool) -> dict[str, Any]:
    config = {f"allow_{name}": True for name in ("ignore", "respond", "edit", "accept")}
    return {
        "action_request": {"action": action, "args": {"to": "ann"}},
        "config": config | {f"allow_{name}": on for name, on in switches.items()},
        "description": "Please look",
    }


ALL = ["approve", "edit", "reject", "respond"]
TOOL_APPROVAL = {
    "type": "tool_approval",
    "tool_call_id": "call_1",
    "name": "refund",
    "args": {"amount": 5},
    "description": "Pay back",
}
REFUND_CALL = hitl(("refund", {"amount": 5}, ALL), args_schema=AMOUNT_SCHEMA)
TWO_CALLS = hitl(("refund", {"amount": 5}, ALL), ("mail", {"to": "ann"}, ["approve", "reject"]))


def answer(value: Any, decision: Any, schema: Any = None) -> Any:
    request = to_request(value, schema)
    parsed = parse_decision("a1", decision)
    validate("a1", request, parsed)
    encoded = encode(request, parsed, by="ann", at=AT)
    assert json.loads(json.dumps(encoded)) == encoded
    return encoded


EDITED = {"type": "edit", "edited_action": {"name": "refund", "args": {"amount": 3}}}


class Anything(BaseModel):
    thing: Any


CYCLE = Anything(thing=None)
CYCLE.thing = {"again": CYCLE}
