"""Real graphs on the checkpointer: branches, races, subgraphs, fan-out, agents, durabilities."""

from __future__ import annotations

import asyncio
import importlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal, get_args

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.types import Command, Send, interrupt

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.errors import ConflictError
from agentflow.failpoints import arm, disarm
from agentflow.testing import ScriptedChatModel
from tests.integration.graphs import State, asks, chain, fan, logs

CONFIG: RunnableConfig = {"configurable": {"thread_id": "t"}}
Durability = Literal["sync", "async", "exit"]


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def saver(request: pytest.FixtureRequest) -> AsyncIterator[Saver]:
    """A checkpointer on an empty database of each kind."""
    url = request.getfixturevalue(f"{request.param}_url") if request.param != "memory" else None
    async with open_checkpointer(url or "memory://") as opened:
        yield opened
    disarm()


def letters(*names: str) -> Any:
    """Build a chain whose nodes log their names."""
    return chain(*((name, logs(name)) for name in names))


async def shape(graph: Any, config: RunnableConfig = CONFIG) -> list[tuple[Any, ...]]:
    """Return what the history of a thread says, but for ids and times."""
    return [
        (each.values, each.next, each.metadata["source"], each.metadata["step"])
        async for each in graph.aget_state_history(config)
    ]


@pytest.mark.parametrize("durability", get_args(Durability))
async def test_history_is_that_of_the_memory_saver(saver: Saver, durability: Durability) -> None:
    graphs = [letters("a", "b", "c").compile(checkpointer=s) for s in (saver, InMemorySaver())]
    for graph in graphs:
        for entry in ("1", "2"):
            await graph.ainvoke({"log": [entry]}, CONFIG, durability=durability)
    ours, theirs = [await shape(graph) for graph in graphs]
    assert ours == theirs
    assert ours[0][0] == {"log": ["1", "a", "b", "c", "2", "a", "b", "c"]}
    assert len(ours) == (2 if durability == "exit" else 10)


async def test_sync_interface_gives_the_same_history(saver: Saver) -> None:
    graph = letters("a", "b").compile(checkpointer=saver)
    other: RunnableConfig = {"configurable": {"thread_id": "u"}}
    outputs = [
        await graph.ainvoke({"log": []}, CONFIG),
        await asyncio.to_thread(graph.invoke, {"log": []}, other),
    ]
    assert outputs[0] == outputs[1]
    assert await shape(graph) == await shape(graph, other)


async def test_any_checkpoint_can_be_continued_and_the_branch_is_the_latest(saver: Saver) -> None:
    graph = letters("a", "b", "c").compile(checkpointer=saver)
    await graph.ainvoke({"log": ["0"]}, CONFIG, durability="sync")
    history = [each async for each in graph.aget_state_history(CONFIG)]
    for old in history[1:-1]:
        assert await graph.ainvoke(None, old.config) == {"log": ["0", "a", "b", "c"]}
        latest = await graph.aget_state(CONFIG)
        assert latest.config["configurable"]["checkpoint_id"] not in {
            each.config["configurable"]["checkpoint_id"] for each in history
        }
    for old in history:
        same = await graph.aget_state(old.config)
        assert (same.values, same.next) == (old.values, old.next), "the old line is untouched"


@pytest.mark.parametrize("as_node", ["a", "__copy__"])
async def test_update_of_an_old_checkpoint_branches(saver: Saver, as_node: str) -> None:
    graph = letters("a", "b").compile(checkpointer=saver)
    await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    old = [each async for each in graph.aget_state_history(CONFIG)][1]
    assert old.next == ("b",)
    values = None if as_node == "__copy__" else {"log": ["by hand"]}
    branch = await graph.aupdate_state(old.config, values, as_node=as_node)
    latest = await graph.aget_state(CONFIG)
    assert latest.config["configurable"]["checkpoint_id"] == branch["configurable"]["checkpoint_id"]
    expected = ["a", "b"] if as_node == "__copy__" else ["a", "by hand", "b"]
    assert (await graph.ainvoke(None, CONFIG))["log"] == expected


async def test_update_from_a_state_that_is_not_the_latest_any_more_is_a_conflict(
    saver: Saver,
) -> None:
    graph = letters("a", "b").compile(checkpointer=saver)
    await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    seen = await graph.aget_state(CONFIG)
    await graph.ainvoke({"log": ["new"]}, CONFIG, durability="sync")
    config = seen.config
    found = await saver.aget_tuple(config)
    assert found is not None
    stale = {**found.config["configurable"]}
    await graph.ainvoke({"log": ["newer"]}, CONFIG, durability="sync")
    with pytest.raises(ConflictError):
        await saver.aput({"configurable": stale}, {**found.checkpoint, "id": "x"}, {}, {})


