"""Approvals bind, in real graphs on LangGraph's in-memory saver."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Interrupt, interrupt
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator

from agentflow.errors import (
    InvalidDecisionError,
    InvalidInputError,
    ProposalUnstableError,
    SerializationError,
)
from agentflow.interrupts import request_approval, to_request
from agentflow.types import ApprovalRequest, ApprovalResult
from tests.unit.questions import AT, CYCLE, Anything, answer


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
