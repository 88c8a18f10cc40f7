"""Every error that agentflow raises, and what each means outside Python.

The tree::

    AgentflowError
    ├── ConfigError
    │   ├── UnsupportedUrlError
    │   ├── MissingDriverError
    │   ├── AppReferenceError
    │   ├── UnknownGraphError
    │   ├── UnknownPriceError
    │   └── MigrationRequiredError
    │       └── JournalMissingError
    ├── StoreError
    │   ├── NotFoundError
    │   ├── ConflictError
    │   │   ├── ThreadBusyError
    │   │   ├── AlreadyResolvedError
    │   │   ├── IdempotencyConflictError
    │   │   ├── EffectConflictError
    │   │   └── VersionChangedError
    │   ├── FencedError
    │   │   └── LeaseLostError
    │   ├── PausedError
    │   ├── ObjectStoreError
    │   └── StoreUnavailableError
    │       └── StoreDamagedError
    ├── CodecError
    │   ├── UnknownVersionError
    │   ├── UnknownKeyError
    │   │   └── KeyUnavailableError
    │   ├── UnencryptedValueError
    │   ├── HashMismatchError
    │   ├── MissingBlobError
    │   ├── SerializationError
    │   ├── PayloadTooLargeError
    │   └── BlockedTypeError
    ├── InputError
    │   ├── ApprovalMismatchError
    │   ├── InvalidInputError
    │   ├── InvalidDecisionError
    │   ├── MissingContextError
    │   └── SupersededError
    └── RunError
        ├── RunFailedError
        ├── RunCancelledError
        ├── AttemptsExhaustedError
        ├── BudgetExceededError
        ├── DeadlineExceededError
        ├── IncompatibleGraphError
        ├── MigrationError
        ├── IllegalTransitionError
        │   └── NotDeadLetterError
        ├── EffectFailedError
        ├── EffectInDoubtError
        ├── OutcomeUnknownError
        ├── NonDeterministicNodeError
        └── ProposalUnstableError

A message says what happened, to which id, and what to do about it. It never holds a payload or a
secret: those stay in the store, behind the codec. Constructors take facts, keep them as attributes
and build the message, so that a caller can act on the facts without parsing text.

None of these derives from LangGraph's `GraphBubbleUp`: its executor drops such exceptions, and a
write that was refused must stop the run.
"""

from __future__ import annotations

from agentflow.errors.base import AgentflowError
from agentflow.errors.codec import (
    BlockedTypeError,
    CodecError,
    HashMismatchError,
    KeyUnavailableError,
    MissingBlobError,
    PayloadTooLargeError,
    SerializationError,
    UnencryptedValueError,
    UnknownKeyError,
    UnknownVersionError,
)
from agentflow.errors.config import (
    AppReferenceError,
    ConfigError,
    JournalMissingError,
    MigrationRequiredError,
    MissingDriverError,
    UnknownGraphError,
    UnknownPriceError,
    UnsupportedUrlError,
)
from agentflow.errors.inputs import (
    ApprovalMismatchError,
    InputError,
    InvalidDecisionError,
    InvalidInputError,
    MissingContextError,
    SupersededError,
)
from agentflow.errors.meanings import Meaning, meaning
from agentflow.errors.runs import (
    AttemptsExhaustedError,
    BudgetExceededError,
    ChangeKind,
    DeadlineExceededError,
    EffectFailedError,
    EffectInDoubtError,
    IllegalTransitionError,
    IncompatibleGraphError,
    MigrationError,
    NonDeterministicNodeError,
    NotDeadLetterError,
    OutcomeUnknownError,
    ProposalUnstableError,
    RunCancelledError,
    RunError,
    RunFailedError,
)
from agentflow.errors.store import (
    AlreadyResolvedError,
    ConflictError,
    EffectConflictError,
    FencedError,
    IdempotencyConflictError,
    LeaseLostError,
    NotFoundError,
    ObjectStoreError,
    Outcome,
    PausedError,
    StoreDamagedError,
    StoreError,
    StoreUnavailableError,
    ThreadBusyError,
    VersionChangedError,
)

__all__ = [
    "AgentflowError",
    "AlreadyResolvedError",
    "AppReferenceError",
    "ApprovalMismatchError",
    "AttemptsExhaustedError",
    "BlockedTypeError",
    "BudgetExceededError",
    "ChangeKind",
    "CodecError",
    "ConfigError",
    "ConflictError",
    "DeadlineExceededError",
    "EffectConflictError",
    "EffectFailedError",
    "EffectInDoubtError",
    "FencedError",
    "HashMismatchError",
    "IdempotencyConflictError",
    "IllegalTransitionError",
    "IncompatibleGraphError",
    "InputError",
    "InvalidDecisionError",
    "InvalidInputError",
    "JournalMissingError",
    "KeyUnavailableError",
    "LeaseLostError",
    "Meaning",
    "MigrationError",
    "MigrationRequiredError",
    "MissingBlobError",
    "MissingContextError",
    "MissingDriverError",
    "NonDeterministicNodeError",
    "NotDeadLetterError",
    "NotFoundError",
    "ObjectStoreError",
    "Outcome",
    "OutcomeUnknownError",
    "PausedError",
    "PayloadTooLargeError",
    "ProposalUnstableError",
    "RunCancelledError",
    "RunError",
    "RunFailedError",
    "SerializationError",
    "StoreDamagedError",
    "StoreError",
    "StoreUnavailableError",
    "SupersededError",
    "ThreadBusyError",
    "UnencryptedValueError",
    "UnknownGraphError",
    "UnknownKeyError",
    "UnknownPriceError",
    "UnknownVersionError",
    "UnsupportedUrlError",
    "VersionChangedError",
    "meaning",
]

for _name in __all__:
    if isinstance(_found := globals()[_name], type):
        # The name that runs and dead letters keep, and that `except` clauses import.
        _found.__module__ = __name__
