"""What an adapter file means for a model: under which names, which modules, and what is wrong. Changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from c3a_triton.bases.linear_like import Geometry, unfit_for_adapters
from c3a_triton.bases.model_names import expert_places, renaming_of, unwrapped_name
from c3a_triton.bases.sharded import whole_shape
from c3a_triton.errors import CheckpointError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, AdapterFile
from c3a_triton.files.expressions import Matching
from c3a_triton.files.patterns import block_size_rule, parameter_rule, target_rule

from .base_model import base_module_names, base_modules, base_name, embedding_weights, near_names
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .parameter_targets import parameter_places, parameter_problem
from .parts import Part
from .stacking import stacked_file, with_parameters_for_layers
from .target import token_problem
from .targets import Target, geometry_of, sharding_problem
from .token_rows import ROWS_SUFFIX
from .token_targets import TokenTarget

__all__ = ["check_file_values", "chosen_by_file", "find_file_targets", "same_tensors", "with_names_of"]


def with_names_of(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """An adapter file whose tensors have the names of this model, where another release of transformers gave others.

    Names that the model has stay as they are, and so do those that mean nothing to transformers either. Experts and
    routers that were layers of their own become what this model has in their place.

    Raises:
        CheckpointError: layers of the file are experts, which this transformers keeps in stacked tensors, and they do
            not fit into these, or it is not known how.
    """
    return with_parameters_for_layers(model, _renamed(model, file))


def _renamed(model: nn.Module, file: AdapterFile) -> AdapterFile:
    known = {unwrapped_name(name) for name in (*base_module_names(model), *parameter_places(model))}
    if file.block_sizes.keys() <= known or not _is_of_transformers(model):
        return file
    file = stacked_file(model, file, expert_places(model))
    rename = renaming_of(model)
    parameters = {base_name(unwrapped_name(name)): parameter for name, parameter in model.named_parameters()}
    names: dict[str, str] = {}
    for name in file.block_sizes.keys() - known:
        is_stack = file.tensors[name + KERNEL_SUFFIX].dim() == 4
        new, converted = rename(name if is_stack else f"{name}.weight")
        _refuse_expert(file, name, new if converted else None, parameters)
        new = new.removesuffix(".weight")
        if new in known and not (is_stack and converted):
            names[name] = new

    def renamed(key: str) -> str:
        if key.endswith(KERNEL_SUFFIX):
            name = key.removesuffix(KERNEL_SUFFIX)
            return names.get(name, name) + KERNEL_SUFFIX
        if key.endswith(ROWS_SUFFIX):
            return renamed(key.removesuffix(ROWS_SUFFIX) + ".weight").removesuffix(".weight") + ROWS_SUFFIX
        # What is trained whole, biases and embeddings.
        new, converted = rename(base_name(key))
        return key if converted or key.rpartition(".")[0] in known or new.rpartition(".")[0] not in known else new

    tensors = {renamed(key): tensor for key, tensor in file.tensors.items()}
    if len(tensors) < len(file.tensors):
        return file
    sizes = {names.get(name, name): size for name, size in file.block_sizes.items()}
    entries = file.config.modules_to_save
    if entries is not None:
        entries = [renamed(f"{entry}.weight").removesuffix(".weight") for entry in entries]
    tokens = file.config.trainable_token_indices
    if isinstance(tokens, dict):
        tokens = {renamed(f"{name}.weight").removesuffix(".weight"): indices for name, indices in tokens.items()}
    config = replace(file.config, modules_to_save=entries, trainable_token_indices=tokens)
    return replace(file, tensors=tensors, block_sizes=sizes, config=config)


def _is_of_transformers(model: nn.Module) -> bool:
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)


def _refuse_expert(file: AdapterFile, name: str, stacked: str | None, parameters: dict[str, nn.Parameter]) -> None:
    """Refuse a layer that was an expert of its own, where the model holds all experts of a layer in one tensor."""
    experts, found, _ = name.rpartition(".experts.")
    if stacked is None and found:
        start = f"{experts}.experts."
        stacked = next((key for key in parameters if key.startswith(start) and "." not in key[len(start) :]), None)
    if stacked in parameters and parameters[stacked].dim() == 3:
        raise CheckpointError(
            f"the adapter in {file.path} does not fit this model: it adapts {name}, an expert that is a layer of its "
            f"own, as transformers 4 builds it. This model holds all experts of a layer in one tensor ({stacked}), and "
            "transformers does not say which part of it that layer is. Load it under transformers 4 and merge it there "
            "(c3a-triton merge), or train an adapter of the stacked experts (target_parameters)"
        )


def find_file_targets(model: nn.Module, file: AdapterFile) -> list[Target]:
    """What an adapter file adapts in a model: modules and then parameters, in the model's order, checked one by one.

    Raises:
        CheckpointError: the file's layers are not those of the model, or one that its configuration targets is missing.
    """
    modules = {name: module for name, module in base_modules(model) if name and not isinstance(module, Part)}
    places = parameter_places(model)
    problems = [
        f"the model has no {name}.{near_names(name, modules) if number < 5 else ''}"
        for number, name in enumerate(sorted(file.block_sizes.keys() - modules.keys() - places.keys()))
    ]
    targets, matching = [], Matching()
    chosen_by = chosen_by_file(file, matching)
    for name, module in modules.items():
        if name not in file.block_sizes:
            continue
        sizes = geometry_of(module)
        if sizes is None:
            problems.append(f"{name} is a {type(module).__name__}, not a layer to adapt")
        elif problem := sharding_problem(name, module) or token_problem(name, module):
            problems.append(problem)
        elif not isinstance(module, C3ALinear) and (reason := unfit_for_adapters(module)):
            problems.append(f"{name}: {reason}")
        elif problem := _misfit(file, name, sizes):
            problems.append(problem)
        else:
            targets.append(Target(name, module, sizes, file.block_sizes[name], chosen_by(name)))
    for name, place in places.items():
        if name not in file.block_sizes:
            continue
        if problem := parameter_problem(name, places, file.config, file.block_sizes):
            problems.append(problem)
            continue
        sizes = place.sizes
        assert sizes is not None, "a parameter that can be adapted, of unknown sizes"
        if problem := _misfit(file, name, sizes):
            problems.append(problem)
        else:
            b = file.block_sizes[name]
            targets.append(Target(name, place.adapted, sizes, b, chosen_by(name), place.parameter))
    if file.config.target_modules not in (None, "all-linear"):
        is_target = target_rule(file.config, matching)
        problems += [
            f"its configuration targets {name}, for which it has no kernel"
            for name, module in modules.items()
            if name not in file.block_sizes and geometry_of(module) and is_target(name)
        ]
    named = file.config.target_parameters
    # What is named in full, as a saved adapter names it, means that parameter and no longer name that ends with it.
    if not isinstance(named, str) and (named := [entry for entry in named or () if entry not in file.block_sizes]):
        is_target = parameter_rule(replace(file.config, target_parameters=named), matching)
        problems += [
            f"its configuration targets {name}, for which it has no kernel"
            for name in places
            if name not in file.block_sizes and is_target(name)
        ]
    _raise_problems(file, problems)
    return targets


def _misfit(file: AdapterFile, name: str, sizes: Geometry) -> str | None:
    """What is wrong with the shape of a kernel for a layer or parameter of these sizes, or None."""
    b, shape = file.block_sizes[name], tuple(file.tensors[name + KERNEL_SUFFIX].shape)
    if not any(width % b for width in sizes.divided) and shape == sizes.kernel_shape(b):
        return None

    def said(stack: int, in_features: int, out_features: int) -> str:
        widths = f"in_features={in_features} and out_features={out_features}"
        return f"{stack} matrices with {widths}" if stack else widths

    stack = shape[0] if len(shape) == 4 else 0
    return (
        f"{name}: its kernel {list(shape)} is for {said(stack, shape[-2] * b, shape[-3] * b)}, the "
        f"{'layer' if sizes.kind not in ('experts', 'parameter') else 'model'} has "
        f"{said(sizes.stack, sizes.in_features, sizes.out_features)}"
        + (f", and b has to divide {sizes.divided}{sizes.what}" if sizes.what else "")
    )


def chosen_by_file(file: AdapterFile, matching: Matching | None = None) -> Callable[[str], str]:
    """What decided on a layer's block size, by its name: a key, "block_size", "auto", or "file" where none says it."""
    block_size_of = block_size_rule(file.config, matching)

    def chosen_by(name: str) -> str:
        size, key = block_size_of(name)
        if size == file.block_sizes[name]:
            return "block_size" if key is None else key
        return "auto" if size == "auto" else "file"

    return chosen_by


