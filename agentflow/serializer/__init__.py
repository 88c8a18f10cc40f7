"""Values to MessagePack and back, exactly or not at all; and the allow-list of classes."""

from __future__ import annotations

from agentflow.serializer.serializer import AllowList as AllowList
from agentflow.serializer.serializer import Serializer as Serializer

__all__ = ["AllowList", "Serializer"]
