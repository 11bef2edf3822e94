"""How a layer's adapters are added to the weight under it, and taken out again, for all layers that have that weight.

Layers are `C3ALinear`s, which stand on this file.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.linear_like import is_transposed
from c3a_triton.bases.partitioned import changed, together
from c3a_triton.bases.sharded import is_partitioned, whole
from c3a_triton.bases.weights import WeightAccess, fingerprint, weight_access
from c3a_triton.errors import AdapterStateError

from .merge_state import MergeState, enter, find

__all__ = [
    "KEEP_BASE",
    "add",
    "bring_back",
    "by_weight",
    "check",
    "check_finite",
    "check_unmerge",
    "merge",
    "move",
    "to_unmerge",
]

KEEP_BASE = ("cpu", "device", None)

Group = Sequence[tuple[Any, list[str]]]
"""Layers of one weight, each with those of its adapters that are to be merged there."""


def by_weight(work: Group) -> list[Group]:
    """Layers, each with the adapters to merge there, in groups that have one weight."""
    groups: dict[Hashable, list[tuple[Any, list[str]]]] = {}
    for layer, names in work:
        groups.setdefault(layer.weight_place() or id(layer), []).append((layer, names))
    return list(groups.values())


def _weights(group: Group) -> list[Tensor]:
    """The parameter under these layers, for each of them."""
    found = (layer.get_base_layer()._parameters.get(layer.parameter or "weight") for layer, _ in group)
    return [weight for weight in found if weight is not None]


def _kernels(group: Group) -> list[Tensor]:
    return [layer.c3a_kernel[name] for layer, names in group for name in names]


def check(group: Group) -> None:
    """Refuse a weight that cannot be merged into, or is not what it was after the last merge. It is read once.

    Raises:
        AdapterStateError: it cannot be merged into or was changed since, or adapters are disabled.
    """
    weights = _weights(group)
    guarded: dict[Any, MergeState] = {}
    with together(weights, "merging") as shared:
        for layer, names in group:
            if layer.disable_adapters:
                raise AdapterStateError(f"{layer._label}: adapters are disabled; enable them before merging")
            state = layer._merge_state or find(_access(layer).place())
            if state is not None and state.kept is not None:
                guarded[layer] = state
            elif not any(map(is_partitioned, weights)):
                _read(layer)  # which a quantized one may refuse
            shared[layer._label] = names, layer.merged_adapters, layer in guarded
    if not guarded:
        return
    with together(weights, "merging"), whole(weights):
        mark = fingerprint(_read(next(iter(guarded)))[1])
        for layer, state in guarded.items():
            if state.mark != mark:
                raise AdapterStateError(
                    f"{layer._label}: the base weight was changed after {state.merged_adapters} were merged into it, "
                    "so that bringing back the original would undo that change. Load the base weight again, or keep "
                    "the merged one (merge_and_unload)"
                )


@torch.no_grad()
def check_finite(group: Group) -> None:
    """Refuse what merging would make of the weight where that is not finite, and change nothing.

    Raises:
        AdapterStateError: it is not finite.
    """
    first, names = group[0]
    parameters = [*_weights(group), *_kernels(group)]
    with together(parameters, "merging"), whole(parameters):
        total = _read(first)[1].clone()
        for layer, its_names in group:
            layer._add_delta_(total if _is_transposed(layer) == _is_transposed(first) else total.t(), its_names)
        if not torch.isfinite(total).all():
            raise AdapterStateError(
                f"{first._label}: merging {names} gives a weight that is not finite; nothing was merged"
            )


@torch.no_grad()
def add(group: Group, keep_base: str | None) -> None:
    """Add the adapters' ΔW to their weight, without a check, and note what the weight is then.

    Where a layer fails, those before it stay merged and can be unmerged.

    Args:
        group: layers of one weight, with the adapters to merge there.
        keep_base: where the original is kept, of `KEEP_BASE`.

    Raises:
        AdapterStateError: the new weight cannot be put in the place of the former one.
    """
    weights = _weights(group)
    states: list[MergeState] = []
    try:
        for layer, names in group:
            with changed(weights, "merging"), whole(_kernels([(layer, names)])):
                access, weight = _read(layer)
                state = layer._merge_state or find(access.place())
                if state is None:
                    kept = None if keep_base is None else access.keep(keep_base)
                    state = MergeState(kept, keep_base, _is_transposed(layer))
                _add_delta(layer, names, access, weight)
            layer._merge_state = state
            layer.merged_adapters.extend(names)
            enter(state, layer)
            layer._refresh()
            states.append(state)
    finally:
        guarded = [state for state in states if state.kept is not None]  # of others nothing can be brought back
        with whole(weights if guarded else ()):
            mark = fingerprint(access.read()) if guarded else None
        for state in guarded:
            state.mark = mark


def merge(layer: Any, names: list[str], keep_base: str | None, safe_merge: bool) -> None:
    """Merge these adapters of one layer, which it has and which are not merged, if they can be.

    Raises:
        AdapterStateError: as `check`, with `safe_merge` as `check_finite`, and as `add`. The layer stays as it was.
    """
    group = [(layer, names)]
    check(group)
    if safe_merge:
        check_finite(group)
    add(group, keep_base)


def _is_transposed(layer: Any) -> bool:
    return is_transposed(layer.get_base_layer())


def _read(layer: Any) -> tuple[WeightAccess, Tensor]:
    """The weight under a layer, [out, in], and the way to change it."""
    access = _access(layer)
    try:
        return access, access.read()
    except AdapterStateError as error:
        raise AdapterStateError(f"{layer._label}: {error}") from None


def _access(layer: Any) -> WeightAccess:
    try:
        return weight_access(layer)
    except AdapterStateError as error:
        raise AdapterStateError(f"{layer._label}: {error}") from None


def _add_delta(layer: Any, names: list[str], access: WeightAccess, weight: Tensor) -> None:
    total = weight if access.in_place else weight.clone()
    layer._add_delta_(total, names)
    if not access.in_place:
        try:
            access.write(total)
        except AdapterStateError as error:
            raise AdapterStateError(f"{layer._label}: {error}") from error


def check_unmerge(layer: Any) -> None:
    """Refuse a layer's weight that cannot be brought back.

    Raises:
        AdapterStateError: the original was not kept, or the merged weight was changed in between.
    """
    if layer._merge_state is None or layer._merge_state.kept is None:
        raise AdapterStateError(
            f"{layer._label}: {layer.merged_adapters} were merged with keep_base=None, or others for good "
            "(merge_and_unload) into the same weight, so the base weight is gone; "
            'load the base model again, or merge with keep_base="cpu"'
        )
    check([(layer, [])])


@torch.no_grad()
def bring_back(layer: Any, *, everyone: bool = False) -> None:
    """Unmerge, without a check, this layer or every one of its weight."""
    state = layer._merge_state
    assert state is not None
    assert state.kept is not None
    others = state.others(layer)
    left = [] if everyone else [other for other in others if other.merged]
    kernels = _kernels([(other, other.merged_adapters) for other in left])
    # Another layer may have kept it, in the order of a `Conv1D`.
    same_order = isinstance(state.kept, nn.Module) or state.transposed == _is_transposed(layer)
    with changed(_weights([(layer, [])]), "unmerging"), whole(kernels):
        weight_access(layer).restore(state.kept if same_order else state.kept.t())
        for other in left:
            _add_delta(other, other.merged_adapters, *_read(other))
        mark = fingerprint(_read(left[-1])[1]) if left else None
    for part in [layer, *others] if everyone else [layer]:
        part._merge_state = None
        part.merged_adapters.clear()
        part._refresh()
    if left:
        state.mark = mark


def to_unmerge(layers: Iterable[Any]) -> list[Any]:
    """One of these layers for each weight that something is merged into, by which `bring_back` reaches all of it.

    Raises:
        AdapterStateError: as `check_unmerge`, where any of them cannot be unmerged.
    """
    merged: dict[Hashable, Any] = {}
    for layer in layers:
        if layer.merged:
            merged.setdefault((id(layer._merge_state), layer.weight_place() or id(layer)), layer)
    for layer in merged.values():
        check_unmerge(layer)
    return list(merged.values())


def move(layer: Any, fn: Callable[[Tensor], Tensor], move_layer: Callable[[], Any]) -> None:
    """Move or cast a layer, and the original that is kept of its weight with it, as torch's `_apply` does.

    Args:
        layer: the layer.
        fn: what becomes of a tensor.
        move_layer: does it to the layer's own.
    """
    state = layer._merge_state
    if state is None or state.kept is None or any(map(is_partitioned, _weights([(layer, [])]))):
        move_layer()  # which leaves ZeRO-3's parts where they are
        return
    # A change made before the move must not be forgotten.
    access = None if state.mark is None else weight_access(layer)
    changed = access is None or fingerprint(access.read()) != state.mark
    others = state.others(layer)
    move_layer()
    state = state.split(layer, others)
    if isinstance(state.kept, nn.Module):
        state.kept._apply(fn)
    elif state.kept is not None:
        moved = fn(state.kept)
        state.kept = moved.to("cpu") if state.where == "cpu" and not moved.is_meta else moved
    if changed or layer.weight.is_meta or type(weight_access(layer)) is not type(access):  # float8 codes, cast
        state.mark = None
    else:
        state.mark = fingerprint(weight_access(layer).read())
    enter(state, layer)
