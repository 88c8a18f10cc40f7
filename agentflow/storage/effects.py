"""The journal of effects: an intent before a call, its outcome after it, and what is said of it.

The key of an effect stands outside the envelope only as a hash, under the key of the ring that
seals, so that it does not tell whether a guess at it is right. All keys of the ring are tried when
it is looked for; `repack_request` moves it on when keys are rotated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.database.engine import now as database_now
from agentflow.database.tables import effects, runs, waits
from agentflow.errors import ConflictError, EffectConflictError, NotFoundError
from agentflow.journal import (
    GLOBAL,
    Begun,
    Effect,
    EffectFailure,
    EffectStatus,
    NewEffect,
    Outcome,
    Resolution,
)
from agentflow.storage import effect_steps
from agentflow.storage.rows import (
    Keyed,
    Payloads,
    change_run,
    get_held_run,
    get_run,
    is_held,
)
from agentflow.types import Lease, NewEvent, RunStatus, WaitStatus

CALLABLE = {EffectStatus.NOT_HAPPENED, EffectStatus.NOT_CALLED, EffectStatus.COMPENSATED}
"""Statuses after which a call may be made without asking anybody."""

CHECK = "check"
"""Who resolves what the effect's own function has found out."""
_SHOWN = 5

table = effects
_INSERT = sa.insert(effects)
_FIND = sa.select(effects).where(
    effects.c.tenant == sa.bindparam("of_tenant"),
    effects.c.effect_id == sa.bindparam("named"),
)
_UPDATE = sa.update(effects).where(
    effects.c.tenant == sa.bindparam("of_tenant"),
    effects.c.effect_id == sa.bindparam("named"),
)
_BY_KEY = sa.select(effects).where(
    effects.c.tenant == sa.bindparam("of_tenant"),
    effects.c.scope == sa.bindparam("in_scope"),
    effects.c.key_hash.in_(sa.bindparam("hashes", expanding=True)),
)


