"""One attempt of a run: from its claim to where it parks, ends or is given up.

`driver.py` begins and ends an attempt, and `attempt.py` is what happens in between. What it decides
by is apart: `questions.py` reads what a thread asks and which answers it is owed, `failures.py`
says what failed and how often, `gate.py` stands before each call of a node, and `graph.py` is what
was registered.
"""

from agentflow.drive.compatibility import Compatibility as Compatibility
from agentflow.drive.compatibility import Verdict as Verdict
from agentflow.drive.compatibility import is_begun as is_begun
from agentflow.drive.compatibility import marks_of as marks_of
from agentflow.drive.compatibility import settle as settle
from agentflow.drive.compatibility import store_fingerprint as store_fingerprint
from agentflow.drive.driver import Driver as Driver
from agentflow.drive.driver import acquire as acquire
from agentflow.drive.driver import drained_by_interrupt as drained_by_interrupt
from agentflow.drive.driver import end_cancelled as end_cancelled
from agentflow.drive.driver import opening as opening
from agentflow.drive.graph import RegisteredGraph as RegisteredGraph
from agentflow.drive.graph import check_nodes as check_nodes
