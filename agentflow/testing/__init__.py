"""What a user's own tests need: a scripted chat model."""

from agentflow.testing.model import Reply as Reply
from agentflow.testing.model import ScriptedChatModel as ScriptedChatModel
