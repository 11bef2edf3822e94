"""`model(..., adapter_names=[...])`: a keyword that the model itself does not know, taken by a hook before it."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .errors import AdapterStateError

__all__ = ["accept_adapter_names", "refuse_adapter_names"]


def accept_adapter_names(model: nn.Module) -> None:
    """Let a model that has its manager as `c3a` be called with `adapter_names=`."""
    if _take_adapter_names not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_take_adapter_names, with_kwargs=True)


def refuse_adapter_names(model: nn.Module) -> None:
    """Undo `accept_adapter_names`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _take_adapter_names:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _take_adapter_names(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Turn `adapter_names=` into `model.c3a.using(...)` around this one call."""
    if "adapter_names" not in kwargs:
        return None
    names = kwargs["adapter_names"]
    kwargs = {key: value for key, value in kwargs.items() if key != "adapter_names"}
    if names is None:
        return args, kwargs
    if getattr(model, "is_gradient_checkpointing", False) and model.training and torch.is_grad_enabled():
        raise AdapterStateError(
            "adapter_names= ends with the call, but gradient checkpointing computes layers again in the backward pass: "
            "use `with model.c3a.using(adapter_names):` around forward and backward"
        )
    stack = ExitStack()
    stack.enter_context(model.c3a.using(names))  # type: ignore[union-attr, operator]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.close()
        if output is not None:
            handle.remove()  # after an error torch is walking through the hooks; the next call removes this one

    handle = model.register_forward_hook(leave, always_call=True)
    return args, kwargs
