"""Questions to people: asking them inside a node, and reading, checking and answering them.

`request_approval` asks. The other functions are pure and know no database: `to_request` reads what
an interrupt carries, whoever raised it; `parse_decision` and `validate` check an answer before the
graph sees it; `encode` turns it into what the interrupt's author expects; `proposal_hash` names
what was shown; `Asked` keeps an answer from another question. Waits as rows, and who may resolve
them, belong to the run store.
"""

from __future__ import annotations

from agentflow.interrupts.decisions import parse_decision, validate
from agentflow.interrupts.recorded import Asked
from agentflow.interrupts.request import request_approval
from agentflow.interrupts.shapes import encode, proposal_hash, to_request

__all__ = [
    "Asked",
    "encode",
    "parse_decision",
    "proposal_hash",
    "request_approval",
    "to_request",
    "validate",
]
