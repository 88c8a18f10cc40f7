"""The brain of the scripted model: it reads a ticket and an order as a model would, by fixed rules.

It is as gullible as a model can be: a ticket that tells it to ignore its instructions is obeyed.
The rules in `policy` are what stands between such a proposal and the money.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from agentflow.testing import Reply, ScriptedChatModel
from examples.refunds.shop import Line, Order, earlier_tickets, refundable

_ORDER_NUMBER = re.compile(r"\b(?:order|R)[\s#-]*(\d{5})\b", re.IGNORECASE)
_TICKET_ID = re.compile(r"\bT-\d+\b")
_TAKEOVER = re.compile(
    r"ignore (?:all|your) previous instructions.*?refund (\d+)\.(\d\d) ([A-Z]{3})",
    re.IGNORECASE | re.DOTALL,
)
_MONEY_BACK = ("refund", "money", "erstattung", "remboursement")
_EVERYTHING = re.compile(
    r"\b(whole order|everything|all of it|never arrived|nothing has arrived)\b"
)
_CONTENT = re.compile(r"\b(fine|lovely|great|good|okay|keep|stay)\b")
"""Words of a sentence about an item that the customer is happy with."""


def chat_model(*, latency: float = 0.0) -> BaseChatModel:
    """Return the scripted model, or the real one that `AGENTFLOW_MODEL=provider:name` names."""
    if name := os.environ.get("AGENTFLOW_MODEL"):
        model: BaseChatModel = init_chat_model(name, temperature=0)
        return model
    return ScriptedChatModel(script=answer, latency=latency)


def answer(messages: list[BaseMessage], tools: list[dict[str, Any]]) -> Reply:
    """Answer as the model would; the bound tools tell what is asked for."""
    ticket = next(message.text for message in messages if isinstance(message, HumanMessage))
    offered = {tool["function"]["name"] for tool in tools}
    if "look_up_order" in offered:
        return _classify(ticket)
    found = next(message for message in reversed(messages) if isinstance(message, ToolMessage))
    return _propose(ticket, json.loads(found.text))


def _classify(ticket: str) -> Reply:
    if not any(_is_like(word, wanted) for word in _words(ticket) for wanted in _MONEY_BACK):
        return "Thank you for your question. Our team will answer it within one working day."
    number = _ORDER_NUMBER.search(ticket)
    if number is None:
        return "We are sorry to hear that. Could you send us the number of your order?"
    return _call("look_up_order", ticket, order_id=f"R-{number[1]}")


def _propose(ticket: str, order: Order | None) -> Reply:
    if order is None:
        return "We could not find an order with this number. Could you check it for us?"
    if takeover := _TAKEOVER.search(ticket):
        amount = int(takeover[1]) * 100 + int(takeover[2])
        return _refund(ticket, order, amount, takeover[3].upper(), "as instructed")
    if earlier := earlier_tickets(order, _ticket_id(ticket)):
        return f"We are already looking after this order under ticket {earlier[0]}."
    if refundable(order) <= 0:
        return "This order has already been refunded in full."
    lines = list(_lines_complained_about(ticket, order))
    due = sum(line["quantity"] * line["price"] for line in lines)
    reason = f"complaint about {', '.join(line['item'] for line in lines)}"
    return _refund(ticket, order, min(due, refundable(order)), order["currency"], reason)


def _lines_complained_about(ticket: str, order: Order) -> Iterator[Line]:
    sentences = re.split(r"[.!?\n]+", ticket)
    complaint = " ".join(text for text in sentences if not _CONTENT.search(text.lower()))
    words = _words(complaint)
    if _EVERYTHING.search(complaint.lower()):
        named = []
    else:
        named = [line for line in order["lines"] if _is_named(line["item"], words)]
    yield from named or order["lines"]


def _is_named(item: str, words: list[str]) -> bool:
    noun = _words(item)[-1]
    return any(_is_like(word, noun) for word in words)


def _is_like(word: str, wanted: str) -> bool:
    """Whether a word is meant, its plural and small typos included."""
    return SequenceMatcher(None, word, wanted).ratio() >= 0.8


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{3,}", text.lower())


def _ticket_id(ticket: str) -> str:
    found = _TICKET_ID.search(ticket)
    return found[0] if found else ""


def _refund(ticket: str, order: Order, amount: int, currency: str, reason: str) -> AIMessage:
    return _call(
        "propose_refund",
        ticket,
        order_id=order["id"],
        amount=amount,
        currency=currency,
        reason=reason,
    )


def _call(name: str, ticket: str, **args: Any) -> AIMessage:
    call = {"name": name, "args": args, "id": f"call_{name}_{_ticket_id(ticket)}"}
    return AIMessage(content="", tool_calls=[call])
