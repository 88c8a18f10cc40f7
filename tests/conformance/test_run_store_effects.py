"""The run store: the journal of effects, on each database."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentflow.errors import (
    ConflictError,
    EffectConflictError,
    LeaseLostError,
    NotFoundError,
    SerializationError,
)
from agentflow.journal import GLOBAL, EffectStatus, NewEffect, Outcome, Resolution
from agentflow.storage import RunStore
from agentflow.types import Decision, Lease, RunStatus, new_id
from tests.conformance.runs import (
    EXPIRED,
    FAILURE,
    claim,
    finish,
    open_store,
    park,
    question,
    resolve,
    running,
    types_of_events,
)

DONE = Outcome(status=EffectStatus.SUCCEEDED, value={"id": 1})
LATER = datetime(2999, 1, 1, tzinfo=UTC)


def new(run: str = "r", key: str = "k", **changes: Any) -> NewEffect:
    fields: dict[str, Any] = {
        "id": new_id(),
        "scope": run,
        "key": key,
        "name": "m:pay",
        "arguments": {"n": 1},
        "ns": "a:t",
        "task_id": "t",
        "node": "a",
        "on_in_doubt": "ask",
    }
    return NewEffect(**(fields | changes))


async def again(store: RunStore, lease: Lease) -> Lease:
    """Give a run to the next attempt."""
    await store.release_run(lease, reason="drain", counts=False)
    return await claim(store, lease.run_id)


def about(effect_id: str, attempt: int = 1) -> Any:
    return question(kind="effect", interrupt_id=f"{effect_id}:{attempt}", checkpoint_id="")


async def test_intent_is_due_once_and_its_outcome_is_returned(store: RunStore) -> None:
    lease = await running(store, "r")
    begun = await store.begin_effect(lease, new(timeout=timedelta(seconds=5)))
    assert (begun.is_due, begun.effect.status, begun.effect.attempt) == (True, "intended", 1)
    assert begun.effect.safe_at == begun.effect.intended_at + timedelta(seconds=5)
    assert not (await store.begin_effect(lease, new())).is_due
    assert await store.finish_effect(lease, begun.effect.id, DONE)
    known = await store.begin_effect(await again(store, lease), new(), retake=1)
    assert (known.is_due, known.effect.outcome) == (False, {"id": 1})
    assert known.effect == await store.get_effect("", begun.effect.id)
    (listed,) = (await store.list_effects("", scope="r")).items
    assert listed == known.effect
    events = [t for t in await types_of_events(store, "r") if t.startswith("effect.")]
    assert events == ["effect.intended", "effect.succeeded"]
    with pytest.raises(NotFoundError):
        await store.get_effect("acme", begun.effect.id)


async def test_intent_needs_the_lease_and_its_outcome_does_not(store: RunStore) -> None:
    lease = await running(store, "r")
    begun = await store.begin_effect(lease, new())
    await store.release_run(lease, reason="drain", counts=False)
    with pytest.raises(LeaseLostError):
        await store.begin_effect(lease, new(key="other"))
    assert await store.finish_effect(lease, begun.effect.id, DONE)
    assert (await store.get_effect("", begun.effect.id)).outcome == {"id": 1}


@pytest.mark.parametrize(
    ("changes", "differs"), [({"arguments": {"n": 2}}, "n"), ({"name": "m:ship"}, "function")]
)
async def test_known_key_with_other_content_is_a_conflict(
    store: RunStore, changes: Mapping[str, Any], differs: str
) -> None:
    lease = await running(store, "r")
    await store.begin_effect(lease, new())
    with pytest.raises(EffectConflictError, match=differs):
        await store.begin_effect(lease, new(**changes))
    other = await running(store, "other")
    assert (await store.begin_effect(other, new("other", **changes))).is_due


async def test_effect_is_taken_again_only_from_the_attempt_that_was_seen(store: RunStore) -> None:
    lease = await running(store, "r")
    first = (await store.begin_effect(lease, new())).effect
    lease = await again(store, lease)
    assert not (await store.begin_effect(lease, new())).is_due
    taken = await store.begin_effect(lease, new(), retake=1)
    assert (taken.is_due, taken.effect.attempt, taken.effect.id) == (True, 2, first.id)
    assert not (await store.begin_effect(lease, new(), retake=1)).is_due


async def test_effects_in_doubt_are_those_that_no_attempt_is_at(store: RunStore) -> None:
    lease = await running(store, "r")
    done = (await store.begin_effect(lease, new(key="done"))).effect
    await store.finish_effect(lease, done.id, DONE)
    intent = (await store.begin_effect(lease, new())).effect
    assert (await store.list_effects("", in_doubt=True)).items == ()
    assert (await store.list_effects("", status=EffectStatus.INTENDED)).items == (intent,)
    await store.extend_leases([lease], EXPIRED)
    assert (await store.list_effects("", in_doubt=True)).items == (intent,)
    assert (await store.list_effects("acme", in_doubt=True)).items == ()


async def test_outcome_that_a_person_gave_is_corrected_once_its_run_has_failed(
    store: RunStore,
) -> None:
    lease = await running(store, "r")
    called = (await store.begin_effect(lease, new(key="called"))).effect
    await store.finish_effect(lease, called.id, DONE)
    told = (await store.begin_effect(lease, new())).effect
    lease = await again(store, lease)
    wrong = Resolution(happened=True, by="ada", outcome=1)
    await store.resolve_effect("", told.id, wrong)
    right = Resolution(happened=True, by="ada", outcome=2)
    with pytest.raises(ConflictError):
        await store.resolve_effect("", told.id, right)
    await store.fail_run(lease, FAILURE, reason="exhausted", checkpoint_id=None, step=None)
    assert (await store.resolve_effect("", told.id, right)).outcome == 2
    with pytest.raises(ConflictError):
        await store.resolve_effect("", called.id, right)
    with pytest.raises(ConflictError):
        await store.resolve_effect("", told.id, Resolution(happened=False, by="ada"))


async def test_of_concurrent_runs_with_a_global_key_one_is_to_call(
    store: RunStore, database_url: str
) -> None:
    leases = [await running(store, f"r{i}") for i in range(4)]
    others = [open_store(database_url) for _ in leases]
    begun = await asyncio.gather(
        *(
            other.begin_effect(lease, new(GLOBAL))
            for other, lease in zip(others, leases, strict=True)
        )
    )
    assert [b.is_due for b in begun].count(True) == 1
    assert all(b.is_held for b in begun if not b.is_due)
    owner = next(b.effect for b in begun if b.is_due)
    lease = next(lease for lease in leases if lease.run_id != owner.run_id)
    assert not (await store.begin_effect(lease, new(GLOBAL), retake=1)).is_due
    holder = next(lease for lease in leases if lease.run_id == owner.run_id)
    await store.extend_leases([holder], EXPIRED)
    assert (await store.begin_effect(lease, new(GLOBAL), retake=1)).is_due
    for other in others:
        await other.close()


async def test_outcome_is_that_of_the_run_that_called_last(store: RunStore) -> None:
    zombie, owner = await running(store, "zombie"), await running(store, "owner")
    assert zombie.token == owner.token
    effect = (await store.begin_effect(zombie, new(GLOBAL))).effect
    await store.extend_leases([zombie], EXPIRED)
    assert (await store.begin_effect(owner, new(GLOBAL), retake=1)).is_due
    late = Outcome(status=EffectStatus.SUCCEEDED, value="late")
    assert not await store.finish_effect(zombie, effect.id, late)
    assert await store.finish_effect(owner, effect.id, DONE)
    assert (await store.get_effect("", effect.id)).outcome == DONE.value


async def test_answer_about_an_effect_is_written_to_its_record(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new())).effect
    lease = await again(store, lease)
    asked = about(effect.id)
    await park(store, lease, asked)
    said = Decision(type="respond", value={"happened": True, "outcome": {"id": 7}})
    await resolve(store, asked.wait_id, said, comment="seen")
    known = await store.get_effect("", effect.id)
    assert (known.status, known.outcome, known.resolved_by) == ("succeeded", {"id": 7}, "ada")
    assert known.comment == "seen"
    assert (await store.get_run("", "r")).status is RunStatus.QUEUED
    types = await types_of_events(store, "r")
    assert {"effect.in_doubt", "approval.requested", "effect.resolved"} <= set(types)
    assert not await store.finish_effect(lease, effect.id, DONE)


async def test_refusing_to_say_cancels_the_run(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new())).effect
    asked = about(effect.id)
    await park(store, lease, asked)
    await resolve(store, asked.wait_id, "reject")
    assert (await store.get_run("", "r")).status is RunStatus.CANCELLED


async def test_outcome_that_comes_in_time_withdraws_the_question(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new())).effect
    asked = about(effect.id)
    await park(store, lease, asked)
    assert await store.finish_effect(lease, effect.id, DONE)
    assert (await store.get_wait("", asked.wait_id)).status == "superseded"
    assert (await store.get_run("", "r")).status is RunStatus.QUEUED


async def test_outcome_that_comes_too_late_is_kept_and_pauses_the_run(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new())).effect
    await park(store, lease, about(effect.id))
    no = Resolution(happened=False, by="ada")
    assert (await store.resolve_effect("", effect.id, no)).status is EffectStatus.NOT_HAPPENED
    assert not await store.finish_effect(lease, effect.id, DONE)
    known, run = await store.get_effect("", effect.id), await store.get_run("", "r")
    assert known.status is EffectStatus.NOT_HAPPENED
    assert [late["value"] for late in known.late] == [{"id": 1}]
    assert run.paused_at is not None
    assert (await types_of_events(store, "r"))[-1] == "effect.late_outcome"


async def test_what_is_known_or_under_way_is_not_resolved(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new())).effect
    no = Resolution(happened=False, by="ada")
    with pytest.raises(ConflictError, match="under way"):
        await store.resolve_effect("", effect.id, no)
    await store.finish_effect(lease, effect.id, DONE)
    with pytest.raises(ConflictError, match="succeeded"):
        await store.resolve_effect("", effect.id, no)


async def test_outcome_that_cannot_be_stored_changes_nothing(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new())).effect
    bad = Outcome(status=EffectStatus.SUCCEEDED, value=object())
    with pytest.raises(SerializationError):
        await store.finish_effect(lease, effect.id, bad)
    assert (await store.get_effect("", effect.id)).status is EffectStatus.INTENDED


async def test_run_with_effects_to_undo_is_queued_for_that_before_it_ends(store: RunStore) -> None:
    lease = await running(store, "r")
    effect = (await store.begin_effect(lease, new(compensate="m:void"))).effect
    await store.finish_effect(lease, effect.id, DONE)
    place: dict[str, Any] = {"checkpoint_id": "c1", "step": 1}
    await store.fail_run(lease, FAILURE, reason="exhausted", **place)
    run = await store.get_run("", "r")
    assert (run.status, run.saga, run.dead_letter) == ("queued", "compensating", False)
    assert run.saga_cause is not None
    assert (run.saga_cause["kind"], run.saga_cause["failure"]) == ("failed", FAILURE)
    assert (await store.cancel_run("", "r", reason=None, by=None)).status is RunStatus.QUEUED
    lease = await claim(store, "r")
    undone = new(key="undo", kind="compensation", task_id=effect.id)
    begun = await store.begin_effect(lease, undone)
    await store.finish_effect(lease, begun.effect.id, DONE)
    assert (await store.get_effect("", effect.id)).status is EffectStatus.COMPENSATED
    await store.fail_run(lease, FAILURE, reason="exhausted", **place)
    run = await store.get_run("", "r")
    assert (run.status, run.saga, run.dead_letter) == ("failed", "compensated", True)


async def test_records_are_pruned_of_runs_that_have_ended_and_are_not_shared(
    store: RunStore,
) -> None:
    prune: dict[str, Any] = {"ended_before": LATER, "are_others": True, "limit": 10}
    leases = {name: await running(store, name) for name in ("ended", "dead", "unfinished", "root")}
    for name, lease in leases.items():
        for scope in (name, GLOBAL):
            begun = await store.begin_effect(lease, new(scope, key=name))
            await store.finish_effect(lease, begun.effect.id, DONE)
    await running(store, "fork", root_id="root")
    for name in ("ended", "root"):
        await finish(store, leases[name])
    await store.fail_run(leases["dead"], FAILURE, reason="exhausted", checkpoint_id=None, step=None)
    assert await store.prune_effects("", graphs=[("g", "1")], **prune) == 0
    old = prune | {"ended_before": datetime(2000, 1, 1, tzinfo=UTC)}
    assert await store.prune_effects("", graphs=[], **old) == 0
    assert await store.prune_effects("acme", graphs=[], **prune) == 0
    assert await store.prune_effects("", graphs=[], **prune) == 1
    kept = (await store.list_effects("")).items
    assert [e.scope for e in kept].count("ended") == 0
    assert len(kept) == 7
