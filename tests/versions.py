"""Versions of peers, for what their older releases do otherwise."""

import importlib.metadata

__all__ = ["PEFT"]


def _version(package: str) -> tuple[int, ...]:
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in text.split(".")[:2])


PEFT = _version("peft")
