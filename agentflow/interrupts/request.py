"""`request_approval`: the question to a person, asked from inside a node.

It goes through LangGraph's own `interrupt`, so it works under any checkpointer that stores
interrupts. What it adds is the binding of the answer to what was shown: the answer carries the
approved proposal, and that is what the node gets, whatever it has computed on replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from langgraph.config import get_config
from langgraph.types import interrupt
from pydantic import ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from agentflow.control import check_attempt
from agentflow.errors import (
    InvalidDecisionError,
    InvalidInputError,
    NonDeterministicNodeError,
    ProposalUnstableError,
    SerializationError,
)
from agentflow.interrupts.decisions import schema_is_for
from agentflow.interrupts.plain import digest, rebuild, to_plain, typed
from agentflow.interrupts.schemas import schema_error, to_schema
from agentflow.interrupts.shapes import (
    DECISION_TYPES,
    DEFAULT_TITLE,
    PAYLOAD_TYPE,
    PAYLOAD_VERSION,
)
from agentflow.types import ApprovalResult, DecisionType

_MOST_REPEATS = 3
_UNUSABLE = (PydanticUserError, PydanticUndefinedAnnotation)
"""What pydantic says of a type that it can make no validator or schema for."""
_ANSWER_KEYS = frozenset({"type", "proposal", "message", "value", "by", "at", "asked_hash"})


def request_approval(
    proposal: Any,
    *,
    title: str | None = None,
    allowed: Sequence[DecisionType] = ("approve", "edit", "reject"),
    policy: Mapping[str, Any] | None = None,
    response: Any = None,
    key: str | None = None,
    on_change: Literal["use_approved", "ask_again"] = "use_approved",
) -> ApprovalResult:
    """Ask a person about a proposal; the run waits, without a process, until it is answered.

    Call it in a node, sync or async, without `await`. The node starts again from its top when the
    answer is there: do what must not happen twice after this call, and act on the returned
    `proposal` only. A rejection returns too; look at `approved`.

    Example:
        ```python
        def refund(state):
            answer = request_approval(Refund(order="A-17", amount=40), title="Refund A-17")
            return {"refund": answer.proposal} if answer.approved else {"refused": answer.message}
        ```

    Args:
        proposal: JSON-like data, a pydantic model or a dataclass; of the latter two an instance
            comes back, built from the approved data. What it does not show when dumped (excluded
            or secret fields) is not part of the proposal, and does not come back.
        title: One line for the reviewer.
        allowed: The decisions that may be taken.
        policy: Who may decide, and until when.
        response: The form of the value that the reviewer gives: a pydantic model, TypedDict,
            dataclass or JSON Schema. It is that of a `respond`; where `respond` is not allowed, of
            the edited proposal, for which a typed proposal is its own form. The value stays plain.
        key: A name for this question: no other one gets its answer. Without one its title is its
            name, so give a key where the title may be another one when the node runs again.
        on_change: What to do when the proposal differs on replay. `use_approved` returns what was
            approved. `ask_again` asks about the new one, three times at most; a rejection stands.

    Raises:
        InvalidInputError: The arguments do not fit together.
        SerializationError: The proposal or the policy could not be read back.
        InvalidDecisionError: The answer did not come through agentflow.
        NonDeterministicNodeError: The answer that is due here is that to another question.
        ProposalUnstableError: With `ask_again`, each repetition proposed something else.
        LeaseLostError: The node goes on although its attempt is over.
    """
    check_attempt()
    plain, cls = to_plain(proposal, "proposal"), typed(proposal)
    payload = {
        "type": PAYLOAD_TYPE,
        "v": PAYLOAD_VERSION,
        "title": title or DEFAULT_TITLE,
        "proposal": plain,
        "allowed": list(allowed),
        "policy": None if policy is None else to_plain(policy, "policy"),
        "response_schema": _response_schema(response, cls, allowed, on_change),
        "key": key,
    }
    if cls is not None:
        # Now, not when somebody has approved it: an error then would leave the run stuck.
        _check_can_be_rebuilt(cls, plain)
    subject = key or title or DEFAULT_TITLE
    for times in range(_MOST_REPEATS + 1):
        raw = interrupt(payload | ({"asked_again": times} if times else {}))
        answer = _checked(raw, subject)
        if (asked := answer.get("asked_key", key)) != key:
            raise NonDeterministicNodeError(asked, key)
        is_settled = (
            on_change == "use_approved"
            or answer["type"] == "reject"
            or (answer["asked_hash"] == digest(plain) and not _was_asked_again(raw, times))
        )
        if is_settled:
            return _result(answer, cls, subject)
    raise ProposalUnstableError(subject, _MOST_REPEATS)


def _response_schema(
    response: Any, cls: type[Any] | None, allowed: Sequence[DecisionType], on_change: str
) -> dict[str, Any] | None:
    """Check the arguments, and return the form of what the reviewer may type in."""
    found = []
    if not allowed or any(kind not in DECISION_TYPES for kind in allowed):
        found.append(f"allowed: must be a list with some of {', '.join(DECISION_TYPES)}")
    if on_change not in {"use_approved", "ask_again"}:
        found.append("on_change: must be use_approved or ask_again")
    schema = None
    try:
        schema = to_schema(response)
    except _UNUSABLE:
        found.append("response: has no JSON Schema")
    if schema is not None and (reason := schema_error(schema)):
        found.append(f"response: {reason}")
    if found:
        raise InvalidInputError("approval request", tuple(found))
    if schema is None and cls is not None and schema_is_for(allowed) == "edit":
        try:
            # By name, as the proposal is dumped.
            return to_schema(cls, by_alias=False)
        except _UNUSABLE:
            return None
    return schema


def _check_can_be_rebuilt(cls: type[Any], plain: Any) -> None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    hint = "an instance cannot be built again from its own JSON form"
    try:
        rebuild(cls, plain)
    except _UNUSABLE as error:
        raise SerializationError(name, "proposal", hint) from error
    except ValidationError as error:
        # Not chained: pydantic's text quotes the values, and tracebacks are kept with the run.
        hint += f" ({', '.join(_told(error))})"
        raise SerializationError(name, "proposal", hint) from None


def _checked(raw: Any, subject: str) -> Mapping[str, Any]:
    """Refuse an answer that did not come through `encode`: nobody checked or recorded it."""
    if (
        isinstance(raw, Mapping)
        and raw.keys() >= _ANSWER_KEYS
        and raw["type"] in DECISION_TYPES
        and isinstance(raw["asked_hash"], str)
    ):
        return raw
    how = "answer: did not come through agentflow; reopen it, and decide by approval id"
    raise InvalidDecisionError(subject, (how,))


def _was_asked_again(raw: Any, times: int) -> bool:
    """Say whether this very question was repeated after this answer, in an earlier attempt.

    A proposal may flip back to what was approved first. To settle for the first answer then would
    leave the later ones to whatever the node asks next, for LangGraph matches them by position.
    """
    scratchpad = get_config()["configurable"]["__pregel_scratchpad"]
    recorded: list[Any] = scratchpad.resume
    position = next(i for i, answer in enumerate(recorded) if answer is raw)
    following = recorded[position + 1 : position + 2]
    return any(
        isinstance(answer, Mapping)
        and answer.keys() >= _ANSWER_KEYS
        and answer.get("asked_again") == times + 1
        for answer in following
    )


def _result(answer: Mapping[str, Any], cls: type[Any] | None, subject: str) -> ApprovalResult:
    proposal, at = answer["proposal"], answer["at"]
    if cls is not None:
        try:
            proposal = rebuild(cls, proposal)
        except ValidationError as error:
            # A schema cannot tell all that a class checks; its own validators speak only here.
            # Not chained, for pydantic's text quotes the values.
            raise InvalidDecisionError(subject, _told(error)) from None
    return ApprovalResult(
        type=answer["type"],
        proposal=proposal,
        message=answer["message"],
        value=answer["value"],
        by=answer["by"],
        at=None if at is None else datetime.fromisoformat(at),
    )


def _told(error: ValidationError) -> tuple[str, ...]:
    return tuple(
        f"{'.'.join(str(step) for step in ('proposal', *problem['loc']))}: {problem['type']}"
        for problem in error.errors(include_input=False, include_context=False, include_url=False)
    )
