"""What a merge makes of each tensor of a model's folder, decided before anything is written."""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.adapters.base_model import warn_tied
from c3a_triton.adapters.ensured_ties import tied_to_embeddings
from c3a_triton.adapters.file_targets import check_file_values, find_file_targets, with_names_of
from c3a_triton.adapters.injection import layer_class, new_layer, put, put_plain
from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.adapters.names import Scope
from c3a_triton.adapters.samples import output_of, sample_inputs
from c3a_triton.adapters.targets import Target, find_modules_to_save
from c3a_triton.adapters.token_rows import ROWS_SUFFIX, check_none_beside
from c3a_triton.adapters.token_targets import check_tokens_alone, find_token_targets
from c3a_triton.adapters.untying import homes_of, plan_untying
from c3a_triton.adapters.watched import Watch
from c3a_triton.bases.model_names import renaming_of
from c3a_triton.bases.weights import unmergeable
from c3a_triton.errors import AdapterStateError, CheckpointError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, AdapterFile
from c3a_triton.files.config import MODEL_CONFIG_NAME

from .merge_stacks import Change, apart_changes, merge_into_parameter
from .model_folder import ModelFolder, are_equal, check_stored, read_json

__all__ = ["Plan", "plan_merge"]


@dataclass
class Plan:
    """What becomes of a checkpoint's tensors."""

    layers: int = 0
    changes: dict[str, Change] = field(default_factory=dict)  # key → what is done to its tensor, in place
    # name of a new tensor → (shape, the key whose tensor it starts as, or None, what is done to it)
    added: dict[str, tuple[tuple[int, ...], str | None, Change | None]] = field(default_factory=dict)
    flags: tuple[str, ...] = ()  # the parts of the configuration in which tie_word_embeddings becomes false
    untied: bool = False
    unseen: bool = False  # whether it is not known which layers the model calls


def plan_merge(structure: nn.Module, adapter: AdapterFile, checkpoint: ModelFolder, merge_uncalled: bool) -> Plan:
    """What becomes of the tensors of a checkpoint when an adapter is merged into it.

    Args:
        structure: the model, on the meta device.
        adapter: what is merged.
        checkpoint: the model's weights.
        merge_uncalled: whether layers that the model never calls are merged too.

    Raises:
        CheckpointError: the adapter, the model and its weights do not fit each other.
        AdapterStateError: nothing can be merged into a layer.
    """
    adapter = with_names_of(structure, adapter)
    targets = find_file_targets(structure, adapter)
    called = targets if merge_uncalled else _called(structure, targets)
    targets = targets if called is None else called
    saved_modules = find_modules_to_save(structure, adapter.config)
    tokens = find_token_targets(structure, adapter.config)
    check_tokens_alone(tokens, [target.name for target in targets], [name for name, _ in saved_modules], adapter.config)
    replaced = check_file_values(structure, adapter, saved_modules, tokens, on_meta=True)
    warn_tied(structure, [target.name for target in targets], "merging changes both")

    tensors = structure.state_dict(keep_vars=True)
    keys = _keys_by_name(structure, checkpoint, tensors)
    one = _tied(structure, tensors, keys, checkpoint)
    groups: dict[str, list[str]] = {}
    for name, first in one.items():
        groups.setdefault(first, []).append(name)
    changes: dict[str, list[Change]] = {}
    for target in targets:
        if not target.parameter:
            changes.setdefault(one[f"{target.name}.weight"], []).append(_merge_into(target, adapter))
        elif target.name in keys:
            changes.setdefault(one[target.name], []).append(merge_into_parameter(target, adapter))
    values = {id(parameter): value for parameter, value in replaced}
    for name, tensor in tensors.items():
        if id(tensor) in values and one[name] == name:
            changes.setdefault(name, []).append(partial(_replace, value=values[id(tensor)]))
    for token in tokens:
        rows = partial(_replace_rows, indices=token.indices, rows=adapter.tensors[token.name + ROWS_SUFFIX])
        firsts = {one[f"{name}.weight"] for name, _ in token.modules}
        beside = {name.removesuffix(".weight") for name, first in one.items() if first in firsts}
        check_none_beside(token.name, sorted(beside - {name for name, _ in token.modules}))
        for first in firsts:
            changes.setdefault(first, []).append(rows)
    saved = {
        f"{name}.{key}": adapter.tensors[f"{name}.{key}"]
        for name, module in saved_modules
        for key in module.state_dict()
    }

    for name in tied_to_embeddings(structure) if adapter.config.ensure_weight_tying else ():
        # One tensor it stays, with other values.
        if (value := saved.pop(f"{name}.weight", None)) is not None:
            changes[one[f"{name}.weight"]] = [partial(_replace, value=value)]

    config = read_json(checkpoint.folder / MODEL_CONFIG_NAME)
    after = one | {name: f"{name} saved" for name in saved}
    untying = plan_untying(structure, one, after, homes_of(structure), config)
    plan = Plan(len(targets), flags=() if untying is None else untying.flags, untied=untying is not None)
    plan.unseen = called is None
    apart = [target for target in targets if target.parameter and target.name not in keys]
    plan.changes |= apart_changes(structure, apart, adapter, checkpoint, _namer(structure, tensors))
    own = () if untying is None else untying.own
    for first, group in groups.items():
        if first in changes or any(name in saved or any(name in names for names in own) for name in group):
            _plan_group(plan, group, tuple(tensors[first].shape), changes.get(first, []), saved, own, keys, checkpoint)
    return plan


