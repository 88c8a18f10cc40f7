"""Every shape of question is read, answered in its own form, and hashed with all that is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agentflow.errors import CodecError, SerializationError, UnknownVersionError
from agentflow.interrupts import encode, proposal_hash, to_request
from agentflow.types import Decision
from tests.unit.questions import (
    ALL,
    AMOUNT_SCHEMA,
    AT,
    CYCLE,
    EDITED,
    REFUND_CALL,
    TOOL_APPROVAL,
    TWO_CALLS,
    Anything,
    answer,
    hitl,
    human,
    own,
)


@pytest.mark.parametrize(
    ("value", "schema", "shape", "title", "allowed"),
    [
        (own(), None, "agentflow", "Refund", ("approve", "edit", "reject")),
        (own(title=None), None, "agentflow", "Approval requested", ("approve", "edit", "reject")),
        (own(allowed=["reject", "approve"]), None, "agentflow", "Refund", ("reject", "approve")),
        (own(allowed=["maybe"]), None, "opaque", "Approval requested", None),
        (own(v="1"), None, "opaque", "Approval requested", None),
        (REFUND_CALL, None, "hitl", "refund", tuple(ALL)),
        (TWO_CALLS, None, "hitl", "refund, mail", tuple(ALL)),
        (REFUND_CALL | {"review_configs": []}, None, "opaque", "Approval requested", None),
        (REFUND_CALL | {"action_requests": [{"name": "x"}]}, None, "opaque", None, None),
        ({"action_requests": [], "review_configs": []}, None, "opaque", None, None),
        (TOOL_APPROVAL, None, "tool_approval", "refund", tuple(ALL)),
        ({"type": "tool_approval"}, None, "opaque", "Approval requested", None),
        (human(), None, "human_interrupt", "send", tuple(ALL)),
        (human(edit=False, ignore=False), None, "human_interrupt", "send", ("approve", "respond")),
        ([human(), human("call")], None, "human_interrupt", "send, call", tuple(ALL)),
        (json.dumps(human()), None, "human_interrupt", "send", tuple(ALL)),
        (json.dumps([human(), human()]), None, "human_interrupt", "send", tuple(ALL)),
        ([human(), "and?"], None, "opaque", "Approval requested", None),
        ("{not json", None, "opaque", "{not json", None),
        ("[" * 100_000, None, "opaque", "[" * 200, None),
        ({"question": "?"}, {"type": "object"}, "schema", "Approval requested", ("respond",)),
        ("How much?", {"type": "integer"}, "schema", "How much?", ("respond",)),
        ("ok?", None, "opaque", "ok?", ("approve", "reject", "respond")),
        ("x" * 500, None, "opaque", "x" * 200, None),
        ("", None, "opaque", "Approval requested", None),
        (None, None, "opaque", "Approval requested", None),
        ([1, 2], None, "opaque", "Approval requested", None),
    ],
)
def test_each_shape_is_recognised(
    value: Any, schema: Any, shape: str, title: str | None, allowed: tuple[str, ...] | None
) -> None:
    request = to_request(value, schema)

    assert request.shape == shape
    assert title is None or request.title == title
    assert allowed is None or request.allowed == allowed
    assert len(proposal_hash(request)) == 64


def test_keys_in_javascripts_case_are_accepted_and_those_of_arguments_kept() -> None:
    request = to_request(
        {
            "actionRequests": [{"name": "refund", "args": {"orderId": 1, "order_id": 2}}],
            "reviewConfigs": [
                {
                    "actionName": "refund",
                    "allowedDecisions": ["approve"],
                    "argsSchema": AMOUNT_SCHEMA,
                }
            ],
        }
    )
    [action] = request.actions
    assert (action.name, action.allowed, action.args_schema) == (
        "refund",
        ("approve",),
        AMOUNT_SCHEMA,
    )
    assert action.args == {"orderId": 1, "order_id": 2}

    legacy = to_request(
        {
            "actionRequest": {"action": "send", "args": {}},
            "config": {"allowAccept": True, "allowEdit": False},
        }
    )
    assert (legacy.shape, legacy.allowed) == ("human_interrupt", ("approve",))


def test_a_config_is_matched_by_name_and_a_call_without_one_may_not_be_edited() -> None:
    value = hitl(("refund", {}, ["approve"]), ("mail", {}, ["reject"]))
    value["review_configs"].reverse()
    assert [action.allowed for action in to_request(value).actions] == [("approve",), ("reject",)]

    value["review_configs"] = [{"action_name": "other", "allowed_decisions": ALL}]
    assert [action.allowed for action in to_request(value).actions] == [("approve", "reject")] * 2

    value["review_configs"] = [{"action_name": "refund", "allowed_decisions": []}]
    assert to_request(value).actions[0].allowed == ()


def test_an_opaque_value_of_any_kind_is_shown_as_plain_data() -> None:
    class Thing:
        pass

    class Order(BaseModel):
        total: Decimal

    cycle: list[Any] = []
    cycle.append(cycle)
    value = {
        "order": Order(total=Decimal("1.50")),
        1: float("nan"),
        "set": {"b", "a"},
        "raw": b"\xff",
        "thing": Thing(),
        "model": Anything(thing=Thing()),
        "cycle": CYCLE,
        "when": AT,
    }
    request = to_request([value, cycle])

    shown = request.proposal[0]
    assert shown["order"] == {"total": "1.50"}
    assert (shown["1"], shown["set"], shown["raw"]) == ("nan", ["a", "b"], "<builtins.bytes>")
    assert shown["thing"].endswith("Thing>")
    assert shown["model"].endswith("Anything>")
    assert shown["cycle"].endswith("Anything>")
    assert shown["when"] == "2026-03-01T12:30:00Z"
    assert json.loads(json.dumps(request.proposal)) == request.proposal
    assert proposal_hash(request)


def test_a_question_of_a_newer_agentflow_is_not_guessed_at() -> None:
    with pytest.raises(UnknownVersionError):
        to_request(own(v=2))
    newer = replace(to_request("ok?"), shape="hologram")
    with pytest.raises(CodecError, match="unknown shape"):
        encode(newer, Decision(type="approve"), by=None, at=None)


@pytest.mark.parametrize(
    ("value", "schema", "decision", "expected"),
    [
        (REFUND_CALL, None, "approve", {"decisions": [{"type": "approve"}]}),
        (REFUND_CALL, None, {"decisions": ["approve"]}, {"decisions": [{"type": "approve"}]}),
        (REFUND_CALL, None, EDITED, {"decisions": [EDITED]}),
        (
            REFUND_CALL,
            None,
            {"type": "edit", "editedAction": {"args": {"amount": 3}}},
            {"decisions": [EDITED]},
        ),
        (
            REFUND_CALL,
            None,
            {"type": "edit", "edited_action": {"name": "store_credit", "args": {"x": 1}}},
            {
                "decisions": [
                    {"type": "edit", "edited_action": {"name": "store_credit", "args": {"x": 1}}}
                ]
            },
        ),
        (
            REFUND_CALL,
            None,
            {"type": "reject", "message": "no"},
            {"decisions": [{"type": "reject", "message": "no"}]},
        ),
        (REFUND_CALL, None, "reject", {"decisions": [{"type": "reject"}]}),
        (
            REFUND_CALL,
            None,
            {"type": "respond", "value": "done by hand"},
            {"decisions": [{"type": "respond", "message": "done by hand"}]},
        ),
        (
            TWO_CALLS,
            None,
            {"type": "approve", "decisions": [EDITED | {"message": None}, "approve"]}
            | {"type": "edit"},
            {"decisions": [EDITED, {"type": "approve"}]},
        ),
        (
            TWO_CALLS,
            None,
            {"decisions": ["approve", {"type": "reject", "message": "spam"}]},
            {"decisions": [{"type": "approve"}, {"type": "reject", "message": "spam"}]},
        ),
        (TOOL_APPROVAL, None, {"type": "approve", "message": "fine"}, {"type": "approve"}),
        (TOOL_APPROVAL, None, EDITED, EDITED),
        (
            TOOL_APPROVAL,
            None,
            {"type": "respond", "message": "paid"},
            {"type": "respond", "message": "paid"},
        ),
        (human(), None, "approve", [{"type": "accept", "args": None}]),
        (human(), None, {"type": "reject", "message": "x"}, [{"type": "ignore", "args": None}]),
        (
            human(),
            None,
            {"type": "respond", "message": "later"},
            [{"type": "response", "args": "later"}],
        ),
        (
            human(),
            None,
            {"type": "edit", "edited_action": {"args": {"to": "bob"}}},
            [{"type": "edit", "args": {"action": "send", "args": {"to": "bob"}}}],
        ),
        (
            [human(), human("call")],
            None,
            {"decisions": ["approve", "reject"]},
            [{"type": "accept", "args": None}, {"type": "ignore", "args": None}],
        ),
        ("?", AMOUNT_SCHEMA, {"type": "respond", "value": {"amount": 2}}, {"amount": 2}),
        ("?", {"type": "boolean"}, {"type": "respond", "value": False}, False),
        ("?", {"type": "string"}, {"type": "respond", "message": "blue"}, "blue"),
        ("ok?", None, "approve", {"type": "approve"}),
        ("ok?", None, {"type": "reject", "message": "n"}, {"type": "reject", "message": "n"}),
        ("ok?", None, {"type": "respond", "value": [1, {"a": None}]}, [1, {"a": None}]),
        ("ok?", None, {"type": "respond", "value": 0}, 0),
    ],
)
def test_each_shape_is_answered_in_its_own_form(
    value: Any, schema: Any, decision: Any, expected: Any
) -> None:
    assert answer(value, decision, schema) == expected


def test_our_own_answer_carries_what_was_approved_and_by_whom() -> None:
    approved = answer(own({"amount": 5}), {"type": "approve", "message": "fine"})
    assert approved == {
        "type": "approve",
        "proposal": {"amount": 5},
        "message": "fine",
        "value": None,
        "by": "ann",
        "at": "2026-03-01T12:30:00+00:00",
        "asked_hash": approved["asked_hash"],
    }
    edited = answer(own({"amount": 5}), {"type": "edit", "value": {"amount": 4}})
    assert edited["proposal"] == {"amount": 4}
    assert edited["asked_hash"] == approved["asked_hash"]
    assert answer(own(None), {"type": "edit", "value": {"amount": 4}})["proposal"] == {"amount": 4}
    responded = answer(own(allowed=["respond"]), {"type": "respond", "message": "blue"})
    assert (responded["proposal"], responded["value"]) == ("pay", "blue")


def test_the_hash_changes_with_all_that_a_reviewer_is_shown() -> None:
    request = to_request(own({"amount": 5, "to": "ann"}))
    seen = {proposal_hash(request)}
    for changed in (
        replace(request, title="Other"),
        replace(request, description="Read me"),
        replace(request, proposal={"amount": 6, "to": "ann"}),
        replace(request, allowed=("approve",)),
        replace(request, response_schema={"type": "object"}),
        replace(request, actions=to_request(REFUND_CALL).actions),
        # A composed and a decomposed letter look alike and are not the same text.
        replace(request, title="\u00e9"),
        replace(request, title="e\u0301"),
    ):
        seen.add(proposal_hash(changed))
    assert len(seen) == 9


def test_the_hash_depends_on_content_alone() -> None:
    request = to_request(own({"amount": 5, "to": "ann"}))
    assert proposal_hash(request) == proposal_hash(
        replace(request, proposal={"to": "ann", "amount": 5}, policy={"quorum": 2})
    )
    # Golden: rows hold it, and a reviewer's answer binds to it.
    golden = "3a6ca5698c3307534b893d0140e911f548286e303083730f91c1cbeae6f2d908"
    assert proposal_hash(request) == golden


def test_nan_is_refused_and_half_a_surrogate_pair_is_not() -> None:
    request = to_request(own())
    with pytest.raises(SerializationError, match="NaN"):
        proposal_hash(replace(request, proposal=[float("nan")]))
    assert proposal_hash(replace(request, proposal="\ud800"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON, reply=JSON)
def test_any_json_can_be_asked_hashed_and_answered(value: Any, reply: Any) -> None:
    request = to_request(value)
    assert proposal_hash(request) == proposal_hash(to_request(value))
    if reply is not None and request.shape == "opaque":
        assert answer(value, {"type": "respond", "value": reply}) == reply
    asked = to_request(own(value))
    assert asked.proposal == value
    assert answer(own(value), "approve")["proposal"] == value