class Gate:
    """Holds both of two racing invocations until both are inside, or one has lost."""

    def __init__(self) -> None:
        self.inside = 0
        self.opened = asyncio.Event()

    async def __call__(self, state: State) -> State:
        self.inside += 1
        if self.inside == 2:
            self.opened.set()
        await self.opened.wait()
        return {"log": ["raced"]}


@pytest.mark.parametrize("savers", [1, 2])
@pytest.mark.parametrize("before", [[], ["before"]])
async def test_one_of_two_racing_invocations_gets_a_conflict(
    database_url: str, savers: int, before: list[str]
) -> None:
    gate = Gate()
    async with open_checkpointer(database_url) as one, open_checkpointer(database_url) as two:
        graphs = [
            chain(("gate", gate), ("b", logs("b"))).compile(checkpointer=each)
            for each in (one, two if savers == 2 else one)
        ]
        if before:
            await graphs[0].aupdate_state(CONFIG, {"log": before}, as_node="b")

        async def race(position: int) -> Any:
            try:
                entry: Any = {"log": [position]}
                return await graphs[position].ainvoke(entry, CONFIG, durability="sync")
            except ConflictError as error:
                gate.opened.set()
                return error

        outcomes = await asyncio.gather(race(0), race(1))
        lost = [each for each in outcomes if isinstance(each, ConflictError)]
        (won,) = [each for each in outcomes if not isinstance(each, ConflictError)]
        assert len(lost) == 1
        assert (await graphs[0].aget_state(CONFIG)).values == won
        # One line, without a fork in it.
        configs = [
            (each.config, each.parent_config) async for each in graphs[0].aget_state_history(CONFIG)
        ]
        parents = [
            parent["configurable"]["checkpoint_id"] if parent else None for _, parent in configs
        ]
        ids = [config["configurable"]["checkpoint_id"] for config, _ in configs]
        assert parents == [*ids[1:], None]


async def test_host_whose_clock_is_a_minute_behind_continues_the_newest_checkpoint(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def count(name: str) -> Any:
        def node(state: State) -> State:
            counted.append(name)
            return {"log": [name]}

        return node

    graph = chain(
        ("a", count("a")), ("ask", asks("ok?")), ("b", count("b")), ("ask2", asks("ok?"))
    ).compile(checkpointer=saver)
    await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    module = importlib.import_module("langgraph.pregel._checkpoint")
    real = module.uuid6

    def behind(**options: Any) -> uuid.UUID:
        made = real(**options)
        # The first 48 bits of a version 6 UUID are the upper bits of a count of 100 ns.
        return uuid.UUID(int=made.int - ((60 * 10**7 >> 12) << 80))

    monkeypatch.setattr(module, "uuid6", behind)
    before = await graph.aget_state(CONFIG)
    (first,) = before.interrupts
    await graph.ainvoke(Command(resume={first.id: 1}), CONFIG, durability="sync")
    latest = await graph.aget_state(CONFIG)
    new_id = latest.config["configurable"]["checkpoint_id"]
    assert new_id < before.config["configurable"]["checkpoint_id"], "the clock is behind"
    assert latest.next == ("ask2",)
    await graph.ainvoke(None, CONFIG, durability="sync")
    (second,) = (await graph.aget_state(CONFIG)).interrupts
    await graph.ainvoke(Command(resume={second.id: 2}), CONFIG, durability="sync")
    assert counted == ["a", "b"]
    steps = [step for _, _, _, step in await shape(graph)]
    assert steps == sorted(steps, reverse=True)


async def test_failed_checkpoint_stops_the_graph_and_finished_nodes_are_not_run_again(
    saver: Saver,
) -> None:
    calls: list[str] = []

    def node(name: str) -> Any:
        def run(state: State) -> State:
            calls.append(name)
            return {"log": [name]}

        return run

    def fail() -> None:
        raise OSError("disk full")

    def a(state: State) -> State:
        arm("checkpoint.before_insert", fail)
        return node("a")(state)  # type: ignore[no-any-return]  # made above

    graph = chain(("a", a), ("b", node("b")), ("c", node("c"))).compile(checkpointer=saver)
    with pytest.raises(OSError, match="disk full"):
        await graph.ainvoke({"log": []}, CONFIG, durability="sync")
    assert calls == ["a"]
    disarm()
    assert (await graph.ainvoke(None, CONFIG, durability="sync"))["log"] == ["a", "b", "c"]
    assert calls == ["a", "b", "c"], "the writes of a were durable before its checkpoint"


async def test_unstorable_write_stops_the_graph_before_the_next_node(saver: Saver) -> None:
    calls: list[str] = []
    after = lambda _: calls.append("after")  # noqa: E731 -- a node
    graph = chain(("bad", lambda _: {"value": object()}), ("after", after))
    compiled = graph.compile(checkpointer=saver)
    with pytest.raises(Exception, match="channel 'value' of thread 't'"):
        await compiled.ainvoke({"log": []}, CONFIG, durability="sync")
    assert calls == []
    assert (await compiled.aget_state(CONFIG)).next == ("bad",)


@pytest.mark.parametrize("checkpointer", [None, True])
async def test_subgraph_continues_in_its_own_namespace(saver: Saver, checkpointer: Any) -> None:
    child = chain(("in", logs("in")), ("ask", asks("ok?"))).compile(checkpointer=checkpointer)
    graph = chain(("child", child), ("end", logs("end"))).compile(checkpointer=saver)
    for turn in range(2):
        await graph.ainvoke({"log": [turn]}, CONFIG, durability="sync")
        (asked,) = (await graph.aget_state(CONFIG, subgraphs=True)).interrupts
        result = await graph.ainvoke(Command(resume={asked.id: turn}), CONFIG, durability="sync")
    reference = chain(("child", child), ("end", logs("end"))).compile(checkpointer=InMemorySaver())
    for turn in range(2):
        await reference.ainvoke({"log": [turn]}, CONFIG)
        (asked,) = (await reference.aget_state(CONFIG)).interrupts
        expected = await reference.ainvoke(Command(resume={asked.id: turn}), CONFIG)
    # LangGraph's own serializer makes lists of tuples.
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(expected))
    assert sum(entry == "in" for entry in result["log"]) >= 2


