"""How a layer's adapters are added to the weight under it, and taken out again, for all layers that have that weight.

Layers are `C3ALinear`s, which stand on this file.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.linear_like import is_transposed
from c3a_triton.bases.weights import WeightAccess, fingerprint, weight_access
from c3a_triton.errors import AdapterStateError

from .merge_state import MergeState, enter, find

__all__ = ["KEEP_BASE", "bring_back", "check_merge", "check_unmerge", "merge", "move", "unmerge_all"]

KEEP_BASE = ("cpu", "device", None)


def check_merge(
    layer: Any, names: list[str], *, finite: bool = False, beside: Iterable[tuple[Any, list[str]]] = ()
) -> None:
    """Raise what `merge` would raise, and change nothing.

    Args:
        layer: the layer.
        names: the adapters to merge, which it has.
        finite: whether the sum has to be finite.
        beside: other layers of the same weight, with the adapters that are to be merged there too.

    Raises:
        AdapterStateError: as `merge`.
    """
    _, weight = _read_unchanged(layer)
    if finite:
        _finite_sum(layer, weight, names, beside)


@torch.no_grad()
def merge(layer: Any, names: list[str], keep_base: str | None, safe_merge: bool = False) -> None:
    """Add these adapters' ΔW to the weight under a layer.

    Args:
        layer: the layer.
        names: adapters that it has and that are not merged.
        keep_base: where the original is kept, of `KEEP_BASE`.
        safe_merge: refuse a sum that is not finite.

    Raises:
        AdapterStateError: the weight cannot be merged into or was changed since the last merge, adapters are disabled,
            or with `safe_merge` the sum is not finite. The layer stays as it was.
    """
    access, weight = _read_unchanged(layer)
    merged = _finite_sum(layer, weight, names) if safe_merge else None
    state = layer._merge_state or find(access.place())
    if state is None:
        state = MergeState(None if keep_base is None else access.keep(keep_base), keep_base, _is_transposed(layer))
    if merged is None:
        merged = weight if access.in_place else weight.clone()
        layer._add_delta_(merged, names)
    if merged is not weight:
        _write(layer, access, merged)
    if state.kept is not None:  # otherwise nothing can be brought back, and there is nothing to guard
        state.mark = fingerprint(access.read())
    layer._merge_state = state
    layer.merged_adapters.extend(names)
    enter(state, layer)
    layer._refresh()


def _is_transposed(layer: Any) -> bool:
    return is_transposed(layer.get_base_layer())


def _write(layer: Any, access: WeightAccess, weight: Tensor) -> None:
    try:
        access.write(weight)
    except AdapterStateError as error:
        raise AdapterStateError(f"{layer._label}: {error}") from error


def _read_unchanged(layer: Any) -> tuple[WeightAccess, Tensor]:
    """The base weight and the way to change it, if it is what it was after the last merge."""
    if layer.disable_adapters:
        raise AdapterStateError(f"{layer._label}: adapters are disabled; enable them before merging")
    try:
        access = weight_access(layer)
        weight = access.read()
    except AdapterStateError as error:
        raise AdapterStateError(f"{layer._label}: {error}") from None
    state = layer._merge_state or find(access.place())
    if state is not None and state.kept is not None and (state.mark is None or fingerprint(weight) != state.mark):
        raise AdapterStateError(
            f"{layer._label}: the base weight was changed after {state.merged_adapters} were merged into it, so "
            "that bringing back the original would undo that change. Load the base weight again, or keep the "
            "merged one (merge_and_unload)"
        )
    return access, weight


@torch.no_grad()
def _finite_sum(layer: Any, weight: Tensor, names: list[str], beside: Iterable[tuple[Any, list[str]]] = ()) -> Tensor:
    merged = weight.clone()
    layer._add_delta_(merged, names)
    for other, its_names in beside:
        same_order = _is_transposed(other) == _is_transposed(layer)
        other._add_delta_(merged if same_order else merged.t(), its_names)
    if not torch.isfinite(merged).all():
        raise AdapterStateError(
            f"{layer._label}: merging {names} gives a weight that is not finite; nothing was merged"
        )
    return merged


def check_unmerge(layer: Any) -> None:
    """Raise what keeps a merged layer's weight from being brought back, and change nothing.

    Raises:
        AdapterStateError: the original was not kept, or the merged weight was changed in between.
    """
    if layer._merge_state is None or layer._merge_state.kept is None:
        raise AdapterStateError(
            f"{layer._label}: {layer.merged_adapters} were merged with keep_base=None, so the base weight is gone; "
            'load the base model again, or merge with keep_base="cpu"'
        )
    _read_unchanged(layer)


@torch.no_grad()
def bring_back(layer: Any, *, everyone: bool = False) -> None:
    """Unmerge, without a check, this layer or every one of its weight."""
    state = layer._merge_state
    assert state is not None
    assert state.kept is not None
    others = state.others(layer)
    # Another layer may have kept it, in the order of a `Conv1D`.
    same_order = isinstance(state.kept, nn.Module) or state.transposed == _is_transposed(layer)
    weight_access(layer).restore(state.kept if same_order else state.kept.t())
    for part in [layer, *others] if everyone else [layer]:
        part._merge_state = None
        part.merged_adapters.clear()
        part._refresh()
    left = [other for other in others if other.merged]
    for other in left:
        access = weight_access(other)
        weight = access.read()
        other._add_delta_(weight, other.merged_adapters)
        if not access.in_place:
            _write(other, access, weight)
    if left:
        state.mark = fingerprint(weight_access(left[-1]).read())


def unmerge_all(layers: Iterable[Any]) -> bool:
    """Unmerge whatever is merged in these layers, if all of it can be; whether there was anything.

    Raises:
        AdapterStateError: as `check_unmerge`; nothing has changed.
    """
    # One of the layers that have a weight in common brings it back for all of them.
    merged: dict[Hashable, Any] = {}
    for layer in layers:
        if layer.merged:
            merged.setdefault((id(layer._merge_state), layer.weight_place() or id(layer)), layer)
    for layer in merged.values():
        check_unmerge(layer)
    for layer in merged.values():
        bring_back(layer, everyone=True)
    return bool(merged)


def move(layer: Any, fn: Callable[[Tensor], Tensor], move_layer: Callable[[], Any]) -> None:
    """Move or cast a layer, and the original that is kept of its weight with it, as torch's `_apply` does.

    Args:
        layer: the layer.
        fn: what becomes of a tensor.
        move_layer: does it to the layer's own.
    """
    state = layer._merge_state
    if state is None or state.kept is None:
        move_layer()
        return
    # A change made before the move must not be forgotten.
    changed = state.mark is None or fingerprint(weight_access(layer).read()) != state.mark
    others = state.others(layer)
    move_layer()
    state = state.split(layer, others)
    if isinstance(state.kept, nn.Module):
        state.kept._apply(fn)
    elif state.kept is not None:
        moved = fn(state.kept)
        state.kept = moved.to("cpu") if state.where == "cpu" and not moved.is_meta else moved
    lost = changed or layer.weight.is_meta
    state.mark = None if lost else fingerprint(weight_access(layer).read())
    enter(state, layer)
