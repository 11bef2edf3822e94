"""What a configuration means for a model: which modules, and what is wrong. Changes nothing."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from c3a_triton.bases.linear_like import Geometry, geometry, is_linear, is_of_peft, unfit_for_adapters
from c3a_triton.errors import ConfigError
from c3a_triton.files.block_sizes import check_block_size, suggest_block_size
from c3a_triton.files.config import DEFAULT_TARGET_MODULES, C3AConfig
from c3a_triton.files.expressions import Matching
from c3a_triton.files.patterns import block_size_rule, target_rule, unmatched_keys
from c3a_triton.files.values import shown, some

from .base_model import base_modules, near_names, output_embeddings_of, warn_tied
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .parameter_targets import Place, find_parameter_targets, parameter_places, stacked_hint, warn_untouched_experts
from .target import Target, sharding_problem, token_problem

__all__ = ["Target", "find_modules_to_save", "find_targets", "geometry_of", "sharding_problem", "with_task_heads"]

# The modules that PEFT trains whole for a task, where the model has them.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_SEQ_CLS_HEADS = ("score", "classifier")


def find_targets(model: nn.Module, config: C3AConfig) -> list[Target]:
    """The modules that a configuration adapts in a model, and then the parameters, each in the model's order, checked.

    Raises:
        ConfigError: no module or parameter is meant, one is meant that cannot be adapted, or there is no default for
            the model's type.
        ShapeError: a block size that does not divide a layer's widths.
    """
    modules = [(name, module) for name, module in base_modules(model) if name and not _is_part(module)]
    names, matching = [name for name, _ in modules], Matching()
    if config.target_modules is None and config.target_parameters is not None:
        config = replace(config, target_modules=[])  # as with PEFT's LoRA
    places = parameter_places(model)
    found = _matches(model, config, modules, matching)
    if not found and config.target_modules:
        raise ConfigError(_nothing_found(config, names, places, matching))
    block_size_of = block_size_rule(config, matching)
    targets = [_target(name, module, config, *block_size_of(name)) for name, module in found]
    parameters = find_parameter_targets(model, config, [name for name, _ in found], matching)
    _warn_about(model, config, targets, parameters, names, places, matching)
    warn_untouched_experts(places, config, matching)
    return [*targets, *parameters]


def _is_part(module: nn.Module) -> bool:
    return isinstance(module, C3ALinear) and module.is_part


def _matches(
    model: nn.Module, config: C3AConfig, modules: list[tuple[str, nn.Module]], matching: Matching
) -> list[tuple[str, nn.Module]]:
    for name, module in modules:
        if is_of_peft(module):
            raise ConfigError(
                f"{name} is a layer of PEFT ({type(module).__name__}): adapt the plain model, which PEFT's unload() or "
                "merge_and_unload() returns"
            )
    if config.target_modules == "all-linear":
        return _all_linear(model, config, modules, matching)
    if config.target_modules is None:
        config = replace(config, target_modules=_default_targets(model))
    is_target = target_rule(config, matching)
    found = [(name, module) for name, module in modules if is_target(name)]
    for name, _ in found:
        if _is_bypassed(model, name):
            raise ConfigError(
                f"{name} cannot be adapted: nn.MultiheadAttention reads its weight and never calls it. Leave it out of "
                "target_modules"
            )
    return found


def _is_bypassed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def _default_targets(model: nn.Module) -> list[str] | str:
    model_type = _model_type(model)
    if model_type not in DEFAULT_TARGET_MODULES:
        what = (
            "has no config.model_type" if model_type is None else f"is of type {model_type!r}, for which none is known"
        )
        raise ConfigError(
            f"target_modules is None, which means the default for the model's type, but {type(model).__name__} {what}: "
            'give target_modules, for example "all-linear"'
        )
    return DEFAULT_TARGET_MODULES[model_type]


def _all_linear(
    model: nn.Module, config: C3AConfig, modules: list[tuple[str, nn.Module]], matching: Matching
) -> list[tuple[str, nn.Module]]:
    is_allowed = target_rule(replace(config, target_modules=".*"), matching)
    heads = _output_heads(model, config)
    found, unfit = [], []
    for name, module in modules:
        wanted = module.kind == "linear" if isinstance(module, C3ALinear) else is_linear(module)
        if not wanted or any(module is head for head in heads) or not is_allowed(name):
            continue
        if _is_bypassed(model, name):
            warnings.warn(
                f"{name} is left out: nn.MultiheadAttention reads its weight and never calls it", stacklevel=2
            )
            continue
        if not isinstance(module, C3ALinear) and (reason := unfit_for_adapters(module)):
            unfit.append((name, reason))
            continue
        found.append((name, module))
    if unfit:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in unfit))
        warnings.warn(f"{some(dict(unfit))}: left out of target_modules='all-linear', because {reasons}", stacklevel=2)
    return found


def _output_heads(model: Any, config: C3AConfig) -> list[nn.Module]:
    """What "all-linear" leaves out: the output embeddings, or else the head of a sequence classifier."""
    if not hasattr(model, "get_output_embeddings"):
        return []
    head = output_embeddings_of(model)
    if head is None and config.task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in _SEQ_CLS_HEADS if hasattr(model, name)), None)
    return [] if head is None else [head]


def _target(name: str, module: nn.Module, config: C3AConfig, size: int | str, key: str | None) -> Target:
    if isinstance(module, ModulesToSave):
        raise ConfigError(f"{name} cannot be adapted: another adapter trains it as a whole (modules_to_save)")
    sizes = geometry_of(module)
    if sizes is None and (hint := stacked_hint(parameter_places(module), lambda _: True)):
        raise ConfigError(f"{name} is a {type(module).__name__}, which cannot be adapted as a layer. In it:{hint}")
    if sizes is None:
        raise ConfigError(
            f"{name} is a {type(module).__name__}, which cannot be adapted: only linear layers, nn.Conv2d and "
            "nn.Embedding can. Make target_modules more precise, or name it in exclude_modules"
        )
    if problem := sharding_problem(name, module) or token_problem(name, module):
        raise ConfigError(problem)
    if not isinstance(module, C3ALinear) and (reason := unfit_for_adapters(module)):
        raise ConfigError(f"{name}: {reason}. Leave it out of target_modules, or name it in exclude_modules")
    chosen_by = "block_size" if key is None else key
    if size == "auto":
        size, chosen_by = suggest_block_size(*sizes.divided, rank=config.rank), "auto"
    assert isinstance(size, int)
    check_block_size(size, *sizes.divided, name + sizes.what)
    return Target(name, module, sizes, size, chosen_by)


def geometry_of(module: nn.Module) -> Geometry | None:
    """What is known of a base layer, or of the one under an adapted layer."""
    if isinstance(module, ModulesToSave):
        return None
    return geometry(module.get_base_layer() if isinstance(module, C3ALinear) else module)


def _nothing_found(config: C3AConfig, names: list[str], places: dict[str, Place], matching: Matching) -> str:
    targets = config.target_modules
    message = f"target_modules={shown(targets)} matches no module"
    unrestricted = replace(config, exclude_modules=None, modules_to_save=None, layers_to_transform=None)
    if targets not in (None, "all-linear") and any(map(target_rule(unrestricted, matching), names)):
        return message + (
            f" that is left by exclude_modules={config.exclude_modules!r}, modules_to_save={config.modules_to_save!r} "
            f"and layers_to_transform={config.layers_to_transform!r}"
        )
    if targets not in (None, "all-linear") and (hint := stacked_hint(places, target_rule(config, matching))):
        return message + "." + hint
    hints = [near_names(target, names) for target in targets[:5]] if isinstance(targets, list) else []
    return message + "." + "".join(dict.fromkeys(hints))


def _warn_about(
    model: nn.Module,
    config: C3AConfig,
    targets: list[Target],
    parameters: list[Target],
    names: list[str],
    places: dict[str, Place],
    matching: Matching,
) -> None:
    adapted = [target.name for target in targets]
    if keys := unmatched_keys(config, [*adapted, *(target.name for target in parameters)], matching):
        warnings.warn(
            f"block_size_pattern: these keys match no adapted module: {', '.join(map(repr, keys))}", stacklevel=2
        )
    if isinstance(config.target_modules, list):
        idle = [
            entry for entry in config.target_modules if not any(f".{name}".endswith(f".{entry}") for name in adapted)
        ]
        if idle:
            hints = "".join(stacked_hint(places, _ends(entry)) or near_names(entry, names) for entry in idle[:5])
            warnings.warn(f"target_modules: {', '.join(map(shown, idle[:20]))} select no module.{hints}", stacklevel=2)
    if config.exclude_modules:
        everything = C3AConfig(target_modules=".*", exclude_modules=config.exclude_modules)
        if all(map(target_rule(everything, matching), [*names, *(places if config.target_parameters else ())])):
            warnings.warn(f"exclude_modules={config.exclude_modules!r} matches no module", stacklevel=2)
    _warn_shared(model, adapted, "adapted")
    warn_tied(model, adapted, "the adapter changes only what this layer computes, but merging it would change both")


def _ends(entry: str) -> Callable[[str], bool]:
    return lambda name: f".{name}".endswith(f".{entry}")


def _warn_shared(model: nn.Module, chosen: list[str], done: str) -> None:
    """Warn about modules with several places in a model, of which only the first gets another module.

    A place is a name within a parent: in a block that the model uses several times a layer has one, for all its uses.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        places.setdefault(id(module), {}).setdefault((id(modules[parent]), child), name)
    wanted = set(chosen)
    for names in map(list, map(dict.values, places.values())):
        if len(names) > 1 and names[0] in wanted:
            warnings.warn(f"{' and '.join(names)} are one module: only its use as {names[0]} is {done}", stacklevel=2)


