"""What a graph is made of, and whether a run that began on one can go on with another.

`source.py` reads code in a form that comments, layout and the version of Python do not change:
the functions that `callables.py` finds in a node, written out by `syntax.py`. `schema.py` reads
types and reducers, and `fingerprint.py` makes of both the fingerprint of a graph.
`comparison.py` compares two of them, and says what of the differences a run can still reach from
where it stands; `frontier.py` reads off a checkpoint where that is. `policy.py` says what follows.
`transformation.py` makes a checkpoint of one version one of another.

All of it is computed from values: nothing here reads a store or runs a node.
"""

from agentflow.versions.callables import declare_parts as declare_parts
from agentflow.versions.comparison import Change as Change
from agentflow.versions.comparison import Frontier as Frontier
from agentflow.versions.comparison import compare as compare
from agentflow.versions.comparison import compare_channels as compare_channels
from agentflow.versions.comparison import compare_from_beginning as compare_from_beginning
from agentflow.versions.fingerprint import Fingerprint as Fingerprint
from agentflow.versions.fingerprint import fingerprint_of as fingerprint_of
from agentflow.versions.frontier import due_nodes as due_nodes
from agentflow.versions.policy import ChangeAction as ChangeAction
from agentflow.versions.policy import ChangePolicy as ChangePolicy
from agentflow.versions.source import CodeChangedWarning as CodeChangedWarning
from agentflow.versions.source import code_tag as code_tag
from agentflow.versions.source import redefined_in_main as redefined_in_main
from agentflow.versions.transformation import GraphMigration as GraphMigration
from agentflow.versions.transformation import Names as Names
from agentflow.versions.transformation import Renaming as Renaming
from agentflow.versions.transformation import TransformationError as TransformationError
from agentflow.versions.transformation import transform as transform
