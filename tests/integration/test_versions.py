"""A graph that changes under runs that have begun on it: each change, from each place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, get_args

import pytest
import sqlalchemy as sa
from langgraph.types import interrupt

from agentflow import AgentFlow, RetryPolicy
from agentflow.database.tables import checkpoints, values, writes
from agentflow.drive import Compatibility, RegisteredGraph
from agentflow.errors import (
    ChangeKind,
    IncompatibleGraphError,
    InvalidInputError,
    PausedError,
    UnknownVersionError,
)
from agentflow.types import RunStatus
from agentflow.versions import ChangeAction, ChangePolicy
from tests.integration.graphs import chain, fan, logs
from tests.integration.versions import CHANGES, STANDS, Shape, called


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    """An app with the graph as it was released."""
    async with AgentFlow("memory://") as opened:
        deploy(opened, Shape())
        yield opened


def deploy(app: AgentFlow, shape: Shape, **options: Any) -> None:
    """Start a process with another version of the code, as far as the app can tell."""
    app._registry.graphs.clear()
    app.register(shape.build(), name="g", **options)


released: dict[str, RegisteredGraph] = {}


def release(app: AgentFlow, name: str) -> RegisteredGraph:
    """Deploy one of `CHANGES`, which is built and read once for all tests."""
    if name not in released:
        deploy(app, CHANGES[name][0])
        released[name] = app.graphs["g", "1"]
    app._registry.graphs["g", "1"] = released[name]
    return released[name]


async def stand(app: AgentFlow, where: str) -> str:
    """Drive a run to a place at which it asks, and return its id."""
    handle = await app.submit("g", {"stop": where})
    assert (await app.drive(handle.id)).status is RunStatus.WAITING
    called.clear()
    return handle.id


async def answer(app: AgentFlow, run_id: str) -> None:
    """Answer what the run asks."""
    for approval in await app.handle(run_id).approvals():
        await app.approvals.decide(approval.id, {"type": "approve"}, by="ann")


async def rows(app: AgentFlow) -> list[Any]:
    """Return everything that is stored of threads, but for who holds them."""

    def read(connection: Any) -> list[Any]:
        tables = (checkpoints, values, writes)
        return [connection.execute(sa.select(t).order_by(*t.primary_key)).all() for t in tables]

    found: list[Any] = await app._store._database.read(read)  # type: ignore[attr-defined]
    return found


async def test_run_that_has_not_begun_takes_the_graph_as_it_is(app: AgentFlow) -> None:
    handle = await app.submit("g", {})
    for name in CHANGES:
        release(app, name)
        assert (await app.check_run(handle.id)).verdict == "same"
    deploy(app, Shape(names={"plan": "begin"}, extra="ask"))
    called.clear()
    assert (await app.drive(handle.id)).status is RunStatus.SUCCEEDED
    assert "extra" in called


@pytest.mark.parametrize("where", STANDS)
async def test_verdict_is_right_about_each_change_from_where_the_run_stands(
    app: AgentFlow, where: str
) -> None:
    run_id = await stand(app, where)
    await answer(app, run_id)
    wrong: list[tuple[str, object]] = []
    before = await rows(app)
    for name, (_, kind, ahead) in CHANGES.items():
        registered = release(app, name)
        judge = Compatibility(app._store, app._saver, registered, "")
        found = await judge.look(await app.get_run(run_id))
        if found.name != ("ahead" if where in ahead else "behind"):
            wrong.append((name, found))
        for action in get_args(ChangeAction):
            of_kind = {**dict.fromkeys(get_args(ChangeKind), "accept"), kind: action}
            for policy in (action, of_kind):
                settled = ChangePolicy.of(policy).verdict(found.changes)
                if settled != (action if where in ahead else "accept"):
                    wrong.append((name, (policy, settled)))
        if where not in ahead:
            continue
        # The way of a worker: it is refused, whatever was decided, and nothing is lost by it.
        with pytest.raises(IncompatibleGraphError) as refused:
            await app.drive(run_id)
        if kind not in dict(refused.value.changes):
            wrong.append((name, refused.value))
        run = await app.resume_run(run_id)
        assert (run.status, run.attempt, run.paused_at) == (RunStatus.QUEUED, 0, None)
    assert wrong == []
    assert called == [], "a node ran before the verdict"
    assert await rows(app) == before, "a refusal changed what is stored"
    deploy(app, Shape())
    assert (await app.drive(run_id)).status is RunStatus.SUCCEEDED


@pytest.mark.parametrize("where", STANDS)
async def test_run_goes_on_with_what_changed_behind_it_and_that_is_noted(
    app: AgentFlow, where: str
) -> None:
    run_id = await stand(app, where)
    await answer(app, run_id)
    shapes = [shape for shape, _, ahead in CHANGES.values() if where not in ahead]
    if where == "plan":
        assert shapes == [], "nothing lies behind the first node"
        return
    deploy(app, shapes[0])
    run = await app.drive(run_id)
    assert run.status is RunStatus.SUCCEEDED
    assert called[0] == where
    [event] = [e for e in await app.list_events(run_id) if e.type == "run.graph_changed"]
    assert event.data["verdict"] == "behind"
    assert event.data["changes"]


CODE = CHANGES["code of last"][0]


@pytest.mark.parametrize(
    ("policy", "shape", "goes_on"),
    [
        ("refuse", CODE, False),
        ("warn", CODE, True),
        ("accept", CODE, True),
        ({"code_changed": "accept"}, CODE, True),
        ({"code_changed": "warn"}, CODE, True),
        ({"edge_changed": "accept"}, CODE, False),
        (
            {"code_changed": "accept"},
            Shape(changed=frozenset({"last"}), schema=CHANGES["type"][0].schema),
            False,
        ),
        ({"channel_added": "accept"}, CHANGES["add channel"][0], True),
        ({"default_changed": "accept"}, CHANGES["default"][0], True),
        ({"node_removed": "accept", "edge_changed": "accept"}, CHANGES["remove ask"][0], True),
    ],
    ids=str,
)
async def test_policy_of_the_graph_and_of_the_kind_of_change_decides(
    app: AgentFlow,
    policy: Any,
    shape: Shape,
    goes_on: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_id = await stand(app, "plan")
    await answer(app, run_id)
    deploy(app, shape, on_change=policy)
    if not goes_on:
        with pytest.raises(IncompatibleGraphError):
            await app.drive(run_id)
        assert called == []
        return
    assert (await app.drive(run_id)).status is RunStatus.SUCCEEDED
    assert called.count("last") == 1
    [event] = [e for e in await app.list_events(run_id) if e.type == "run.graph_changed"]
    action = policy if isinstance(policy, str) else next(iter(policy.values()))
    assert (event.data["verdict"], event.data["policy"]) == ("ahead", action)
    assert ("has changed" in caplog.text) == (action == "warn")


@pytest.mark.parametrize(
    "policy", ["refused", 1, {"code": "accept"}, {"code_changed": "maybe"}], ids=str
)
def test_policy_that_is_none_is_refused_at_registration(policy: Any) -> None:
    with pytest.raises(InvalidInputError, match="on_change"):
        deploy(AgentFlow("memory://"), Shape(), on_change=policy)


async def test_refused_run_is_paused_told_by_doctor_and_goes_on_when_resumed(
    app: AgentFlow,
) -> None:
    run_id = await stand(app, "ask")
    await answer(app, run_id)
    deploy(app, Shape(names={"ask": "inquire"}))
    with pytest.raises(IncompatibleGraphError) as refused:
        await app.drive(run_id)
    run = await app.get_run(run_id)
    assert run.error is not None
    assert run.error.message == str(refused.value)
    assert "node 'ask' was renamed to 'inquire' (node_removed)" in run.error.message
    with pytest.raises(PausedError):
        await app.drive(run_id)
    checks = {check.name: check for check in (await app.doctor()).checks}
    assert checks["graphs"].level == "problem"
    deploy(app, Shape())
    await app.resume_run(run_id)
    assert {c.name: c.level for c in (await app.doctor()).checks}["graphs"] == "ok"
    run = await app.drive(run_id)
    assert run.status is RunStatus.SUCCEEDED
    assert called == ["ask", "first", "second", "last"], "the answer was delivered"


async def test_sibling_that_has_finished_is_behind_and_one_that_asks_is_not(
    app: AgentFlow,
) -> None:
    def asks(_: Any) -> Any:
        return {"log": [interrupt("?")]}

    def deploy_fan(left: Any, right: Any) -> None:
        app._registry.graphs.clear()
        app.register(fan(("left", left), ("right", right)), name="fan")

    deploy_fan(logs("l"), asks)
    handle = await app.submit("fan", {"log": []})
    await app.drive(handle.id)
    deploy_fan(lambda _: {"log": ["other"]}, asks)
    assert (await app.check_run(handle.id)).verdict == "behind"
    deploy_fan(logs("l"), lambda _: {"log": ["other"]})
    assert (await app.check_run(handle.id)).verdict == "ahead"


async def test_conversation_goes_on_with_a_new_version_unless_a_value_has_another_type(
    app: AgentFlow,
) -> None:
    await app.submit("g", {"log": ["hello"]}, run_id="one", thread_id="t")
    await app.drive("one")
    await app.submit("g", {"log": ["again"]}, run_id="two", thread_id="t")
    deploy(app, CHANGES["type"][0])
    with pytest.raises(IncompatibleGraphError, match="'note' has the type"):
        await app.drive("two")
    await app.resume_run("two")
    deploy(app, CHANGES["rename plan"][0])
    assert (await app.drive("two")).status is RunStatus.SUCCEEDED


async def test_run_of_before_fingerprints_goes_on_unless_its_next_node_is_gone(
    app: AgentFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentflow.drive import attempt

    with monkeypatch.context() as older:
        older.setattr(attempt, "marks_of", lambda _: {})
        run_id = await stand(app, "ask")

    def forget(connection: Any) -> None:
        from agentflow.database.tables import runs

        connection.execute(sa.update(runs).values(fingerprint=None))

    await app._store._database.write(forget)  # type: ignore[attr-defined]
    await answer(app, run_id)
    deploy(app, CHANGES["rename ask"][0])
    with pytest.raises(IncompatibleGraphError, match="node 'ask' is gone"):
        await app.drive(run_id)
    await app.resume_run(run_id)
    deploy(app, CHANGES["code of last"][0])
    assert (await app.drive(run_id)).status is RunStatus.SUCCEEDED


async def test_run_that_goes_back_is_judged_from_where_it_goes_back_to(app: AgentFlow) -> None:
    def deploy_chain(first: Any) -> None:
        app._registry.graphs.clear()
        once = RetryPolicy(max_attempts=1)
        app.register(chain(("first", first), ("fails", fails)), name="back", retry=once)

    def fails(_: Any) -> Any:
        raise ValueError("no")

    def other(_: Any) -> Any:
        called.append("other")
        return {"log": ["other"]}

    deploy_chain(logs("first"))
    handle = await app.submit("back", {"log": []})
    assert (await app.drive(handle.id)).status is RunStatus.FAILED
    config: Any = {"configurable": {"thread_id": handle.id}}
    begun = [each async for each in app._saver.alist(config)][1]
    deploy_chain(other)
    await app.dead_letters.requeue(handle.id, checkpoint_id=begun.checkpoint["id"])
    before = await rows(app)
    with pytest.raises(IncompatibleGraphError, match="'first' has other code"):
        await app.drive(handle.id)
    assert await rows(app) == before
    assert "other" not in called


async def test_run_that_a_newer_program_has_stored_waits_for_one(app: AgentFlow) -> None:
    """As in a deploy that is under way, or was taken back."""
    run_id = await stand(app, "ask")
    await answer(app, run_id)

    def change(to: Callable[[bytes], bytes]) -> Callable[[Any], None]:
        def apply(connection: Any) -> None:
            for row in connection.execute(sa.select(checkpoints)).all():
                own = [key == getattr(row, key.name) for key in checkpoints.primary_key]
                query = sa.update(checkpoints).where(*own).values(data=to(row.data))
                connection.execute(query)

        return apply

    database = app._store._database  # type: ignore[attr-defined]
    version = (await rows(app))[0][0].data[:1]
    await database.write(change(lambda data: b"\x63" + data[1:]))
    before = await rows(app)
    with pytest.raises(UnknownVersionError, match="upgrade agentflow here"):
        await app.drive(run_id)
    run = await app.get_run(run_id)
    assert (run.status, run.paused_at is None, run.dead_letter) == (RunStatus.QUEUED, False, False)
    assert await rows(app) == before
    assert called == []
    await database.write(change(lambda data: version + data[1:]))
    await app.resume_run(run_id)
    assert (await app.drive(run_id)).status is RunStatus.SUCCEEDED
    assert called == ["ask", "first", "second", "last"]
