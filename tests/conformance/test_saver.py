"""The checkpointer, called as LangGraph calls it: heads, fencing, order and listings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME

from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.errors import ConflictError, FencedError, InvalidInputError, SerializationError
from agentflow.failpoints import arm, disarm
from agentflow.types import FencingToken, Lease


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def saver(request: pytest.FixtureRequest) -> Iterator[Saver]:
    """A checkpointer on an empty database of each kind."""
    url = request.getfixturevalue(f"{request.param}_url") if request.param != "memory" else None
    with open_checkpointer(url or "memory://") as opened:
        yield opened
    disarm()


def at(checkpoint_id: str | None = None, *, thread: str = "t", ns: str = "") -> RunnableConfig:
    """Name a place."""
    configurable: dict[str, Any] = {"thread_id": thread, "checkpoint_ns": ns}
    if checkpoint_id:
        configurable["checkpoint_id"] = checkpoint_id
    return {"configurable": configurable}


def checkpoint(checkpoint_id: str, versions: dict[str, Any], **values: Any) -> Checkpoint:
    """Make a checkpoint."""
    return {
        **empty_checkpoint(),
        "id": checkpoint_id,
        "channel_values": values,
        "channel_versions": versions,
    }


def put(
    saver: Saver,
    checkpoint_id: str,
    parent: str | RunnableConfig | None = None,
    *,
    thread: str = "t",
    ns: str = "",
    changed: Any = None,
    metadata: dict[str, Any] | None = None,
) -> RunnableConfig:
    """Put a checkpoint whose one channel `x` has the version and the value of its id."""
    config = at(parent, thread=thread, ns=ns) if not isinstance(parent, dict) else parent
    value = checkpoint_id if changed is None else changed
    made = checkpoint(checkpoint_id, {"x": checkpoint_id}, x=value)
    details = cast("Any", {"source": "loop", "step": 1, **(metadata or {})})
    return saver.put(config, made, details, {"x": checkpoint_id})


def load(saver: Saver, checkpoint_id: str | None = None, **place: Any) -> CheckpointTuple:
    """Load what must be there."""
    found = saver.get_tuple(at(checkpoint_id, **place))
    assert found is not None
    return found


def id_of(found: CheckpointTuple) -> str:
    """Return a checkpoint's id."""
    return found.checkpoint["id"]


def lease(token: int, thread: str = "t") -> Lease:
    """Make a lease."""
    return Lease(tenant="", run_id="r", thread_id=thread, worker="w", token=FencingToken(token))


def acquire(saver: Saver, held: Lease) -> Saver:
    """Take the lease's thread."""
    assert asyncio.run(saver.acquire(held)) == held.token
    return saver.with_lease(held)


def test_put_on_the_head_becomes_the_head(saver: Saver) -> None:
    assert saver.get_tuple(at()) is None
    saved = put(saver, "c1")
    assert saved["configurable"] == {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "c1"}
    put(saver, "c2", "c1")
    found = load(saver)
    assert (id_of(found), found.checkpoint["channel_values"]) == ("c2", {"x": "c2"})
    assert found.parent_config is not None
    assert found.parent_config["configurable"]["checkpoint_id"] == "c1"
    assert id_of(load(saver, "c1")) == "c1"
    assert saver.get_tuple(at("none")) is None


def test_put_on_what_is_not_the_head_any_more_is_a_conflict(saver: Saver) -> None:
    put(saver, "c1")
    put(saver, "c2", "c1")
    with pytest.raises(ConflictError, match="'t' has moved on"):
        put(saver, "c3", "c1")
    assert id_of(load(saver)) == "c2"
    assert saver.get_tuple(at("c3")) is None


def test_branch_from_an_old_checkpoint_is_accepted_from_who_saw_the_head(saver: Saver) -> None:
    put(saver, "c1")
    put(saver, "c2", "c1")
    first, second = load(saver, "c1").config, load(saver, "c1").config
    put(saver, "c3", first)
    assert id_of(load(saver)) == "c3"
    with pytest.raises(ConflictError):
        put(saver, "c4", second)
    assert id_of(load(saver)) == "c3"


def test_same_checkpoint_again_from_the_same_invocation_replaces_it(saver: Saver) -> None:
    put(saver, "c1")
    put(saver, "c1", changed="again")
    found = load(saver)
    assert found.checkpoint["channel_values"] == {"x": "again"}
    assert len(list(saver.list(at()))) == 1


