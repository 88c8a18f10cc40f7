"""The support agent as a LangGraph graph.

classify (model) → look up the order (tool) → propose a refund (model) → approval, if the shop's
rules ask for it → pay → e-mail. A ticket that needs no refund goes straight to the e-mail.

The payment and the e-mail are effects: a node that is executed again does not repeat them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import httpx
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, tool
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from pydantic import TypeAdapter, ValidationError

from agentflow import RetryPolicy, effect, effect_context
from agentflow.nodes import ToolPolicy, approval_node, llm_node, tool_node
from examples.refunds.client import Payment, ServiceClient
from examples.refunds.policy import Refund, reasons_to_ask
from examples.refunds.shop import Money, Order, Ticket, read_orders

_CLASSIFY = (
    "You answer the mail of a web shop. If the ticket asks for money back for an order whose "
    "number it names, call look_up_order and nothing else. Otherwise reply to the customer in "
    "one or two sentences; if a refund is asked for without an order number, ask for the number."
)
_PROPOSE = (
    "Decide on the refund from the order that was looked up. Amounts are in the currency's "
    "smallest unit. Refund the items that the ticket complains about, all of them if it names "
    "none, and never more than total minus refunded. Call propose_refund; or, if nothing is due "
    "(unknown order, nothing left to refund, or `tickets` lists one before this ticket), reply to "
    "the customer in one or two sentences."
)
_REFUND = TypeAdapter(Refund)
_UNSENT = RetryPolicy(retry_on=(httpx.ConnectError, httpx.ConnectTimeout))
"""Of these it is certain that nothing was sent."""


class RefundState(TypedDict):
    """What a run knows. Only `ticket` is given; the nodes fill in the rest."""

    ticket: Ticket
    messages: Annotated[NotRequired[list[AnyMessage]], add_messages]
    approval: NotRequired[dict[str, Any]]
    """The decision, with the refund as it was approved or edited."""
    payment: NotRequired[Payment]


@tool
def propose_refund(order_id: str, amount: int, currency: str, reason: str) -> str:
    """Propose a refund; `amount` is in the currency's smallest unit (cents, pence, yen)."""
    # The model's call is the proposal: the graph reads its arguments and never runs it.
    raise NotImplementedError


def order_tool(orders: Mapping[str, Order]) -> BaseTool:
    """Return the tool with which the model looks at the shop's orders."""

    @tool
    def look_up_order(order_id: str) -> str:
        """Look up an order by its number, such as R-10001."""
        return json.dumps(orders.get(order_id), ensure_ascii=False)

    return look_up_order


def build_graph(
    model: BaseChatModel, services: ServiceClient
) -> StateGraph[RefundState, None, RefundState, RefundState]:
    """Build the agent around a model and the services that it pays and writes with."""
    look_up_order = order_tool(read_orders())
    graph = StateGraph(RefundState)
    graph.add_node("classify", llm_node(model, tools=[look_up_order], prompt=_classify_prompt))
    # It only reads: where it is not known whether it was called, it is called again.
    reads = ToolPolicy(idempotent=True)
    graph.add_node("look_up", tool_node([look_up_order], policy=reads))
    graph.add_node("propose", llm_node(model, tools=[propose_refund], prompt=_propose_prompt))
    graph.add_node(
        "approve",
        approval_node(approvable_refund, title="Refund", response=Refund, when=needs_approval),
    )
    outside = _Outside(services)
    graph.add_node("pay", outside.pay_node)
    graph.add_node("email", outside.email_node)

    graph.add_edge(START, "classify")
    graph.add_conditional_edges("classify", _after_classify)
    graph.add_edge("look_up", "propose")
    graph.add_conditional_edges("propose", _after_propose)
    graph.add_conditional_edges("approve", _after_approve)
    graph.add_edge("pay", "email")
    graph.add_edge("email", END)
    return graph


def proposed_refund(state: RefundState) -> Refund | None:
    """Return the refund that the model proposed, or `None` if it made no usable proposal."""
    calls = _last_answer(state).tool_calls
    if not calls or calls[0]["name"] != propose_refund.name:
        return None
    try:
        return _REFUND.validate_python(calls[0]["args"])
    except ValidationError:
        return None


