"""What `target_parameters` means for a model: which parameters, and what is wrong with one. Changes nothing."""

import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from c3a_triton.bases.experts import (
    parameter_geometry,
    parameter_names,
    parameter_shape,
    problem,
    spread,
    stacked_names,
)
from c3a_triton.bases.linear_like import Geometry, geometry
from c3a_triton.bases.sharded import whole_shape
from c3a_triton.errors import ConfigError
from c3a_triton.files.block_sizes import check_block_size, suggest_block_size
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.expressions import Matching
from c3a_triton.files.patterns import block_size_rule, parameter_rule
from c3a_triton.files.values import shown, some

from .base_model import near_names
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .parts import Holder
from .report import format_bytes
from .target import Target, sharding_problem

__all__ = [
    "Place",
    "find_parameter_targets",
    "parameter_places",
    "parameter_problem",
    "stacked_hint",
    "warn_untouched_experts",
]


class Place(NamedTuple):
    """A parameter of a model as it is without adapters.

    Attributes:
        module: what has it.
        parameter: its name there.
        around: what stands in the module's place, where that is a layer of this library's.
        inside: the name of such a layer in whose module this one lies, or "".
    """

    module: nn.Module
    parameter: str
    around: nn.Module | None
    inside: str

    @property
    def sizes(self) -> Geometry | None:
        """What is known of it as something to adapt."""
        return parameter_geometry(self.module, self.parameter)

    @property
    def adapted(self) -> nn.Module:
        """Its part, where it is adapted already, or the module."""
        parts = self.around.parts() if isinstance(self.around, Holder) else {}
        return parts.get(self.parameter, self.module)


def parameter_places(model: nn.Module) -> dict[str, Place]:
    """Full name → place of a model's parameters, every name of those that have several."""
    return {f"{name}.{place.parameter}".removeprefix("."): place for name, place in _places("", model, None, "")}


def _places(name: str, module: nn.Module, around: nn.Module | None, inside: str) -> Iterator[tuple[str, Place]]:
    if isinstance(module, (C3ALinear, Holder, ModulesToSave)):
        base = module.original_module if isinstance(module, ModulesToSave) else module.base_layer
        yield from _places(name, base, module, inside)
        return
    for parameter in parameter_names(module):
        yield name, Place(module, parameter, around, inside)
    for child, part in module._modules.items():
        if part is not None:
            yield from _places(
                f"{name}.{child}".removeprefix("."), part, None, inside or ("" if around is None else name)
            )


def find_parameter_targets(
    model: nn.Module, config: C3AConfig, adapted_modules: Collection[str], matching: Matching
) -> list[Target]:
    """The parameters that a configuration adapts in a model, in the model's order, each checked.

    Args:
        model: the model.
        config: the configuration.
        adapted_modules: names of the modules that it adapts.
        matching: where the time of its matches is counted.

    Raises:
        ConfigError: no parameter is meant, or one that cannot be adapted.
        ShapeError: a block size that does not divide a parameter's widths.
    """
    if config.target_parameters is None:
        return []
    places = parameter_places(model)
    is_target = parameter_rule(config, matching)
    every = config.target_parameters == "all-experts"
    found = {
        name: place
        for name, place in places.items()
        if (not every or place.parameter in stacked_names(place.module)) and is_target(name)
    }
    if not found:
        raise ConfigError(_nothing_found(config, places, matching))
    reasons = {name: parameter_problem(name, places, config, adapted_modules) for name in found}
    unfit = {name: reason for name, reason in reasons.items() if reason is not None}
    # "all-experts" leaves out what nobody could adapt (quantized weights), but not what should have been told apart.
    tied = [name for name in unfit if _shared_with(name, places)]
    if unfit and (tied or not every or len(unfit) == len(found)):
        reason = unfit[next(iter(tied or unfit))]
        raise ConfigError(f"{reason}. Leave it out of target_parameters, or name it in exclude_modules")
    if unfit:
        why = {reason.removeprefix(f"{name}: ").replace(name, "it", 1): None for name, reason in unfit.items()}
        warnings.warn(
            f"left out of target_parameters='all-experts': {some(unfit)}, because {'; '.join(why)}", stacklevel=3
        )
    block_size_of = block_size_rule(config, matching)
    targets = [_target(name, place, config, *block_size_of(name)) for name, place in found.items() if name not in unfit]
    _warn_idle(config, found, places)
    _warn_dense(targets)
    return targets


