"""Where runs are stored: the port `RunStore` and its implementations."""

from agentflow.storage.base import ChangeKind as ChangeKind
from agentflow.storage.base import OnBusy as OnBusy
from agentflow.storage.base import OnExisting as OnExisting
from agentflow.storage.base import RunStore as RunStore
from agentflow.storage.integrity import RowDamage as RowDamage
from agentflow.storage.integrity import Verified as Verified
from agentflow.storage.opening import Claimant as Claimant
from agentflow.storage.opening import Created as Created
from agentflow.storage.opening import Opening as Opening
from agentflow.storage.opening import Resolved as Resolved
