"""What a user's own tests need: a scripted chat model, and a clock that they can advance."""

from agentflow.testing.clock import VirtualClock as VirtualClock
from agentflow.testing.model import Reply as Reply
from agentflow.testing.model import ScriptedChatModel as ScriptedChatModel