def _target(name: str, place: Place, config: C3AConfig, size: int | str, key: str | None) -> Target:
    sizes = place.sizes
    assert sizes is not None
    chosen_by = "block_size" if key is None else key
    if size == "auto":
        size, chosen_by = suggest_block_size(*sizes.divided, rank=config.rank), "auto"
    assert isinstance(size, int)
    check_block_size(size, *sizes.divided, name + sizes.what)
    return Target(name, place.adapted, sizes, size, chosen_by, place.parameter)


def parameter_problem(
    name: str, places: dict[str, Place], config: C3AConfig, adapted_modules: Collection[str] = ()
) -> str | None:
    """Why a parameter cannot be adapted by itself, as a sentence that begins with its name, or None.

    Args:
        name: its full name.
        places: what `parameter_places` gave.
        config: the configuration, for what is trained whole beside it.
        adapted_modules: names of the modules that the same adapter adapts.
    """
    place, owner = places[name], name.rpartition(".")[0]
    kind = type(place.module).__name__
    if not owner:
        return f"{name} is a parameter of the model itself, in whose place nothing can be put"
    if place.inside:
        return f"{name} lies in {place.inside}, which is adapted or trained as a whole already"
    if isinstance(place.around, ModulesToSave):
        return f"{name} belongs to {owner}, which another adapter trains as a whole (modules_to_save)"
    if owner in adapted_modules or isinstance(place.around, C3ALinear):
        return f"{name} belongs to {owner}, which is adapted as a layer (target_modules): adapt either of the two"
    if geometry(place.module) is not None:
        return f"{name} belongs to {owner}, a {kind} that is adapted as a layer: name {owner} in target_modules"
    whole = [f"{owner}.{child}" for child, _ in place.module.named_modules() if child]
    if entry := next((entry for entry in config.modules_to_save or () if any(map(_ends(entry), whole))), None):
        return f"{name} belongs to {owner}, in which {entry!r} is trained as a whole (modules_to_save)"
    if spread(place.module, place.parameter) is None and (
        reason := sharding_problem(name, place.module, place.parameter)
    ):
        return reason
    if place.parameter in place.module._parameters and place.sizes is None:
        parameter = place.module._parameters[place.parameter]
        n_dims = 0 if parameter is None else len(whole_shape(parameter))
        return f"{name} has {n_dims} dimensions: only matrices and stacks of matrices can be adapted"
    if reason := problem(place.module, place.parameter):
        return f"{name}: {reason}"
    if others := _shared_with(name, places):
        return (
            f"{name} has its memory in common with {some(others)} (tied), so that one adapter would change what others "
            "compute: load the model with weights of their own"
        )
    return None


def _ends(entry: str) -> Any:
    return lambda name: name.endswith(entry)


def _shared_with(name: str, places: dict[str, Place]) -> list[str]:
    """The names of the other parameters in the same memory."""
    where, start, end = _memory(places[name])
    memory = {other: _memory(place) for other, place in places.items() if other != name}
    return [other for other, (own, first, last) in memory.items() if own == where and first < end and start < last]


def _memory(place: Place) -> tuple[Any, int, int]:
    """What a parameter lies in, and from where to where: views of one large buffer are no ties."""
    parameter = place.module._parameters.get(place.parameter)
    if parameter is None:
        return None, 0, 0
    if parameter.is_meta or not parameter.numel() or type(parameter) not in (Tensor, nn.Parameter):
        return id(parameter), 0, 1
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    start = parameter.data_ptr()
    return parameter.device, start, start + (last + 1) * parameter.element_size()