def test_latest_is_the_newest_put_whatever_the_ids_say(saver: Saver) -> None:
    put(saver, "9", metadata={"n": 1})
    put(saver, "1", "9", metadata={"n": 2})
    put(saver, "5", "1", metadata={"n": 3})
    assert id_of(load(saver)) == "5"
    assert [id_of(each) for each in saver.list(at())] == ["5", "1", "9"]
    assert [id_of(each) for each in saver.list(at(), before=at("1"))] == ["9"]
    assert [id_of(each) for each in saver.list(at(), before=at("5"), limit=1)] == ["1"]


def test_namespaces_have_heads_of_their_own(saver: Saver) -> None:
    put(saver, "c1")
    put(saver, "d1", ns="child:1")
    put(saver, "c2", "c1")
    assert id_of(load(saver, ns="child:1")) == "d1"
    assert id_of(load(saver)) == "c2"
    everywhere: RunnableConfig = {"configurable": {"thread_id": "t"}}
    assert [id_of(each) for each in saver.list(everywhere)] == ["c2", "d1", "c1"]


def test_child_namespace_takes_the_last_put_of_one_attempt_only(saver: Saver) -> None:
    put(saver, "d1", ns="child")
    put(saver, "d2", "d1", ns="child")
    put(saver, "d3", "d1", ns="child")
    assert id_of(load(saver, ns="child")) == "d3"
    other = acquire(saver, lease(1))
    with pytest.raises(ConflictError):
        put(other, "d4", "d1", ns="child")


def test_forks_with_equal_versions_do_not_read_each_others_values(saver: Saver) -> None:
    root = checkpoint("c1", {"x": 1}, x="root")
    saver.put(at(), root, {"step": 0}, {"x": 1})
    for name in ("left", "right"):
        config = load(saver, "c1").config
        saver.put(config, checkpoint(name, {"x": 2}, x=name), {"step": 1}, {"x": 2})
    # And their successors, which only refer to the value.
    for name in ("left", "right"):
        after = checkpoint(f"{name} after", {"x": 2, "y": 1}, x=name, y=name)
        saver.put(load(saver, name).config, after, {"step": 2}, {"y": 1})
    for name in ("left", "right"):
        assert load(saver, name).checkpoint["channel_values"] == {"x": name}
        values = load(saver, f"{name} after").checkpoint["channel_values"]
        assert values == {"x": name, "y": name}


