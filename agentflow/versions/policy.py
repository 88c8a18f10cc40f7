"""What is done about a change that a run can still reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from agentflow.errors import ChangeKind, InvalidInputError
from agentflow.versions.comparison import Change

ChangeAction = Literal["refuse", "warn", "accept"]
"""`refuse`: the run does not go on. `warn`: it does, with a warning. `accept`: it does."""

_SEVERITY: tuple[ChangeAction, ...] = ("accept", "warn", "refuse")


@dataclass(frozen=True, slots=True)
class ChangePolicy:
    """By kind of change, what is done about it; anything else is refused."""

    default: ChangeAction = "refuse"
    of_kind: Mapping[ChangeKind, ChangeAction] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> ChangePolicy:
        """Return the policy that an option stands for: one for all, or by kind.

        Raises:
            InvalidInputError: It is none.
        """
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        actions = ", ".join(get_args(ChangeAction))
        if isinstance(given, str):
            if given not in get_args(ChangeAction):
                raise InvalidInputError("graph", (f"on_change: must be one of {actions}",))
            return cls(default=given)  # type: ignore[arg-type]  # it is one of them
        if not isinstance(given, Mapping):
            raise InvalidInputError("graph", ("on_change: must be text, or a mapping by kind",))
        kinds = get_args(ChangeKind)
        problems = [
            f"on_change: there is no kind {kind!r}; kinds are: {', '.join(kinds)}"
            for kind in given
            if kind not in kinds
        ]
        problems += [
            f"on_change[{kind!r}]: must be one of {actions}"
            for kind, action in given.items()
            if action not in get_args(ChangeAction)
        ]
        if problems:
            raise InvalidInputError("graph", tuple(problems))
        return cls(of_kind=dict(given))

    def action(self, change: Change) -> ChangeAction:
        """Return what is done about one change; nothing about what lies behind."""
        return self.of_kind.get(change.kind, self.default) if change.is_ahead else "accept"

    def verdict(self, changes: tuple[Change, ...]) -> ChangeAction:
        """Return what is done about several: the strictest that holds for one of them."""
        return max(map(self.action, changes), key=_SEVERITY.index, default="accept")