def _called(structure: Any, targets: list[Target]) -> list[Target] | None:
    """The targets without those that a forward of the model does not call, of which a warning tells, as in memory.

    None where that cannot be seen: inputs that are not known, or a forward that needs values.
    """
    watch, scope = Watch(structure), Scope()
    work = []
    try:
        for target in targets:
            layer, kernel = new_layer(structure, target, "default", True, None, backend="auto", active=["default"])
            layer._install("default", kernel)
            layer._scope = scope
            put(structure, target, layer)
            work.append((target.name, layer, target))
        if hasattr(structure, "set_experts_implementation"):
            structure.set_experts_implementation("batched_mm")  # which needs no values, whatever the dtype
        watch.begin()
        with scope.bound(disabled=True):
            for inputs in sample_inputs(structure):
                # Made up, and without values: whatever a model says about them, it says nothing of its layers.
                with contextlib.suppress(Exception):
                    output_of(structure, inputs)
                    break
            else:
                return None
    finally:
        watch.end()
        put_plain(structure, scope, with_copies=False)
    return [target for _, _, target in watch.without_uncalled(work)]


def _tied(
    structure: Any, tensors: Mapping[str, Tensor], keys: Mapping[str, str], checkpoint: ModelFolder
) -> dict[str, str]:
    """Name → the first name of those that are one tensor as the model is loaded."""
    groups: dict[int, list[str]] = {}  # tied ones share an object
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    one: dict[str, str] = {}
    for group in groups.values():
        present = [name for name in group if name in keys]
        apart = [name for name in present[1:] if not are_equal(checkpoint, keys[present[0]], keys[name])]
        if not apart:
            one |= dict.fromkeys(group, group[0])
            continue
        if not hasattr(structure, "get_expanded_tied_weights_keys"):
            raise CheckpointError(
                f"{checkpoint.folder} ties {' and '.join(group)} by its configuration, but stores different values for "
                f'them: set "tie_word_embeddings": false in its {MODEL_CONFIG_NAME}, if transformers 4 is to load it'
            )
        # transformers 5 ties each target to its source, unless both are there and differ.
        pairs = structure.get_expanded_tied_weights_keys(all_submodels=True)
        for name in group:
            source = pairs.get(name, name)
            if name in keys and source in keys and not are_equal(checkpoint, keys[name], keys[source]):
                source = name
            one[name] = one.get(source, source)
    return one


