"""The points of a port's verbs are derived from it, and are passed only where a test wants it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial

import pytest

from agentflow.failpoints import arm, disarm, failpoint, instrument, points, transitions


class Port(ABC):
    """Verbs that change something, and others."""

    @abstractmethod
    async def create_thing(self) -> str:
        """Change something."""

    @abstractmethod
    def drop_thing(self) -> str:
        """Change something else."""

    @abstractmethod
    async def get_thing(self) -> str:
        """Read."""

    @abstractmethod
    async def survey(self) -> str:
        """Read too."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether there is anything to change."""


class Later(Port):
    """The same with one verb more."""

    @abstractmethod
    def mend_thing(self) -> str:
        """Change something."""


def make(said: list[str]) -> Port:
    class Store(Port):
        async def create_thing(self) -> str:
            said.append("create")
            return "created"

        def drop_thing(self) -> str:
            said.append("drop")
            raise KeyError

        async def get_thing(self) -> str:
            return "it"

        async def survey(self) -> str:
            return "all"

        @property
        def is_open(self) -> bool:
            return True

    instrument(Store, Port, transitions(Port, reads={"survey"}))
    return Store()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What was passed and done, in order."""
    passed: list[str] = []
    for verb in transitions(Port):
        for name in points(Port, verb):
            arm(name, partial(passed.append, name))
    yield passed
    disarm()


def test_verb_that_is_added_to_a_port_has_its_points_at_once() -> None:
    assert transitions(Port, reads={"survey"}) == ("create_thing", "drop_thing")
    assert set(transitions(Later)) - set(transitions(Port)) == {"mend_thing"}
    assert points(Later, "mend_thing") == ("Later.mend_thing.before", "Later.mend_thing.after")


async def test_points_are_passed_before_a_verb_and_after_it(said: list[str]) -> None:
    store = make(said)
    assert await store.create_thing() == "created"
    assert said == ["Port.create_thing.before", "create", "Port.create_thing.after"]


def test_verb_that_fails_does_not_pass_the_point_after_it(said: list[str]) -> None:
    store = make(said)
    with pytest.raises(KeyError):
        store.drop_thing()
    assert said == ["Port.drop_thing.before", "drop"]


async def test_what_is_not_armed_does_nothing(said: list[str]) -> None:
    store = make(said)
    disarm()
    failpoint("anything")
    assert (await store.create_thing(), await store.survey()) == ("created", "all")
    assert said == ["create"]