def test_only_changed_channels_are_stored_and_all_are_read(saver: Saver) -> None:
    saver.put(at(), checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b"), {}, {"x": 1, "y": 1})
    saver.put(at("c1"), checkpoint("c2", {"x": 2, "y": 1}, x="c"), {}, {"x": 2})
    assert load(saver).checkpoint["channel_values"] == {"x": "c", "y": "b"}
    saver.put(at("c2"), checkpoint("c3", {"x": 3, "y": 1}), {}, {"x": 3})
    assert load(saver).checkpoint["channel_values"] == {"y": "b"}, "an explicit empty"


def test_unchanged_channel_is_found_for_who_never_loaded_the_thread(database_url: str) -> None:
    with open_checkpointer(database_url) as one, open_checkpointer(database_url) as other:
        one.put(at(), checkpoint("c1", {"x": 1, "y": 1}, x="a", y="b"), {}, {"x": 1, "y": 1})
        one.put(at("c1"), checkpoint("c2", {"x": 2, "y": 1}, x="c", y="b"), {}, {"x": 2})
        other.put(at("c2"), checkpoint("c3", {"x": 3, "y": 1}, x="d", y="b"), {}, {"x": 3})
        assert load(one).checkpoint["channel_values"] == {"x": "d", "y": "b"}


def test_numbers_as_versions_are_continued_and_text_is_never_repeated(saver: Saver) -> None:
    assert str(saver.get_next_version(3, None)) == "4"
    first, again = saver.get_next_version(None, None), saver.get_next_version(None, None)
    assert first != again
    assert first < saver.get_next_version(first, None)


def test_loaded_values_cannot_change_what_is_stored(saver: Saver) -> None:
    value = {"list": [1]}
    put(saver, "c1", changed=value)
    value["list"].append(2)
    load(saver).checkpoint["channel_values"]["x"]["list"].append(3)
    assert load(saver).checkpoint["channel_values"] == {"x": {"list": [1]}}


def test_text_with_nul_and_lone_surrogates_round_trips(saver: Saver) -> None:
    odd = ["a\x00b", "\ud800", {"k\x00": 1}]
    put(saver, "c1", changed=odd, metadata={"note": "x\x00y"})
    saver.put_writes(at("c1"), [("x", odd)], "task")
    found = load(saver)
    assert found.checkpoint["channel_values"] == {"x": odd}
    assert found.pending_writes == [("task", "x", odd)]


def test_thread_under_a_lease_is_closed_to_all_others(saver: Saver) -> None:
    put(saver, "c1")
    stale = acquire(saver, lease(1))
    put(stale, "c2", "c1")
    holder = acquire(saver, lease(2))
    wrong_thread = saver.with_lease(lease(2, "other"))
    for other in (saver, stale, wrong_thread):
        with pytest.raises(FencedError):
            put(other, "c3", "c2")
        # A failure fails what follows in the same invocation; a load begins a new one.
        other.get_tuple(at())
        with pytest.raises(FencedError):
            other.put_writes(at("c2"), [("x", 1)], "task")
        other.get_tuple(at())
        with pytest.raises(FencedError):
            other.delete_thread("t")
    assert load(saver).pending_writes == []
    put(holder, "c3", "c2")
    assert id_of(load(saver)) == "c3"


def test_thread_is_open_again_after_release_but_not_to_old_leases(saver: Saver) -> None:
    holder = acquire(saver, lease(3))
    put(holder, "c1")
    asyncio.run(saver.release(lease(2)))
    with pytest.raises(FencedError):
        put(saver, "c2", "c1")
    asyncio.run(saver.release(lease(3)))
    with pytest.raises(FencedError):
        put(holder, "c2", "c1")
    saver.get_tuple(at())
    put(saver, "c2", "c1")


def test_token_survives_the_deletion_of_its_thread(saver: Saver) -> None:
    holder = acquire(saver, lease(5))
    put(holder, "c1")
    holder.put_writes(at("c1"), [("x", 1)], "task")
    holder.delete_thread("t")
    assert saver.get_tuple(at()) is None
    assert list(saver.list(at())) == []
    assert asyncio.run(saver.acquire(lease(4))) == 5
    with pytest.raises(FencedError):
        put(saver.with_lease(lease(4)), "c2")
    put(holder, "c2")
    assert load(saver).pending_writes == []


def test_failed_write_fails_the_checkpoint_that_follows_it(saver: Saver) -> None:
    put(saver, "c1")

    async def superstep() -> None:
        first = saver.aput_writes(at("c1"), [("x", object())], "a")
        second = saver.aput_writes(at("c1"), [("x", 2)], "b")
        with pytest.raises(SerializationError, match="channel 'x' of thread 't'"):
            await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})
        with pytest.raises(SerializationError):
            await saver.flush("t")
        for each in (first, second):
            with pytest.raises(SerializationError):
                await each

    asyncio.run(superstep())
    assert (id_of(load(saver)), load(saver).pending_writes) == ("c1", [])
    put(saver, "c2", "c1")


def test_reader_does_not_make_a_failed_write_forgotten(saver: Saver) -> None:
    put(saver, "c1")
    invocation = load(saver).config

    async def superstep() -> None:
        with pytest.raises(SerializationError):
            await saver.aput_writes(invocation, [("x", object())], "a")
        await saver.aget_tuple(at())
        with pytest.raises(SerializationError):
            await saver.aput(invocation, checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})

    asyncio.run(superstep())
    assert id_of(load(saver)) == "c1"


def test_write_is_accepted_by_the_call_though_nobody_awaits_it(saver: Saver) -> None:
    put(saver, "c1")

    async def superstep() -> None:
        abandoned = saver.aput_writes(at("c1"), [("x", 1)], "a")
        abandoned.close()
        await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})

    asyncio.run(superstep())
    assert load(saver, "c1").pending_writes == [("a", "x", 1)]


@pytest.mark.parametrize("point", ["checkpoint.before_insert", "database.before_commit"])
def test_torn_write_leaves_the_old_checkpoint(saver: Saver, point: str) -> None:
    put(saver, "c1")

    def fail() -> None:
        raise OSError("disk full")

    arm(point, fail)
    with pytest.raises(OSError, match="disk full"):
        put(saver, "c2", "c1")
    disarm()
    assert [id_of(each) for each in saver.list(at())] == ["c1"]
    assert id_of(load(saver)) == "c1"
    put(saver, "c2", "c1")


def test_writes_are_durable_although_the_next_checkpoint_is_not(saver: Saver) -> None:
    put(saver, "c1")

    def fail() -> None:
        raise OSError("disk full")

    arm("checkpoint.before_insert", fail)

    async def superstep() -> None:
        write = saver.aput_writes(at("c1"), [("x", 1)], "a")
        with pytest.raises(OSError, match="disk full"):
            await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {}, {"x": 2})
        await write

    asyncio.run(superstep())
    disarm()
    assert load(saver).pending_writes == [("a", "x", 1)]


