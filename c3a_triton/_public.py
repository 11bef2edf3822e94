"""Under which name the public classes and functions go, wherever they live."""

from typing import Any, TypeVar

__all__ = ["public"]

_T = TypeVar("_T")


def public(thing: _T) -> _T:
    """Name this package as the module of a class or function: in pickles, representations and documentation."""
    named: Any = thing
    named.__module__ = __package__
    return thing
