"""Two releases of one program, for the command line: `first` and `second` are its apps."""

from __future__ import annotations

from agentflow import AgentFlow
from tests.integration.graphs import asks, chain, logs

first = AgentFlow("sqlite:///never-used.db")
first.register(chain(("ask", asks("pay?")), ("pay", logs("paid"))), name="refund")

second = AgentFlow("sqlite:///never-used.db")
second.register(chain(("ask", asks("pay?")), ("wire", logs("paid"))), name="refund")
second.register(
    chain(("inquire", asks("pay?")), ("wire", logs("paid"))), name="refund", version="2"
)
second.migration("refund", from_="1", to="2", nodes={"ask": "inquire"})(lambda values: values)
