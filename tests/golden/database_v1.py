"""Made `database-v1.sqlite3.gz` at the first landed version, and shows what is in it.

The file is never made again: it is what that version left behind, and every later one has to load,
list and continue it. This module stays so that a reader can see what was written (`write`) and what
must be found (`EXPECTED`, `STATUSES`; `database-v1.json` has every checkpoint, run and approval as
`list_database` showed them). The graphs are in `graphs_v1`.

`write` takes any URL, and needs an empty database. It was called by

    python -c "from tests.golden.database_v1 import make; make()"
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME
from langgraph.types import Command, Interrupt

from agentflow import AgentFlow
from agentflow.checkpoint import Saver, open_checkpointer
from tests.golden.graphs_v1 import (
    CALL,
    CUSTOMER,
    THINGS,
    Outside,
    chat,
    fetches,
    input_of,
    journal,
    letters,
    questions,
    register,
    say,
    subgraphs,
    things,
    totals,
)
from tests.golden.listing import list_database

FOLDER = Path(__file__).parent
DATABASE = FOLDER / "database-v1.sqlite3.gz"
LISTING = FOLDER / "database-v1.json"
REVISION = "0001"
"""The revision of the schema that the file has."""
TENANT = "acme"
"""Has one thread, under a name that another tenant uses too."""


def on(thread_id: str) -> RunnableConfig:
    """Name a thread."""
    return {"configurable": {"thread_id": thread_id}}


def place(thread_id: str, checkpoint_id: str | None, ns: str = "") -> RunnableConfig:
    """Name a checkpoint, as a caller of the saver does."""
    configurable: dict[str, Any] = {"thread_id": thread_id, "checkpoint_ns": ns}
    if checkpoint_id is not None:
        configurable["checkpoint_id"] = checkpoint_id
    return {"configurable": configurable}


def id_of(number: int) -> str:
    """Return the id of a checkpoint that is put by hand."""
    return f"1f000000-0000-6000-8000-{number:012}"


def checkpoint(number: int, versions: dict[str, Any], values: dict[str, Any]) -> Checkpoint:
    """Make a checkpoint by hand."""
    return {
        "v": 4,
        "id": id_of(number),
        "ts": f"2026-01-01T00:00:{number:02}+00:00",
        "channel_values": values,
        "channel_versions": versions,
        "versions_seen": {"node": {"x": number}},
        "updated_channels": None,
    }


def _put(
    saver: Saver, thread_id: str, states: Iterable[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """Put a line of checkpoints, each from the versions and values of all its channels."""
    before: dict[str, Any] = {}
    for number, (versions, values) in enumerate(states, 1):
        saver.put(
            place(thread_id, id_of(number - 1) if number > 1 else None),
            checkpoint(number, versions, values),
            {"source": "loop", "step": number, "parents": {}},
            {name: version for name, version in versions.items() if before.get(name) != version},
        )
        before = versions


def write(url: str) -> None:
    """Write everything into the empty database at `url`."""
    with open_checkpointer(url) as saver:
        _write_chat(saver)
        _write_by_hand(saver)
    with open_checkpointer(url, tenant=TENANT) as saver:
        _put(saver, "numbers", [({"x": 1}, {"x": "of acme"})])
    asyncio.run(_write_threads(url))
    asyncio.run(_write_runs(url))
    # Killed inside its last node, under a lease and with its approval delivered.
    command = "from tests.golden import database_v1 as v1; import sys; v1.die(sys.argv[1])"
    died = subprocess.run([sys.executable, "-c", command, url], check=False, cwd=FOLDER.parents[1])
    assert died.returncode == 9


def _write_chat(saver: Saver) -> None:
    """Hold a conversation of six turns; of the fifth only the end is stored."""
    graph = chat().compile(checkpointer=saver)
    graph.invoke({**say(0, "hello"), "topic": "greetings"}, on("chat"))
    graph.invoke(say(2, "how is the weather?"), on("chat"), durability="sync")
    graph.invoke(say(6, "and tomorrow?"), on("chat"), durability="sync")
    graph.invoke(say(8, "thanks"), on("chat"), durability="async")
    graph.invoke(say(10, "really"), on("chat"), durability="exit")
    graph.invoke(say(12, "bye"), on("chat"), durability="sync")


def _write_by_hand(saver: Saver) -> None:
    """Put checkpoints with numbers as versions, a channel carried on, and one emptied."""
    kept = {"y": {"kept": (1, 2)}}
    numbers = [({"x": n, "y": 1}, {"x": f"x{n}", **kept}) for n in range(1, 6)]
    _put(saver, "numbers", numbers)
    for path, name in (("~b", "t2"), ("~a", "t9"), ("", "t3"), ("~a", "t1")):
        saver.put_writes(place("numbers", id_of(5)), [("x", name), ("y", (path,))], name, path)
    special = [(ERROR, ValueError("no")), (RESUME, ["yes"]), (INTERRUPT, [Interrupt("?", "i")])]
    saver.put_writes(place("numbers", id_of(5)), special, "t9", "~a")
    emptied = [
        ({"x": 1, "y": 1}, {"x": "x1", "y": "y1"}),
        ({"x": 2, "y": 1}, {"y": "y1"}),
        ({"x": 2, "y": 2}, {"y": "y2"}),
        ({"x": 3, "y": 2}, {"x": "x3", "y": "y2"}),
        ({"x": 3, "y": 3}, {"x": "x3"}),
    ]
    _put(saver, "emptied", emptied)


async def _write_threads(url: str) -> None:
    """Write the threads of graphs that are driven by hand."""
    outside = Outside(is_up=False)
    async with open_checkpointer(url) as saver:
        await things().compile(checkpointer=saver).ainvoke({}, on("things"))
        await _write_forks(saver)

        graph = subgraphs(outside).compile(checkpointer=saver)
        await graph.ainvoke({"entry": "one"}, on("subgraphs"), durability="sync")
        await graph.ainvoke(Command(resume="first"), on("subgraphs"), durability="sync")
        await graph.ainvoke({"entry": "two"}, on("subgraphs"), durability="sync")

        graph = fetches(outside).compile(checkpointer=saver)
        with contextlib.suppress(ConnectionError):
            await graph.ainvoke({"log": []}, on("failed"), durability="sync")

        graph = questions(outside).compile(checkpointer=saver)
        asked = await graph.ainvoke({"by": CUSTOMER}, on("questions"), durability="sync")
        (left,) = [each for each in asked["__interrupt__"] if each.value["question"] == "left"]
        resume: Command[Any] = Command(resume={left.id: ("tuple", 1)})
        await graph.ainvoke(resume, on("questions"), durability="sync")

        function = totals(saver, outside)
        await function.ainvoke([1, 2], on("functional"), durability="sync")
        await function.ainvoke(Command(resume="yes"), on("functional"), durability="sync")
        await function.ainvoke([10], on("functional"), durability="sync")

        graph = journal().compile(checkpointer=saver)
        for number in range(7):
            await graph.ainvoke({"entries": [f"turn {number}"]}, on("delta"), durability="sync")


async def _write_forks(saver: Saver) -> None:
    """Go three ways from one checkpoint: as the graph goes, once more, and by hand."""
    graph = letters().compile(checkpointer=saver)
    await graph.ainvoke({"log": ["start"]}, on("forks"), durability="sync")
    history = [each async for each in graph.aget_state_history(on("forks"))]
    (old,) = [each for each in history if each.next == ("b",)]
    await graph.ainvoke(None, old.config, durability="sync")
    await graph.aupdate_state(old.config, {"log": ["by hand"]}, as_node="b")


async def _write_runs(url: str) -> None:
    """Bring a run to each status."""
    edited = {"type": "edit", "value": {"number": "A-17", "amount": 25, "items": ["tea"]}}
    async with AgentFlow(url) as app:
        register(app, Outside(is_up=False))

        async def ask(run_id: str, **options: Any) -> str:
            handle = await app.submit("refund", input_of(run_id), run_id=run_id, **options)
            await app.drive(run_id)
            (approval,) = await handle.approvals()
            return approval.id

        approval_id = await ask("run-succeeded", thread_id="account-7", metadata={"n": (1, 2)})
        await app.approvals.decide(approval_id, edited, by="ann", comment="the milk was fine")
        await app.drive("run-succeeded")
        await ask("run-waiting")
        await app.approvals.decide(
            await ask("run-decided"), "approve", by="bob", idempotency_key="key-1"
        )
        await ask("run-cancelled")
        await app.cancel("run-cancelled", reason="changed their mind", by="ann")
        await app.submit("charge", input_of("run-failed"), run_id="run-failed")
        await app.drive("run-failed")
        await app.submit(
            "refund",
            input_of("run-queued"),
            run_id="run-queued",
            thread_id="account-7",
            priority=5,
            start_at=datetime(2026, 1, 1, tzinfo=UTC),
            config={"configurable": {"user": "ada"}, "recursion_limit": 50, "tags": ["golden"]},
            metadata={"source_of": "golden"},
            by="ann",
        )
        await app.approvals.decide(await ask("run-killed"), "approve", by="ann")


def die(url: str) -> None:
    """Drive a run in a world that kills its process."""

    async def drive() -> None:
        async with AgentFlow(url) as app:
            register(app, Outside(is_deadly=True))
            await app.drive("run-killed")

    asyncio.run(drive())


EXPECTED: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [
            HumanMessage("hello", id="m0"),
            AIMessage("re: hello", id="m1"),
            HumanMessage("how is the weather?", id="m2"),
            AIMessage("", tool_calls=[CALL], id="m3"),
            ToolMessage("sunny", tool_call_id="call-1", name="weather", id="m4"),
            AIMessage("re: sunny", id="m5"),
            HumanMessage("and tomorrow?", id="m6"),
            AIMessage("re: and tomorrow?", id="m7"),
            HumanMessage("thanks", id="m8"),
            AIMessage("re: thanks", id="m9"),
            HumanMessage("really", id="m10"),
            AIMessage("re: really", id="m11"),
            HumanMessage("bye", id="m12"),
            AIMessage("re: bye", id="m13"),
        ],
        "topic": "weather",
        "turns": 6,
    },
    "things": dict(THINGS),
    "forks": {"log": ["start", "a", "by hand"]},
    "subgraphs": {"entry": "two", "count": 2, "answer": "first"},
    "failed": {"log": ["plan", ("fetched", "steady")]},
    "questions": {"answers": [("left", ("tuple", 1))], "by": CUSTOMER},
    "delta": {
        "entries": [e for n in range(7) for e in (f"turn {n}", ("noted", 2 * n + 1))],
        "last": "note",
    },
}
"""The state of each thread of a graph that was driven by hand, as the graph sees it.

That is with the pending writes of the tasks that have ended.
"""

STATUSES = {
    "run-succeeded": "succeeded",
    "run-waiting": "waiting",
    "run-decided": "queued",
    "run-cancelled": "cancelled",
    "run-failed": "failed",
    "run-queued": "queued",
    "run-killed": "running",
}
"""The status of each run."""


def make() -> None:
    """Make both files; only the first version may."""
    from agentflow.database import migrate

    assert migrate.HEAD == REVISION
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "golden.db"
        url = f"sqlite:///{file}"
        write(url)
        listing = asyncio.run(list_database(url, tenants=("", TENANT)))
        # What was committed is in the file itself, also what the killed process left in its log.
        assert [each.name for each in Path(folder).iterdir()] == [file.name]
        DATABASE.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    LISTING.write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n")
