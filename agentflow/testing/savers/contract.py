"""LangGraph's contract for one checkpoint: what is put comes back, and nothing else does."""

from __future__ import annotations

from collections import deque
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.types import Send

from agentflow.errors import InvalidInputError, SerializationError
from agentflow.testing.savers.base import Suite
from agentflow.testing.savers.calls import (
    AnySaver,
    at,
    checkpoint,
    dumped,
    id_of,
    ids,
    load,
    public,
    put,
    put_line,
    values_at,
    writes_at,
)

SIZES = (0, 1, 119, 120, 127, 128, 129, 255, 256, 257, 4096, 70_000, 3_000_000)
TYPES: dict[str, Any] = {
    "none": None,
    "numbers": [0, -1, 2**63, 2**200, 0.0, -0.0, 1.5, float("inf"), True],
    "text": ["", "naïve", "\U0001f600", "a\x00b", "\ud800"],
    "bytes": b"\x00\xff" * 100,
    "tuple": (1, ("two", [3]), ()),
    "set": {1, 2},
    "frozenset": frozenset({"a"}),
    "deque": deque([1, 2], maxlen=3),
    "mapping": {1: "int", (2, 3): "tuple", "nested": {"a": {"b": []}}},
    "times": [datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), timedelta(seconds=1.5)],
    "decimal": Decimal("1.10"),
    "uuid": UUID(int=7),
    "messages": [HumanMessage("hi", id="1"), AIMessage("", tool_calls=[])],
    "send": Send("node", {"x": (1,)}),
}
UNSTORABLE_NAMES = ("a\x00b", "\ud800")