def check_file_values(
    model: nn.Module,
    file: AdapterFile,
    saved: list[tuple[str, nn.Module]],
    tokens: Sequence[TokenTarget] = (),
    *,
    on_meta: bool = False,
) -> list[tuple[nn.Parameter, Tensor]]:
    """The base model's parameters that a file replaces (biases, and embeddings, which PEFT adds), with their values.

    Also checks that the file has every tensor of the modules that it trains whole, the rows of every token, and nothing
    that has no place.

    Args:
        model: the model.
        file: the adapter file.
        saved: what `find_modules_to_save` found for its configuration.
        tokens: what `find_token_targets` found for it.
        on_meta: whether the model is a mere structure, whose values nobody is going to replace.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the model.
    """
    left = {name: value for name, value in file.tensors.items() if not name.endswith(KERNEL_SUFFIX)}
    problems = []
    for name, module in saved:
        original = module.original_module if isinstance(module, ModulesToSave) else module
        for key, tensor in original.state_dict(keep_vars=True).items():
            value = left.pop(f"{name}.{key}", None)
            if value is None:
                problems.append(f"it has no {name}.{key}, which modules_to_save promises")
            elif value.shape != (shape := whole_shape(tensor)):
                problems.append(f"{name}.{key} has shape {list(value.shape)}, in the model {list(shape)}")
    for target in tokens:
        value = left.pop(target.name + ROWS_SUFFIX, None)
        shape = torch.Size([len(target.indices), whole_shape(target.module.weight)[1]])  # type: ignore[arg-type]
        if value is None:
            problems.append(f"it has no {target.name}{ROWS_SUFFIX}, which trainable_token_indices promises")
        elif value.shape != shape:
            problems.append(f"{target.name}{ROWS_SUFFIX} has shape {list(value.shape)}, its tokens want {list(shape)}")
    parameters = {base_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    embeddings = embedding_weights(model)
    replaced: list[tuple[nn.Parameter, Tensor]] = []
    for name, value in left.items():
        # PEFT writes the biases of modules_to_save twice with bias="all".
        if ".modules_to_save." in name:
            continue
        parameter = parameters.get(base_name(name))
        if parameter is None or not (name.endswith(".bias") or any(parameter is weight for weight in embeddings)):
            problems.append(f"nothing in the model takes {name}")
        elif value.shape != (shape := whole_shape(parameter)):
            problems.append(f"{name} has shape {list(value.shape)}, in the model {list(shape)}")
            if not name.endswith(".bias") and value.shape[1:] == shape[1:]:
                problems[-1] += f": call model.resize_token_embeddings({len(value)}) before the adapter is loaded"
        elif any(parameter is other and not value.equal(former) for other, former in replaced):
            problems.append(
                f"{name} is tied to another tensor in this model, and the file has different values for the two: load "
                "the model with tie_word_embeddings=False"
            )
        elif parameter.is_meta and not on_meta:
            problems.append(f"{name} cannot be replaced while the model keeps it on the meta device")
        else:
            replaced.append((parameter, value))
    _raise_problems(file, problems)
    return replaced


def same_tensors(present: Mapping[str, Tensor], file: AdapterFile) -> list[tuple[Tensor, Tensor]]:
    """(present tensor, the file's value for it) for each of an adapter's tensors, of which the file has exactly these.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the adapter.
    """
    present = {base_name(name): tensor for name, tensor in present.items()}
    # PEFT writes the biases of modules_to_save twice with bias="all".
    values = {base_name(name): value for name, value in file.tensors.items() if ".modules_to_save." not in name}
    problems = [f"it has no {name}" for name in present if name not in values]
    problems += [f"nothing in the adapter takes {name}" for name in values if name not in present]
    problems += [
        f"{name} has shape {list(values[name].shape)}, in the model {list(whole_shape(tensor))}"
        for name, tensor in present.items()
        if name in values and values[name].shape != whole_shape(tensor)
    ]
    _raise_problems(file, problems)
    return [(tensor, values[name]) for name, tensor in present.items()]


def _raise_problems(file: AdapterFile, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 5} more like these)" if len(problems) > 5 else ""
        raise CheckpointError(f"the adapter in {file.path} does not fit this model: {'; '.join(problems[:5])}{more}")
