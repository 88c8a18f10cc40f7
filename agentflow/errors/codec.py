"""Errors of stored values: what cannot be written or read faithfully."""

from __future__ import annotations

from agentflow.errors.base import AgentflowError


class CodecError(AgentflowError):
    """A stored value could not be written or read faithfully."""

    def __init__(self, message: str) -> None:
        """Take the whole message."""
        super().__init__(message)


class UnknownVersionError(CodecError):
    """A stored value was written by a newer program."""

    def __init__(self, version: int, supported: int, where: str = "") -> None:
        """Name both codec versions and the place of the value."""
        AgentflowError.__init__(self, version, supported, where)
        self.version = version
        self.supported = supported
        self.where = where

    def __str__(self) -> str:
        """Say which program can read it."""
        return (
            f"stored value{_at(self.where)} has codec version {self.version}, this program reads "
            f"up to {self.supported}; upgrade agentflow here"
        )


class HashMismatchError(CodecError):
    """A stored value is not what was saved: damaged, cut short or swapped."""

    def __init__(self, where: str = "", reason: str = "its hash does not match") -> None:
        """Name the place of the value and what is wrong with it."""
        AgentflowError.__init__(self, where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Say that it was not trusted."""
        return (
            f"stored value{_at(self.where)} is damaged: {self.reason}; nothing was executed, "
            "restore it from a backup"
        )


class MissingBlobError(CodecError):
    """What a stored value refers to is not there any more."""

    def __init__(self, where: str = "", reason: str = "a part of it was deleted") -> None:
        """Name the place of the value and what is missing."""
        AgentflowError.__init__(self, where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Say what to do about it."""
        return (
            f"stored value{_at(self.where)} is incomplete: {self.reason}; nothing was executed, "
            "restore it from a backup, or go on from a checkpoint that does not have it"
        )


class UnknownKeyError(CodecError):
    """A stored value is encrypted under a key that this program was not given."""

    def __init__(self, key: str, where: str = "") -> None:
        """Name the key and the place of the value."""
        AgentflowError.__init__(self, key, where)
        self.key = key
        self.where = where

    def __str__(self) -> str:
        """Say where it has to go."""
        return (
            f"stored value{_at(self.where)} is encrypted under the key {self.key!r}, which is not "
            "here; give it to the key ring (AGENTFLOW_KEYS)"
        )


class KeyUnavailableError(UnknownKeyError):
    """Whoever has the key of a stored value could not be asked; it may work later."""

    def __init__(self, key: str, reason: str, where: str = "") -> None:
        """Name the key, the class of what the key ring's lookup raised, and the place."""
        AgentflowError.__init__(self, key, reason, where)
        self.key = key
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        """Say that it passes, or whose matter it is."""
        return (
            f"stored value{_at(self.where)} is encrypted under the key {self.key!r}, and the key "
            f"ring's lookup has raised {self.reason}; check that the key service answers"
        )


class UnencryptedValueError(CodecError):
    """A stored value is not encrypted although everything has to be."""

    def __init__(self, where: str = "") -> None:
        """Name the place of the value."""
        AgentflowError.__init__(self, where)
        self.where = where

    def __str__(self) -> str:
        """Say how to go on if it is from before."""
        return (
            f"stored value{_at(self.where)} is not encrypted, and was refused; if it was stored "
            "before encryption was switched on, accept plaintext until `agentflow keys rotate` "
            "has encrypted everything"
        )


class SerializationError(CodecError):
    """A value cannot be stored so that it could be loaded back."""

    def __init__(self, type_name: str, path: str, hint: str, where: str = "") -> None:
        """Name the type, the path inside the value, what to do, and the place."""
        AgentflowError.__init__(self, type_name, path, hint, where)
        self.type_name = type_name
        self.path = path
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        """Say where the value sits and how to make it storable."""
        return (
            f"cannot store a value of type {self.type_name} at {self.path or 'the top'}"
            f"{_at(self.where)}: {self.hint}"
        )


class PayloadTooLargeError(CodecError):
    """A value is larger than anything may be that is stored of a run."""

    def __init__(self, size: int, limit: int, where: str = "") -> None:
        """Name both sizes in bytes, and the place."""
        AgentflowError.__init__(self, size, limit, where)
        self.size = size
        self.limit = limit
        self.where = where

    def __str__(self) -> str:
        """Say how large it is and what to do instead."""
        return (
            f"a value of {self.size} bytes is too large to be stored{_at(self.where)}: the limit "
            f"is {self.limit} bytes; store it elsewhere and keep a reference, or raise "
            "AGENTFLOW_MAX_PAYLOAD"
        )


class BlockedTypeError(CodecError):
    """A stored value is of a type that this process may not build."""

    def __init__(self, type_name: str, where: str = "", reason: str = "") -> None:
        """Name the type, the place and why it is blocked."""
        AgentflowError.__init__(self, type_name, where, reason)
        self.type_name = type_name
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Say how to allow it."""
        return (
            f"stored value{_at(self.where)} is of type {self.type_name}, which may not be loaded "
            f"here: {self.reason or 'it is not allowed'}; import its module before loading, or "
            f'allow it with allow=["{self.type_name}"]'
        )


def _at(where: str) -> str:
    return f" ({where})" if where else ""
