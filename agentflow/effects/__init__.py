"""Effects: calls to the outside world that happen once, or are known to be in doubt.

`definition.py` has the decorator, `journal.py` what it does in an attempt, `places.py` the keys of
calls that have none of their own, `failures.py` exceptions on record, `sagas.py` what undoes them
again, `transaction.py` and `outside.py` those that commit in the user's own database. A node of our
own that calls something uses `run_effect`, which needs no decorated function:

    answer = await run_effect(
        call, name="agentflow:llm", arguments={"messages": plain}, on_in_doubt="retry"
    )

Whoever drives an attempt makes a `Journal` for it, enters `recording(journal)`, tells its `places`
of each call of a node, and asks it for `doubts` when the graph has stopped. The records themselves
are in `agentflow.journal`, and stored by the run store.
"""

from __future__ import annotations

from agentflow.effects.definition import effect, effect_context, find_definition, run_effect
from agentflow.effects.journal import Journal, current_journal, recording
from agentflow.effects.places import NAMES, SHIFT, Places, names_before, shift_of
from agentflow.effects.policy import EffectContext, Happened, InDoubt, Policy
from agentflow.effects.sagas import compensate, count_undone

__all__ = [
    "NAMES",
    "SHIFT",
    "EffectContext",
    "Happened",
    "InDoubt",
    "Journal",
    "Places",
    "Policy",
    "compensate",
    "count_undone",
    "current_journal",
    "effect",
    "effect_context",
    "find_definition",
    "names_before",
    "recording",
    "run_effect",
    "shift_of",
]
