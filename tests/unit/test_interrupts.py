"""Questions to people: every shape read and answered, wrong answers refused, approvals binding.

The graphs are real ones on LangGraph's in-memory saver, and the middleware is langchain's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, TypedDict, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Interrupt, interrupt
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator

from agentflow.errors import (
    CodecError,
    InvalidDecisionError,
    InvalidInputError,
    ProposalUnstableError,
    SerializationError,
    UnknownVersionError,
)
from agentflow.interrupts import (
    encode,
    parse_decision,
    proposal_hash,
    request_approval,
    to_request,
    validate,
)
from agentflow.testing import ScriptedChatModel
from agentflow.types import ApprovalRequest, ApprovalResult, Decision, DecisionType

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


# Reading


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


# Answering


def answer(value: Any, decision: Any, schema: Any = None) -> Any:
    request = to_request(value, schema)
    parsed = parse_decision("a1", decision)
    validate("a1", request, parsed)
    encoded = encode(request, parsed, by="ann", at=AT)
    assert json.loads(json.dumps(encoded)) == encoded
    return encoded


EDITED = {"type": "edit", "edited_action": {"name": "refund", "args": {"amount": 3}}}


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


# Refusing


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


# Parsing


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


# The hash


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


# In real graphs


class State(TypedDict, total=False):
    unused: str


CONFIG: Any = {"configurable": {"thread_id": "t", "__pregel_strict_resume": True}}


class Review:
    """A graph of one node that asks, and the reviewer, who answers it as agentflow will.

    What the node returns is kept here and not in the state, whose serde would change its types.
    """

    def __init__(self, ask: Callable[[], Any], *, style: str = "sync") -> None:
        self.got: Any = None

        def node(state: State) -> State:
            self.got = ask()
            return {}

        async def anode(state: State) -> State:
            self.got = ask()
            return {}

        builder = StateGraph(State)
        if style == "sync":
            builder.add_node("ask", node)
        else:
            builder.add_node("ask", anode)
        builder.add_edge(START, "ask")
        builder.add_edge("ask", END)
        self.graph = builder.compile(checkpointer=InMemorySaver())

    def start(self) -> ApprovalRequest | None:
        self.graph.invoke({}, CONFIG)
        return self.pending()

    def pending(self) -> ApprovalRequest | None:
        found = self._interrupt()
        return found and to_request(found.value, found.response_schema)

    def decide(self, decision: Any) -> Any:
        self.graph.invoke(self.command(decision), CONFIG)
        return self.got

    def command(self, decision: Any) -> Command[Any]:
        found = self._interrupt()
        assert found is not None
        resume = answer(found.value, decision, found.response_schema)
        return Command(resume={found.id: resume})

    def _interrupt(self) -> Interrupt | None:
        return next(iter(self.graph.get_state(CONFIG).interrupts), None)


def counted(proposals: Iterable[Any], **options: Any) -> Callable[[], ApprovalResult]:
    """Ask about something else each time the node starts."""
    rest = iter(proposals)
    return lambda: request_approval(next(rest), **options)


@pytest.mark.parametrize(
    ("decision", "kind", "proposal", "approved"),
    [
        ("approve", "approve", {"amount": 40}, True),
        ({"type": "edit", "value": {"amount": 30}}, "edit", {"amount": 30}, True),
        ({"type": "reject", "message": "no"}, "reject", {"amount": 40}, False),
    ],
)
@pytest.mark.parametrize("style", ["sync", "async"])
async def test_a_node_gets_what_was_approved_whatever_it_proposes_on_replay(
    style: str, decision: Any, kind: str, proposal: Any, approved: Any
) -> None:
    ask = counted([{"amount": 40}, {"amount": 9_999}], title="Refund", policy={"quorum": 1})
    review = Review(ask, style=style)
    if style == "sync":
        asked = review.start()
        review.decide(decision)
    else:
        await review.graph.ainvoke({}, CONFIG)
        asked = review.pending()
        await review.graph.ainvoke(review.command(decision), CONFIG)
    result = review.got

    assert asked is not None
    assert (asked.shape, asked.title, asked.proposal) == ("agentflow", "Refund", {"amount": 40})
    assert asked.policy == {"quorum": 1}
    assert result == ApprovalResult(
        type=kind,  # type: ignore[arg-type] # a parameter of the test is plain text
        proposal=proposal,
        message="no" if kind == "reject" else None,
        by="ann",
        at=AT,
    )
    assert result.approved is approved


class Currency(Enum):
    EUR = "EUR"


class Refund(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    amount: Decimal
    currency: Currency = Currency.EUR
    due_at: datetime = AT
    order: str = Field(default="A-17", alias="orderId")

    @computed_field
    def label(self) -> str:
        return f"{self.amount} {self.currency.value}"

    @field_validator("amount")
    @classmethod
    def _not_round(cls, value: Decimal) -> Decimal:
        if value == Decimal(13):
            raise ValueError("hunter2")
        return value


@dataclass
class Mail:
    to: tuple[str, ...]
    at: datetime
    sent: bool = field(init=False, default=False)


@pytest.mark.parametrize(
    ("proposal", "edit", "edited"),
    [
        (
            Refund(amount=Decimal("40.10")),
            {"amount": "30.05", "order": "B-1"},
            Refund(amount=Decimal("30.05"), orderId="B-1"),
        ),
        (
            Mail(to=("ann", "bob"), at=AT),
            {"to": ["cy"], "at": "2026-03-01T12:30:00Z"},
            Mail(to=("cy",), at=AT),
        ),
    ],
)
def test_a_typed_proposal_comes_back_as_its_class(proposal: Any, edit: Any, edited: Any) -> None:
    review = Review(lambda: request_approval(proposal).proposal)
    review.start()
    assert review.decide("approve") == proposal

    review = Review(lambda: request_approval(proposal).proposal)
    review.start()
    assert review.decide({"type": "edit", "value": edit}) == edited


def test_an_edit_of_a_typed_proposal_is_checked_before_the_node_sees_it() -> None:
    review = Review(lambda: request_approval(Refund(amount=Decimal(40))))
    review.start()
    with pytest.raises(InvalidDecisionError, match="value: lacks amount"):
        review.decide({"type": "edit", "value": {"order": "B-1"}})
    # What only the class itself can tell is found in the node; its text is not repeated.
    with pytest.raises(InvalidDecisionError, match=r"proposal\.amount: value_error") as refused:
        review.decide({"type": "edit", "value": {"amount": "13"}})
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


class Colour(BaseModel):
    colour: Literal["red", "blue"]


def test_the_value_of_a_respond_fits_the_response_form_and_stays_plain() -> None:
    review = Review(lambda: request_approval("paint", allowed=("respond",), response=Colour))
    asked = review.start()
    assert asked is not None
    assert asked.response_schema == Colour.model_json_schema()
    with pytest.raises(InvalidDecisionError, match=r"value\.colour: must be one of"):
        review.decide({"type": "respond", "value": {"colour": "green"}})
    result = review.decide({"type": "respond", "value": {"colour": "red"}})
    assert (result.value, result.proposal, result.approved) == ({"colour": "red"}, "paint", False)


@pytest.mark.parametrize(
    ("proposals", "asked", "expected"),
    [
        ([1, 1], [1], 1),
        ([1, 2, 2], [1, 2], 2),
        ([1, 2, 3, 4, 4], [1, 2, 3, 4], 4),
        # It flips back to what was approved first: the later answer must not be left over.
        ([1, 2, 1, 1], [1, 2, 1], 1),
    ],
)
def test_a_changed_proposal_is_asked_about_again(
    proposals: list[int], asked: list[int], expected: int
) -> None:
    ask = counted([*proposals, proposals[-1]], on_change="ask_again")

    def node() -> Any:
        first = ask().proposal
        return first, interrupt("and now?")

    review = Review(node)
    seen = []
    request = review.start()
    while request is not None and request.shape != "opaque":
        seen.append(request.proposal)
        review.decide("approve")
        request = review.pending()

    assert seen == asked
    assert request is not None
    assert request.title == "and now?"
    assert review.decide({"type": "respond", "value": "go"}) == (expected, "go")


def test_a_proposal_that_never_settles_is_given_up() -> None:
    review = Review(counted(range(20), title="Refund", on_change="ask_again"))
    review.start()
    for _ in range(3):
        assert review.decide("approve") is None
    with pytest.raises(ProposalUnstableError, match="Refund"):
        review.decide("approve")


def test_a_rejection_stands_though_the_proposal_changed() -> None:
    review = Review(counted([1, 2], on_change="ask_again"))
    review.start()
    assert review.decide("reject").proposal == 1


def test_two_questions_of_one_node_are_answered_each_by_its_own() -> None:
    def node() -> Any:
        first = request_approval("small", key="small", on_change="ask_again")
        second = request_approval("large", key="large", on_change="ask_again")
        return first.type, first.proposal, second.type, second.proposal

    review = Review(node)
    review.start()
    review.decide("approve")
    assert review.decide("reject") == ("approve", "small", "reject", "large")


@pytest.mark.parametrize("raw", ["yes", True, {"type": "approve"}, {"decisions": []}])
def test_a_bare_resume_is_not_taken_for_an_approval(raw: Any) -> None:
    review = Review(counted(["pay", "pay"]))
    review.start()
    found = review.graph.get_state(CONFIG).interrupts[0]
    with pytest.raises(InvalidDecisionError, match="did not come through agentflow"):
        review.graph.invoke(Command(resume={found.id: raw}), CONFIG)


class Unbuildable(BaseModel):
    secret: int = Field(exclude=True)


class Anything(BaseModel):
    thing: Any


CYCLE = Anything(thing=None)
CYCLE.thing = {"again": CYCLE}


@dataclass
class Unresolvable:
    thing: Missing  # type: ignore[name-defined] # noqa: F821 - what is tested


@pytest.mark.parametrize(
    ("proposal", "options", "error"),
    [
        (float("nan"), {}, SerializationError),
        ({"a": object()}, {}, SerializationError),
        ({1: "a"}, {}, SerializationError),
        (b"\xff", {}, SerializationError),
        (Unbuildable(secret=1), {}, SerializationError),
        (Anything(thing=object()), {}, SerializationError),
        (Anything(thing=[float("inf")]), {}, SerializationError),
        (CYCLE, {}, SerializationError),
        (Unresolvable(1), {}, SerializationError),
        ("x", {"policy": {"who": object()}}, SerializationError),
        ("x", {"allowed": ()}, InvalidInputError),
        ("x", {"allowed": "approve"}, InvalidInputError),
        ("x", {"allowed": ("accept",)}, InvalidInputError),
        ("x", {"on_change": "panic"}, InvalidInputError),
        ("x", {"response": {"type": "nonsense"}}, InvalidInputError),
        ("x", {"response": Review}, InvalidInputError),
        ("x", {"response": Unresolvable}, InvalidInputError),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anybody_is_asked(
    proposal: Any, options: Any, error: type[Exception]
) -> None:
    review = Review(counted([proposal], **options))
    with pytest.raises(error):
        review.start()
    assert review.pending() is None


# langchain's middleware


@tool
def refund(amount: int) -> str:
    """Pay money back."""
    return f"refunded {amount}"


@tool
def mail(to: str) -> str:
    """Send a mail."""
    return f"mailed {to}"


Mode = Literal["batched", "per_call"]


def agent(mode: Mode, **gates: Any) -> Any:
    calls = [
        {"name": "refund", "args": {"amount": 5}, "id": "c1"},
        {"name": "mail", "args": {"to": "ann"}, "id": "c2"},
    ]
    model = ScriptedChatModel(script=[AIMessage("", tool_calls=calls), "done"])
    return create_agent(
        model,
        [refund, mail],
        middleware=[HumanInTheLoopMiddleware(gates, interrupt_mode=mode)],
        checkpointer=InMemorySaver(),
    )


def results(graph: Any) -> dict[str, Any]:
    messages = graph.get_state(CONFIG).values["messages"]
    return {m.tool_call_id: m.content for m in messages if isinstance(m, ToolMessage)}


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        (["approve", "approve"], {"c1": "refunded 5", "c2": "mailed ann"}),
        (
            [
                {"type": "edit", "edited_action": {"args": {"amount": 3}}},
                {"type": "respond", "message": "told her"},
            ],
            {"c1": "refunded 3", "c2": "told her"},
        ),
        ([{"type": "reject", "message": "too much"}, "approve"], {"c2": "mailed ann"}),
    ],
)
def test_the_batched_middleware_takes_our_answer_for_two_calls(
    decisions: list[Any], expected: Mapping[str, str]
) -> None:
    graph = agent("batched", refund=True, mail=True)
    graph.invoke({"messages": [("user", "hi")]}, CONFIG)
    [asked] = graph.get_state(CONFIG).interrupts
    request = to_request(asked.value, asked.response_schema)
    assert request.shape == "hitl"
    assert [action.name for action in request.actions] == ["refund", "mail"]

    resume = answer(asked.value, {"decisions": decisions}, asked.response_schema)
    graph.invoke(Command(resume={asked.id: resume}), CONFIG)

    got = results(graph)
    for call, text in expected.items():
        assert text in got[call]
    if "c1" not in expected:
        assert "too much" in got["c1"]


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        ("approve", "refunded 5"),
        ({"type": "edit", "edited_action": {"args": {"amount": 3}}}, "refunded 3"),
        ({"type": "reject", "message": "too much"}, "too much"),
        ({"type": "respond", "message": "by hand"}, "by hand"),
    ],
)
def test_the_per_call_middleware_takes_our_answer(decision: Any, expected: str) -> None:
    graph = agent("per_call", refund=True)
    graph.invoke({"messages": [("user", "hi")]}, CONFIG)
    [asked] = graph.get_state(CONFIG).interrupts
    request = to_request(asked.value, asked.response_schema)
    assert (request.shape, request.allowed) == ("tool_approval", tuple(ALL))
    schema = request.actions[0].args_schema
    assert schema is not None
    assert schema["properties"]["amount"]["type"] == "integer"
    bad = {"type": "edit", "edited_action": {"name": "refund", "args": {"amount": "hunter2"}}}
    with pytest.raises(InvalidDecisionError, match=r"edited_action\.args\.amount: must be of type"):
        answer(asked.value, bad, asked.response_schema)

    resume = answer(asked.value, decision, asked.response_schema)
    graph.invoke(Command(resume={asked.id: resume}), CONFIG)
    assert expected in results(graph)["c1"]


def test_the_per_call_schema_limits_what_is_allowed() -> None:
    graph = agent("per_call", refund={"allowed_decisions": ["reject"]})
    graph.invoke({"messages": [("user", "hi")]}, CONFIG)
    [asked] = graph.get_state(CONFIG).interrupts
    assert to_request(asked.value, asked.response_schema).allowed == ("reject",)


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
