"""`approval_node`: a node that asks a person about a proposal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from langgraph.types import Command

from agentflow.errors import InvalidInputError
from agentflow.interrupts import request_approval
from agentflow.nodes.state import read
from agentflow.types import DecisionType
from agentflow.versions import declare_parts

_NOT_REQUIRED = "not_required"


class Node(Protocol):
    """A node that needs the state alone."""

    def __call__(self, state: Any) -> Any:
        """Return what is written to the state, and perhaps where to go."""
        ...


def approval_node(
    proposal: str | Callable[[Any], Any],
    *,
    into: str = "approval",
    write_to: str | None = None,
    edges: Mapping[str, str] | None = None,
    title: str | Callable[[Any], str] | None = None,
    allowed: Sequence[DecisionType] = ("approve", "edit", "reject"),
    policy: Mapping[str, Any] | None = None,
    response: Any = None,
    when: Callable[[Any], bool] | None = None,
) -> Node:
    """Make a node that asks a person to approve a proposal and writes down the decision.

    Args:
        proposal: The state key that holds the proposal, or a function of the state that makes it.
        into: The channel that gets the decision: a dict with `type`, `proposal` (as approved or
            edited; act on this value only), `message`, `value`, `by` and `at` (ISO 8601).
        write_to: The channel that gets the proposal once it was approved or edited, so that the
            nodes behind this one need not know that anybody was asked. Nothing is written there if
            it was rejected.
        edges: The node to go to, by the type of the decision; then the graph needs no edge of its
            own behind this one. `edit` and `not_required` go where `approve` goes unless they are
            listed. To have it drawn, give `add_node` the same nodes as `destinations`.
        title: What the reviewer reads first, or a function of the state that returns it.
        allowed: The decisions that may be taken.
        policy: Who may decide, and until when.
        response: A type that an edited proposal must fit; checked before the decision is stored.
        when: If it returns false for the state, nobody is asked, and `type` is `not_required`.

    Returns:
        A node that writes `{into: decision}`.

    Raises:
        InvalidInputError: A decision that may be taken leads nowhere.
    """
    routes = None if edges is None else _routes(edges, allowed, is_optional=when is not None)

    def ask(state: Any) -> Any:
        subject = proposal(state) if callable(proposal) else read(state, proposal)
        decision: dict[str, Any] = {"type": _NOT_REQUIRED, "proposal": subject}
        if when is None or when(state):
            result = request_approval(
                subject,
                title=title(state) if callable(title) else title,
                allowed=allowed,
                policy=policy,
                response=response,
            )
            decision = asdict(result) | {
                "proposal": result.proposal,
                "at": result.at.isoformat() if result.at else None,
            }
        update = {into: decision}
        if write_to is not None and decision["type"] in {"approve", "edit", _NOT_REQUIRED}:
            update[write_to] = decision["proposal"]
        return update if routes is None else Command(update=update, goto=routes[decision["type"]])

    declare_parts(
        ask, proposal, when, title, into, write_to, *allowed, leads_anywhere=routes is not None
    )
    return ask


def _routes(
    edges: Mapping[str, str], allowed: Sequence[DecisionType], *, is_optional: bool
) -> dict[str, str]:
    routes = dict(edges)
    if "approve" in routes:
        routes.setdefault("edit", routes["approve"])
        routes.setdefault(_NOT_REQUIRED, routes["approve"])
    needed = [*allowed, *([_NOT_REQUIRED] if is_optional else [])]
    missing = [each for each in needed if each not in routes]
    unknown = [each for each in edges if each not in {*allowed, _NOT_REQUIRED}]
    found = [f"edges: say where to go after {each!r}" for each in missing]
    found += [f"edges: {each!r} is no decision that is allowed" for each in unknown]
    if found:
        raise InvalidInputError("approval node", tuple(found))
    return routes
