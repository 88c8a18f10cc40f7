"""Durable AI agents: LangGraph graphs that survive crashes, deploys and days of waiting."""

from agentflow.app import AgentFlow
from agentflow.interrupts import request_approval
from agentflow.retry import RetryPolicy

__all__ = ["AgentFlow", "RetryPolicy", "request_approval"]
__version__ = "0.1.0"
