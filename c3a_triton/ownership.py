"""Whose an adapted layer is: of the manager that made it, whichever models it may be a part of."""

from collections.abc import Iterator

from torch import nn

from .errors import AdapterStateError
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .targets import base_modules

__all__ = ["check_owner", "is_own", "own_parts"]


def is_own(module: nn.Module, mark: str) -> bool:
    """Whether a module is an adapted layer, or one trained whole, of the manager with this mark, or of none."""
    return isinstance(module, (C3ALinear, ModulesToSave)) and module._owner in (None, mark)


def own_parts(model: nn.Module, mark: str) -> Iterator[tuple[str, C3ALinear | ModulesToSave]]:
    """(name, module) of what in a model is that manager's."""
    for name, module in base_modules(model):
        if is_own(module, mark):
            yield name, module  # type: ignore[misc]


def check_owner(model: nn.Module, mark: str) -> None:
    """Refuse a model in which another manager has layers: switching, saving or deleting would be one's of both.

    Raises:
        AdapterStateError: it has; the message names them and the way out.
    """
    foreign = {
        name: module._owner
        for name, module in base_modules(model)
        if isinstance(module, (C3ALinear, ModulesToSave)) and not is_own(module, mark)
    }
    if not foreign:
        return
    names = ", ".join(list(foreign)[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
    kind = type(model).__name__
    for part, module in model.named_modules():
        if part and getattr(module.__dict__.get("c3a"), "_mark", None) in foreign.values():
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
