"""Rows of effects as records, and how what they hold is sealed.

The key of an effect stands outside the envelope only as a hash, under the key of the ring that
seals, so that it does not tell whether a guess at it is right. All keys of the ring are tried when
it is looked for; `repack_request` moves it on when keys are rotated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.codec import is_apart
from agentflow.database.tables import effects
from agentflow.errors import NotFoundError
from agentflow.journal import Effect, EffectFailure, EffectStatus, NewEffect, Outcome
from agentflow.storage.effect_objects import open_apart
from agentflow.storage.marks import mark, of_effect, of_redacted_key
from agentflow.storage.payloads import Keyed, Payloads, member_of, place_of

_FIND = sa.select(effects).where(
    effects.c.tenant == sa.bindparam("of_tenant"),
    effects.c.effect_id == sa.bindparam("named"),
)
_UPDATE = sa.update(effects).where(
    effects.c.tenant == sa.bindparam("of_tenant"),
    effects.c.effect_id == sa.bindparam("named"),
)


def get_effect(connection: Connection, tenant: str, effect_id: str) -> sa.Row[Any]:
    """Read an effect's row; `NotFoundError` if there is none."""
    row = connection.execute(_FIND, {"of_tenant": tenant, "named": effect_id}).first()
    if row is None:
        raise NotFoundError("effect", effect_id)
    return row


def update_effect(connection: Connection, row: sa.Row[Any], changes: Mapping[str, Any]) -> None:
    """Change columns of an effect."""
    named = {"of_tenant": row.tenant, "named": row.effect_id}
    connection.execute(_UPDATE, {**named, **changes})


def new_row(payloads: Payloads, tenant: str, new: NewEffect) -> dict[str, Any]:
    """Return the columns of an effect that do not depend on the run, its payload sealed."""
    row = {"tenant": tenant, "effect_id": new.id}
    request = {"key": new.key, "arguments": dict(new.arguments)}
    return {
        **row,
        "scope": new.scope,
        "key_hash": key_hashes(payloads, new.key)[0],
        "kind": new.kind,
        "name": new.name,
        "compensate": new.compensate,
        "ns": new.ns,
        "task_id": new.task_id,
        "node": new.node,
        "on_in_doubt": new.on_in_doubt,
        "timeout": new.timeout,
        "status": EffectStatus.INTENDED.value,
        "attempt": 1,
        "request": payloads.dump(request, effects.c.request, row),
    }


def outcome_body(payloads: Payloads, row: Keyed, outcome: Outcome) -> tuple[bytes, dict[str, Any]]:
    """Return an outcome as it is stored, not sealed yet, and as it is kept if it comes too late."""
    plain = {"value": outcome.value, "failure": _failure_to_plain(outcome.failure)}
    return payloads.body(plain, effects.c.outcome, row), {"status": outcome.status.value, **plain}


def to_effect(row: Keyed, payloads: Payloads, *, strict: bool = False) -> Effect:
    """Build the record of an effect; `strict` refuses an outcome with unknown classes."""
    columns = columns_of(row)
    request = payloads.load(effects.c.request, columns)
    return _record(columns, payloads, request["key"], request["arguments"], strict=strict)


def made_effect(row: Mapping[str, Any], payloads: Payloads, new: NewEffect) -> Effect:
    """Build the record of an intent that was just written."""
    whole = {"resolved_by": None, "comment": None, "outcome": None, "late": None, **row}
    whole = {"ended_at": None, "ended_seq": None, **whole}
    return _record(whole, payloads, new.key, new.arguments, strict=True)


def _record(
    columns: Mapping[str, Any],
    payloads: Payloads,
    key: str,
    arguments: Mapping[str, Any],
    *,
    strict: bool,
) -> Effect:
    outcome = _outcome_of(payloads, columns, strict=strict)
    return Effect(
        id=columns["effect_id"],
        scope=columns["scope"],
        run_id=columns["run_id"],
        thread_id=columns["thread_id"],
        tenant=columns["tenant"],
        graph=columns["graph"],
        kind=columns["kind"],
        name=columns["name"],
        key=key,
        arguments=arguments,
        ns=columns["ns"],
        task_id=columns["task_id"],
        node=columns["node"],
        status=member_of(EffectStatus, effects.c.status, columns),
        attempt=columns["attempt"],
        worker=columns["worker"],
        token=columns["token"],
        on_in_doubt=columns["on_in_doubt"],
        intended_at=columns["intended_at"],
        timeout=columns["timeout"],
        ended_at=columns["ended_at"],
        order=columns["ended_seq"],
        compensate=columns["compensate"],
        outcome=outcome.get("value"),
        failure=_failure_of(outcome.get("failure")),
        resolved_by=columns["resolved_by"],
        comment=payloads.load(effects.c.comment, columns),
        late=tuple(payloads.load(effects.c.late, columns) or ()),
    )


def _outcome_of(payloads: Payloads, row: Keyed, *, strict: bool) -> Mapping[str, Any]:
    data = columns_of(row)["outcome"]
    if data is None or not is_apart(data):
        return payloads.load(effects.c.outcome, row, strict=strict) or {}
    codec = payloads.strict if strict else payloads.lenient
    where = place_of(effects.c.outcome, row)
    plain: Mapping[str, Any] = codec.deserialize(open_apart(payloads, row), where=where)
    return plain


def effect_marks(payloads: Payloads, row: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what an event that changes an effect says of it."""
    effect_id = row["effect_id"]
    found = {of_effect(effect_id): mark(effects, row)}
    if payloads.strict.redact is not None:
        found[of_redacted_key(effect_id)] = b"1"
    return found


def repack_request(payloads: Payloads, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the columns that depend on the current key; `None` if they are that already."""
    if payloads.strict.is_current(row["request"]):
        return None
    request = payloads.load(effects.c.request, row)
    body = payloads.unseal(effects.c.request, row)
    hashes = key_hashes(payloads, request["key"])
    # Of a key that was redacted only the old hash is known; it is found as long as its key is.
    return {
        "request": payloads.seal(body, effects.c.request, row),
        "key_hash": hashes[0] if row["key_hash"] in hashes else row["key_hash"],
    }


def key_hashes(payloads: Payloads, key: str) -> list[str]:
    """Return what may stand in `key_hash` for a key: the current hash, then older ones."""
    data = key.encode("utf-8", "surrogatepass")
    ring = payloads.strict.keys
    if ring is None:
        return [hashlib.sha256(data).hexdigest()]
    found = [each.digest(data).hex() for each in ring.known()]
    if ring.accept_plaintext:
        found.append(hashlib.sha256(data).hexdigest())
    return found


def columns_of(row: Keyed) -> Mapping[str, Any]:
    """Return the columns of a row by name."""
    if isinstance(row, sa.Row):
        # Each look into the row itself costs ten into a dictionary.
        return dict(zip(row._fields, row, strict=True))
    return row


def _failure_to_plain(failure: EffectFailure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {
        "type": failure.type,
        "message": failure.message,
        "args": None if failure.args is None else list(failure.args),
        "state": None if failure.state is None else dict(failure.state),
        "is_final": failure.is_final,
    }


def _failure_of(plain: Mapping[str, Any] | None) -> EffectFailure | None:
    if plain is None:
        return None
    args = plain["args"]
    return EffectFailure(**{**plain, "args": None if args is None else tuple(args)})
