"""The errors this library raises on purpose.

Each is a `C3AError` and also the built-in exception that callers of torch and PEFT would expect to catch.
"""

from ._public import public

__all__ = [
    "AdapterNotFoundError",
    "AdapterStateError",
    "BackendError",
    "C3AError",
    "CheckpointError",
    "ConfigError",
    "ShapeError",
]


@public
class C3AError(Exception):
    """Base of every error that this library raises on purpose."""


@public
class ConfigError(C3AError, ValueError):
    """A configuration value that cannot be used: a bad block size, pattern, target or file format field."""


@public
class ShapeError(C3AError, ValueError):
    """Tensors or layers whose sizes, dtypes or devices do not fit together."""


@public
class BackendError(C3AError, RuntimeError, ValueError):
    """A backend that was asked for by name and cannot run here, or that does not exist."""


@public
class AdapterStateError(C3AError, ValueError, RuntimeError):
    """An operation that the adapters' present state forbids: a taken name, a merged layer, a changed base weight."""


@public
class AdapterNotFoundError(C3AError, KeyError, ValueError):
    """An adapter name that nobody knows."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; a message should read as a sentence.
        return str(self.args[0]) if self.args else ""


@public
class CheckpointError(C3AError, OSError, ValueError):
    """An adapter folder or file that cannot be read, is damaged, or does not belong to the model."""
