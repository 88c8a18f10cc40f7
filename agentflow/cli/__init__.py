"""The command line: a thin layer over `AgentFlow`, noun then verb.

Nothing here decides anything about runs; each command reads its arguments, calls one method and
prints the records that come back. What is slow to import (LangGraph, SQLAlchemy, the user's app)
is imported inside the commands, so that `agentflow --help` answers at once.
"""

from __future__ import annotations

from agentflow.cli.program import main

__all__ = ["main"]
