"""The graphs that are measured, and how they are run. No model and no saver is made here.

Each graph is one node that sends itself on with a `Command`. That makes LangGraph's own part of a
superstep the cheapest: a router is one more call, a synchronous node of the asynchronous API goes
through a thread, and a line of a hundred nodes makes every checkpoint larger.
"""

from __future__ import annotations

import asyncio
import operator
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command

Builder = StateGraph[Any, Any, Any, Any]
Graph = CompiledStateGraph[Any, Any, Any, Any]


class Counter(TypedDict):
    """A state that costs nothing to compute; `value` is never changed."""

    count: int
    value: str


class Chat(TypedDict):
    """A conversation under LangGraph's own reducer, which looks at every message each time."""

    messages: Annotated[list[AnyMessage], add_messages]


class PlainChat(TypedDict):
    """A conversation under a reducer that only appends."""

    messages: Annotated[list[AnyMessage], operator.add]


class Log(TypedDict):
    """A counter that says something from time to time."""

    count: int
    messages: Annotated[list[AnyMessage], operator.add]


def counter(steps: int) -> Builder:
    """Count to `steps`, for the asynchronous API."""

    async def step(state: Counter) -> Command[str]:
        return _count(state, steps)

    return _loop(Counter, step)


def sync_counter(steps: int) -> Builder:
    """Count to `steps`, for the synchronous API."""

    def step(state: Counter) -> Command[str]:
        return _count(state, steps)

    return _loop(Counter, step)


def chat(texts: Sequence[str]) -> Builder:
    """Answer each message with the text that is next."""

    async def reply(state: Chat) -> dict[str, Any]:
        said = len(state["messages"])
        # Chat models name what they say; people do not.
        return {"messages": [AIMessage(texts[said], id=f"message-{said}")]}

    builder: Builder = StateGraph(Chat)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    builder.add_edge("reply", END)
    return builder


def monologue(
    texts: Sequence[str], schema: type[Any], at_step: Callable[[int], None] = lambda _count: None
) -> Builder:
    """Say all texts in one run, one for each step.

    Args:
        texts: What is said.
        schema: `Chat` or `PlainChat`.
        at_step: Called by the node with the number of messages that were said before.
    """

    async def step(state: Any) -> Command[str]:  # naming a type would add its reducer
        said = len(state["messages"])
        at_step(said)
        message = AIMessage(texts[said], id=f"message-{said}")
        return Command(
            update={"messages": [message]}, goto="step" if said + 1 < len(texts) else END
        )

    return _loop(schema, step)


def log(texts: Sequence[str], *, steps: int, every: int) -> Builder:
    """Count to `every` for each text and say it, in `steps` steps altogether.

    The final state does not depend on the number of steps.
    """
    total = every * len(texts)
    stride = total // steps
    assert stride * steps == total
    assert every % stride == 0

    async def step(state: Log) -> Command[str]:
        count = state["count"] + stride
        update: dict[str, Any] = {"count": count}
        if count % every == 0:
            said = count // every - 1
            update["messages"] = [AIMessage(texts[said], id=f"message-{said}")]
        return Command(update=update, goto="step" if count < total else END)

    return _loop(Log, step)


def new_config() -> RunnableConfig:
    """Name a thread that nobody has used."""
    return {"configurable": {"thread_id": uuid.uuid4().hex}, "recursion_limit": 10_000}


async def run(graph: Graph, values: dict[str, Any], config: RunnableConfig | None = None) -> float:
    """Run a graph to its end, every step durable before the next, and return the seconds."""
    config = config or new_config()
    began = time.perf_counter()
    await graph.ainvoke(values, config, **_options(graph))
    return time.perf_counter() - began


async def run_sync(graph: Graph, values: dict[str, Any]) -> float:
    """Do the same by the synchronous API, in a thread of its own."""
    config = new_config()

    def invoke() -> float:
        began = time.perf_counter()
        graph.invoke(values, config, **_options(graph))
        return time.perf_counter() - began

    return await asyncio.to_thread(invoke)


async def hold_chat(graph: Graph, texts: Sequence[str]) -> None:
    """Say every other text to a `chat`, which says those in between."""
    config = new_config()
    for text in texts[::2]:
        await run(graph, {"messages": [HumanMessage(text)]}, config)


def _loop(schema: type[Any], step: Any) -> Builder:
    builder: Builder = StateGraph(schema)
    builder.add_node("step", step, destinations=("step", END))
    builder.add_edge(START, "step")
    return builder


def _count(state: Counter, steps: int) -> Command[str]:
    count = state["count"] + 1
    return Command(update={"count": count}, goto="step" if count < steps else END)


def _options(graph: Graph) -> dict[str, Any]:
    # Without a checkpointer LangGraph warns that durability means nothing.
    return {"durability": "sync"} if graph.checkpointer else {}
