"""Chat models as the journal and budgets know them: names, questions, what answers have used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage

from agentflow.budgets import Meter, Usage, price_of, read_prices
from agentflow.errors import MissingDriverError
from agentflow.interrupts.plain import digest

is_asking: ContextVar[bool] = ContextVar("agentflow_is_asking", default=False)
"""Whether the caller is within a call of a model that is in the journal already."""

_NOT_SENT = {"id", "artifact"}
"""What of a message no model is told."""


def name_of_model(model: BaseChatModel | str) -> str:
    """Return what a model is called in the journal."""
    if isinstance(model, str):
        return model
    params = model._identifying_params
    return str(params.get("model_name") or params.get("model") or model._llm_type)


def made(name: str) -> BaseChatModel:
    """Make the model of a name like `"openai:gpt-4o"`, whose client does not wait by itself."""
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as exc:
        raise MissingDriverError("langchain", None) from exc
    model: BaseChatModel = init_chat_model(name)
    if "max_retries" in type(model).model_fields:
        # Its client would wait while a worker is occupied.
        model = init_chat_model(name, max_retries=0)
    return model


def question(messages: Sequence[BaseMessage]) -> str:
    """Identify what a model is asked."""
    return digest([each.model_dump(mode="json", exclude=_NOT_SENT) for each in messages])


def usage_of(answer: BaseMessage, model: str, meter: Meter | None) -> Usage:
    """Return what a call has used, with its cost if the model has a price."""
    told: Mapping[str, Any] = (answer.usage_metadata if isinstance(answer, AIMessage) else {}) or {}
    named = [answer.response_metadata.get("model_name"), model]
    models = [name for name in named if isinstance(name, str)]
    if meter is not None:
        cost = meter.cost(models, told)
    else:
        prices = [price_of(name, read_prices()) for name in models]
        cost = next((price.cost(told) for price in prices if price is not None), 0.0)
    return Usage(tokens=told.get("total_tokens", 0), cost=cost, model_calls=1)


def note_of(usage: Usage) -> dict[str, Any]:
    """Return what an answer says about itself under `response_metadata["agentflow"]`."""
    return {"cost": usage.cost} if usage.cost else {}
