"""FlexKV's exceptions: one flat list under one base.

Owns the types only. Each also inherits the builtin that people catch. Errors of storage never
appear here: they are statuses, counted in `stats()`, because a failing tier is a miss.
"""

from __future__ import annotations


class FlexKVError(Exception):
    """Base of every exception that FlexKV raises on purpose."""


class KeyInputError(FlexKVError, ValueError):
    """Tokens, keys, roots or extras of a wrong shape or value."""


class KeyTypeError(FlexKVError, TypeError):
    """Tokens or keys of a wrong dtype or type."""


class LayoutError(FlexKVError, ValueError):
    """A model's or a device's geometry that cannot be served."""


class StackConfigError(FlexKVError, ValueError):
    """A stack that cannot be used; the text names file, line, column, key, value and the fix.

    Attributes:
        file, key, value: what the error is about; `key` is spelled like tiers[1].capacity.
        line, column: 1-based; None where the stack did not come from a file.
    """

    file: str = ""
    key: str = ""
    value: object = None
    line: int | None = None
    column: int | None = None


class BackendNotFoundError(FlexKVError, LookupError):
    """No plug-in of that name; the text says what to install or the nearest name."""


class BackendLoadError(FlexKVError, ImportError):
    """A plug-in that is installed but cannot be used; the text names the plug-in and the reason."""


class HostMemoryError(FlexKVError, MemoryError):
    """The host region does not fit in the machine's memory."""


class UnknownNamespaceError(FlexKVError, KeyError):
    """A namespace that this manager has not registered, or that was reset."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ManagerClosedError(FlexKVError, RuntimeError):
    """A call on a manager that was closed."""


class StateError(FlexKVError, RuntimeError):
    """A call in a state that does not allow it, such as a second `open`."""


class PolicyError(FlexKVError, LookupError):
    """A policy of eviction or admission of unknown or taken name, with bad options, or that cannot be made."""


class DirectoryInUseError(FlexKVError, BlockingIOError):
    """A directory that another process has locked; the text names the process."""


class ServerRefusedError(FlexKVError, ConnectionRefusedError):
    """A server that does not take this client or agent; the text says why and what to do."""


class ServerAwayError(FlexKVError, ConnectionError):
    """No server answers, where a call cannot be a miss instead."""


class SocketPathError(FlexKVError, ValueError):
    """A path that cannot be a server's socket, or is not safe to be one; the text says what to do."""