async def test_fan_out_with_parallel_questions_keeps_what_is_done(saver: Saver) -> None:
    calls: list[Any] = []

    def work(state: State) -> State:
        calls.append(state["value"])
        if state["value"] % 2:
            return {"log": [interrupt(state["value"])]}
        return {"log": [state["value"]]}

    graph = chain(("a", logs("a")))
    graph.add_node("work", work)
    graph.add_conditional_edges("a", lambda _: [Send("work", {"value": i}) for i in range(6)])
    compiled = graph.compile(checkpointer=saver)
    result = await compiled.ainvoke({"log": []}, CONFIG, durability="sync")
    answers = {each.id: f"answer {each.value}" for each in result["__interrupt__"]}
    assert len(answers) == 3
    result = await compiled.ainvoke(Command(resume=answers), CONFIG, durability="sync")
    assert result["log"] == ["a", 0, "answer 1", 2, "answer 3", 4, "answer 5"]
    assert [calls.count(i) for i in range(6)] == [1, 2, 1, 2, 1, 2]


async def test_functional_api_does_not_repeat_finished_tasks(saver: Saver) -> None:
    calls: list[int] = []

    @task
    async def double(value: int) -> int:
        calls.append(value)
        return value * 2

    @entrypoint(checkpointer=saver)
    async def flow(values: list[int]) -> dict[str, Any]:
        doubled = [await double(value) for value in values]
        return {"doubled": doubled, "answer": interrupt("ok?")}

    result = await flow.ainvoke([1, 2, 3], CONFIG, durability="sync")
    (asked,) = result["__interrupt__"]
    final = await flow.ainvoke(Command(resume={asked.id: "yes"}), CONFIG, durability="sync")
    assert final == {"doubled": [2, 4, 6], "answer": "yes"}
    assert calls == [1, 2, 3]


async def test_prebuilt_agent_remembers_its_conversation(saver: Saver) -> None:
    def weather(city: str) -> str:
        """Look up the weather."""
        return f"sunny in {city}"

    call = {"name": "weather", "args": {"city": "Rome"}, "id": "1"}
    script = [AIMessage("", tool_calls=[call]), AIMessage("Sunny."), AIMessage("Still sunny.")]
    agent: Any = create_agent(ScriptedChatModel(script=script), tools=[weather], checkpointer=saver)
    await agent.ainvoke({"messages": [("user", "weather?")]}, CONFIG)
    result = await agent.ainvoke({"messages": [("user", "and now?")]}, CONFIG)
    texts = [message.content for message in result["messages"]]
    assert texts == ["weather?", "", "sunny in Rome", "Sunny.", "and now?", "Still sunny."]
    stored = (await agent.aget_state(CONFIG)).values["messages"]
    assert stored == result["messages"]
    assert [type(message) for message in stored] == [type(m) for m in result["messages"]]


async def test_metadata_of_a_run_is_kept_without_private_keys(saver: Saver) -> None:
    graph = fan(("a", logs("a"))).compile(checkpointer=saver)
    config: RunnableConfig = {
        "configurable": {"thread_id": "t", "user": "ada", "__private": 1},
        "metadata": {"run_id": "r"},
    }
    await graph.ainvoke({"log": []}, config, durability="sync")
    found = [each async for each in saver.alist(CONFIG, filter={"run_id": "r"})]
    assert len(found) == len(await shape(graph))
    for each in found:
        assert each.metadata.get("user") == "ada"
        assert not [key for key in each.metadata if key.startswith("__")]
