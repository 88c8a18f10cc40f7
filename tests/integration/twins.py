"""Plays one scenario on agentflow's checkpointer and on LangGraph's own, and compares all of it.

A scenario drives graphs through a `Player`, which keeps a transcript: outputs, errors, states,
histories and in the end every stored checkpoint with its writes. Ids and times differ between two
plays of the same scenario, so a transcript is compared after each id was replaced by a number that
counts first appearances: two transcripts are equal if they tell the same story about the same ids.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import pprint
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, Send, StateSnapshot

Api = Literal["sync", "async"]
Durability = Literal["sync", "async", "exit"]
Mode = tuple[Api, Durability]
EVERY_MODE: tuple[Mode, ...] = tuple(
    (api, durability) for durability in get_args(Durability) for api in get_args(Api)
)
MODES: Mapping[str, tuple[Mode, ...]] = {
    "memory": (("async", "sync"),),
    "sqlite": (("sync", "async"),),
    "postgres": (("async", "sync"),),
}
"""How most scenarios are played on each backend; some are played in every mode on each."""

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{32}\b")
_SHORTEST = 21
_VERSION = re.compile(r"^0*(\d+)\.(?:[\d.e-]{16,}|[0-9a-f]{8})$")


class Player:
    """Drives graphs on one checkpointer in one mode, and notes what comes of it."""

    def __init__(self, saver: BaseCheckpointSaver[Any], mode: Mode) -> None:
        self.saver = saver
        self.api, self.durability = mode
        self.thread = "-".join(mode)
        self.config: RunnableConfig = {"configurable": {"thread_id": self.thread}}
        self.transcript: list[Any] = []

    async def run(
        self, graph: Any, value: Any, config: RunnableConfig | None = None, **options: Any
    ) -> Any:
        """Invoke a graph; an error is noted and returned."""
        config = config or self.config
        options.setdefault("durability", self.durability)
        try:
            if self.api == "async":
                result = await graph.ainvoke(value, config, **options)
            else:
                result = await asyncio.to_thread(graph.invoke, value, config, **options)
        except Exception as error:  # noqa: BLE001 -- both twins must fail alike
            result = error
        self.transcript.append(("run", _in_order(result)))
        return result

    async def stream(self, graph: Any, value: Any, modes: Sequence[str]) -> list[Any]:
        """Collect what a graph streams."""
        options = {"stream_mode": list(modes), "durability": self.durability}
        if self.api == "async":
            chunks = [chunk async for chunk in graph.astream(value, self.config, **options)]
        else:
            chunks = await asyncio.to_thread(
                lambda: list(graph.stream(value, self.config, **options))
            )
        self.transcript.append(("stream", chunks))
        return chunks

    async def answer(self, graph: Any, answers: Mapping[Any, Any]) -> Any:
        """Answer the open questions that have these values, by id."""
        state = await self.state(graph, subgraphs=True)
        resume = {
            asked.id: answers[asked.value] for asked in state.interrupts if asked.value in answers
        }
        assert len(resume) == len(answers), "each of the questions is open, once"
        return await self.run(graph, Command(resume=resume))

    async def state(
        self, graph: Any, config: RunnableConfig | None = None, *, subgraphs: bool = False
    ) -> StateSnapshot:
        """Load a state."""
        config = config or self.config
        found: StateSnapshot
        if self.api == "async":
            found = await graph.aget_state(config, subgraphs=subgraphs)
        else:
            found = await asyncio.to_thread(graph.get_state, config, subgraphs=subgraphs)
        self.transcript.append(("state", found))
        return found

    async def history(self, graph: Any, *, ns: str = "") -> list[StateSnapshot]:
        """Load the history of a namespace, newest first."""
        configurable = {"thread_id": self.thread, "checkpoint_ns": ns}
        config: RunnableConfig = {"configurable": configurable}
        if self.api == "async":
            found = [each async for each in graph.aget_state_history(config)]
        else:
            found = await asyncio.to_thread(lambda: list(graph.get_state_history(config)))
        self.transcript.append(("history", found))
        return found

    async def update(
        self,
        graph: Any,
        values: Any,
        *,
        as_node: str | None = None,
        config: RunnableConfig | None = None,
    ) -> RunnableConfig:
        """Update a state by hand."""
        config = config or self.config
        saved: RunnableConfig
        if self.api == "async":
            saved = await graph.aupdate_state(config, values, as_node=as_node)
        else:
            saved = await asyncio.to_thread(graph.update_state, config, values, as_node=as_node)
        self.transcript.append(("update", saved))
        return saved

    async def stored(self) -> list[CheckpointTuple]:
        """List every checkpoint of the thread, in all namespaces."""
        if self.api == "async":
            return [each async for each in self.saver.alist(self.config)]
        return await asyncio.to_thread(lambda: list(self.saver.list(self.config)))


Scenario = Callable[[Player], Awaitable[Any]]


class Twins:
    """Agentflow's checkpointer, and for each play a new one of LangGraph's."""

    def __init__(
        self,
        saver: BaseCheckpointSaver[Any],
        modes: Sequence[Mode],
        theirs: dict[Mode, list[Any]],
    ) -> None:
        """Play on `saver`, and compare with `theirs`.

        What is missing in `theirs` is played and added. It can be shared by the plays of one
        scenario on several backends.
        """
        self.saver = saver
        self.modes = modes
        self.theirs = theirs

    async def agree(
        self,
        scenario: Scenario,
        *,
        modes: Sequence[Mode] | None = None,
        has_same_rows: bool = True,
    ) -> None:
        """Play a scenario in each mode, and compare it with a play on `InMemorySaver`.

        What the scenario returns must be the same in all modes.

        Args:
            scenario: What to play.
            modes: The ways to drive it, if not the usual ones.
            has_same_rows: Whether to compare all stored rows too.
        """
        results = []
        for mode in modes or self.modes:
            ours, result = await _play(self.saver, scenario, mode, has_same_rows)
            if mode not in self.theirs:
                self.theirs[mode], _ = await _play(InMemorySaver(), scenario, mode, has_same_rows)
            for position, (our, their) in enumerate(zip(ours, self.theirs[mode], strict=True)):
                assert our == their, f"{mode}, entry {position}: {_difference(our, their)}"
            results.append(result)
        assert all(result == results[0] for result in results), f"the modes differ: {results}"


async def _play(
    saver: BaseCheckpointSaver[Any], scenario: Scenario, mode: Mode, has_same_rows: bool
) -> tuple[list[Any], Any]:
    """Return the told transcript of a play, and its told result."""
    player = Player(saver, mode)
    result = await scenario(player)
    rows = _grouped(await player.stored()) if has_same_rows else []
    told: list[Any] = Numbered().tell([*player.transcript, result, *rows])
    return told, Numbered().tell(result)


class Numbered:
    """Tells a transcript in plain data, with each id replaced by the number of its appearance."""

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}

    def tell(self, value: Any) -> Any:
        """Turn a value into plain data."""
        match value:
            case str():
                # Shorter text holds neither an id nor a version.
                if len(value) < _SHORTEST:
                    return value
                return _ID.sub(self._number, _VERSION.sub(r"version \1", value))
            case Mapping():
                items = sorted(value.items(), key=lambda item: str(item[0]))
                # What agentflow stamps a loaded configuration with is its own affair.
                return {
                    self.tell(key): self.tell(item)
                    for key, item in items
                    if not str(key).startswith("__agentflow")
                }
            # LangGraph's own serializer makes lists of tuples.
            case list() | tuple() if not hasattr(value, "_asdict"):
                return [self.tell(item) for item in value]
            case _:
                fields = _fields(value)
                if fields is None:
                    return value
                return {"class": type(value).__name__, **self.tell(fields)}

    def _number(self, found: re.Match[str]) -> str:
        return self._numbers.setdefault(found[0], f"#{len(self._numbers)}")


class _Anonymous(Numbered):
    """Tells with every id replaced by the same sign."""

    def _number(self, found: re.Match[str]) -> str:
        return "#"


def _fields(value: Any) -> dict[str, Any] | None:
    """Return what there is to tell of an object, if it has parts."""
    match value:
        case StateSnapshot():
            return {**value._asdict(), "created_at": None}
        case CheckpointTuple():
            return {**value._asdict(), "checkpoint": {**value.checkpoint, "ts": None}}
        case BaseMessage():
            return value.model_dump()
        case Send():
            return {"node": value.node, "arg": value.arg}
        case BaseException():
            return {"text": str(value)}
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    if dataclasses.is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return None


def _grouped(rows: Iterable[CheckpointTuple]) -> list[Any]:
    """Group rows by namespace, newest first, in an order that does not depend on ids."""
    groups: dict[str, list[CheckpointTuple]] = {}
    for row in rows:
        groups.setdefault(row.config["configurable"]["checkpoint_ns"], []).append(row)
    if len(groups) == 1:
        return list(groups.values())
    return sorted(groups.values(), key=_place)


def _place(group: list[CheckpointTuple]) -> tuple[str, str]:
    # Between calls that say the same, the order in which they were made, which ids do tell here.
    return repr(_Anonymous().tell(group)), min(row.checkpoint["id"] for row in group)


def _difference(our: Any, their: Any) -> str:
    """Show how two told entries differ, ours first."""
    ours, theirs = [pprint.pformat(entry, width=100).splitlines() for entry in (our, their)]
    lines = difflib.unified_diff(ours, theirs, "ours", "InMemorySaver's", lineterm="")
    return "\n".join(["", *lines])


def _in_order(result: Any) -> Any:
    """Sort the questions in a result: parallel nodes may ask in any order."""
    if isinstance(result, dict) and "__interrupt__" in result:
        asked = sorted(result["__interrupt__"], key=lambda each: repr(each.value))
        return {**result, "__interrupt__": asked}
    return result
