"""Errors of the set-up: URLs, drivers, graphs and schemas that do not fit this program."""

from __future__ import annotations

from agentflow.errors.base import AgentflowError


class ConfigError(AgentflowError):
    """Something about the set-up is wrong; no run was touched."""


class UnsupportedUrlError(ConfigError):
    """A storage URL that agentflow does not know."""

    def __init__(self, scheme: str, supported: tuple[str, ...]) -> None:
        """Name the scheme, or as much of the URL as cannot hold a password."""
        super().__init__(scheme, supported)
        self.scheme = scheme
        self.supported = supported

    def __str__(self) -> str:
        """Say what was given and what is possible."""
        what = "URL" if ":" in self.scheme else "URL scheme"
        known = ", ".join(self.supported)
        return f"unsupported storage {what} {self.scheme!r}; use one of: {known}"


class MissingDriverError(ConfigError):
    """A Python package that a storage URL or a model name needs is not installed."""

    def __init__(self, package: str, extra: str | None) -> None:
        """Name the package and the extra that brings it, if one does."""
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        """Say how to install it."""
        wanted = f'"agentflow[{self.extra}]"' if self.extra else self.package
        return f"the package {self.package!r} is not installed; install it: pip install {wanted}"


class AppReferenceError(ConfigError):
    """An app reference `module:attribute` that does not lead to an `AgentFlow`."""

    def __init__(self, reference: str, reason: str) -> None:
        """Name the reference and what went wrong."""
        super().__init__(reference, reason)
        self.reference = reference
        self.reason = reason

    def __str__(self) -> str:
        """Say what a reference looks like."""
        return (
            f"cannot load the app {self.reference!r}: {self.reason}; "
            "give --app module:attribute, where the attribute is an AgentFlow"
        )


class UnknownGraphError(ConfigError):
    """A graph name or version that is not registered in this process."""

    def __init__(self, name: str, version: str | None, registered: tuple[str, ...]) -> None:
        """Name what was asked for and what there is (`name@version`)."""
        super().__init__(name, version, registered)
        self.name = name
        self.version = version
        self.registered = registered

    def __str__(self) -> str:
        """Say what is registered."""
        asked = self.name if self.version is None else f"{self.name}@{self.version}"
        known = ", ".join(self.registered) or "none"
        return (
            f"no graph {asked!r} is registered here (registered: {known}); "
            "call app.register(graph, name=..., version=...) before using it"
        )


class UnknownPriceError(ConfigError):
    """What a run may cost is limited, and what a model costs is not known."""

    def __init__(self, model: str) -> None:
        """Name the model."""
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        """Say where to name the price."""
        return (
            f"there is no price of model {self.model!r}, which was not called; name it: "
            f"Budget(prices={{{self.model!r}: Price(input=..., output=...)}})"
        )


class MigrationRequiredError(ConfigError):
    """The database's schema is not the one that this program speaks."""

    def __init__(self, found: str | None, expected: str) -> None:
        """Name both schema revisions."""
        super().__init__(found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        """Say which side to move."""
        return (
            f"the database has schema revision {self.found or 'none'!r}, this program needs "
            f"{self.expected!r}; run 'agentflow migrate up' with the newer of the two programs"
        )


class JournalMissingError(MigrationRequiredError):
    """A database of the user's has no table for the journal of transactions."""

    def __init__(self, database: str) -> None:
        """Name the database, without its password."""
        AgentflowError.__init__(self, database)
        self.database = database

    def __str__(self) -> str:
        """Say how to make it."""
        return (
            f"the database {self.database} has no table effect_journal; run "
            "'agentflow migrate journal --url <the database>' to make it"
        )
