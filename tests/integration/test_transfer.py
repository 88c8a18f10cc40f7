"""Runs as files: from one database to another of another kind, and what is not let in."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.types import interrupt

from agentflow import AgentFlow, effect
from agentflow.errors import (
    AgentflowError,
    ConflictError,
    HashMismatchError,
    InvalidInputError,
    NotFoundError,
    UnknownKeyError,
    UnknownVersionError,
)
from agentflow.keys import KeyRing
from agentflow.testing import replay_stored
from agentflow.types import Run, RunStatus
from tests.golden import run_v1
from tests.integration.graphs import chain
from tests.integration.versions import CHANGES, Shape

SECRET = "the wire goes to Panama"


def opened(url: str = "memory://", **options: Any) -> AgentFlow:
    """Open an app with the graph."""
    app = AgentFlow(url, **options)
    app.register(Shape().build(), name="g")
    return app


async def exported(app: AgentFlow, **options: Any) -> dict[str, Any]:
    """Drive a run to a question inside of a subgraph, and export it."""
    handle = await app.submit("g", {"stop": "second", "log": [SECRET]}, run_id="r", **options)
    await app.drive(handle.id)
    # As a file has it.
    found: dict[str, Any] = json.loads(json.dumps(await app.export_run("r")))
    return found


async def test_run_goes_on_in_another_database_of_another_kind(database_url: str) -> None:
    async with opened() as source:
        file = await exported(source, metadata={"team": "a"}, timeout=900)
        original, events = await source.get_run("r"), await source.list_events("r")
    async with opened(database_url) as target:
        imported = await target.import_run(file, by="ann")
        assert imported == original
        log = await target.list_events("r")
        assert log[:-1] == events, "the chain of hashes is the same"
        assert log[-1].type == "run.imported"
        assert log[-1].data == {"by": "ann", "origin": file["sha256"]}
        [approval] = await target.handle("r").approvals()
        await target.approvals.decide(approval.id, {"type": "approve"}, by="bob")
        run = await target.drive("r")
        assert run.status is RunStatus.SUCCEEDED
        assert run.output["log"][0] == SECRET
        assert run.output["log"][-1] == "last"
        with pytest.raises(ConflictError, match="there already"):
            await target.import_run(file)


async def test_run_that_has_not_begun_and_one_that_has_ended_are_moved_too() -> None:
    async with opened() as source, opened() as target:
        await source.submit("g", {}, run_id="new")
        await source.submit("g", {}, run_id="old")
        await source.drive("old")
        for run_id in ("new", "old"):
            await target.import_run(await source.export_run(run_id))
        assert (await target.get_run("old")).output == (await source.get_run("old")).output
        assert (await target.drive("new")).status is RunStatus.SUCCEEDED


def _resealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change the content, and the hash as whoever changed it on purpose would."""

    def apply(file: dict[str, Any]) -> None:
        change(file["content"])
        text = json.dumps(file["content"], sort_keys=True, separators=(",", ":"))
        file["sha256"] = hashlib.sha256(text.encode()).hexdigest()

    return apply


