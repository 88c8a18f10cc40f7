"""`TaskRunner` from outside: snapshots, context, and runs that stop and go on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.control import current_attempt
from agentflow.errors import (
    InvalidInputError,
    MissingContextError,
    NotFoundError,
    PausedError,
    StoreUnavailableError,
)
from agentflow.storage.sql import SqlRunStore
from agentflow.tasks import (
    StaleResultWarning,
    Task,
    TaskCall,
    TaskError,
    TaskRunner,
    TaskStatus,
    UnknownTaskWarning,
    read_snapshot,
)

RAN: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _forget() -> None:
    RAN.clear()


def work(call: TaskCall) -> str:
    RAN[call.name] += 1
    return call.name


def fail(call: TaskCall) -> None:
    RAN[call.name] += 1
    raise RuntimeError("not today")


DIAMOND = [
    Task(name="top", run=work),
    Task(name="left", run=work, dependencies=["top"]),
    Task(name="right", run=work, dependencies=["top"]),
    Task(name="bottom", run=work, dependencies=["left", "right"]),
]


async def test_snapshot_is_names_to_results_as_json_during_a_run_and_after_it() -> None:
    seen: list[str] = []

    def look(call: TaskCall) -> str:
        seen.append(json.dumps(made[0].snapshot()))
        return work(call)

    tasks = [*DIAMOND, Task(name="last", run=look, dependencies=["bottom"])]
    made = [TaskRunner(tasks)]
    await made[0].execute()
    (during,) = [json.loads(each) for each in seen]
    assert during.keys() == {"top", "left", "right", "bottom"}, "a running task is absent"
    after = made[0].snapshot()
    assert json.loads(json.dumps(after)) == after
    assert after.keys() == {task.name for task in tasks}
    for result in after.values():
        assert result.keys() == {"status", "data", "started_at", "ended_at", "code", "inputs"}


async def test_snapshot_is_a_copy() -> None:
    runner = TaskRunner([Task(name="a", run=lambda _: {"list": [1]})])
    results = await runner.execute()
    taken = runner.snapshot()
    taken["a"]["data"]["list"].append(2)
    taken["b"] = {}
    results["a"].data["list"].append(3)
    results.clear()
    assert runner.snapshot().keys() == {"a"}
    assert runner.snapshot()["a"]["data"] == {"list": [1]}


async def test_dependent_cannot_change_what_its_dependency_returned() -> None:
    def spoil(call: TaskCall) -> int:
        data: list[int] = call.results["a"].data
        data.append(9)
        return len(data)

    runner = TaskRunner(
        [
            Task(name="a", run=lambda _: [1]),
            *(Task(name=name, run=spoil, dependencies=["a"]) for name in "bc"),
        ]
    )
    results = await runner.execute()
    assert [results[name].data for name in "abc"] == [[1], 2, 2]


@pytest.mark.parametrize("status", ["failure", "cancelled", "skipped"])
async def test_what_has_not_succeeded_is_evaluated_again(status: str) -> None:
    snapshot = {
        "top": {"status": "success", "data": "top"},
        "left": {"status": status},
        "bottom": {"status": "skipped", "reason": "dependency", "because_of": "left"},
    }
    results = await TaskRunner(DIAMOND, snapshot=snapshot).execute()
    assert {each.status for each in results.values()} == {TaskStatus.SUCCESS}
    assert Counter(["left", "right", "bottom"]) == RAN


async def test_each_execution_without_an_id_goes_on_where_the_last_one_ended() -> None:
    doors = {"open": False}

    def guarded(call: TaskCall) -> str:
        if not doors["open"]:
            raise RuntimeError("closed")
        return work(call)

    runner = TaskRunner([*DIAMOND, Task(name="door", run=guarded, dependencies=["left"])])
    first = await runner.execute()
    assert first["door"].error == TaskError(type="builtins.RuntimeError", message="closed")
    doors["open"] = True
    second = await runner.execute()
    assert second["door"].status is TaskStatus.SUCCESS
    assert Counter(["top", "left", "right", "bottom", "door"]) == RAN


async def test_failure_that_may_be_passed_is_passed_after_hydration_too() -> None:
    tasks = [
        Task(name="a", run=fail, continue_on_error=True),
        Task(name="b", run=work, dependencies=["a"]),
    ]
    first = TaskRunner(tasks)
    assert (await first.execute())["b"].status is TaskStatus.SUCCESS
    results = await TaskRunner(tasks, snapshot=first.snapshot()).execute()
    assert results["a"].status is TaskStatus.FAILURE
    assert results["b"].status is TaskStatus.SUCCESS
    assert Counter({"a": 2, "b": 1}) == RAN


# Context.


class Connection:
    """What nothing could store."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.password = "canary-4711"

    def __reduce__(self) -> Any:
        raise TypeError("not to be stored")


