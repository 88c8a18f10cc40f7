"""What the tests of encryption share: keys, and a database with something in every column."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypedDict

import sqlalchemy as sa
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph

from agentflow import AgentFlow, RetryPolicy, effect, request_approval
from agentflow.checkpoint import Saver
from agentflow.database.engine import parse_url
from agentflow.database.tables import (
    checkpoints,
    dead_letters,
    effects,
    events,
    fingerprints,
    metadata,
    pauses,
    runs,
    waits,
)
from agentflow.errors import CodecError, HashMismatchError, PausedError
from agentflow.journal import EffectStatus, Outcome
from agentflow.keys import KeyRing
from agentflow.storage.sql import SqlRunStore
from agentflow.testing.savers.graphs import DeltaState
from agentflow.testing.savers.graphs import chain as delta_chain
from agentflow.types import Lease

PLACES = (
    "state",
    "list",
    "metadata",
    "config",
    "input",
    "output",
    "exception",
    "proposal",
    "decision",
    "comment",
    "event",
    "delta",
    "pause",
    "argument",
    "outcome",
    "remark",
    "late",
)
"""Where users put what nobody else should read; the dead letter has the exception."""
RUNS = ("decided", "failed", "cancelled", "waiting")
Mark = Callable[[str], str]
"""Given a place, what to put there."""

SEALED = [
    column
    for table in metadata.sorted_tables
    for column in table.c
    if isinstance(column.type, sa.LargeBinary) and column is not checkpoints.c.hash
]
"""Every column whose values are envelopes."""
OF_RUNS = [column for column in SEALED if "tenant" in column.table.c]
"""Those of the run store; the tables of checkpoints name a thread by its number."""


def secret(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def ring(*names: str, accept_plaintext: bool = False) -> KeyRing:
    """Make a ring of keys of which the first seals."""
    return KeyRing([(name, secret(name)) for name in names], accept_plaintext=accept_plaintext)


def in_environment(*names: str) -> str:
    """Return the same as the value of AGENTFLOW_KEYS."""
    return ",".join(f"{name}={base64.b64encode(secret(name)).decode()}" for name in names)


class State(TypedDict, total=False):
    given: str
    kept: str
    log: Annotated[list[str], operator.add]
    answer: Any
    result: str


class Calls(list[str]):
    """The nodes that were executed."""


def open_app(
    url: str,
    keys: KeyRing | None,
    mark: Mark = str,
    *,
    calls: Calls | None = None,
    tenant: str = "",
) -> AgentFlow:
    """Open an app whose graphs put a mark at every place."""
    executed = Calls() if calls is None else calls
    app = AgentFlow(url, keys=keys, tenant=tenant)
    app.register(_refund(mark, executed), name="refund")
    app.register(
        _line(("fail", _failing(mark, executed))), name="fail", retry=RetryPolicy(max_attempts=1)
    )
    app.register(_line(("pay", _paying(mark))), name="pay", retry=RetryPolicy(max_attempts=1))
    return app


def _paying(mark: Mark) -> Any:
    @effect(compensate=_undo, name="sealed:pay", key=mark("argument"))
    async def pay(what: str) -> str:
        return mark("outcome")

    @effect(timeout=0.01, on_in_doubt="fail", name="sealed:hang")
    async def hang() -> None:
        await asyncio.Event().wait()

    async def node(state: State) -> State:
        await pay(mark("argument"))
        await hang()
        return {}

    return node


def _undo(outcome: str) -> None: ...


def _refund(mark: Mark, calls: Calls) -> StateGraph[Any, None, Any, Any]:
    def work(state: State) -> State:
        calls.append("work")
        return {"kept": mark("state"), "log": [f"{mark('list')} {n} {'.' * 90}" for n in range(9)]}

    def ask(state: State) -> State:
        calls.append("ask")
        return {"answer": request_approval({"text": mark("proposal")}, title="Refund").proposal}

    def end(state: State) -> State:
        calls.append("end")
        return {"result": mark("output")}

    return _line(("work", work), ("ask", ask), ("end", end))


def _failing(mark: Mark, calls: Calls) -> Any:
    def fail(state: State) -> State:
        calls.append("fail")
        raise ValueError(mark("exception"))

    return fail


def _line(*nodes: tuple[str, Any]) -> StateGraph[Any, None, Any, Any]:
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    before = START
    for name, node in nodes:
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph


async def fill(app: AgentFlow, mark: Mark = str) -> None:
    """Drive one run to each end, and one to its question."""
    for run_id in RUNS:
        await app.submit(
            "fail" if run_id == "failed" else "refund",
            {"given": mark("input")},
            run_id=run_id,
            metadata={"of": mark("metadata")},
            config={"configurable": {"by": mark("config")}},
        )
    for run_id in ("decided", "waiting", "failed"):
        await app.drive(run_id)
    (asked,) = await app.handle("decided").approvals()
    edit = {"type": "edit", "value": {"text": mark("decision")}}
    await app.approvals.decide(asked.id, edit, by="ann", comment=mark("comment"))
    await app.drive("decided")
    await app.cancel("cancelled", reason=mark("event"))
    await app.pause(queue="unused", reason=mark("pause"))
    await _fill_effects(app, mark)


async def _fill_effects(app: AgentFlow, mark: Mark) -> None:
    """Leave a run whose effects are about to be undone, one of them with a late outcome."""
    await app.submit("pay", {}, run_id="paid")
    lease = await _drive_until_undone(app)
    (hung,) = [e for e in (await app.effects.list(run_id="paid")).items if e.timeout]
    await app.effects.resolve(
        hung.id, happened=True, outcome=mark("outcome"), by="ann", comment=mark("remark")
    )
    late = Outcome(status=EffectStatus.SUCCEEDED, value=mark("late"))
    assert not await app._store.finish_effect(lease, hung.id, late)


async def _drive_until_undone(app: AgentFlow) -> Lease:
    claims: list[Lease] = []
    store, fail = app._store, app._store.fail_run

    async def fail_and_pause(lease: Lease, *args: Any, **named: Any) -> None:
        claims.append(lease)
        await fail(lease, *args, **named)
        await app.pause_run(lease.run_id)

    store.fail_run = fail_and_pause  # type: ignore[method-assign]  # nobody undoes it meanwhile
    with suppress(PausedError):
        await app.drive("paid")
    del store.fail_run
    return claims[0]


def prune_deltas(saver: Saver, text: str = "x") -> None:
    """Leave behind an anchor, and what delta channels had before it."""
    nodes = [(f"n{n}", lambda _: {"log": [text * 99], "notes": {"a": text}}) for n in range(5)]
    graph = delta_chain(*nodes, state=DeltaState).compile(checkpointer=saver)
    config: RunnableConfig = {"configurable": {"thread_id": "pruned"}}
    graph.invoke({"log": ["first"]}, config, durability="sync")
    saver.prune(["pruned"])


def payloads(url: str) -> dict[str, list[Any]]:
    """Read every sealed column of a database, with the keys of its rows."""
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        found = {
            str(column): sorted(
                tuple(row)
                for row in connection.execute(
                    sa.select(*_identity(column.table), column).where(column.is_not(None))
                )
            )
            for column in SEALED
        }
    engine.dispose()
    return found


def _identity(table: sa.Table) -> list[sa.Column[Any]]:
    return list(table.primary_key.columns)


def read_rows(engine: sa.Engine, table: sa.Table) -> list[Any]:
    """Read a table."""
    with engine.connect() as connection:
        return list(connection.execute(sa.select(table)))


async def read_payloads(app: AgentFlow, table: sa.Table, row: Any) -> None:
    """Read a row as the API does, and what only an attempt reads of it."""
    store = app._store
    assert isinstance(store, SqlRunStore)
    if table is runs:
        await store.get_run("", row.run_id)
        query = sa.select(runs).where(runs.c.seq == row.seq)
        found = await store._database.read(lambda connection: connection.execute(query).one())
        store._payloads.load(runs.c.failures, found)
    elif table is waits:
        await store.get_wait("", row.wait_id)
    elif table is pauses:
        # That it is paused shows all the same, and what its reason cannot be read for.
        (pause,) = [x for x in await store.list_pauses("") if (x.scope, x.name) == row[1:3]]
        if pause.damage is not None:
            is_damaged = pause.damage.startswith("HashMismatchError: ")
            raise (HashMismatchError if is_damaged else CodecError)(pause.damage)
    elif table is effects:
        await store.get_effect("", row.effect_id)
    elif table is events:
        await store.list_events("", row.run_id, after=row.seq - 1, limit=1)
    elif table is fingerprints:
        await store.find_fingerprint("", row.digest)
    else:
        assert table is dead_letters, "a table that no test reads"
        await store.find_dead_letter("", row.run_id)