def test_pending_writes_come_in_the_order_of_path_task_and_position(saver: Saver) -> None:
    put(saver, "c1")
    for path, task in (("~b", "2"), ("~a", "9"), ("", "3"), ("~a", "1"), ("~B", "0")):
        saver.put_writes(at("c1"), [("x", f"{path}{task}-0"), ("y", f"{path}{task}-1")], task, path)
    saver.put_writes(at("c1"), [(ERROR, "boom")], "9", "~a")
    found = [value for _, _, value in load(saver).pending_writes or []]
    expected = ["3-0", "3-1", "~B0-0", "~B0-1", "~a1-0", "~a1-1", "boom", "~a9-0", "~a9-1"]
    assert found == [*expected, "~b2-0", "~b2-1"]


def test_first_ordinary_and_last_special_write_of_each_position_stand(saver: Saver) -> None:
    put(saver, "c1")
    for turn in ("first", "last"):
        batch = [(RESUME, turn), ("x", turn), (INTERRUPT, turn)]
        saver.put_writes(at("c1"), batch, "task")
    kept = {channel: value for _, channel, value in load(saver).pending_writes or []}
    assert kept == {RESUME: "last", "x": "first", INTERRUPT: "last"}


def test_exceptions_are_kept_as_text(saver: Saver) -> None:
    class OddError(Exception):
        def __repr__(self) -> str:
            raise RuntimeError

    put(saver, "c1")
    saver.put_writes(at("c1"), [(ERROR, ValueError("no"))], "a")
    saver.put_writes(at("c1"), [(ERROR, OddError())], "b")
    texts = [value for _, _, value in load(saver).pending_writes or []]
    assert texts == ["ValueError('no')", "OddError(<no text: its repr raises>)"]


def test_listing_filters_limits_and_pages_over_all_threads(saver: Saver) -> None:
    parent: str | None = None
    for i in range(120):
        parent = put(saver, f"c{i:03}", parent, metadata={"even": i % 2 == 0})["configurable"][
            "checkpoint_id"
        ]
    put(saver, "z", thread="u")
    newest_first = [f"c{i:03}" for i in reversed(range(120))]
    assert [id_of(each) for each in saver.list(at())] == newest_first
    assert [id_of(each) for each in saver.list(None)] == ["z", *newest_first]
    even = [id_of(each) for each in saver.list(at(), filter={"even": True}, limit=55)]
    assert even == newest_first[1::2][:55]
    before = saver.list(at(), before=at("c060"), limit=3)
    assert [id_of(each) for each in before] == ["c059", "c058", "c057"]
    assert [id_of(each) for each in saver.list(at("c007"))] == ["c007"]
    for nothing in (
        saver.list(at(), limit=0),
        saver.list(at(), filter={"even": None}),
        saver.list(at(), filter={"x' OR 1=1 --": 1}),
        saver.list(at(thread="none")),
    ):
        assert list(nothing) == []


def test_paused_listing_locks_nothing(saver: Saver) -> None:
    put(saver, "c1")
    put(saver, "c2", "c1")
    listing = saver.list(at())
    assert id_of(next(listing)) == "c2"
    put(saver, "c3", "c2")
    assert [id_of(each) for each in listing] == ["c1"]


def test_both_interfaces_read_the_same(saver: Saver) -> None:
    put(saver, "c1", metadata={"n": 1})
    saver.put_writes(at("c1"), [("x", 1)], "task", "~p")

    async def read() -> list[Any]:
        await saver.aput(at("c1"), checkpoint("c2", {"x": 2}, x=2), {"step": 2}, {"x": 2})
        await saver.aput_writes(at("c2"), [("x", 3)], "task")
        found = [await saver.aget_tuple(at()), await saver.aget_tuple(at("c1"))]
        return [*found, *[each async for each in saver.alist(at(), filter={"n": 1})]]

    both = asyncio.run(read())
    assert both == [load(saver), load(saver, "c1"), *saver.list(at(), filter={"n": 1})]
    asyncio.run(saver.adelete_thread("t"))
    assert saver.get_tuple(at()) is None


def test_call_without_a_thread_says_so(saver: Saver) -> None:
    for configurable in ({}, {"thread_id": ""}):
        with pytest.raises(InvalidInputError, match="thread_id"):
            saver.get_tuple({"configurable": configurable})


def test_tenants_do_not_share_threads(sqlite_url: str) -> None:
    with (
        open_checkpointer(sqlite_url, tenant="a") as one,
        open_checkpointer(sqlite_url, tenant="b") as other,
    ):
        put(one, "c1")
        acquire(one, lease(1))
        assert other.get_tuple(at()) is None
        assert list(other.list(None)) == []
        put(other, "c1")