async def test_context_may_be_anything_and_is_not_stored(sqlite_url: str) -> None:
    def use(call: TaskCall) -> bool:
        with call.context["db"].lock:
            return "db" in call.context and call.context.get("other") is None

    runner = TaskRunner([Task(name="a", run=use, needs=["db"])], url=sqlite_url, run_id="r")
    results = await runner.execute(context={"db": Connection()})
    assert results["a"].data is True
    folder = Path(sqlite_url.removeprefix("sqlite:///")).parent
    assert not any(b"canary-4711" in file.read_bytes() for file in folder.iterdir())


async def test_nothing_is_begun_without_the_context_that_a_task_names() -> None:
    tasks = [*DIAMOND, Task(name="load", run=work, dependencies=["bottom"], needs=["db"])]
    runner = TaskRunner(tasks)
    with pytest.raises(MissingContextError) as missing:
        await runner.execute()
    assert (missing.value.task, missing.value.key) == ("load", "db")
    assert "'load' needs 'db'" in str(missing.value)
    assert not RAN
    assert runner.snapshot() == {}


async def test_run_stops_at_a_context_that_is_missing_and_goes_on_with_it(sqlite_url: str) -> None:
    def load(call: TaskCall) -> int:
        return int(call.context["db"])

    tasks = [*DIAMOND, Task(name="load", run=load, dependencies=["bottom"])]
    with pytest.raises(MissingContextError) as missing:
        await TaskRunner(tasks, url=sqlite_url, run_id="r").execute()
    assert (missing.value.task, missing.value.key) == ("load", "db")
    results = await TaskRunner(tasks, url=sqlite_url, run_id="r").execute(context={"db": 7})
    assert results["load"].data == 7
    assert Counter(["top", "left", "right", "bottom"]) == RAN


# What does not fit.


async def test_result_that_json_cannot_hold_is_a_failure_by_name() -> None:
    results = await TaskRunner(
        [
            Task(name="a", run=lambda _: {"rows": [{"at": Connection()}]}),
            Task(name="b", run=work, dependencies=["a"]),
        ]
    ).execute()
    error = results["a"].error
    assert error is not None
    assert error.type == "agentflow.errors.SerializationError"
    assert "Connection at rows[0].at" in error.message
    assert results["b"].because_of == "a"


async def test_result_of_a_task_that_is_no_more_is_carried_along_with_a_warning() -> None:
    old = {"status": "success", "data": 1}
    with pytest.warns(UnknownTaskWarning, match="that there are not: gone"):
        runner = TaskRunner(DIAMOND, snapshot={"gone": old})
    assert "gone" not in await runner.execute()
    assert runner.snapshot()["gone"] == old


async def test_task_that_the_snapshot_does_not_know_is_run() -> None:
    first = TaskRunner(DIAMOND)
    await first.execute()
    added = [*DIAMOND, Task(name="new", run=work, dependencies=["bottom"])]
    await TaskRunner(added, snapshot=first.snapshot()).execute()
    assert Counter(["top", "left", "right", "bottom", "new"]) == RAN


async def test_success_that_came_from_other_code_or_inputs_is_kept_with_a_warning() -> None:
    first = TaskRunner(DIAMOND)
    await first.execute()

    def rewritten(call: TaskCall) -> str:
        return f"{call.name}, but otherwise"

    changed = [Task(name="top", run=rewritten), *DIAMOND[1:]]
    with pytest.warns(StaleResultWarning, match="'top' came from other code "):
        await TaskRunner(changed, snapshot=first.snapshot()).execute()
    without = {name: each for name, each in first.snapshot().items() if name != "top"}
    with pytest.warns(StaleResultWarning, match="came from other inputs ") as told:
        results = await TaskRunner(changed, snapshot=without).execute()
    assert len(told) == 2, "left and right; bottom was made from what they are"
    assert results["bottom"].data == "bottom"
    assert Counter(["top", "left", "right", "bottom"]) == RAN