def with_task_heads(model: nn.Module, config: C3AConfig) -> C3AConfig:
    """The configuration with the heads that its task trains whole among `modules_to_save`, as PEFT adds them."""
    heads = _TASK_HEADS.get(config.task_type or "", ())
    present = {name.rpartition(".")[2] for name, _ in base_modules(model)}
    missing = [head for head in heads if head in present and head not in (config.modules_to_save or ())]
    return replace(config, modules_to_save=[*(config.modules_to_save or ()), *missing]) if missing else config


def find_modules_to_save(model: nn.Module, config: C3AConfig) -> list[tuple[str, nn.Module]]:
    """(name, module) of the modules that a configuration trains whole: those whose name ends with an entry, as in PEFT.

    A module that lies in another one of them is left to that one. Entries that match nothing are warned about.
    """
    entries = config.modules_to_save or []
    modules = [(name, module) for name, module in base_modules(model) if name]
    found: list[tuple[str, nn.Module]] = []
    for name, module in modules:
        if any(name.endswith(entry) for entry in entries) and not (found and name.startswith(found[-1][0] + ".")):
            found.append((name, module))
    if idle := [entry for entry in entries if not any(name.endswith(entry) for name, _ in modules)]:
        hints = "".join(near_names(entry, [name for name, _ in modules]) for entry in idle[:5])
        warnings.warn(f"modules_to_save: {', '.join(map(shown, idle[:20]))} match no module.{hints}", stacklevel=2)
    for name, module in found:
        if problem := token_problem(name, module):
            raise ConfigError(f"modules_to_save: {problem}")
    _warn_shared(model, [name for name, _ in found], "trained whole (modules_to_save)")
    if not config.ensure_weight_tying:
        warn_tied(model, [name for name, _ in found], "modules_to_save gives it a copy of its own")
    return found
