"""Errors survive a process boundary, and say what to do."""

from __future__ import annotations

import copy
import inspect
import pickle
from datetime import timedelta
from typing import Any

import pytest

from agentflow import errors
from agentflow.config import Settings, load_settings
from agentflow.errors import AgentflowError, InvalidInputError, meaning

SAMPLES: dict[str, Any] = {
    "str": "fact",
    "str | None": "fact",
    "int": 7,
    "int | None": 7,
    "float": 7.5,
    "Outcome": "not_written",
    "tuple[str, ...]": ("fact", "other"),
    "tuple[tuple[ChangeKind, str], ...]": (("code_changed", "fact"),),
}
CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, AgentflowError)
]
ADVICE = (
    "use",
    "install",
    "call",
    "run ",
    "check",
    "wait",
    "stands",
    "give",
    "read it again",
    "stop",
    "recorded",
    "upgrade",
    "restore",
    "import its module",
    "decide",
    "run.error",
    "compute it",
    "dies",
    "store it elsewhere",
)
"""What a message with advice in it holds one of."""
PLAIN_FACTS = {
    "AgentflowError",
    "ConfigError",
    "StoreError",
    "InputError",
    "RunError",
    "OutcomeUnknownError",
    "ConflictError",
    "CodecError",
    "SerializationError",
    "InvalidInputError",
    "RunCancelledError",
    "IllegalTransitionError",
}
"""Base classes, those whose caller gives the advice, and those with nothing to be done."""


def make(cls: type[AgentflowError]) -> AgentflowError:
    """Make an error from sample facts."""
    parameters = inspect.signature(cls).parameters.values()
    return cls(
        *(
            SAMPLES[str(parameter.annotation)]
            for parameter in parameters
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_error_survives_pickling_and_copying_with_its_facts(cls: type[AgentflowError]) -> None:
    error = make(cls)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 -- the point
        assert type(again) is cls
        assert str(again) == str(error)
        own = {name: value for name, value in vars(error).items() if not name.startswith("_")}
        assert own.items() <= vars(again).items()


@pytest.mark.parametrize("cls", CLASSES)
def test_message_names_its_facts_and_says_what_to_do(cls: type[AgentflowError]) -> None:
    text = str(make(cls))
    if cls.__init__ is not AgentflowError.__init__:
        assert "fact" in text
    if cls.__name__ not in PLAIN_FACTS:
        assert any(word in text for word in ADVICE), text


@pytest.mark.parametrize("cls", CLASSES)
def test_error_is_no_signal_of_langgraphs_and_has_a_meaning(cls: type[AgentflowError]) -> None:
    from langgraph.errors import GraphBubbleUp

    assert not issubclass(cls, GraphBubbleUp)
    found = meaning(make(cls))
    assert 400 <= found.http_status < 600
    assert found.exit_code in {1, 2, 3, 4, 5}


def test_settings_come_from_the_environment() -> None:
    found = load_settings(
        {"AGENTFLOW_DB_URL": "memory://", "AGENTFLOW_LEASE": "0.5", "AGENTFLOW_POLL_INTERVAL": ""}
    )
    assert (found.db_url, found.lease) == ("memory://", timedelta(seconds=0.5))
    assert found.heartbeat * 3 < found.lease
    assert found.poll_interval == Settings().poll_interval
    assert load_settings({}) == Settings()


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e999", "1e99", "1,5"])
@pytest.mark.parametrize(
    "name", ["AGENTFLOW_LEASE", "AGENTFLOW_POLL_INTERVAL", "AGENTFLOW_STORE_TIMEOUT"]
)
def test_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{name}: must be a positive number of seconds"):
        load_settings({name: value})
