"""Whose an adapted layer is: of the manager that made it, whichever models it may be a part of."""

from collections.abc import Iterator
from typing import TypeGuard

from torch import nn

from c3a_triton.errors import AdapterStateError
from c3a_triton.files.values import some

from .base_model import base_modules
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .names import Scope
from .parts import Holder
from .token_rows import TokenRows

__all__ = ["check_owner", "holds_own", "is_own", "own_copies", "own_layers", "own_parts", "own_rows"]


def is_own(module: nn.Module, scope: Scope) -> TypeGuard[C3ALinear | ModulesToSave]:
    """Whether a module is an adapted layer, or one trained whole, of the manager with this scope, or of none."""
    if not isinstance(module, (C3ALinear, ModulesToSave)):
        return False
    return module._scope is scope or not module._scope.managed


def holds_own(module: nn.Module, scope: Scope) -> TypeGuard[Holder]:
    """Whether a module stands in the place of another one, of which that manager has adapted parameters."""
    return isinstance(module, Holder) and any(is_own(part, scope) for part in module.parts().values())


def own_parts(model: nn.Module, scope: Scope) -> Iterator[tuple[str, C3ALinear | ModulesToSave]]:
    """(name, module) of what in a model is that manager's."""
    for name, module in base_modules(model):
        if is_own(module, scope):
            yield name, module


def own_layers(model: nn.Module, scope: Scope) -> Iterator[tuple[str, C3ALinear]]:
    """(name, layer) of the adapted layers that are that manager's."""
    return ((name, part) for name, part in own_parts(model, scope) if isinstance(part, C3ALinear))


def own_copies(model: nn.Module, scope: Scope) -> list[tuple[str, ModulesToSave]]:
    """(name, module) of the modules trained whole that are that manager's."""
    return [(name, part) for name, part in own_parts(model, scope) if isinstance(part, ModulesToSave)]


def own_rows(model: nn.Module, scope: Scope) -> list[tuple[str, TokenRows]]:
    """(name of the embedding, its rows) of the trained tokens that are that manager's."""
    return [
        (name.rpartition(".")[0], module)
        for name, module in model.named_modules()
        if isinstance(module, TokenRows) and (module._scope is scope or not module._scope.managed)
    ]


def check_owner(model: nn.Module, scope: Scope) -> None:
    """Refuse a model in which another manager has layers: switching, saving or deleting would be one's of both.

    Raises:
        AdapterStateError: it has; the message names them and the way out.
    """
    foreign = {
        name: module._scope
        for name, module in base_modules(model)
        if isinstance(module, (C3ALinear, ModulesToSave)) and not is_own(module, scope)
    }
    if not foreign:
        return
    names = some(foreign, most=3)
    kind = type(model).__name__
    for part, module in model.named_modules():
        if part and getattr(module.__dict__.get("c3a"), "_scope", None) in foreign.values():
            raise AdapterStateError(
                f"{part} has been adapted by itself ({names}), and its layers stay those of its manager, {part}.c3a. "
                f"Adapt the rest of this {kind} part by part; or save the adapter of {part}, call {part}.c3a.unload(), "
                f"and adapt the whole {kind} with target_modules that take in both"
            )
    raise AdapterStateError(
        f"layers of this {kind} ({names}) belong to the manager of another model, of which it is, or was, a part. Add "
        "the adapter to that model, with target_modules that name this part alone (a regular expression), or unload "
        "its adapters first (unload)"
    )
