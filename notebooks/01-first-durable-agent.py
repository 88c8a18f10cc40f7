# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first durable agent
#
# An agent reads a complaint and proposes a refund. A person has to agree before anything is paid.
# The person takes their time, and meanwhile the kernel is restarted. The run does not mind: all
# that it needs stands in one SQLite file, and nothing that was done is done again.

# %% [markdown]
# ## The agent
#
# An ordinary LangGraph graph with three nodes. The model is a scripted one, so that the notebook
# needs no key and no network; for a real one write `llm_node("openai:gpt-5-mini", tools=[...])`.
# It says when it is called, so that you can count. The payment is an *effect*: its outcome is on
# record, so it is not repeated if its node is.

# %% tags=["definitions"]
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, BaseMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

from agentflow import AgentFlow, effect
from agentflow.nodes import approval_node, llm_node
from agentflow.testing import ScriptedChatModel

RUN_ID = "complaint-17"


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    approval: NotRequired[dict[str, Any]]
    paid: NotRequired[int]


def propose_refund(order: str, amount: int) -> str:
    """Propose a refund of an amount in euros."""
    raise NotImplementedError  # the call itself is the proposal; nothing executes it


def script(messages: Sequence[BaseMessage]) -> AIMessage:
    print(f"the model is called: {messages[-1].text}")
    refund = {"order": "A-17", "amount": 40}
    return AIMessage(
        "The parcel never came; I propose to refund it.",
        tool_calls=[{"name": "propose_refund", "args": refund, "id": "call-1"}],
    )


def proposed_refund(state: State) -> dict[str, Any]:
    return state["messages"][-1].tool_calls[0]["args"]


@effect(key="refund")
def refund(order: str, amount: int) -> int:
    print(f"{amount} euros are paid for {order}")  # here you would call your bank
    return amount


def pay(state: State) -> dict[str, int]:
    decision = state["approval"]
    if decision["type"] == "reject":
        return {"paid": 0}
    # What was approved is what is paid, whatever the model has proposed.
    return {"paid": refund(decision["proposal"]["order"], decision["proposal"]["amount"])}


graph = StateGraph(State)
graph.add_node("propose", llm_node(ScriptedChatModel(script=script), tools=[propose_refund]))
graph.add_node("approve", approval_node(proposed_refund, title="Refund"))
graph.add_node("pay", pay)
graph.add_edge(START, "propose")
graph.add_edge("propose", "approve")
graph.add_edge("approve", "pay")
graph.add_edge("pay", END)

app = AgentFlow("sqlite:///first-durable-agent.db")
app.register(graph, name="refund")

# %% [markdown]
# ## Start a run
#
# `submit` returns when the run is stored; from then on any process that knows the graph can drive
# it. Here that is this cell: `drive` goes on to the end, or to the first question. (A service would
# have a worker instead: `agentflow worker`.)
#
# The id is our own, so executing this cell twice still gives one run. To start over, choose another
# id, or shut the kernel down and delete `first-durable-agent.db` with its `-wal` and `-shm` files.

# %%
complaint = {"messages": [("user", "Order A-17 never came, and it was 40 euros!")]}
await app.submit("refund", complaint, run_id=RUN_ID)
await app.drive(RUN_ID)

# %% [markdown]
# The model was called once, and now the run is `waiting`. It occupies no worker and no memory while
# it does. What it waits for is an approval:

# %%
waiting = await app.approvals.list(run_id=RUN_ID)
waiting.items[0]

# %% [markdown]
# ## Restart the kernel here
#
# Do it now, with *Kernel → Restart*, or kill the process; to the run both are the same. Then
# **execute the cell under "The agent" again** and go on below. The graph is code, and code is not
# stored: the new kernel knows no graph until that cell has defined and registered it.

# %% [markdown]
# ## Approve, and go on
#
# The new kernel finds the run as the old one left it.

# %% tags=["after-restart"]
await app.get_run(RUN_ID)

# %% [markdown]
# So is the approval. We agree, but to less: an `edit` approves with changes. The other two answers
# are `"approve"` and `{"type": "reject", "message": "..."}`. A decision is checked and stored
# before the agent sees it, and the first one stands.

# %%
(approval,) = (await app.approvals.list(run_id=RUN_ID)).items
edited = {"type": "edit", "value": approval.request.proposal | {"amount": 25}}
await app.approvals.decide(approval.id, edited, by="ann")

# %% [markdown]
# Now the run goes on. The model is not called again: its answer was stored before the question was
# asked.

# %%
run = await app.drive(RUN_ID)
run.output["paid"]

# %% [markdown]
# What has happened, in the order in which it happened, over both kernels:

# %%
for event in await app.list_events(RUN_ID):
    print(f"{event.seq:>2}  {event.type}")

# %%
await app.aclose()
