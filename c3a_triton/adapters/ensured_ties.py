"""`ensure_weight_tying`: what is tied to the input embeddings stays so where these are trained whole."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from c3a_triton.errors import CheckpointError, ConfigError
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.values import shown

from .base_model import base_modules, embeddings_of
from .layer import C3ALinear
from .modules_to_save import ModulesToSave

__all__ = ["of_one_weight", "own_weight", "tie_copies", "tied_to_embeddings", "with_tied_modules"]


def own_weight(module: nn.Module) -> Tensor | None:
    """The weight of an embedding or a linear layer, or of the one under what stands in its place."""
    base: Any = module.original_module if isinstance(module, ModulesToSave) else module
    base = base.get_base_layer() if isinstance(base, C3ALinear) else base
    weight = base._parameters.get("weight")
    return weight if isinstance(base, (nn.Embedding, nn.Linear)) else None


def of_one_weight(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """The other modules that have a module's weight."""
    weight = own_weight(modules[name])
    return [other for other in modules if other != name and weight is not None and own_weight(modules[other]) is weight]


def tied_to_embeddings(model: nn.Module) -> list[str]:
    """Names of the modules that have one weight with the input embeddings, these first; none where nothing is tied."""
    modules = {name: module for name, module in base_modules(model) if name}
    embeddings = embeddings_of(model)[0]
    for name, module in modules.items():
        if module is embeddings and (others := of_one_weight(modules, name)):
            return [name, *others]
    return []


def with_tied_modules(
    model: nn.Module, config: C3AConfig, adapted: Collection[str], saved: Sequence[tuple[str, nn.Module]]
) -> C3AConfig:
    """A configuration that names all that `ensure_weight_tying` trains together, where it names any of it.

    Warns where it has no effect, as PEFT does.

    Args:
        model: the model.
        config: the configuration.
        adapted: names of the layers that it adapts.
        saved: what it trains whole.

    Raises:
        ConfigError: tied layers are adapted, of which each has an adapter of its own.
    """
    if not config.ensure_weight_tying:
        return config
    tied = tied_to_embeddings(model)
    if not tied:
        warnings.warn(
            f"ensure_weight_tying has no effect: nothing is tied to this {type(model).__name__}'s input embeddings",
            stacklevel=4,
        )
        return config
    if both := [name for name in tied if name in adapted]:
        raise ConfigError(
            f"ensure_weight_tying: {both[0]} is adapted (target_modules={shown(config.target_modules)}), and C3A's "
            f"adapters of {' and '.join(tied)}, which have one weight, cannot be one. Leave {both[0]} out of "
            "target_modules; train these modules whole (modules_to_save) or some of their tokens "
            "(trainable_token_indices); or leave ensure_weight_tying out"
        )
    names = [name for name, _ in saved]
    if not any(name in names for name in tied):
        if config.trainable_token_indices is None:
            warnings.warn(
                f"ensure_weight_tying has no effect: none of {', '.join(tied)} is in modules_to_save, and no tokens "
                "are trained (trainable_token_indices)",
                stacklevel=4,
            )
        return config
    return replace(config, modules_to_save=[*names, *(name for name in tied if name not in names)])


def tie_copies(model: nn.Module, config: C3AConfig, copies: Mapping[str, nn.Module]) -> None:
    """Give the copies of tied modules one weight, that of the input embeddings' copy, if the configuration says so.

    Args:
        model: the model.
        config: the configuration.
        copies: name of a module → its new copy.

    Raises:
        CheckpointError: the copies, which are a file's, differ.
    """
    names = [name for name in tied_to_embeddings(model) if name in copies] if config.ensure_weight_tying else []
    for name in names[1:]:
        first, other = copies[names[0]]._parameters["weight"], copies[name]._parameters["weight"]
        assert first is not None
        assert other is not None
        if not first.is_meta and not first.equal(other):
            raise CheckpointError(
                f"the configuration ties {names[0]} and {name} (ensure_weight_tying), for which the file has different "
                "values: take the file as it was saved"
            )
        copies[name].weight = first