@pytest.mark.parametrize(
    "options", [{"app": AgentFlow("memory://"), "url": "memory://"}, {"concurrency": 0}]
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        TaskRunner(DIAMOND, **options)


# Runs.


async def test_only_so_many_tasks_run_at_once() -> None:
    inside: set[str] = set()
    most = []

    async def enter(call: TaskCall) -> None:
        inside.add(call.name)
        for _ in range(5):
            await asyncio.sleep(0)
        most.append(len(inside))
        inside.remove(call.name)

    await TaskRunner([Task(name=name, run=enter) for name in "abcdef"], concurrency=2).execute()
    assert max(most) == 2
    await TaskRunner([Task(name=name, run=enter) for name in "abcdef"]).execute()
    assert max(most) == 6


async def test_cancelled_run_says_so_of_what_has_no_result_and_is_evaluated_again() -> None:
    reached = asyncio.Event()

    async def hang(call: TaskCall) -> str:
        RAN[call.name] += 1
        reached.set()
        if RAN[call.name] == 1:
            await asyncio.Event().wait()
        return call.name

    tasks = [*DIAMOND[:3], Task(name="bottom", run=hang, dependencies=["left", "right"])]
    runner = TaskRunner(tasks)
    with pytest.raises(NotFoundError):
        await runner.cancel()
    async with asyncio.TaskGroup() as group:
        executing = group.create_task(runner.execute())
        await reached.wait()
        await runner.cancel(reason="changed my mind")
    assert executing.result()["bottom"].status is TaskStatus.CANCELLED
    results = await TaskRunner(tasks, snapshot=runner.snapshot()).execute()
    assert results["bottom"].status is TaskStatus.SUCCESS
    assert Counter({"top": 1, "left": 1, "right": 1, "bottom": 2}) == RAN


async def test_paused_run_goes_on_by_its_id(sqlite_url: str) -> None:
    async with AgentFlow(sqlite_url) as app:

        async def pause(call: TaskCall) -> str:
            await app.pause_run("r", by="alice")
            attempt = current_attempt()
            assert attempt is not None
            while not attempt.is_paused:  # noqa: ASYNC110 -- nothing else tells of it
                await asyncio.sleep(0.001)
            return work(call)

        tasks = [
            Task(name="first", run=pause),
            Task(name="second", run=work, dependencies=["first"]),
        ]
        with pytest.raises(PausedError):
            await TaskRunner(tasks, app=app, run_id="r").execute()
        assert (await read_snapshot(app, "r")).keys() == {"first"}
        await app.resume_run("r", by="alice")
    results = await TaskRunner(tasks, url=sqlite_url, run_id="r").execute()
    assert [each.status for each in results.values()] == [TaskStatus.SUCCESS] * 2
    assert Counter(["first", "second"]) == RAN


async def test_deploy_in_the_middle_goes_on_with_the_new_code(database_url: str) -> None:
    reached = asyncio.Event()

    async def hang(call: TaskCall) -> None:
        reached.set()
        await asyncio.Event().wait()

    old = [*DIAMOND[:3], Task(name="bottom", run=hang, dependencies=["left", "right"])]
    executing = asyncio.create_task(TaskRunner(old, url=database_url, run_id="r").execute())
    await reached.wait()
    executing.cancel()  # as when the program is told to end
    with pytest.raises(asyncio.CancelledError):
        await executing
    results = await TaskRunner(DIAMOND, url=database_url, run_id="r").execute()
    assert results["bottom"].data == "bottom"
    assert Counter(["top", "left", "right", "bottom"]) == RAN


async def test_task_may_ask_and_the_next_execution_goes_on() -> None:
    def pay(call: TaskCall) -> Any:
        return request_approval({"amount": 40}, title="Pay").proposal

    tasks = [*DIAMOND, Task(name="pay", run=pay, dependencies=["bottom"])]
    async with AgentFlow("memory://") as app:
        runner = TaskRunner(tasks, app=app, run_id="r")
        assert (await runner.execute()).keys() == {task.name for task in DIAMOND}
        # Its code may have changed meanwhile.
        mended = Task(name="pay", run=lambda call: {**pay(call)}, dependencies=["bottom"])
        runner = TaskRunner([*DIAMOND, mended], app=app, run_id="r")
        (asked,) = (await app.approvals.list(run_id="r")).items
        decision = {"type": "edit", "value": {"amount": 30}}
        await app.approvals.decide(asked.id, decision, by="alice")
        assert (await runner.execute())["pay"].data == {"amount": 30}
    assert Counter(["top", "left", "right", "bottom"]) == RAN


async def test_workers_of_an_app_drive_tasks_as_any_graph() -> None:
    def load(call: TaskCall) -> str:
        return f"loaded by {call.context['user']}"

    runner = TaskRunner([*DIAMOND, Task(name="load", run=load, dependencies=["bottom"])])
    async with AgentFlow("memory://") as app:
        app.register(runner.graph, name="nightly", context=lambda run: {"user": run.submitted_by})
        handle = await app.submit("nightly", {"snapshot": {}}, by="alice")
        async with app.worker():
            await handle.result(timeout=30)
        assert (await read_snapshot(app, handle.id))["load"]["data"] == "loaded by alice"


async def test_run_of_other_tasks_is_refused_and_its_snapshot_begins_another(
    sqlite_url: str,
) -> None:
    async with AgentFlow(sqlite_url) as app:
        await TaskRunner(DIAMOND, app=app, run_id="r").execute()
        more = [*DIAMOND, Task(name="more", run=work, dependencies=["bottom"])]
        with pytest.raises(InvalidInputError, match="begun with other tasks"):
            await TaskRunner(more, app=app, run_id="r").execute()
        snapshot = await read_snapshot(app, "r")
        await TaskRunner(more, app=app, snapshot=snapshot, run_id="r2").execute()
        assert (await app.get_run("r2")).graph == "tasks"
        with pytest.raises(NotFoundError):
            await read_snapshot(app, "unknown")
    assert Counter(["top", "left", "right", "bottom", "more"]) == RAN


async def test_text_of_a_message_is_text() -> None:
    async def answer(_: TaskCall) -> str:
        return AIMessage("fine").text

    runner = TaskRunner([Task(name="ask", run=answer)])
    results = await runner.execute()
    assert type(results["ask"].data) is str
    assert json.loads(json.dumps(runner.snapshot()))["ask"]["data"] == "fine"


async def test_task_is_called_again_before_it_has_failed_as_its_policy_says() -> None:
    def flaky(call: TaskCall) -> int:
        RAN[call.name] += 1
        if RAN[call.name] < 3:
            raise ConnectionError(call.name)
        return RAN[call.name]

    policy = RetryPolicy(initial_interval=0, max_attempts=3, retry_on=ConnectionError)
    tasks = [
        Task(name="flaky", run=flaky, retry=policy),
        Task(name="worse", run=fail, retry=replace(policy, max_attempts=2, retry_on=Exception)),
        Task(name="other", run=fail, retry=policy),
    ]
    results = await TaskRunner(tasks).execute()
    assert results["flaky"].data == 3
    assert results["worse"].error == results["other"].error
    assert Counter(flaky=3, worse=2, other=1) == RAN


async def test_task_that_takes_too_long_has_failed() -> None:
    released = threading.Event()

    async def wait(_: TaskCall) -> None:
        await asyncio.Event().wait()

    def block(_: TaskCall) -> None:
        released.wait()

    tasks = [
        Task(name=name, run=run, timeout=0.05) for name, run in (("wait", wait), ("block", block))
    ]
    try:
        results = await TaskRunner(tasks).execute()
    finally:
        released.set()
    for name, result in results.items():
        told = f"task {name!r} took longer than its timeout"
        assert result.error == TaskError(type="builtins.TimeoutError", message=told)


async def test_store_that_fails_in_the_middle_costs_no_finished_task(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is gone when the outcome is to be written; the run is found as it was left."""
    monkeypatch.setenv("AGENTFLOW_LEASE", "0.5")
    real = SqlRunStore.finish_run
    failed: list[Counter[str]] = []

    async def once(*args: Any, **named: Any) -> Any:
        if failed:
            return await real(*args, **named)
        failed.append(RAN.copy())
        raise StoreUnavailableError("the database", "it is gone")

    monkeypatch.setattr(SqlRunStore, "finish_run", once)
    results = await TaskRunner(DIAMOND, url=sqlite_url, run_id="r").execute()
    assert failed == [Counter(["top", "left", "right", "bottom"])]
    assert {each.status for each in results.values()} == {TaskStatus.SUCCESS}
    assert failed == [RAN]