def _plan_group(
    plan: Plan,
    group: list[str],
    shape: tuple[int, ...],
    changes: list[Change],
    saved: Mapping[str, Tensor],
    own: tuple[tuple[str, ...], ...],
    keys: Mapping[str, str],
    checkpoint: ModelFolder,
) -> None:
    """Plan one tensor of the model, which has several names where it is tied."""
    present = [keys[name] for name in group if name in keys]
    if not present and (changes or any(name not in saved for name in group)):
        raise CheckpointError(
            f"{checkpoint.folder} has no tensor of its own for {group[0]} (transformers may build it from others): "
            "merge this model in memory, with model.c3a.merge_and_unload()"
        )
    for key in present:
        check_stored(key, checkpoint, shape)
    # A module that is trained whole is a copy of its own: what it was tied to goes on with the former values, in one
    # tensor if loading ties it again, otherwise in several.
    parts: dict[Any, list[str]] = {}
    for name in group:
        parts.setdefault(name if name in saved else next((names for names in own if name in names), None), []).append(
            name
        )
    for part in parts.values():
        done: list[Change] = [partial(_replace, value=saved[part[0]])] if part[0] in saved else changes
        if done:
            plan.changes |= {keys[name]: partial(_in_order, changes=done) for name in part if name in keys}
        if not any(name in keys for name in part):
            plan.added[part[0]] = (shape, None if part[0] in saved else present[0], partial(_in_order, changes=done))


def _keys_by_name(structure: Any, checkpoint: ModelFolder, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The model's names → keys of its checkpoint, as transformers relates them: renamed, with or without the prefix.

    Tensors that transformers computes from several of the checkpoint have no key.
    """
    rename, named = renaming_of(structure), _namer(structure, tensors)
    keys = {}
    for key in checkpoint.tensors:
        name, converted = rename(key)
        if not converted and (found := named(name)) is not None:
            keys[found] = key
    return keys


def _namer(structure: Any, tensors: Mapping[str, Tensor]) -> Callable[[str], str | None]:
    """A tensor's name by transformers → its name in the model, with or without the prefix of the bare one."""
    prefix = f"{structure.base_model_prefix}."

    def named(name: str) -> str | None:
        candidates = (name.removeprefix(prefix), prefix + name, name)
        return next((candidate for candidate in candidates if candidate in tensors), None)

    return named


# What is done to a tensor, in place


def _merge_into(target: Target, adapter: AdapterFile) -> Change:
    """What merges a target's adapter into its weight as `merge_and_unload` does: by a layer that has this weight.

    Raises:
        AdapterStateError: nothing can be merged into a layer of this kind.
        ConfigError: it cannot be adapted.
    """

    def adapted(weight: nn.Parameter | None) -> C3ALinear:
        base = copy.copy(target.module)
        base.__dict__["_parameters"] = {**base._parameters, "weight": weight}
        return layer_class(base)(base, "default", target.block_size, True, layer_name=target.name)

    def merge(weight: Tensor) -> None:
        layer = adapted(nn.Parameter(weight, requires_grad=False))
        layer.c3a_kernel["default"].data.copy_(adapter.tensors[target.name + KERNEL_SUFFIX])
        layer.merge(keep_base=None)
        if not torch.isfinite(weight).all():
            raise AdapterStateError(f"{target.name}: merging gives a weight that is not finite; nothing was written")

    if reason := unmergeable(target.module):
        raise AdapterStateError(
            f"{target.name}: nothing can be merged into this {type(target.module).__name__}: {reason}. Keep the "
            "adapter unmerged"
        )
    adapted(target.module._parameters["weight"])
    return merge


def _replace(tensor: Tensor, *, value: Tensor) -> None:
    tensor.copy_(value)


def _replace_rows(tensor: Tensor, *, indices: list[int], rows: Tensor) -> None:
    if not torch.isfinite(rows).all():
        raise AdapterStateError("the rows of the trained tokens are not finite; nothing was written")
    tensor[indices] = rows.to(tensor)


def _in_order(tensor: Tensor, *, changes: list[Change]) -> None:
    for change in changes:
        change(tensor)
