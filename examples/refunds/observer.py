"""Report every node execution and model call to the services, where they are counted.

The demo kills workers and then has to know what ran again. It asks the services and not agentflow,
so that agentflow is not the judge of its own work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult

from examples.refunds.client import ServiceClient


class Observer(AsyncCallbackHandler):
    """Send a fact when a node or a model call begins and when it has finished.

    The answer is awaited: a node starts after the services know of it, and its result is handed on
    after they know that it finished.
    """

    raise_error = True

    def __init__(self, services: ServiceClient) -> None:
        self._services = services
        self._nodes: dict[UUID, dict[str, str]] = {}
        self._calls: dict[UUID, dict[str, str]] = {}

    async def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        metadata = metadata or {}
        # Chains start inside a node too (a router, a runnable); the node's own bears its name.
        if kwargs.get("name") == metadata.get("langgraph_node") is not None:
            self._nodes[run_id] = _fact(metadata)
            await self._report("/executions", self._nodes[run_id], "started")

    async def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        if fact := self._nodes.pop(run_id, None):
            await self._report("/executions", fact, "finished")

    async def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        # An interrupt arrives here as well; either way the node has not finished.
        self._nodes.pop(run_id, None)

    async def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._calls[run_id] = {**_fact(metadata or {}), "call": str(run_id)}
        await self._report("/model-calls", self._calls[run_id], "started")

    async def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        if fact := self._calls.pop(run_id, None):
            await self._report("/model-calls", fact, "finished")

    async def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._calls.pop(run_id, None)

    async def _report(self, path: str, fact: Mapping[str, str], event: str) -> None:
        await self._services.report(path, {**fact, "event": event})


def _fact(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {"run": str(metadata["run_id"]), "node": str(metadata["langgraph_node"])}
