"""Object stores: where what is too large for rows, or is kept for long, stands under a name."""

from __future__ import annotations

from agentflow.objects.base import FoundObject, ObjectStore
from agentflow.objects.bundle import Bundle
from agentflow.objects.tier import OFFLOAD_FROM, ObjectTier, open_tier
from agentflow.objects.urls import open_objects

__all__ = [
    "OFFLOAD_FROM",
    "Bundle",
    "FoundObject",
    "ObjectStore",
    "ObjectTier",
    "open_objects",
    "open_tier",
]
