"""Stands before each call of a node, model or tool: nothing is begun that would be in vain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler

from agentflow.control import AttemptControl
from agentflow.effects import Places
from agentflow.telemetry import node_of


class Gate(BaseCallbackHandler):
    """Checks the lease before each call, and has those of nodes with a timeout watched."""

    run_inline = True
    raise_error = True
    """A call before which this raises is not made."""

    def __init__(
        self, control: AttemptControl, limits: Mapping[str, float], places: Places
    ) -> None:
        """Guard an attempt; `limits` are seconds by the names of nodes, `places` hears of calls."""
        self._control = control
        self._places = places
        self._limits = limits
        self._first_step: int | None = None
        self.has_progressed = False
        """Whether a superstep of the graph has become durable since."""

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check, and watch a node whose time is limited."""
        del serialized, inputs, parent_run_id
        self._control.check()
        node = node_of(tags, metadata, kwargs.get("name"))
        if node is None or metadata is None:
            return
        self._places.enter(metadata)
        if "|" not in metadata.get("langgraph_checkpoint_ns", ""):
            self._note_step(metadata.get("langgraph_step", 0))
        if (limit := self._limits.get(node)) is not None:
            self._control.watch(run_id, node, limit)

    def _note_step(self, step: int) -> None:
        # A step begins when the one before it is durable.
        if self._first_step is None:
            self._first_step = step
        elif step > self._first_step:
            self.has_progressed = True

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Stop watching."""
        del outputs, kwargs
        if self._limits:
            self._control.unwatch(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Stop watching."""
        del error, kwargs
        if self._limits:
            self._control.unwatch(run_id)

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        """Check."""
        del args, kwargs
        self._control.check()

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        """Check."""
        del args, kwargs
        self._control.check()

    def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
        """Check."""
        del args, kwargs
        self._control.check()

    def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        """Check."""
        del args, kwargs
        self._control.check()
