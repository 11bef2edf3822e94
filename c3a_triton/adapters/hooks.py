"""Hooks of torch modules, taken away by what they are: `register_*_hook` gives handles, which copies do not have."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["remove_hooks"]


def remove_hooks(module: nn.Module, is_meant: Callable[[Any], bool]) -> None:
    """Remove those of a module's forward hooks and forward pre-hooks that `is_meant` says."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if is_meant(hook):
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(module._forward_hooks.items()):
        if is_meant(hook):
            module._forward_hooks.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
