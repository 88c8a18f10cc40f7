"""Bridges between agentflow and the systems around it, one module and one extra each.

The folder stands at the top level, where it is easy to find, and is imported as
`agentflow.integrations` through a symlink. Nothing in the core imports it: an integration builds
on the public surface alone, so removing one can break nothing else.
"""
