"""The public names: adding one is a decision, and removing one breaks somebody's program."""

import importlib
import inspect

import pytest

from agentflow import errors

EXPORTS = {
    "agentflow": {
        "AgentFlow",
        "RetryPolicy",
        "effect",
        "effect_context",
        "request_approval",
        "shield",
        "transaction",
    },
    "agentflow.checkpoint": {
        "Archived",
        "Retention",
        "Save",
        "Saver",
        "SweepReport",
        "SweptThread",
        "open_checkpointer",
    },
    "agentflow.nodes": {
        "ToolPolicy",
        "approval_node",
        "durable_model",
        "llm_node",
        "tool_node",
    },
    "agentflow.tasks": {
        "StaleResultWarning",
        "Task",
        "TaskCall",
        "TaskError",
        "TaskResult",
        "TaskRunner",
        "TaskStatus",
        "UnknownTaskWarning",
        "read_snapshot",
    },
}

ERRORS = {
    "AgentflowError": {"ConfigError", "StoreError", "CodecError", "InputError", "RunError"},
    "ConfigError": {
        "AppReferenceError",
        "MigrationRequiredError",
        "MissingDriverError",
        "UnknownGraphError",
        "UnknownPriceError",
        "UnsupportedUrlError",
    },
    "StoreError": {
        "ConflictError",
        "FencedError",
        "NotFoundError",
        "PausedError",
        "ObjectStoreError",
        "StoreUnavailableError",
    },
    "MigrationRequiredError": {"JournalMissingError"},
    "ConflictError": {
        "AlreadyResolvedError",
        "EffectConflictError",
        "IdempotencyConflictError",
        "ThreadBusyError",
        "VersionChangedError",
    },
    "FencedError": {"LeaseLostError"},
    "StoreUnavailableError": {"StoreDamagedError"},
    "CodecError": {
        "BlockedTypeError",
        "HashMismatchError",
        "MissingBlobError",
        "PayloadTooLargeError",
        "SerializationError",
        "UnencryptedValueError",
        "UnknownKeyError",
        "UnknownVersionError",
    },
    "InputError": {
        "ApprovalMismatchError",
        "InvalidDecisionError",
        "InvalidInputError",
        "MissingContextError",
        "SupersededError",
    },
    "RunError": {
        "AttemptsExhaustedError",
        "BudgetExceededError",
        "DeadlineExceededError",
        "EffectFailedError",
        "EffectInDoubtError",
        "OutcomeUnknownError",
        "IllegalTransitionError",
        "NonDeterministicNodeError",
        "IncompatibleGraphError",
        "MigrationError",
        "ProposalUnstableError",
        "RunCancelledError",
        "RunFailedError",
    },
    "IllegalTransitionError": {"NotDeadLetterError"},
    "UnknownKeyError": {"KeyUnavailableError"},
}


@pytest.mark.parametrize("module_name", EXPORTS)
def test_module_exports_exactly_its_public_names(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert set(module.__all__) == EXPORTS[module_name]
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_error_tree_is_as_pinned() -> None:
    assert error_tree() == ERRORS


def test_error_tree_is_drawn_in_the_docstring() -> None:
    assert drawn_tree(errors.__doc__ or "") == ERRORS


def error_tree() -> dict[str, set[str]]:
    tree: dict[str, set[str]] = {}
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.AgentflowError):
            for base in value.__bases__:
                if issubclass(base, errors.AgentflowError):
                    tree.setdefault(base.__name__, set()).add(name)
    return tree


def drawn_tree(docstring: str) -> dict[str, set[str]]:
    tree: dict[str, set[str]] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        name = line.strip(" │├└─")
        if not name.isidentifier() or not name.endswith("Error"):
            continue
        depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
        path[depth:] = [name]
        if depth > 0:
            tree.setdefault(path[depth - 1], set()).add(name)
    return tree