def new_row(payloads: Payloads, tenant: str, new: NewEffect) -> dict[str, Any]:
    """Return the columns of an effect that do not depend on the run, its payload sealed."""
    row = {"tenant": tenant, "effect_id": new.id}
    request = {"key": new.key, "arguments": dict(new.arguments)}
    return {
        **row,
        "scope": new.scope,
        "key_hash": _hashes(payloads, new.key)[0],
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


def begin_effect(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    new: NewEffect,
    row: Mapping[str, Any],
    *,
    retake: int | None,
) -> Begun:
    """See `RunStore.begin_effect`; `row` is what `new_row` made of it."""
    if retake is None and len(_hashes(payloads, new.key)) == 1:
        made = effect_steps.begin(connection, payloads, lease, row)
        if made is not None:
            return Begun(effect=_to_effect(made, payloads, new), is_due=True)
    now = database_now(connection)
    run = get_held_run(connection, lease, now)
    found = _find_by_key(connection, payloads, lease.tenant, new)
    mine = {"token": lease.token, "worker": lease.worker, "intended_at": now}
    if found is None:
        whole = {**row, **mine, "run_id": run.run_id, "thread_id": run.thread_id}
        whole |= {"graph": run.graph}
        connection.execute(_INSERT, {**whole, "ended_at": None, "ended_seq": None})
        _log(connection, payloads, run, now, "intended", whole)
        return Begun(effect=_to_effect(whole, payloads, new), is_due=True)
    _check_same(payloads, found, new)
    status = EffectStatus(found.status)
    is_held_elsewhere = status is EffectStatus.INTENDED and _is_under_way(
        connection, found, lease, now
    )
    is_free = status in CALLABLE or (
        retake == found.attempt and status is not EffectStatus.SUCCEEDED and not is_held_elsewhere
    )
    if not is_free:
        return Begun(
            effect=to_effect(found, payloads, strict=True), is_due=False, is_held=is_held_elsewhere
        )
    changes = {
        **mine,
        "status": EffectStatus.INTENDED.value,
        "attempt": found.attempt + 1,
        "timeout": new.timeout,
        "on_in_doubt": new.on_in_doubt,
        "ended_at": None,
        "ended_seq": None,
        "outcome": None,
        "resolved_by": None,
        # Another run of the tenant may have been first to use a global key.
        "run_id": run.run_id,
        "thread_id": run.thread_id,
        "graph": run.graph,
    }
    _update(connection, found, changes)
    whole = {**_columns(found), **changes}
    _log(connection, payloads, run, now, "intended", whole)
    return Begun(effect=_to_effect(whole, payloads, new), is_due=True)


def finish_effect(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    effect_id: str,
    status: EffectStatus,
    sealed: bytes,
    plain: Mapping[str, Any],
) -> bool:
    """See `RunStore.finish_effect`; `sealed` is what `seal_outcome` made of it."""
    if effect_steps.finish(connection, payloads, lease, effect_id, status, sealed):
        return True
    now = database_now(connection)
    run = get_run(connection, lease.tenant, lease.run_id, lock=True)
    row = get_effect(connection, lease.tenant, effect_id)
    if row.status != EffectStatus.INTENDED or row.token != lease.token:
        _keep_late(connection, payloads, run, row, now, plain)
        return False
    seq = _log(connection, payloads, run, now, status.value, _columns(row))
    changes = {
        "status": status.value,
        "outcome": sealed,
        "ended_at": now,
        "ended_seq": seq,
    }
    _update(connection, row, changes)
    _note_undone(connection, row, status)
    if not is_held(run, lease, now):
        _settle_waits(connection, payloads, row, now)
    return True


def resolve_effect(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    effect_id: str,
    resolution: Resolution,
) -> Effect:
    """See `RunStore.resolve_effect`."""
    now = database_now(connection)
    row = get_effect(connection, tenant, effect_id)
    run = get_run(connection, tenant, row.run_id, lock=True)
    row = get_effect(connection, tenant, effect_id)
    resolve(connection, payloads, run, row, now, resolution)
    _settle_waits(connection, payloads, row, now)
    return to_effect(get_effect(connection, tenant, effect_id), payloads)


def resolve(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    row: sa.Row[Any],
    now: datetime,
    resolution: Resolution,
) -> None:
    """Write down what somebody says of an effect; its run is locked.

    Raises:
        ConflictError: What came of it is known, or it is under way.
    """
    status = EffectStatus(row.status)
    is_known = status in {EffectStatus.SUCCEEDED, *CALLABLE}
    is_running = status is EffectStatus.INTENDED and _has_living_owner(run, row, now)
    if is_known or (is_running and resolution.by != CHECK):
        state = "under way" if is_running else status.value
        raise ConflictError(
            f"effect {row.effect_id!r} is not in doubt: it is {state}; read it again"
        )
    told = EffectStatus.SUCCEEDED if resolution.happened else EffectStatus.NOT_HAPPENED
    key = {"tenant": row.tenant, "effect_id": row.effect_id}
    facts = {"happened": resolution.happened, "by": resolution.by, **resolution.facts}
    seq = _log(connection, payloads, run, now, "resolved", _columns(row), facts)
    comment = resolution.comment
    changes = {
        "status": told.value,
        "outcome": payloads.dump({"value": resolution.outcome}, effects.c.outcome, key)
        if resolution.happened
        else None,
        "ended_at": now,
        "ended_seq": seq,
        "resolved_by": resolution.by,
        "comment": None if comment is None else payloads.dump(comment, effects.c.comment, key),
    }
    _update(connection, row, changes)
    _note_undone(connection, row, told)


def get_effect(connection: Connection, tenant: str, effect_id: str) -> sa.Row[Any]:
    """Read an effect's row; `NotFoundError` if there is none."""
    row = connection.execute(_FIND, {"of_tenant": tenant, "named": effect_id}).first()
    if row is None:
        raise NotFoundError("effect", effect_id)
    return row


def seal_outcome(
    payloads: Payloads, tenant: str, effect_id: str, outcome: Outcome
) -> tuple[bytes, dict[str, Any]]:
    """Return an outcome as it is stored, and as it is kept if it comes too late."""
    key = {"tenant": tenant, "effect_id": effect_id}
    plain = {"value": outcome.value, "failure": _failure_to_plain(outcome.failure)}
    return payloads.dump(plain, effects.c.outcome, key), {"status": outcome.status.value, **plain}


def to_effect(row: Keyed, payloads: Payloads, *, strict: bool = False) -> Effect:
    """Build the record of an effect; `strict` refuses an outcome with unknown classes."""
    columns = _columns(row)
    request = payloads.load(effects.c.request, row)
    return _record(columns, payloads, request["key"], request["arguments"], row, strict=strict)


def _to_effect(row: Mapping[str, Any], payloads: Payloads, new: NewEffect) -> Effect:
    """Build the record of an intent that was just written."""
    whole = {"resolved_by": None, "comment": None, "outcome": None, "late": None, **row}
    whole = {"ended_at": None, "ended_seq": None, **whole}
    return _record(whole, payloads, new.key, new.arguments, whole, strict=True)


def _record(
    columns: Mapping[str, Any],
    payloads: Payloads,
    key: str,
    arguments: Mapping[str, Any],
    row: Keyed,
    *,
    strict: bool,
) -> Effect:
    outcome = payloads.load(effects.c.outcome, row, strict=strict) or {}
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
        status=EffectStatus(columns["status"]),
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
        comment=payloads.load(effects.c.comment, row),
        late=tuple(payloads.load(effects.c.late, row) or ()),
    )