class ContractSuite(Suite):
    """`get`, `get_tuple` and `put`, the versions of channels, and metadata."""

    def test_put_on_the_head_becomes_the_head(self, saver: AnySaver) -> None:
        assert saver.get_tuple(at()) is None
        saved = put(saver, "c1")
        expected = {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "c1"}
        assert saved["configurable"] == expected
        put(saver, "c2", "c1")
        found = load(saver)
        assert (id_of(found), found.checkpoint["channel_values"]) == ("c2", {"x": "c2"})
        assert public(found.config) == {**expected, "checkpoint_id": "c2"}
        assert public(found.parent_config) == expected
        assert id_of(load(saver, "c1")) == "c1"
        assert load(saver, "c1").parent_config is None
        assert saver.get_tuple(at("none")) is None

    @pytest.mark.parametrize("given", [{}, {"checkpoint_id": None}, {"checkpoint_id": ""}])
    def test_absent_none_and_empty_id_mean_the_head(
        self, saver: AnySaver, given: dict[str, Any]
    ) -> None:
        put_line(saver, "c1", "c2")
        for ns in ({}, {"checkpoint_ns": ""}):
            found = saver.get_tuple({"configurable": {"thread_id": "t", **ns, **given}})
            assert found is not None
            assert id_of(found) == "c2"
            assert public(found.config) == public(at("c2"))

    def test_get_returns_the_checkpoint_alone(self, saver: AnySaver) -> None:
        assert saver.get(at()) is None
        put_line(saver, "c1", "c2")
        assert saver.get(at()) == load(saver).checkpoint
        assert saver.get(at("c1")) == load(saver, "c1").checkpoint

    def test_what_is_put_is_there_for_another_saver_at_once(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        for number in range(1, 6):
            writer, reader = (saver, another) if number % 2 else (another, saver)
            put(writer, f"c{number}", load(writer).config if number > 1 else None)
            assert id_of(load(reader)) == f"c{number}"
            assert values_at(reader) == {"x": f"c{number}"}

    def test_same_checkpoint_again_from_the_same_invocation_replaces_it(
        self, saver: AnySaver
    ) -> None:
        put(saver, "c1")
        put(saver, "c1", changed="again")
        assert values_at(saver) == {"x": "again"}
        assert len(list(saver.list(at()))) == 1

    def test_only_changed_channels_are_stored_and_all_are_read(self, saver: AnySaver) -> None:
        saver.put(at(), checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b"), {}, {"x": 1, "y": 1})
        saver.put(at("c1"), checkpoint("c2", {"x": 2, "y": 1}, x="c"), {}, {"x": 2})
        assert values_at(saver) == {"x": "c", "y": "b"}
        saver.put(at("c2"), checkpoint("c3", {"x": 3, "y": 1}), {}, {"x": 3})
        assert values_at(saver) == {"y": "b"}, "an explicit empty"
        saver.put(at("c3"), checkpoint("c4", {"x": 4, "y": 1}, x="d", y="b"), {}, {"x": 4})
        assert values_at(saver) == {"x": "d", "y": "b"}
        assert values_at(saver, "c3") == {"y": "b"}

    def test_unchanged_channel_has_the_value_of_its_version(self, saver: AnySaver) -> None:
        """What the caller holds of it may have been edited since."""
        saver.put(at(), checkpoint("c1", {"x": 1, "y": 1}, x=1, y=["b"]), {}, {"x": 1, "y": 1})
        edited = checkpoint("c2", {"x": 2, "y": 1}, x=2, y=["b", "edited"])
        saver.put(at("c1"), edited, {}, {"x": 2})
        assert values_at(saver) == {"x": 2, "y": ["b"]}

    def test_unchanged_channel_is_found_for_who_never_loaded_the_thread(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        saver.put(at(), checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b"), {}, {"x": 1, "y": 1})
        saver.put(at("c1"), checkpoint("c2", {"x": 2, "y": 1}, x="c", y="b"), {}, {"x": 2})
        another.put(at("c2"), checkpoint("c3", {"x": 3, "y": 1}, x="d", y="b"), {}, {"x": 3})
        assert values_at(saver) == {"x": "d", "y": "b"}

    def test_channel_that_leaves_the_versions_is_gone(self, saver: AnySaver) -> None:
        saver.put(at(), checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b"), {}, {"x": 1, "y": 1})
        saver.put(at("c1"), checkpoint("c2", {"x": 1}, x="a"), {}, {})
        assert values_at(saver) == {"x": "a"}
        assert load(saver).checkpoint["channel_versions"] == {"x": 1}
        saver.put(at("c2"), checkpoint("c3", {"x": 1, "y": 2}, x="a", y="c"), {}, {"y": 2})
        assert values_at(saver) == {"x": "a", "y": "c"}
        assert values_at(saver, "c1") == {"x": "a", "y": "b"}

    def test_numbers_as_versions_are_continued_and_text_is_never_repeated(
        self, saver: AnySaver
    ) -> None:
        assert str(saver.get_next_version(3, None)) == "4"
        first, again = saver.get_next_version(None, None), saver.get_next_version(None, None)
        assert first != again
        assert first < saver.get_next_version(first, None)

    @pytest.mark.parametrize("version", [1, 1.5, "00000000000000000000000000000001.5", "v"])
    def test_versions_come_back_as_they_were(self, saver: AnySaver, version: Any) -> None:
        seen = {"node": {"x": version}, "__input__": {}}
        made = {**checkpoint("c1", {"x": version}, x="a"), "versions_seen": seen}
        saver.put(at(), made, {}, {"x": version})  # type: ignore[arg-type]  # a dict is a TypedDict
        saver.put(at("c1"), checkpoint("c2", {"x": version}, x="a"), {}, {})
        for name in ("c1", "c2"):
            found = load(saver, name).checkpoint
            assert found["channel_versions"] == {"x": version}
            assert type(found["channel_versions"]["x"]) is type(version)
            assert found["channel_values"] == {"x": "a"}
        assert load(saver, "c1").checkpoint["versions_seen"] == seen

    def test_namespaces_are_apart(self, saver: AnySaver) -> None:
        for ns in ("", "child:1", "child:1|grand:2", "child"):
            put(saver, "c1", ns=ns, changed=f"of {ns}")
            saver.put_writes(at("c1", ns=ns), [("x", ns)], "task")
        for ns in ("", "child:1", "child:1|grand:2", "child"):
            found = load(saver, ns=ns)
            assert found.config["configurable"]["checkpoint_ns"] == ns
            assert values_at(saver, ns=ns) == {"x": f"of {ns}"}
            assert writes_at(saver, ns=ns) == [("task", "x", ns)]
        assert saver.get_tuple(at(ns="none")) is None

    def test_more_namespaces_than_anyone_remembers(
        self, saver: AnySaver, another: AnySaver
    ) -> None:
        spaces = [f"child:{number}" for number in range(80)]
        for ns in spaces:
            put(saver, "c1", ns=ns)
        for ns in spaces:
            put(saver, "c2", "c1", ns=ns)
        for ns in spaces:
            assert ids(another.list(at(ns=ns))) == ["c2", "c1"]

    @pytest.mark.parametrize("thread", ["1" * 500, "quote ' and % and ?", "naïve \U0001f600"])
    def test_names_of_any_text_are_kept(self, saver: AnySaver, thread: str) -> None:
        put(saver, thread[:255], thread=thread, ns=thread)
        saver.put_writes(at(thread[:255], thread=thread, ns=thread), [(thread, 1)], thread, thread)
        found = load(saver, thread=thread, ns=thread)
        assert public(found.config) == public(at(thread[:255], thread=thread, ns=thread))
        assert found.pending_writes == [(thread, thread, 1)]
        assert saver.get_tuple(at(thread=f"{thread} ", ns=thread)) is None

    def test_unknown_keys_of_a_checkpoint_are_kept_verbatim(self, saver: AnySaver) -> None:
        unknown = {"from_the_future": {"a": [1, (2,), None]}, "pending_sends": [], "v": 9}
        made: Any = {**checkpoint("c1", {"x": 1}, x="a"), **unknown, "updated_channels": None}
        saver.put(at(), made, {}, {"x": 1})
        assert load(saver).checkpoint == made
        later: Any = {**checkpoint("c2", {"x": 1}, x="a"), "updated_channels": ["x"]}
        saver.put(at("c1"), later, {}, {})
        assert load(saver).checkpoint == later, "and they are not inherited"
        assert load(saver, "c1").checkpoint == made

    def test_metadata_is_kept_with_the_scalars_of_the_config(self, saver: AnySaver) -> None:
        config: RunnableConfig = {
            "configurable": {**at()["configurable"], "user": "ada", "__private": 1, "obj": object},
            "metadata": {"run_id": "r", "score": 0.5, "user": "by metadata", "list": [1]},
        }
        own: Any = {"source": "loop", "step": 3, "parents": {"": "p"}, "extra": {"a": (1,)}}
        details: Any = {**own, "score": "own first"}
        saver.put(config, checkpoint("c1", {}), details, {})
        expected = {**own, "score": "own first", "run_id": "r", "user": "by metadata"}
        assert load(saver).metadata == expected

    def test_loaded_values_cannot_change_what_is_stored(self, saver: AnySaver) -> None:
        value, detail = {"list": [1]}, {"list": [1]}
        put(saver, "c1", changed=value, metadata={"detail": detail})
        saver.put_writes(at("c1"), [("x", value)], "task")
        for edited in (value, detail):
            edited["list"].append(2)
        first = load(saver)
        found: Any = (first.checkpoint["channel_values"]["x"], first.metadata["detail"])  # type: ignore[typeddict-item]  # our own key
        for each in (*found, (first.pending_writes or [])[0][2]):
            each["list"].append(3)
        for listed in saver.list(at()):
            listed.checkpoint["channel_values"]["x"]["list"].append(4)
        again = load(saver)
        assert again.checkpoint["channel_values"] == {"x": {"list": [1]}}
        assert dict(again.metadata)["detail"] == {"list": [1]}
        # What was written is what it was when it was written.
        assert again.pending_writes == [("task", "x", {"list": [1]})]

    @pytest.mark.parametrize("kind", TYPES)
    def test_values_come_back_with_their_types(self, saver: AnySaver, kind: str) -> None:
        value = TYPES[kind]
        put(saver, "c1", changed=[value])
        saver.put_writes(at("c1"), [("x", value)], "task")
        found = load(saver)
        assert dumped(found.checkpoint["channel_values"]) == dumped({"x": [value]})
        assert dumped(found.pending_writes) == dumped([("task", "x", value)])

    def test_values_of_every_size_come_back(self, saver: AnySaver, another: AnySaver) -> None:
        texts = {f"text {size}": "x" * size for size in SIZES}
        lists = {f"list {size}": ["y" * (size // 2)] * 2 for size in SIZES}
        values: dict[str, Any] = {**texts, **lists}
        versions: dict[str, str | int | float] = dict.fromkeys(values, "1")
        saver.put(at(), checkpoint("c1", dict(versions), **values), {}, versions)
        saver.put(at("c1"), checkpoint("c2", dict(versions), **values), {}, {})
        for reader in (saver, another):
            assert values_at(reader, "c1") == values
            assert values_at(reader, "c2") == values

    def test_text_with_nul_and_lone_surrogates_round_trips(self, saver: AnySaver) -> None:
        odd = ["a\x00b", "\ud800", {"k\x00": 1}]
        put(saver, "c1", changed=odd, metadata={"note": "x\x00y", "deep": {"note": "x\x00y"}})
        saver.put_writes(at("c1"), [("x", odd)], "task\x00", "path\x00")
        found = load(saver)
        assert found.checkpoint["channel_values"] == {"x": odd}
        assert found.pending_writes == [("task\x00", "x", odd)]
        # LangGraph strips it from the metadata's own texts.
        assert (dict(found.metadata)["note"], dict(found.metadata)["deep"]) == (
            "xy",
            {"note": "x\x00y"},
        )

    @pytest.mark.parametrize("name", ["", "a\x00b", "\ud800", "naïve", "branch:to:a", "__private"])
    def test_channels_may_have_any_name(self, saver: AnySaver, name: str) -> None:
        saver.put(at(), checkpoint("c1", {name: 1}, **{name: "a" * 200}), {}, {name: 1})
        saver.put_writes(at("c1"), [(name, 1)], "task")
        assert values_at(saver) == {name: "a" * 200}
        assert writes_at(saver) == [("task", name, 1)]

    def test_unstorable_value_is_refused_naming_its_place(self, saver: AnySaver) -> None:
        put(saver, "c1")
        for value in ({"deep": [object()]}, [1, object()]):
            loaded = load(saver).config
            with pytest.raises(SerializationError, match="channel 'x' of thread 't'"):
                put(saver, "c2", loaded, changed=value)
            loaded = load(saver).config
            with pytest.raises(SerializationError, match="channel 'x' of thread 't'"):
                saver.put_writes(loaded, [("ok", 1), ("x", value)], "task")
        loaded = load(saver).config
        with pytest.raises(SerializationError, match="metadata of thread 't'"):
            put(saver, "c2", loaded, metadata={"bad": object()})
        assert ids(saver.list(at())) == ["c1"]
        assert writes_at(saver) == [], "all or none"

    def test_call_without_a_thread_says_so(self, saver: AnySaver) -> None:
        for configurable in ({}, {"thread_id": ""}):
            config: RunnableConfig = {"configurable": configurable}
            with pytest.raises(InvalidInputError, match="thread_id"):
                saver.get_tuple(config)
            with pytest.raises(InvalidInputError, match="thread_id"):
                saver.put(config, checkpoint("c1", {}), {}, {})

    def test_write_without_a_checkpoint_says_so(self, saver: AnySaver) -> None:
        put(saver, "c1")
        with pytest.raises(InvalidInputError, match="checkpoint_id"):
            saver.put_writes(at(), [("x", 1)], "task")

    @pytest.mark.parametrize("key", ["thread_id", "checkpoint_ns", "checkpoint_id"])
    @pytest.mark.parametrize("name", UNSTORABLE_NAMES)
    def test_names_that_no_store_can_keep_are_refused_by_key(
        self, saver: AnySaver, key: str, name: str
    ) -> None:
        put(saver, "c1")
        config: RunnableConfig = {"configurable": {**at("c1")["configurable"], key: name}}
        with pytest.raises(InvalidInputError, match=key):
            saver.get_tuple(config)
        with pytest.raises(InvalidInputError, match=key):
            list(saver.list(config))
        with pytest.raises(InvalidInputError, match=key):
            saver.put(config, checkpoint("c2", {}), {}, {})
        with pytest.raises(InvalidInputError, match=key):
            saver.put_writes(config, [("x", 1)], "task")
        with pytest.raises(InvalidInputError, match=key):
            saver.get_delta_channel_history(config=config, channels=["x"])
        assert ids(saver.list(None)) == ["c1"]
        put(saver, "c2", "c1")

    @pytest.mark.parametrize("name", UNSTORABLE_NAMES)
    def test_verbs_refuse_names_that_no_store_can_keep(self, saver: AnySaver, name: str) -> None:
        put(saver, "c1")
        for call in (
            lambda: saver.delete_thread(name),
            lambda: saver.copy_thread(name, "u"),
            lambda: saver.copy_thread("t", name),
            lambda: saver.prune([name]),
            lambda: put(saver, name, "c1"),
            lambda: list(saver.list(at(), before=at(name))),
        ):
            with pytest.raises(InvalidInputError):
                call()
        assert ids(saver.list(None)) == ["c1"]

    def test_copy_with_more_allowed_types_shares_the_store(self, saver: AnySaver) -> None:
        copied = saver.with_allowlist({("decimal", "Decimal")})
        put(saver, "c1")
        put(copied, "c2", "c1", changed=Decimal("1.5"))
        put(saver, "c3", "c2")
        assert ids(copied.list(at())) == ["c3", "c2", "c1"]
        assert values_at(copied, "c2") == {"x": Decimal("1.5")}
