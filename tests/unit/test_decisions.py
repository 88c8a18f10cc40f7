"""What is no decision, or does not fit its question, is refused without its values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from agentflow.errors import InvalidDecisionError
from agentflow.interrupts import parse_decision, to_request, validate
from agentflow.types import Decision, DecisionType
from tests.unit.questions import (
    ALL,
    AMOUNT_SCHEMA,
    AT,
    EDITED,
    REFUND_CALL,
    TOOL_APPROVAL,
    TWO_CALLS,
    answer,
    hitl,
    human,
    own,
)


@pytest.mark.parametrize(
    ("value", "schema", "decision", "problems"),
    [
        (own(allowed=["approve"]), None, "reject", ["type: is not allowed here; allowed: approve"]),
        ("ok?", None, "edit", ["type: is not allowed"]),
        ("?", {"type": "object"}, "approve", ["type: is not allowed here; allowed: respond"]),
        (own(), None, "edit", ["value: an edit needs the edited proposal"]),
        (own({"a": 1}), None, {"type": "edit", "value": [1]}, ["value: must stay of type object"]),
        (own(True), None, {"type": "edit", "value": 1}, ["value: must stay of type boolean"]),
        (own(1), None, {"type": "edit", "value": "1"}, ["value: must stay of type number"]),
        (
            REFUND_CALL,
            {"type": "object", "required": ["decisions", "signature"]},
            "approve",
            ["answer: lacks signature"],
        ),
        (own(), None, EDITED, ["edited_action: this is not about the call of a tool"]),
        (own(), None, {"decisions": ["approve"]}, ["decisions: one thing is asked"]),
        (own(), None, {"type": "approve", "value": "more"}, ["value: only an edit or a respond"]),
        (own(allowed=["respond"]), None, "respond", ["value: a respond needs"]),
        (
            own(allowed=["respond"], response_schema=AMOUNT_SCHEMA),
            None,
            {"type": "respond", "value": {"amount": 0, "secret": "x"}},
            [
                "value: has properties that are not known here: secret",
                "value.amount: must be at least 1",
            ],
        ),
        (
            own({"amount": 1}, response_schema=AMOUNT_SCHEMA),
            None,
            {"type": "edit", "value": {}},
            ["value: lacks amount"],
        ),
        ("?", AMOUNT_SCHEMA, {"type": "respond", "value": "hunter2"}, ["value: must be of type"]),
        ("ok?", None, "respond", ["value: a respond needs"]),
        (REFUND_CALL, None, "edit", ["edited_action: an edit needs the edited call"]),
        (
            REFUND_CALL,
            None,
            {"type": "edit", "edited_action": {"name": "refund", "args": {"amount": "hunter2"}}},
            ["edited_action.args.amount: must be of type integer"],
        ),
        (REFUND_CALL, None, EDITED | {"value": 1}, ["value: an edit of a call is given as"]),
        (REFUND_CALL, None, {**EDITED, "type": "approve"}, ["edited_action: only an edit takes"]),
        (REFUND_CALL, None, {"type": "respond", "value": {"a": 1}}, ["message: a respond needs"]),
        (
            REFUND_CALL,
            None,
            {"type": "respond", "value": "a", "message": "b"},
            ["value: a respond to a call takes either"],
        ),
        (REFUND_CALL, None, {"decisions": ["approve", "approve"]}, ["decisions: 1 are due"]),
        (TWO_CALLS, None, "approve", ["decisions: 2 are due", "0 given"]),
        (TWO_CALLS, None, {"decisions": ["approve"]}, ["decisions: 2 are due", "1 given"]),
        (
            TWO_CALLS,
            None,
            {"decisions": ["edit", "respond"]},
            ["decisions[0].edited_action: an edit needs", "decisions[1].type: is not allowed"],
        ),
        (
            hitl(("refund", {}, ALL), ("mail", {}, ALL)),
            None,
            {
                "decisions": [
                    {"type": "edit", "edited_action": {"name": "mail", "args": {}}},
                    "approve",
                ]
            },
            ["decisions[0].edited_action.name: is another action of this request"],
        ),
        (
            TWO_CALLS,
            None,
            {"type": "approve", "message": "m", "decisions": ["approve", "approve"]},
            ["message: belongs inside decisions"],
        ),
        (
            TOOL_APPROVAL,
            None,
            {"type": "edit", "edited_action": {"name": "wire", "args": {}}},
            ["edited_action.name: must stay the tool"],
        ),
        ([human(), human()], None, "approve", ["decisions: 2 are due"]),
        (human(accept=False), None, "approve", ["type: is not allowed"]),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_without_its_values(
    value: Any, schema: Any, decision: Any, problems: list[str]
) -> None:
    with pytest.raises(InvalidDecisionError) as refused:
        answer(value, decision, schema)

    told = "\n".join(refused.value.problems)
    for problem in problems:
        assert problem in told
    assert "hunter2" not in str(refused.value)
    assert refused.value.approval_id == "a1"


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        ({"enum": ["red", "blue"]}, "x", "must be one of ['red', 'blue']"),
        ({"type": ["integer", "null"]}, "x", "must be of type integer or null"),
        (
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "x",
            "must be of type integer or null",
        ),
        ({"anyOf": [{"const": 1}, {"type": "null"}]}, "x", "fits none of the forms"),
        ({"format": "date"}, "x", "must have the format date"),
        ({"not": {}}, "x", "does not meet 'not'"),
        ({"pattern": "^a"}, "x", "must match the pattern ^a"),
        ({"items": {"type": "integer"}}, [1, "x"], "value[1]: must be of type integer"),
        ({"type": "nonsense"}, "x", "cannot be checked, its schema is not a JSON Schema at type"),
        ({"$ref": "#/$defs/gone"}, "x", "cannot be checked, its schema refers to"),
        ({"$ref": "http://127.0.0.1:9/s.json"}, "x", "cannot be checked, its schema refers to"),
        ({"$ref": "#"}, "x", "cannot be checked, its schema cannot be applied"),
    ],
)
def test_what_a_schema_asks_for_is_told(schema: Any, value: Any, problem: str) -> None:
    with pytest.raises(InvalidDecisionError, match=problem.replace("[", r"\[").replace("^", ".")):
        answer("?", {"type": "respond", "value": value}, schema)


def test_a_decision_is_read_from_its_type_a_mapping_or_a_record() -> None:
    assert parse_decision("a", "approve") == Decision(type="approve")
    edited = Decision(type="edit", edited_action={"name": "x", "args": {"orderId": 1}})
    raw = {"type": "edit", "editedAction": {"name": "x", "args": {"orderId": 1}}}
    assert parse_decision("a", raw) == edited
    assert parse_decision("a", edited) == edited
    both = parse_decision("a", {"decisions": ["approve", {"type": "reject", "message": "m"}]})
    assert both.decisions == (Decision(type="approve"), Decision(type="reject", message="m"))
    assert both.type == "edit"
    assert parse_decision("a", {"decisions": ["reject", "reject"]}).type == "reject"
    assert parse_decision("a", {"type": "respond", "value": {"when": AT}}).value == {
        "when": "2026-03-01T12:30:00Z"
    }


@pytest.mark.parametrize(
    ("decision", "problem"),
    [
        ("accept", "type: must be one of approve, edit, reject, respond"),
        ({}, "type: must be one of"),
        ({"type": None}, "type: must be one of"),
        ({"type": ["approve"]}, "type: must be one of"),
        (Decision(type=cast("DecisionType", "maybe")), "type: must be one of"),
        (None, "decision: must be the type of a decision, or an object"),
        (["approve"], "decision: must be the type"),
        ({"type": "approve", "comment": "x"}, "decision: has unknown keys: comment"),
        ({"type": "reject", "message": 5}, "message: must be text"),
        ({"type": "edit", "edited_action": "x"}, "edited_action: must be an object"),
        ({"type": "edit", "edited_action": {"name": "x"}}, "edited_action.args: must be an object"),
        ({"type": "edit", "edited_action": {"name": 1, "args": {}}}, "edited_action.name: must be"),
        (
            {"type": "edit", "edited_action": {"args": {}, "id": 1}},
            "edited_action: has unknown keys: id",
        ),
        ({"type": "edit", "edited_action": {}, "editedAction": {}}, "is given twice"),
        ({"type": "approve", "decisions": "approve"}, "decisions: must be a list"),
        ({"decisions": ["yes"]}, r"decisions\[0\].type: must be one of"),
        ({"decisions": [{"decisions": ["approve"]}]}, r"decisions\[0\].decisions: .* cannot hold"),
        ({"type": "reject", "decisions": ["approve"]}, "type: none of the decisions is of this"),
        ({"type": "respond", "value": {"x": [float("nan")]}}, r"value.x\[0\]: JSON has no NaN"),
        ({"type": "respond", "value": object()}, "value: give JSON-like data"),
        ({"type": "respond", "value": {1: 2}}, "value: keys must be text"),
    ],
)
def test_what_is_not_a_decision_is_refused(decision: Any, problem: str) -> None:
    with pytest.raises(InvalidDecisionError, match=problem):
        parse_decision("a1", decision)


def test_a_handmade_record_is_checked_like_any_other_decision() -> None:
    nested = Decision(type="approve", decisions=(Decision(type="approve", decisions=()),))
    inner = replace(nested, decisions=(nested,))
    with pytest.raises(InvalidDecisionError, match="cannot hold"):
        validate("a1", to_request(REFUND_CALL), inner)


def test_a_tool_whose_plain_schema_has_definitions_of_its_own_is_checked_by_them() -> None:
    args = {
        "type": "object",
        "properties": {"amount": {"$ref": "#/$defs/Amount"}},
        "$defs": {"Amount": {"type": "integer"}},
    }
    schema = {
        "oneOf": [
            {"type": "object", "properties": {"type": {"const": "approve"}}},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "edit"},
                    "edited_action": {"$ref": "#/$defs/EditedAction"},
                },
            },
        ],
        "$defs": {"EditedAction": {"type": "object", "properties": {"args": args}}},
    }
    assert answer(TOOL_APPROVAL, "approve", schema) == {"type": "approve"}
    assert answer(TOOL_APPROVAL, EDITED, schema) == EDITED
    wrong = {"type": "edit", "edited_action": {"args": {"amount": "hunter2"}}}
    with pytest.raises(InvalidDecisionError, match=r"edited_action\.args\.amount: must be of type"):
        answer(TOOL_APPROVAL, wrong, schema)


@pytest.mark.parametrize(
    "schema",
    [{"oneOf": 5}, {"$defs": 5}, {"properties": 5}, {"oneOf": [{"$ref": "#/$defs/a"}]}],
)
def test_a_broken_schema_leaves_a_question_readable(schema: Any) -> None:
    assert to_request(TOOL_APPROVAL, schema).allowed == tuple(ALL)


def test_a_form_that_asks_for_more_than_a_decision_is_checked_whole() -> None:
    schema = {
        "type": "object",
        "properties": {"type": {"const": "reject"}, "message": {"type": "string"}},
        "required": ["type", "message"],
    }
    assert answer(TOOL_APPROVAL, {"type": "reject", "message": "no"}, schema)
    with pytest.raises(InvalidDecisionError, match="answer: lacks message"):
        answer(TOOL_APPROVAL, "reject", schema)
