"""Values that users and files give: as plain ones, and as messages show them."""

import os
import reprlib
from collections import UserString
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from numbers import Integral
from typing import Any

__all__ = ["described", "is_positive_int", "plain", "shown", "some"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 20


def shown(value: object) -> str:
    """A value's repr for a message, cut where it is long: a stranger's may have megabytes."""
    return _SHORT.repr(value)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of some names for a message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def plain(value: Any) -> Any:
    """A value as JSON knows it: what PEFT takes where it asks for an int, a bool, a string, a list or a dict.

    Numbers, strings and arrays of numpy, members of enumerations, paths, sequences and mappings of any kind
    (OmegaConf's) and sets, which are sorted. Whatever else stays as it is.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (str, UserString)):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(
            map(plain, value), key=lambda item: (type(item).__name__, item if isinstance(item, int) else str(item))
        )
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [plain(item) for item in value]
    return value


def described(value: object) -> str:
    """A value and its type, and those of what a list holds, for a message."""
    kinds = sorted({type(item).__name__ for item in value}) if isinstance(value, list) else []
    return f"{shown(value)}, a {type(value).__name__}" + (f" of {' and '.join(kinds)}" if kinds else "")


def is_positive_int(value: object) -> bool:
    """Whether a value counts something: True does not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
