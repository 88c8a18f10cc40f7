"""Rows of effects that an earlier version has stored are read as they were."""

from __future__ import annotations

import json

import pytest

from agentflow.errors import MissingBlobError
from tests.golden import effects_apart_v1, effects_v1

LINES = [json.loads(line) for line in effects_v1.FILE.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["record"]["key"])
def test_stored_effect_is_read_as_it_was(line: dict[str, object]) -> None:
    row, is_encrypted = line["row"], line["is_encrypted"]
    assert isinstance(row, dict)
    assert effects_v1.read(row, is_encrypted=bool(is_encrypted)) == line["record"]


def test_file_has_every_kind_of_record() -> None:
    seen = {line["record"]["status"] for line in LINES}
    assert seen == {"intended", "succeeded", "failed", "not_happened"}
    assert {line["is_encrypted"] for line in LINES} == {True, False}
    assert any(line["record"]["late"] for line in LINES)
    assert any(line["record"]["comment"] for line in LINES)


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
def test_outcome_in_an_object_is_read_as_it_was(kind: str) -> None:
    made = json.loads(effects_apart_v1.FILE.read_text("utf-8"))[kind]
    is_encrypted = kind == "encrypted"
    assert effects_apart_v1.read(made, is_encrypted=is_encrypted) == effects_apart_v1.VALUE
    (name,) = made["objects"]
    with pytest.raises(MissingBlobError, match=name):
        effects_apart_v1.read({**made, "objects": {}}, is_encrypted=is_encrypted)
