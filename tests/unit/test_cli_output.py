"""What the command line prints: escapes that make text safe to look at, JSON, tables, arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from agentflow.cli.command import UsageError
from agentflow.cli.output import (
    Output,
    OutputFormat,
    block,
    field_lines,
    jsonable,
    to_json,
    visible,
)
from agentflow.cli.values import read_json, read_pairs

HIDDEN = {
    "right-to-left override": "\u202e",
    "right-to-left isolate": "\u2067",
    "right-to-left mark": "\u200f",
    "arabic letter mark": "\u061c",
    "zero width space": "\u200b",
    "zero width joiner": "\u200d",
    "word joiner": "\u2060",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "line separator": "\u2028",
    "escape": "\x1b",
    "delete": "\x7f",
    "c1 control": "\x9b",
    "backspace": "\b",
    "carriage return": "\r",
    "null": "\x00",
    "tag letter": "\U000e0041",
    "variation selector": "\ufe0f",
    "variation selector 17": "\U000e0100",
    "hangul filler": "\u3164",
    "braille blank": "\u2800",
    "combining grapheme joiner": "\u034f",
    "private use": "\ue000",
    "lone surrogate": "\ud800",
}


@pytest.mark.parametrize("char", HIDDEN.values(), ids=HIDDEN)
def test_a_hidden_character_is_shown_as_an_escape_that_json_reads_back(char: str) -> None:
    text = f"pay 10{char}0 EUR"
    shown = visible(text)
    assert shown.isprintable()
    assert "\\" in shown
    assert json.loads(f'"{shown}"') == text
    printed = to_json({"note": text, f"k{char}": 1}, indent=2)
    assert all(line.isprintable() for line in printed.split("\n"))
    assert json.loads(printed) == {"note": text, f"k{char}": 1}


@pytest.mark.parametrize(
    "text",
    ["plain", "Zürich 1\u202f000 €", "日本語", "שלום", "مرحبا", "emoji 🙂", "a\u00a0b", "e\u0301"],
)
def test_text_that_can_be_seen_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_an_escape_that_was_typed_differs_in_json_from_a_hidden_character() -> None:
    assert to_json("\\u202e") == '"\\\\u202e"'
    assert to_json("\u202e") == '"\\u202e"'


class Colour(Enum):
    RED = "red"


@dataclass
class Money:
    amount: float
    at: datetime


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            Money(1.5, datetime(2026, 1, 2, tzinfo=UTC)),
            {"amount": 1.5, "at": "2026-01-02T00:00:00+00:00"},
        ),
        (Colour.RED, "red"),
        (float("nan"), "nan"),
        ({1: ("a", {"b"}), None: b"x"}, {"1": ["a", ["b"]], "None": "b'x'"}),
        ({(1, 2): 3}, {"[1, 2]": 3}),
    ],
)
def test_values_of_any_kind_become_json(value: Any, expected: Any) -> None:
    assert json.loads(to_json(value)) == expected


def test_a_message_becomes_json_by_its_fields() -> None:
    assert jsonable(HumanMessage("hi"))["content"] == "hi"


def test_fields_that_are_not_set_are_not_shown() -> None:
    data = {"id": "r1", "error": None, "metadata": {}, "nested": {"title": "T\nid: r2"}}
    assert field_lines(data, ("id", "error", "metadata", "nested.title", "missing")) == [
        "id:           r1",
        "nested.title: T\\nid: r2",
    ]


def test_a_long_value_is_shown_whole_on_lines_of_its_own() -> None:
    lines = field_lines({"input": {"text": "x" * 500}}, ("input",))
    assert lines[0] == "input:"
    assert json.loads("".join(lines[1:])) == {"text": "x" * 500}


def test_lines_of_free_text_cannot_pass_for_fields() -> None:
    assert block("description", "fine\nversion: 9\rid: 7") == [
        "description:",
        "  | fine",
        "  | version: 9",
        "  | id: 7",
    ]


def test_a_table_that_is_piped_is_tab_separated_without_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    records = [{"id": "r1", "request": {"title": "a\tb\n[red]c"}}, {"id": "r2"}]
    Output(OutputFormat.TABLE).rows(records, ("id", "request.title"), empty="none")
    printed = capsys.readouterr()
    assert printed.out == "id\trequest.title\nr1\ta\\tb\\n[red]c\nr2\t\n"
    assert printed.err == ""


@pytest.mark.parametrize(("form", "out"), [("table", ""), ("json", "[]\n"), ("jsonl", "")])
def test_an_empty_list_is_said_on_stderr(
    capsys: pytest.CaptureFixture[str], form: str, out: str
) -> None:
    Output(OutputFormat(form)).rows([], ("id",), empty="no runs")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (out, "no runs\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{amount: 1}", "is not JSON: Expecting property name"),
        ("", "is not JSON"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"amount": 1, "amount": 1000}', "a key occurs twice"),
        ("@missing.json", "cannot read the file 'missing.json': No such file"),
        ("@latin1.json", "it is not UTF-8"),
        ("@.", "cannot read the file '.'"),
        ("[" * 100_000, "cannot be used"),
    ],
)
def test_what_is_not_json_names_the_option_and_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.json").write_bytes(b'"\xe9"')
    with pytest.raises(UsageError, match=r"^--input ") as caught:
        read_json("--input", text)
    assert reason in str(caught.value)


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert read_pairs("--metadata", ["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    for bad in ("a", "=b", ""):
        with pytest.raises(UsageError, match="--metadata takes key=value"):
            read_pairs("--metadata", [bad])
