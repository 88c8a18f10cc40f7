"""What a reviewer is asked, and the hash that names it, as the two columns of a wait.

The hash of what is shown stands inside the envelope, beside the request. The column outside has a
hash of that hash, under the key that the envelope is sealed by, so that it does not tell whether a
guess at the question is right; and it begins with the version of this form. Before that (no
version) the envelope had the request alone, and the column the hash itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import ormsgpack
import sqlalchemy as sa

from agentflow.codec import digest_of
from agentflow.database.tables import waits
from agentflow.errors import HashMismatchError
from agentflow.storage.payloads import Keyed, Payloads, member_of, place_of
from agentflow.types import Approval, ApprovalRequest, NewWait, WaitStatus

_VERSION: Final = "2:"
_PAIR: Final = b"\x92"
"""How MessagePack begins a list of two."""


def to_approval(row: sa.Row[Any], payloads: Payloads) -> Approval:
    """Build the record of a wait."""
    request, proposal_hash = unpack_question(payloads, row)
    return Approval(
        id=row.wait_id,
        run_id=row.run_id,
        thread_id=row.thread_id,
        tenant=row.tenant,
        graph=row.graph,
        ns=row.ns,
        task_id=row.task_id,
        interrupt_id=row.interrupt_id,
        checkpoint_id=row.checkpoint_id,
        answers_recorded=row.answers_recorded,
        kind=row.kind,
        request=request,
        proposal_hash=proposal_hash,
        version=row.version,
        status=member_of(WaitStatus, waits.c.status, row),
        created_at=row.created_at,
        decision=payloads.load(waits.c.decision, row),
        decided_by=row.decided_by,
        decided_at=row.decided_at,
        comment=payloads.load(waits.c.comment, row),
    )


def redacted_question(payloads: Payloads, question: NewWait, run: sa.Row[Any]) -> NewWait:
    """Return a question of a run as it is to be stored."""
    shown = payloads.redacted(question.request, waits.c.request)
    if shown == question.request:
        return question
    # What is not stored must not be found out by its hash either.
    body = payloads.serialize(shown, waits.c.request, _key(question, run))
    return replace(question, request=shown, proposal_hash=digest_of(body).hex())


def pack_question(payloads: Payloads, question: NewWait, run: sa.Row[Any]) -> dict[str, Any]:
    """Return the columns of a question of a run, as it is to be stored."""
    row = _key(question, run)
    body = payloads.serialize(question.request, waits.c.request, row)
    return _sealed(payloads, body, question.proposal_hash, row)


def unpack_question(payloads: Payloads, row: Keyed) -> tuple[ApprovalRequest, str]:
    """Verify a question, and return it with the hash of what is shown.

    Raises:
        HashMismatchError: It is not what was asked, or is not named by its hash any more.
    """
    sealed, outside = _columns(row)
    stored = payloads.load(waits.c.request, row)
    if not isinstance(stored, list):
        if outside.startswith(_VERSION):
            raise HashMismatchError(place_of(waits.c.proposal_hash, row))
        return stored, outside
    request, named = stored
    if outside != _outside(payloads, sealed, named):
        raise HashMismatchError(place_of(waits.c.proposal_hash, row))
    return request, named


def repack_question(payloads: Payloads, row: Keyed) -> dict[str, Any] | None:
    """Return the columns of a stored question as they would be now; `None` if they are that."""
    sealed, outside = _columns(row)
    is_new = outside.startswith(_VERSION)
    if is_new and payloads.strict.is_current(sealed):
        return None
    body = payloads.unseal(waits.c.request, row)
    if not is_new:
        return _sealed(payloads, body, outside, row)
    _, named = unpack_question(payloads, row)
    return _columns_of(payloads, payloads.seal(body, waits.c.request, row), named)


def _key(question: NewWait, run: sa.Row[Any]) -> dict[str, Any]:
    return {"tenant": run.tenant, "wait_id": question.wait_id}


def _sealed(payloads: Payloads, body: bytes, named: str, row: Keyed) -> dict[str, Any]:
    pair = _PAIR + body + ormsgpack.packb(named)
    return _columns_of(payloads, payloads.seal(pair, waits.c.request, row), named)


def _columns_of(payloads: Payloads, sealed: bytes, named: str) -> dict[str, Any]:
    return {"request": sealed, "proposal_hash": _outside(payloads, sealed, named)}


def _outside(payloads: Payloads, sealed: bytes, named: str) -> str:
    return _VERSION + payloads.strict.hash_like(sealed, named.encode()).hex()


def _columns(row: Keyed) -> tuple[bytes, str]:
    if isinstance(row, sa.Row):
        return row.request, row.proposal_hash
    return row["request"], row["proposal_hash"]
