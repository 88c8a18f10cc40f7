"""The synchronous and the asynchronous methods: the same calls give the same results."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, get_args

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.errors import (
    AgentflowError,
    ConflictError,
    InvalidInputError,
    SerializationError,
)
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    after,
    at,
    checkpoint,
    dumped,
    plain,
    put,
    put_line,
    writes_at,
)
from agentflow.testing.savers.graphs import CONFIG, Graph, letters, logs, shape

Api = Literal["sync", "async"]


class Calls:
    """Calls a saver through one of its two interfaces, and notes what comes back."""

    def __init__(self, saver: AnySaver, api: Api) -> None:
        """Call `saver`, each method with the prefix that its interface has."""
        self.saver = saver
        self.api = api
        self.outcomes: list[Any] = []

    async def get(self, name: str, *args: Any, **named: Any) -> Any:
        """Make a call and return what it returns."""
        if self.api == "sync":
            return getattr(self.saver, name)(*args, **named)
        return await getattr(self.saver, f"a{name}")(*args, **named)

    async def note(self, name: str, *args: Any, **named: Any) -> None:
        """Make a call and note what it returns, or its error."""
        try:
            self.outcomes.append((name, await self.get(name, *args, **named)))
        except AgentflowError as error:
            self.outcomes.append((name, type(error), str(error)))

    async def load(self, config: RunnableConfig) -> None:
        """Load a checkpoint and note it."""
        self.outcomes.append(("get_tuple", plain(await self.get("get_tuple", config))))

    async def list(self, *args: Any, **named: Any) -> None:
        """List checkpoints and note them."""
        if self.api == "sync":
            found = list(self.saver.list(*args, **named))
        else:
            found = [each async for each in self.saver.alist(*args, **named)]
        self.outcomes.append(("list", [plain(each) for each in found]))


async def play(calls: Calls) -> None:
    """Make every kind of call, on an empty store; it is empty again afterwards."""
    t: RunnableConfig = {"configurable": {"thread_id": "t"}}

    def made(name: str, **values: Any) -> Any:
        fixed = {**checkpoint(name, dict.fromkeys(values, name), **values), "ts": "then"}
        return (fixed, {"step": 1, "run_id": name[0]}, dict.fromkeys(values, name))

    await calls.load(t)
    await calls.note("get", t)
    await calls.note("put", at(), *made("c1", x=["a"], y=1))
    await calls.note("put_writes", at("c1"), [("x", 1), ("__error__", ValueError("no"))], "2", "~b")
    await calls.note("put_writes", at("c1"), [("x", 2)], "1", "~b")
    await calls.note("put", at("c1"), *made("c2", x=["a", "b" * 200], y=2))
    await calls.note("put", at("c1"), *made("c3", x=[], y=2))
    await calls.load(t)
    await calls.note("put", at("c2"), *made("c3", x=[]))
    await calls.note("put", at(ns="child:1"), *made("d1", x=["of the child"]))
    await calls.note("put_writes", at("d1", ns="child:1"), [("x", {"k": (1,)})], "task")
    await calls.note("put", at("c3"), *made("c4", x=[object()]))
    await calls.note("put_writes", at("c3"), [("x", object())], "task")
    await calls.load(t)
    await calls.note("put", {"configurable": {}}, *made("c5", x=1))
    for config in (t, at("c1"), at("c2"), at(ns="child:1"), at("none"), at(thread="none")):
        await calls.load(config)
        await calls.note("get", config)
        await calls.note("get_delta_channel_history", config={**at(), **config}, channels=["x"])
    listings: tuple[tuple[RunnableConfig | None, dict[str, Any]], ...] = (
        (None, {}),
        (t, {}),
        (t, {"limit": 2}),
        (t, {"limit": 0}),
        (t, {"filter": {"run_id": "c"}}),
        (t, {"filter": {"run_id": "d", "step": 1}}),
        (at(), {"before": at("c3")}),
        (at("c1"), {}),
    )
    for narrowed, options in listings:
        await calls.list(narrowed, **options)
    await calls.note("copy_thread", "t", "u")
    await calls.note("copy_thread", "t", "u")
    await calls.note("delete_for_runs", ["d", "none"])
    await calls.note("prune", ["t"], strategy="keep_latest")
    await calls.list(None)
    await calls.note("prune", ["u"], strategy="none")
    await calls.note("prune", ["u"], strategy="delete")
    await calls.note("delete_thread", "none")
    await calls.list(None)
    await calls.note("delete_thread", "t")
    await calls.list(None)


class ParitySuite(Suite):
    """Each method and its twin."""

    def test_same_calls_give_the_same_results(self, saver: AnySaver) -> None:
        noted = []
        for api in get_args(Api):
            calls = Calls(saver, api)
            asyncio.run(play(calls))
            noted.append(calls.outcomes)
        sync, other = noted
        assert [outcome[0] for outcome in sync] == [outcome[0] for outcome in other]
        for ours, theirs in zip(sync, other, strict=True):
            assert ours == theirs
        kinds = {outcome[1] for outcome in sync if isinstance(outcome[1], type)}
        assert kinds == {ConflictError, InvalidInputError, SerializationError}

    def test_each_interface_sees_at_once_what_the_other_has_done(self, saver: AnySaver) -> None:
        async def run() -> None:
            for number in range(1, 6):
                made = checkpoint(f"c{2 * number}", {"x": number}, x=number)
                put(saver, f"c{2 * number - 1}", f"c{2 * number - 2}" if number > 1 else None)
                found = await saver.aget_tuple(at())
                assert found is not None
                assert found.checkpoint["id"] == f"c{2 * number - 1}"
                await saver.aput(found.config, made, {}, {"x": number})
                await saver.aput_writes(after(found.config, made["id"]), [("x", 1)], "a")
                saver.put_writes(after(found.config, made["id"]), [("x", 2)], "b")
                assert writes_at(saver) == [("a", "x", 1), ("b", "x", 2)]
                listed = [each async for each in saver.alist(at())]
                assert [plain(e) for e in listed] == [plain(e) for e in saver.list(at())]

        asyncio.run(run())

    def test_every_method_has_its_own_twin(self, saver: AnySaver) -> None:
        """LangGraph's base class calls neither from the other."""
        for name in ("get_tuple", "list", "put", "put_writes", "delete_thread", "delete_for_runs",
                     "copy_thread", "prune", "get_delta_channel_history"):  # fmt: skip
            for method in (name, f"a{name}"):
                inherited = getattr(BaseCheckpointSaver, method)
                assert getattr(type(saver), method) is not inherited, method

    def test_graph_leaves_the_same_history_through_both(self, saver: AnySaver) -> None:
        graph: Graph = letters("a", "b").compile(checkpointer=saver)
        other: RunnableConfig = {"configurable": {"thread_id": "u"}}
        outputs = [
            asyncio.run(graph.ainvoke({"log": []}, CONFIG)),
            graph.invoke({"log": []}, other),
        ]
        assert outputs[0] == outputs[1] == {"log": ["a", "b"]}
        assert dumped(shape(graph)) == dumped(shape(graph, other))

    def test_many_threads_call_at_once(self, saver: AnySaver) -> None:
        """Sync callers in threads and async callers in a loop, each on a thread of its own."""

        def sync_line(thread: str) -> None:
            put_line(saver, *(f"c{number}" for number in range(8)), thread=thread)

        async def async_line(thread: str) -> None:
            place = at(thread=thread)
            for number in range(8):
                made = checkpoint(f"c{number}", {"x": number}, x=number)
                place = await saver.aput(place, made, {}, {"x": number})

        async def run() -> None:
            await asyncio.gather(
                *(asyncio.to_thread(sync_line, f"sync {number}") for number in range(6)),
                *(async_line(f"async {number}") for number in range(12)),
            )

        asyncio.run(run())
        found = list(saver.list(None))
        assert len(found) == 18 * 8
        for number in range(6):
            thread = at(thread=f"sync {number}")
            assert [e.checkpoint["id"] for e in saver.list(thread)] == [
                f"c{each}" for each in reversed(range(8))
            ]

    @pytest.mark.parametrize("api", get_args(Api))
    def test_node_that_reads_its_own_thread_finds_what_is_durable(
        self, saver: AnySaver, api: Api
    ) -> None:
        seen: list[Any] = []

        def looks(_: Any) -> Any:
            found = saver.get_tuple(CONFIG)
            seen.append(found and found.checkpoint["channel_values"].get("log"))
            return {"log": ["looked"]}

        from agentflow.testing.savers.graphs import chain

        graph: Graph = chain(("a", logs("a")), ("looks", looks)).compile(checkpointer=saver)
        if api == "sync":
            graph.invoke({"log": ["0"]}, CONFIG, durability="sync")
        else:
            asyncio.run(graph.ainvoke({"log": ["0"]}, CONFIG, durability="sync"))
        assert seen == [["0", "a"]]
