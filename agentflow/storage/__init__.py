"""Where runs are stored: the port `RunStore` and its implementations."""

from agentflow.storage.base import ChangeKind as ChangeKind
from agentflow.storage.base import OnBusy as OnBusy
from agentflow.storage.base import OnExisting as OnExisting
from agentflow.storage.base import RunStore as RunStore
from agentflow.storage.integrity import RowDamage as RowDamage
from agentflow.storage.integrity import Verified as Verified