def _nothing_found(config: C3AConfig, places: dict[str, Place], matching: Matching) -> str:
    wanted = config.target_parameters
    message = f"target_parameters={shown(wanted)} matches no parameter"
    if wanted == "all-experts" and not any(p.parameter in stacked_names(p.module) for p in places.values()):
        return f"{message}: the model has no stacked expert weights"
    unrestricted = replace(config, exclude_modules=None, modules_to_save=None, layers_to_transform=None)
    if wanted == "all-experts" or any(map(parameter_rule(unrestricted, matching), places)):
        return message + (
            f" that is left by exclude_modules={config.exclude_modules!r}, modules_to_save={config.modules_to_save!r} "
            f"and layers_to_transform={config.layers_to_transform!r}"
        )
    hints = [_hint(entry, places) for entry in wanted[:5]] if wanted is not None else []
    return message + "." + "".join(dict.fromkeys(hints))


def _hint(entry: str, places: Collection[str]) -> str:
    """A sentence on what an entry that selects no parameter may have meant, or nothing."""
    inside = [name for name in places if f".{name.rpartition('.')[0]}".endswith(f".{entry}")]
    return (
        f" {shown(entry)} is a module: name parameters of it, {some(inside)}." if inside else near_names(entry, places)
    )


def _warn_idle(config: C3AConfig, found: Collection[str], places: Collection[str]) -> None:
    if not isinstance(config.target_parameters, list):
        return
    idle = [entry for entry in config.target_parameters if not any(f".{name}".endswith(f".{entry}") for name in found)]
    if idle:
        hints = "".join(_hint(entry, places) for entry in idle[:5])
        entries = ", ".join(map(shown, idle[:20]))
        warnings.warn(f"target_parameters: {entries} select no parameter.{hints}", stacklevel=4)


def _warn_dense(targets: list[Target]) -> None:
    """Say what parameters cost that are computed with as W + ΔW, written out."""
    dense = [target for target in targets if target.sizes.kind == "parameter"]
    if not dense:
        return
    sizes = [math.prod(target.sizes.matrix_shape) * _itemsize(target) for target in dense]
    warnings.warn(
        f"{some(target.name for target in dense)}: computed as W + ΔW, which is written out in every forward and kept "
        f"for the backward pass: {format_bytes(sum(sizes))} in all",
        stacklevel=4,
    )


def _itemsize(target: Target) -> int:
    weight = getattr(target.module, target.parameter, None)
    weight = target.module.weight if weight is None else weight
    assert isinstance(weight, Tensor)
    return weight.element_size()


# Stacked experts that `target_modules` does not reach


def stacked_hint(places: dict[str, Place], wants: Any) -> str:
    """A sentence on how to name stacked experts, where `wants` is true of one's name or of its module's."""
    names = [name for name, place in places.items() if place.parameter in stacked_names(place.module)]
    meant = [name for name in names if wants(name) or wants(name.rpartition(".")[0])]
    if not meant:
        return ""
    return (
        f" {some(meant)}: stacked expert weights, which are parameters and no layers: name them in target_parameters, "
        f'for example target_parameters=[{meant[0].rpartition(".")[2]!r}] or "all-experts".'
    )


def warn_untouched_experts(places: dict[str, Place], config: C3AConfig, matching: Matching) -> None:
    """Say that most of a model may lie in stacked experts, where its first adapter adapts and excludes none of them."""
    if config.target_parameters is not None:
        return
    names = [name for name, place in places.items() if place.parameter in stacked_names(place.module)]
    is_left = parameter_rule(replace(config, target_parameters="all-experts"), matching)
    left = [name for name in names if is_left(name)]
    if not left or any(place.around is not None for place in places.values()):  # by an earlier adapter, which said so
        return
    counts = {name: _n_elements(place) for name, place in places.items()}
    warnings.warn(
        f"stacked expert weights are not adapted: {len(left)} of them ({some(left)}) hold "
        f"{sum(counts[name] for name in left):,} of {sum(counts.values()):,} parameters. "
        'target_parameters="all-experts" adapts them too; exclude_modules leaves them out without this warning',
        stacklevel=3,
    )


def _n_elements(place: Place) -> int:
    shape = parameter_shape(place.module, place.parameter)
    return shape.numel() if shape else 0
