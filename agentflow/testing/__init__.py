"""What a user's own tests need: a scripted model, a clock to advance, stored runs to replay."""

from agentflow.testing.clock import VirtualClock as VirtualClock
from agentflow.testing.model import Reply as Reply
from agentflow.testing.model import ScriptedChatModel as ScriptedChatModel
from agentflow.testing.replay import replay_stored as replay_stored