LETTER = {
    "tenant": "",
    "run_id": "other",
    "thread_id": "r",
    "at": 1,
    "attempts": 1,
    "claims": 1,
    "cause": "AAAA",
}
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[AgentflowError]]] = {
    "content": (lambda f: f["content"].update(graph="other"), HashMismatchError),
    "format": (lambda f: f.update(format="other"), InvalidInputError),
    "version": (lambda f: f.update(version=2), UnknownVersionError),
    "tenant": (_resealed(lambda c: c.update(tenant="other")), InvalidInputError),
    "event gone": (_resealed(lambda c: c["rows"]["events"].pop()), HashMismatchError),
    "event changed": (
        _resealed(lambda c: c["rows"]["events"][1].update(type="run.other")),
        HashMismatchError,
    ),
    "run of another tenant": (
        _resealed(lambda c: c["rows"]["run"][0].update(tenant="other")),
        HashMismatchError,
    ),
    "question of another tenant": (
        _resealed(lambda c: c["rows"]["waits"][0].update(tenant="other")),
        HashMismatchError,
    ),
    "question of another run": (
        _resealed(lambda c: c["rows"]["waits"][0].update(run_id="other")),
        HashMismatchError,
    ),
    "question changed": (
        _resealed(lambda c: c["rows"]["waits"][0].update(request="AAAA")),
        HashMismatchError,
    ),
    "dead letter of another run": (
        _resealed(lambda c: c["rows"]["dead_letters"].append(LETTER)),
        HashMismatchError,
    ),
    "fingerprint of another tenant": (
        _resealed(lambda c: c["rows"]["fingerprints"][0].update(tenant="other")),
        HashMismatchError,
    ),
    "thread": (
        _resealed(lambda c: c["objects"].update(dict.fromkeys(c["objects"], "AAAA"))),
        HashMismatchError,
    ),
    "column": (_resealed(lambda c: c["rows"]["run"][0].update(x=1)), InvalidInputError),
    "no run": (_resealed(lambda c: c["rows"]["run"].pop()), HashMismatchError),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_file_that_was_changed_is_refused_and_nothing_is_left(damage: str) -> None:
    change, error = DAMAGES[damage]
    async with opened() as source:
        file = await exported(source)
    broken = copy.deepcopy(file)
    change(broken)
    async with opened() as target:
        with pytest.raises(error):
            await target.import_run(broken)
        with pytest.raises(NotFoundError):
            await target.get_run("r")
        await target.import_run(file)


def _row(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return _resealed(lambda content: content["rows"][name][0].update(changes))


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "another tenant's wait": _row("waits", tenant="other"),
    "another run's wait": _row("waits", run_id="other"),
    "another tenant's fingerprint": _row("fingerprints", tenant="other"),
    "another graph's fingerprint": _row("fingerprints", digest="0" * 16),
    "another thread": _row("run", thread_id="other"),
    "another version": _row("run", version="9"),
    "an end that it has not come to": _row("run", status="succeeded"),
    "nothing that is waited for": _resealed(lambda c: c["rows"]["waits"].clear()),
    "two runs": _resealed(lambda c: c["rows"]["run"].append(c["rows"]["run"][0])),
    "no thread": _resealed(lambda c: c.update(archive=None)),
    "no header": _resealed(lambda c: c.pop("graph_version")),
}


async def test_file_that_does_not_fit_together_is_refused_and_nothing_is_left() -> None:
    """Whoever makes one knows how to hash it; it may not reach beyond its run."""
    async with opened() as source:
        file = await exported(source)
    async with opened() as target:
        let_in = []
        for name, forge in FORGERIES.items():
            forged = copy.deepcopy(file)
            forge(forged)
            try:
                await target.import_run(forged)
            except HashMismatchError:
                continue
            let_in.append(name)
        assert let_in == []
        claimed = copy.deepcopy(file)
        _row("run", worker="w", token=7, lease_expires_at=2**60)(claimed)
        await target.import_run(claimed)
        [approval] = await target.handle("r").approvals()
        await target.approvals.decide(approval.id, {"type": "approve"}, by="bob")
        assert (await target.drive("r")).status is RunStatus.SUCCEEDED


def _bytes_of(part: Any) -> bytes:
    """Return all that is in a file, with what is written as base64 decoded."""
    if isinstance(part, dict):
        return b" ".join(_bytes_of(each) for item in part.items() for each in item)
    if isinstance(part, list):
        return b" ".join(map(_bytes_of, part))
    text = str(part).encode()
    try:
        return text + b" " + base64.b64decode(text, validate=True)
    except ValueError:
        return text


async def test_encrypted_run_needs_its_key_and_shows_nothing() -> None:
    async with opened() as twin:
        assert SECRET.encode() in _bytes_of(await exported(twin))
    keys = KeyRing({"a": b"k" * 32})
    async with opened(keys=keys) as source:
        file = await exported(source)
    assert file["content"]["is_encrypted"]
    assert SECRET.encode() not in _bytes_of(file)
    async with opened(keys=KeyRing({"b": b"o" * 32})) as stranger:
        with pytest.raises(UnknownKeyError):
            await stranger.import_run(file)
    async with opened(keys=keys) as target:
        await target.import_run(file)
        assert (await target.state("r")).values["log"][0] == SECRET


async def test_run_that_is_being_driven_and_a_foreign_thread_are_refused() -> None:
    async with opened() as source, opened() as target:
        file = await exported(source)
        await target.submit("g", {}, run_id="other", thread_id="r")
        await target.drive("other")
        with pytest.raises(ConflictError, match="there already"):
            await target.import_run(file)
        await source.submit("g", {}, run_id="driven")
        await source._store.claim_run("", "driven", worker="w", lease=source._settings.lease)
        with pytest.raises(ConflictError, match="being driven"):
            await source.export_run("driven")


async def test_stored_runs_are_held_against_todays_code(tmp_path: Path) -> None:
    async with opened() as app:
        file = await exported(app)
        (tmp_path / "r.json").write_text(json.dumps(file))
        [checked] = await replay_stored(app, tmp_path)
        assert checked.verdict == "same"
        app._registry.graphs.clear()
        app.register(CHANGES["code of first"][0].build(), name="g")
        checked, _ = await replay_stored(app, tmp_path / "r.json", file)
        assert checked.verdict == "behind"
        app._registry.graphs.clear()
        app.register(CHANGES["code of second"][0].build(), name="g")
        with pytest.raises(AssertionError, match="node 'sub/second' has other code"):
            await replay_stored(app, file)
        with pytest.raises(AssertionError, match="nothing stored"):
            await replay_stored(app)


async def test_stored_runs_of_a_version_that_is_gone_are_held_against_its_migration() -> None:
    async with AgentFlow("memory://") as source, AgentFlow("memory://") as app:
        for each, version in ((source, "1"), (app, "2")):
            each.register(paying([]), name="pay", version=version)
        await source.submit("pay", {"log": []}, run_id="r")
        await source.drive("r")
        file = await source.export_run("r")
        with pytest.raises(AssertionError, match="no migration leads there"):
            await replay_stored(app, file)
        app.migration("pay", from_="1", to="2")(lambda values: values)
        [checked] = await replay_stored(app, file)
        assert (checked.verdict, checked.version) == ("same", "2")
        app._registry.migrations.clear()
        app.migration("pay", from_="1", to="2")(lambda values: {**values, "more": 1})
        with pytest.raises(AssertionError, match="more: there is no such channel"):
            await replay_stored(app, file)


async def test_run_that_the_first_version_exported_goes_on() -> None:
    async with AgentFlow("memory://") as app:
        run_v1.register(app)
        run = await app.import_run(json.loads(run_v1.FILE.read_text()))
        assert run.metadata == {"team": "a"}
        assert (await app.check_run(run.id)).verdict == "same"
        run = await run_v1.answer(app)
        assert run.output["log"] == ["begun", "approve", "approve", "3 before"]


def paying(outside: list[str], *, hangs: str = "", **options: Any) -> Any:
    """Build a graph that pays, asks, and ships; the call `hangs` does not come back."""

    @effect(timeout=0.02, name="transfer:act", **options)
    async def called(what: str) -> str:
        outside.append(what)
        if what == hangs:
            await asyncio.Event().wait()
        return what

    async def node(_: Any) -> Any:
        done = [await called("pay"), interrupt("ship?")["type"], await called("ship")]
        return {"log": done}

    return chain(("node", node))


async def moved(source: AgentFlow) -> dict[str, Any]:
    """Drive a run of `paying` to its question, and export it."""
    await source.submit("pay", {"log": []}, run_id="r")
    await source.drive("r")
    found: dict[str, Any] = json.loads(json.dumps(await source.export_run("r")))
    return found


async def answered(app: AgentFlow) -> Run:
    """Answer what the run asks, and drive it."""
    [approval] = await app.handle("r").approvals()
    await app.approvals.decide(approval.id, {"type": "approve"}, by="bob")
    return await app.drive("r")


@pytest.mark.parametrize("key", [None, "one"])
async def test_effect_that_was_called_before_is_not_called_again(
    key: str | None, database_url: str
) -> None:
    """Also where the key of encryption is another one, by which keys of effects are hashed."""
    outside: list[str] = []
    own: dict[str, Any] = {} if key is None else {"key": lambda what: f"{key}-{what}"}
    old, new = b"o" * 32, b"n" * 32
    async with AgentFlow("memory://", keys=KeyRing({"a": old})) as source:
        source.register(paying(outside, **own), name="pay")
        file = await moved(source)
    assert outside == ["pay"]
    ring = KeyRing({"b": new, "a": old})
    async with AgentFlow(database_url, keys=ring) as target:
        target.register(paying(outside, **own), name="pay")
        await target.import_run(file)
        assert (await answered(target)).output == {"log": ["pay", "approve", "ship"]}
        assert outside == ["pay", "ship"]
        assert [each.status for each in (await target.effects.list(run_id="r")).items] == [
            "succeeded"
        ] * 2


async def test_effect_in_doubt_stays_in_doubt() -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as source, AgentFlow("memory://") as target:
        source.register(paying(outside, hangs="pay"), name="pay")
        target.register(paying(outside), name="pay")
        await target.import_run(await moved(source))
        [question] = await target.handle("r").approvals()
        assert (question.kind, outside) == ("effect", ["pay"])
        said = {"happened": True, "outcome": "pay"}
        await target.approvals.decide(question.id, {"type": "respond", "value": said}, by="bob")
        assert (await target.drive("r")).status is RunStatus.WAITING
        assert (await answered(target)).output == {"log": ["pay", "approve", "ship"]}
        assert outside == ["pay", "ship"]


async def test_what_shares_its_effects_is_not_exported() -> None:
    outside: list[str] = []
    async with AgentFlow("memory://") as app:
        app.register(paying(outside, scope="global", key=lambda what: what), name="pay")
        with pytest.raises(ConflictError, match="unique in the whole tenant"):
            await moved(app)
    async with AgentFlow("memory://") as app:
        app.register(paying(outside), name="pay")
        await moved(app)
        run = await app.get_run("r")
        assert run.checkpoint_id is not None
        fork = await app.fork("r", run.checkpoint_id)
        with pytest.raises(ConflictError, match="of which this is a fork"):
            await app.export_run(fork.id)


async def test_run_that_is_being_undone_is_undone_where_it_came_to() -> None:
    outside: list[str] = []

    async def undo(outcome: str) -> None:
        outside.append(f"un{outcome}")

    async with AgentFlow("memory://") as source, AgentFlow("memory://") as target:
        for app in (source, target):
            app.register(paying(outside, compensate=undo), name="pay")
        await moved(source)
        await source.cancel("r")
        await target.import_run(await source.export_run("r"))
        run = await target.drive("r")
        assert (run.status, run.saga) == (RunStatus.CANCELLED, "compensated")
        assert outside == ["pay", "unpay"]