def looked_up_order(state: RefundState) -> Order | None:
    """Return the order as the shop knows it, or `None` if there is no such order."""
    found = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    if not found or found[-1].status == "error":
        return None
    order: Order | None = json.loads(found[-1].text)
    return order


def approvable_refund(state: RefundState) -> dict[str, Any]:
    """Return what a person is shown: the refund, and why it is not paid without asking."""
    refund = proposed_refund(state)
    assert refund is not None, "without a proposal the graph goes past the approval"
    reasons = reasons_to_ask(state["ticket"], looked_up_order(state), refund)
    return {**refund, "ticket": state["ticket"]["id"], "reasons_to_ask": reasons}


def needs_approval(state: RefundState) -> bool:
    """Whether a person must agree to the proposed refund."""
    return bool(approvable_refund(state)["reasons_to_ask"])


def _classify_prompt(state: RefundState) -> list[BaseMessage]:
    return [SystemMessage(_CLASSIFY), _ticket_message(state["ticket"])]


def _propose_prompt(state: RefundState) -> list[BaseMessage]:
    # The ticket, the call of look_up_order, and the order that it found.
    return [SystemMessage(_PROPOSE), _ticket_message(state["ticket"]), *state["messages"]]


def _ticket_message(ticket: Ticket) -> HumanMessage:
    return HumanMessage(f"Ticket {ticket['id']}: {ticket['subject']}\n\n{ticket['text']}")


def _last_answer(state: RefundState) -> AIMessage:
    return next(
        message for message in reversed(state["messages"]) if isinstance(message, AIMessage)
    )


def _after_classify(state: RefundState) -> Literal["look_up", "email"]:
    return "look_up" if _last_answer(state).tool_calls else "email"


def _after_propose(state: RefundState) -> Literal["approve", "email"]:
    return "approve" if proposed_refund(state) else "email"


def _after_approve(state: RefundState) -> Literal["pay", "email"]:
    return "email" if state["approval"]["type"] == "reject" else "pay"


class _Outside:
    """The two effects of the agent on the outside world, and the nodes that call them."""

    def __init__(self, services: ServiceClient) -> None:
        # The payment service makes a payment once per idempotency key, so one in doubt is
        # requested again.
        @effect(name="refunds:pay", key="payment", on_in_doubt="retry")
        async def pay(reference: str, order_id: str, amount: int, currency: str) -> Payment:
            return await services.pay(
                idempotency_key=effect_context().idempotency_key,
                reference=reference,
                order_id=order_id,
                amount=amount,
                currency=currency,
            )

        # The mail service sends whatever arrives, so a person is asked about an e-mail in doubt.
        # The timeout is shorter than the client's: an answer that does not come is a doubt too.
        @effect(name="refunds:email", key="email", timeout=20, retry=_UNSENT)
        async def send_email(reference: str, to: str, subject: str, text: str) -> None:
            await services.send_email(reference=reference, to=to, subject=subject, text=text)

        self._pay = pay
        self._send_email = send_email

    async def pay_node(self, state: RefundState, config: RunnableConfig) -> dict[str, Any]:
        # What was approved, not what the model proposed: a person may have changed the amount.
        refund: Refund = state["approval"]["proposal"]
        payment = await self._pay(
            config["metadata"]["run_id"], refund["order_id"], refund["amount"], refund["currency"]
        )
        return {"payment": payment}

    async def email_node(self, state: RefundState, config: RunnableConfig) -> dict[str, Any]:
        ticket = state["ticket"]
        subject = f"Re: {ticket['subject']}"
        run_id = config["metadata"]["run_id"]
        await self._send_email(run_id, ticket["email"], subject, _email_text(state))
        return {}


def _email_text(state: RefundState) -> str:
    if payment := state.get("payment"):
        money = Money(amount=payment["amount"], currency=payment["currency"])
        return f"We have refunded {money} for your order {payment['order_id']}."
    if "approval" in state:
        return "We have looked at your request and cannot refund this order."
    return _last_answer(state).text or "A colleague will get back to you about your request."