def repack_request(payloads: Payloads, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the columns that depend on the current key; `None` if they are that already."""
    if payloads.strict.is_current(row["request"]):
        return None
    request = payloads.load(effects.c.request, row)
    body = payloads.unseal(effects.c.request, row)
    return {
        "request": payloads.seal(body, effects.c.request, row),
        "key_hash": _hashes(payloads, request["key"])[0],
    }


def _find_by_key(
    connection: Connection, payloads: Payloads, tenant: str, new: NewEffect
) -> sa.Row[Any] | None:
    named = {
        "of_tenant": tenant,
        "in_scope": new.scope,
        "hashes": _hashes(payloads, new.key),
    }
    return connection.execute(_BY_KEY, named).first()


def _hashes(payloads: Payloads, key: str) -> list[str]:
    """Return what may stand in `key_hash` for a key: the current hash, then older ones."""
    data = key.encode("utf-8", "surrogatepass")
    ring = payloads.strict.keys
    if ring is None:
        return [hashlib.sha256(data).hexdigest()]
    found = [each.digest(data).hex() for each in ring.known()]
    if ring.accept_plaintext:
        found.append(hashlib.sha256(data).hexdigest())
    return found


def _check_same(payloads: Payloads, row: sa.Row[Any], new: NewEffect) -> None:
    request = payloads.load(effects.c.request, row)
    asked = payloads.redacted({"key": new.key, "arguments": dict(new.arguments)}, effects.c.request)
    differs = list(differences(request["arguments"], asked["arguments"], ""))
    if row.name != new.name:
        differs.insert(0, "function")
    if differs:
        raise EffectConflictError(new.name, "run" if new.scope else "", tuple(differs[:_SHOWN]))


def differences(stored: Any, given: Any, path: str) -> list[str]:
    """Return the paths at which two plain values differ, without what stands there."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        names = sorted({*stored, *given})
        return [
            found
            for name in names
            for found in (
                differences(stored[name], given[name], f"{path}.{name}" if path else str(name))
                if name in stored and name in given
                else [f"{path}.{name}" if path else str(name)]
            )
        ]
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        return [
            found
            for i, (one, other) in enumerate(zip(stored, given, strict=True))
            for found in differences(one, other, f"{path}[{i}]")
        ]
    is_same = stored == given and isinstance(stored, bool) == isinstance(given, bool)
    return [] if is_same else [path or "arguments"]


def _is_under_way(connection: Connection, row: sa.Row[Any], lease: Lease, now: datetime) -> bool:
    """Whether another run, which lives, is at an effect."""
    if row.run_id == lease.run_id:
        return False  # an earlier attempt, or this one, which knows
    owner = connection.execute(
        sa.select(runs).where(runs.c.tenant == row.tenant, runs.c.run_id == row.run_id)
    ).first()
    return owner is not None and _has_living_owner(owner, row, now)


def _has_living_owner(run: sa.Row[Any], row: sa.Row[Any], now: datetime) -> bool:
    return (
        run.status == RunStatus.RUNNING
        and run.token == row.token
        and run.lease_expires_at is not None
        and run.lease_expires_at > now
    )


def _keep_late(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    row: sa.Row[Any],
    now: datetime,
    plain: Mapping[str, Any],
) -> None:
    """Store an outcome that nobody waits for any more, and raise the alarm."""
    if plain["status"] == EffectStatus.NOT_CALLED:
        return  # what was not called does not contradict anybody
    key = {"tenant": row.tenant, "effect_id": row.effect_id}
    late = [*(payloads.load(effects.c.late, row) or ()), {**plain, "at": now.isoformat()}]
    _update(connection, row, {"late": payloads.dump(late, effects.c.late, key)})
    facts = {"late": plain["status"], "stands": row.status}
    changes: dict[str, Any] = {}
    if not RunStatus(run.status).is_ended and run.paused_at is None:
        changes["paused_at"] = now
    _log(connection, payloads, run, now, "late_outcome", _columns(row), facts, **changes)


def _settle_waits(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime
) -> None:
    """Close the questions about an effect that is not in doubt any more, and let its run go on."""
    run = get_run(connection, row.tenant, row.run_id, lock=True)
    pending = [
        waits.c.tenant == row.tenant,
        waits.c.run_id == row.run_id,
        waits.c.kind == "effect",
        waits.c.interrupt_id == question_id(row.effect_id, row.attempt),
        waits.c.status == WaitStatus.PENDING.value,
    ]
    ids = connection.execute(sa.select(waits.c.wait_id).where(*pending)).scalars().all()
    if not ids:
        return
    closed = {"status": WaitStatus.SUPERSEDED.value, "decided_at": now}
    connection.execute(sa.update(waits).where(*pending).values(**closed))
    log = [NewEvent(type="approval.superseded", data={"approval": each}) for each in ids]
    if run.status == RunStatus.WAITING:
        change_run(
            connection,
            run,
            payloads,
            now,
            status=RunStatus.QUEUED,
            log=log,
            wake_reason="approval",
            available_at=payloads.time(now),
        )
    else:
        change_run(connection, run, payloads, now, log=log)


def give_up(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    row: sa.Row[Any],
    now: datetime,
    by: str,
) -> None:
    """Leave an effect in doubt as it is, whose run is being undone: nobody will know."""
    seq = _log(connection, payloads, run, now, "given_up", _columns(row), {"by": by})
    changes = {"status": EffectStatus.FAILED.value, "ended_at": now, "ended_seq": seq}
    _update(connection, row, {**changes, "resolved_by": by})


def has_any_to_undo(connection: Connection, run: sa.Row[Any]) -> bool:
    """Whether a run has effects that can be undone and are not, or of which nobody knows."""
    return _exists(connection, run, _UNDOABLE)


def is_all_undone(connection: Connection, run: sa.Row[Any]) -> bool:
    """Whether every effect of a run that can be undone is."""
    return not _exists(connection, run, _UNDOABLE)


_UNDOABLE = {EffectStatus.SUCCEEDED.value, EffectStatus.INTENDED.value}


def _exists(connection: Connection, run: sa.Row[Any], statuses: set[str]) -> bool:
    query = sa.select(effects.c.seq).where(
        effects.c.tenant == run.tenant,
        effects.c.run_id == run.run_id,
        effects.c.compensate.is_not(None),
        effects.c.status.in_(sorted(statuses)),
    )
    return connection.execute(query.limit(1)).first() is not None


def _note_undone(connection: Connection, row: sa.Row[Any], status: EffectStatus) -> None:
    """Note on an effect, which a compensation names, that it is undone."""
    if row.kind != "compensation" or status is not EffectStatus.SUCCEEDED:
        return
    named = {"of_tenant": row.tenant, "named": row.task_id}
    connection.execute(_UPDATE, {**named, "status": EffectStatus.COMPENSATED.value})


def question_id(effect_id: str, attempt: int) -> str:
    """Name the question whether this call of an effect happened."""
    return f"{effect_id}:{attempt}"


def _update(connection: Connection, row: sa.Row[Any], changes: Mapping[str, Any]) -> None:
    named = {"of_tenant": row.tenant, "named": row.effect_id}
    connection.execute(_UPDATE, {**named, **changes})


def _log(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    now: datetime,
    what: str,
    effect: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> int:
    """Append an event about an effect to its run's, and return the event's number."""
    data = {
        "effect": effect["effect_id"],
        "name": effect["name"],
        "node": effect["node"],
        "attempt": effect["attempt"],
        **(facts or {}),
    }
    event = NewEvent(type=f"effect.{what}", data=data)
    change_run(connection, run, payloads, now, log=[event], **changes)
    seq: int = run.event_seq + 1
    return seq


def _columns(row: Keyed) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", row._mapping) if isinstance(row, sa.Row) else row


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


def listed(tenant: str, *, run_id: str | None, scope: str | None) -> sa.Select[Any]:
    """Return the query for rows of effects, in the order of their first intents."""
    query = sa.select(effects).where(effects.c.tenant == tenant).order_by(effects.c.seq)
    if scope is not None:
        query = query.where(effects.c.scope == scope)
    if run_id is not None:
        query = query.where(effects.c.run_id == run_id)
    return query


def doomed(
    tenant: str,
    ended_before: datetime,
    graphs: Collection[tuple[str, str]],
    *,
    are_others: bool,
    limit: int,
) -> sa.Select[Any]:
    """Return the query for the numbers of effects that need not be kept."""
    owner, fork = runs.alias("owner"), runs.alias("fork")
    is_shared = sa.exists().where(
        fork.c.tenant == effects.c.tenant,
        fork.c.root == effects.c.scope,
        fork.c.ended_at.is_(None),
    )
    is_named = sa.tuple_(owner.c.graph, owner.c.version).in_(sorted(graphs) or [("", "")])
    return (
        sa.select(effects.c.seq)
        .join(
            owner,
            sa.and_(owner.c.tenant == effects.c.tenant, owner.c.run_id == effects.c.run_id),
        )
        .where(
            effects.c.tenant == tenant,
            effects.c.scope != GLOBAL,
            owner.c.ended_at < ended_before,
            owner.c.is_dead_letter.is_(False),
            sa.not_(is_named) if are_others else is_named,
            sa.not_(is_shared),
        )
        .limit(limit)
    )


def prune_effects(connection: Connection, payloads: Payloads, doomed: sa.Select[Any]) -> int:
    """See `RunStore.prune_effects`; `doomed` is the query of that name."""
    del payloads
    numbers = connection.execute(doomed).scalars().all()
    connection.execute(sa.delete(effects).where(effects.c.seq.in_(numbers)))
    return len(numbers)
