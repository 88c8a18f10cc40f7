"""The agent as an agentflow app: `agentflow worker --app examples.refunds.app:app`."""

from __future__ import annotations

import os

from agentflow import AgentFlow
from examples.refunds.client import ServiceClient
from examples.refunds.graph import build_graph
from examples.refunds.observer import Observer
from examples.refunds.script import chat_model

_services = ServiceClient(os.environ.get("REFUNDS_SERVICES_URL", "http://127.0.0.1:8085"))
_model = chat_model(latency=float(os.environ.get("REFUNDS_MODEL_LATENCY", "0.2")))
_graph = build_graph(_model, _services).compile()

app = AgentFlow()
app.register(_graph.with_config(callbacks=[Observer(_services)]), name="refund")
