"""Ready-made nodes: call a model, run its tools, ask a person. Plain LangGraph node callables.

`llm.py`, `tools.py` and `approval.py` have a node each, `durable.py` a model for nodes of others;
`models.py` is what both know of models. `history.py` makes a conversation one that
a model accepts, `policy.py` is what may be said of a tool.
"""

from __future__ import annotations

from agentflow.nodes.approval import approval_node
from agentflow.nodes.durable import durable_model
from agentflow.nodes.llm import llm_node
from agentflow.nodes.policy import ToolPolicy
from agentflow.nodes.tools import tool_node

__all__ = ["ToolPolicy", "approval_node", "durable_model", "llm_node", "tool_node"]
