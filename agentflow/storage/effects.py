"""The journal of effects: an intent before a call, its outcome after it, what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentflow.apart import Sealed
from agentflow.database.engine import now as database_now
from agentflow.database.tables import effects, runs, waits
from agentflow.errors import ConflictError, EffectConflictError, PayloadTooLargeError
from agentflow.journal import (
    CALLABLE,
    CHECK,
    GLOBAL,
    Begun,
    EffectStatus,
    NewEffect,
    Resolution,
    differences,
    question_ids,
)
from agentflow.storage import effect_objects, effect_steps
from agentflow.storage.effect_queries import is_all_undone
from agentflow.storage.effect_rows import (
    columns_of,
    effect_marks,
    get_effect,
    key_hashes,
    made_effect,
    update_effect,
)
from agentflow.storage.endings import COMPENSATED, PARTIALLY_COMPENSATED
from agentflow.storage.events import lock_log
from agentflow.storage.letters import undo_again
from agentflow.storage.marks import wait_event
from agentflow.storage.payloads import Payloads
from agentflow.storage.rows import change_run, get_held_run, get_run, is_held
from agentflow.types import Lease, NewEvent, RunStatus, WaitStatus

_SHOWN = 5

_INSERT = sa.insert(effects)
_BY_KEY = sa.select(effects).where(
    effects.c.tenant == sa.bindparam("of_tenant"),
    effects.c.scope == sa.bindparam("in_scope"),
    effects.c.key_hash.in_(sa.bindparam("hashes", expanding=True)),
)


def begin_effect(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    new: NewEffect,
    row: Mapping[str, Any],
    *,
    retake: int | None,
) -> Begun | tuple[sa.Row[Any], bool]:
    """See `RunStore.begin_effect`; `row` is what `new_row` made of it.

    What is known already is returned as its row, and whether it is held, to be read by the caller.
    """
    if retake is None and len(key_hashes(payloads, new.key)) == 1:
        made = effect_steps.begin(connection, payloads, lease, row)
        if made is not None:
            return Begun(effect=made_effect(made, payloads, new), is_due=True)
    now = database_now(connection)
    run = get_held_run(connection, lease, now)
    if new.scope == GLOBAL and len(key_hashes(payloads, new.key)) > 1:
        # Under two keys it has two hashes, which the database does not know to be one.
        lock_log(connection, lease.tenant)
    found = _find_by_key(connection, payloads, lease.tenant, new)
    mine = {"token": lease.token, "worker": lease.worker, "intended_at": now}
    if found is None:
        whole = {**row, **mine, "run_id": run.run_id, "thread_id": run.thread_id}
        whole |= {"graph": run.graph}
        connection.execute(_INSERT, {**whole, "ended_at": None, "ended_seq": None})
        _log(connection, payloads, run, now, "intended", whole)
        return Begun(effect=made_effect(whole, payloads, new), is_due=True)
    _check_same(payloads, found, new)
    status = EffectStatus(found.status)
    is_held_elsewhere = status is EffectStatus.INTENDED and _is_under_way(
        connection, found, lease, now
    )
    is_free = status in CALLABLE or (
        retake == found.attempt and status is not EffectStatus.SUCCEEDED and not is_held_elsewhere
    )
    if not is_free:
        return found, is_held_elsewhere
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
    update_effect(connection, found, changes)
    whole = {**columns_of(found), **changes}
    _log(connection, payloads, run, now, "intended", whole)
    return Begun(effect=made_effect(whole, payloads, new), is_due=True)


def finish_effect(
    connection: Connection,
    payloads: Payloads,
    lease: Lease,
    effect_id: str,
    status: EffectStatus,
    sealed: Sealed,
    plain: Mapping[str, Any],
) -> bool | None:
    """See `RunStore.finish_effect`; `None`, and nothing changes, if its object was collected.

    `plain` is the outcome as it is kept if it comes too late.
    """
    is_usual = not sealed.object
    if is_usual and effect_steps.finish(
        connection, payloads, lease, effect_id, status, sealed.data
    ):
        return True
    now = database_now(connection)
    run = get_run(connection, lease.tenant, lease.run_id, lock=True)
    row = get_effect(connection, lease.tenant, effect_id)
    # Tokens are a thread's: another run that calls under the same key may have the same one.
    is_own = row.run_id == lease.run_id and row.token == lease.token
    if row.status != EffectStatus.INTENDED or not is_own:
        _keep_late(connection, payloads, run, row, now, plain)
        return False
    name = sealed.object
    if name and not effect_objects.hold(connection, payloads, row.seq, row.attempt, name):
        return None
    changes = {
        "status": status.value,
        "outcome": sealed.data,
        "ended_at": now,
        "ended_seq": run.event_seq + 1,
    }
    update_effect(connection, row, changes)
    whole = {**columns_of(row), **changes}
    undone = _note_undone(connection, row, status)
    _log(connection, payloads, run, now, status.value, whole, undone=undone)
    if not is_held(run, lease, now):
        _settle_waits(connection, payloads, row, now)
    return True


def resolve_effect(
    connection: Connection,
    payloads: Payloads,
    tenant: str,
    effect_id: str,
    resolution: Resolution,
) -> sa.Row[Any]:
    """See `RunStore.resolve_effect`."""
    now = database_now(connection)
    row = get_effect(connection, tenant, effect_id)
    run = get_run(connection, tenant, row.run_id, lock=True)
    row = get_effect(connection, tenant, effect_id)
    resolve(connection, payloads, run, row, now, resolution)
    _settle_waits(connection, payloads, row, now)
    if row.kind == "compensation":
        _settle_saga(connection, payloads, row, now, happened=resolution.happened)
    return get_effect(connection, tenant, effect_id)


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
    if status is EffectStatus.SUCCEEDED and resolution.happened:
        # Of a run that has failed on it, what a person said may be corrected.
        is_told = row.resolved_by not in {None, CHECK}
        is_known = not (is_told and run.status == RunStatus.FAILED)
    is_running = status is EffectStatus.INTENDED and _has_living_owner(run, row, now)
    if is_known or (is_running and resolution.by != CHECK):
        state = "under way" if is_running else status.value
        raise ConflictError(
            f"effect {row.effect_id!r} is not in doubt: it is {state}; read it again"
        )
    told = EffectStatus.SUCCEEDED if resolution.happened else EffectStatus.NOT_HAPPENED
    key = {"tenant": row.tenant, "effect_id": row.effect_id}
    facts = {"happened": resolution.happened, "by": resolution.by, **resolution.facts}
    comment = resolution.comment
    changes = {
        "status": told.value,
        "outcome": payloads.dump({"value": resolution.outcome}, effects.c.outcome, key)
        if resolution.happened
        else None,
        "ended_at": now,
        "ended_seq": run.event_seq + 1,
        "resolved_by": resolution.by,
        "comment": None if comment is None else payloads.dump(comment, effects.c.comment, key),
    }
    update_effect(connection, row, changes)
    effect_objects.release(connection, [row.seq])
    undone = _note_undone(connection, row, told)
    whole = {**columns_of(row), **changes}
    _log(connection, payloads, run, now, "resolved", whole, facts, undone=undone)


def _find_by_key(
    connection: Connection, payloads: Payloads, tenant: str, new: NewEffect
) -> sa.Row[Any] | None:
    named = {
        "of_tenant": tenant,
        "in_scope": new.scope,
        "hashes": key_hashes(payloads, new.key),
    }
    return connection.execute(_BY_KEY, named).first()


def _check_same(payloads: Payloads, row: sa.Row[Any], new: NewEffect) -> None:
    request = payloads.load(effects.c.request, row)
    asked = payloads.redacted({"key": new.key, "arguments": dict(new.arguments)}, effects.c.request)
    differs = list(differences(request["arguments"], asked["arguments"], ""))
    if row.name != new.name:
        differs.insert(0, "function")
    if differs:
        raise EffectConflictError(new.name, "run" if new.scope else "", tuple(differs[:_SHOWN]))


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
    before = payloads.load(effects.c.late, row) or ()
    entry = {**plain, "at": now.isoformat()}
    try:
        late = payloads.dump([*before, entry], effects.c.late, key)
    except PayloadTooLargeError:
        # The alarm matters more than the value.
        entry |= {"value": None, "is_too_large": True}
        late = payloads.dump([*before, entry], effects.c.late, key)
    update_effect(connection, row, {"late": late})
    facts = {"late": plain["status"], "stands": row.status}
    changes: dict[str, Any] = {}
    if not RunStatus(run.status).is_ended and run.paused_at is None:
        changes["paused_at"] = now
    whole = {**columns_of(row), "late": late}
    _log(connection, payloads, run, now, "late_outcome", whole, facts, **changes)


def _settle_waits(
    connection: Connection, payloads: Payloads, row: sa.Row[Any], now: datetime
) -> None:
    """Close the questions about an effect that is not in doubt any more, and let its run go on."""
    run = get_run(connection, row.tenant, row.run_id, lock=True)
    pending = [
        waits.c.tenant == row.tenant,
        waits.c.run_id == row.run_id,
        waits.c.kind == "effect",
        waits.c.interrupt_id.in_(question_ids(row.effect_id, row.attempt)),
        waits.c.status == WaitStatus.PENDING.value,
    ]
    asked = connection.execute(sa.select(waits).where(*pending)).all()
    if not asked:
        return
    closed = {"status": WaitStatus.SUPERSEDED.value, "decided_at": now}
    connection.execute(sa.update(waits).where(*pending).values(**closed))
    log = [wait_event("superseded", {**each._mapping, **closed}) for each in asked]
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


def _settle_saga(
    connection: Connection,
    payloads: Payloads,
    row: sa.Row[Any],
    now: datetime,
    *,
    happened: bool,
) -> None:
    """Go on, or be done, with a run that could not be undone as a whole."""
    run = get_run(connection, row.tenant, row.run_id, lock=True)
    if run.saga != PARTIALLY_COMPENSATED or not RunStatus(run.status).is_ended:
        return
    if happened and is_all_undone(connection, run):
        event = NewEvent(type="run.compensated")
        change_run(connection, run, payloads, now, log=[event], saga=COMPENSATED)
    elif not happened and run.status == RunStatus.FAILED:
        undo_again(connection, payloads, run, now)


def give_up(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    row: sa.Row[Any],
    now: datetime,
    by: str,
) -> None:
    """Leave an effect in doubt as it is, whose run is being undone: nobody will know."""
    changes = {
        "status": EffectStatus.FAILED.value,
        "ended_at": now,
        "ended_seq": run.event_seq + 1,
        "resolved_by": by,
    }
    update_effect(connection, row, changes)
    whole = {**columns_of(row), **changes}
    _log(connection, payloads, run, now, "given_up", whole, {"by": by})


def _note_undone(
    connection: Connection, row: sa.Row[Any], status: EffectStatus
) -> Mapping[str, Any] | None:
    """Note on an effect, which a compensation names, that it is undone; return what it is then."""
    if row.kind != "compensation" or status is not EffectStatus.SUCCEEDED:
        return None
    undone = get_effect(connection, row.tenant, row.task_id)
    change = {"status": EffectStatus.COMPENSATED.value}
    update_effect(connection, undone, change)
    return {**columns_of(undone), **change}


def _log(
    connection: Connection,
    payloads: Payloads,
    run: sa.Row[Any],
    now: datetime,
    what: str,
    effect: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    *,
    undone: Mapping[str, Any] | None = None,
    **changes: Any,
) -> None:
    """Append an event about an effect, which has become `effect`, to its run's.

    The event may have the number of the effect's end. `undone` is another one that was changed.
    """
    data = {
        "effect": effect["effect_id"],
        "name": effect["name"],
        "node": effect["node"],
        "attempt": effect["attempt"],
        **(facts or {}),
    }
    marks = effect_marks(payloads, effect) | (
        {} if undone is None else effect_marks(payloads, undone)
    )
    event = NewEvent(type=f"effect.{what}", data=data, marks=marks)
    change_run(connection, run, payloads, now, log=[event], **changes)
