"""What training changes beside an adapter: embeddings, which its file takes along, and what no file of it holds."""

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.model_names import unwrapped_name
from c3a_triton.bases.sharded import own_part
from c3a_triton.errors import ConfigError
from c3a_triton.files.checkpoint import AdapterFile
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.values import shown, some

from .base_model import base_modules, base_name, embeddings_of
from .hooks import remove_hooks
from .layer import C3ALinear
from .modules_to_save import ModulesToSave

__all__ = [
    "embedding_parameters",
    "embeddings_in",
    "embeddings_to_save",
    "unwatch_statistics",
    "warn_embeddings",
    "warn_statistics",
    "warn_unsaved",
    "watch_statistics",
]


def embedding_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name → parameter of what transformers' models call their input and output embeddings.

    Both names of tied ones; not of those that `modules_to_save` holds.
    """
    embeddings = [module for module in embeddings_of(model) if module is not None]
    found: dict[str, nn.Parameter] = {}
    for name, module in base_modules(model):
        base, where = (module.base_layer, f"{name}.base_layer") if isinstance(module, C3ALinear) else (module, name)
        if any(other is module or other is base for other in embeddings) and not isinstance(module, ModulesToSave):
            found |= {
                f"{where}.{key}": parameter
                for key, parameter in base.named_parameters(recurse=False)
                if parameter.is_floating_point()
            }
    return found


def embeddings_to_save(
    model: nn.Module, config: C3AConfig, choice: bool | str, *, held: Collection[str] = ()
) -> dict[str, nn.Parameter]:
    """Full name → parameter of the embeddings that belong into an adapter's file.

    Args:
        model: the adapted model.
        config: the adapter's configuration, which names the base model.
        choice: PEFT's `save_embedding_layers`. With `"auto"` all of them where the vocabulary is not that of the base
            model (or that cannot be found out, and they are adapted), otherwise those that are trained.
        held: those that the adapter's own file has brought, by the base model's names; with `"auto"` the next has them.

    Raises:
        ConfigError: another choice.
    """
    if not (isinstance(choice, bool) or choice == "auto"):
        raise ConfigError(f'save_embedding_layers must be True, False or "auto", got {shown(choice)}')
    if choice is False:
        return {}
    parameters = embedding_parameters(model)
    if choice is True:
        if not parameters:
            warnings.warn(
                f"save_embedding_layers=True: {type(model).__name__} does not tell its embeddings "
                "(get_input_embeddings), so that none are saved: name them in modules_to_save",
                stacklevel=4,
            )
        return parameters
    if not parameters:
        return {}
    changed = _vocabulary_changed(model, config)
    adapted = any(base_name(name) != name for name in parameters)
    if changed or (changed is None and adapted):
        return parameters
    if changed is None and not held:
        warnings.warn(
            f"the configuration of the base model {config.base_model_name_or_path!r} is not at hand, so that its "
            "vocabulary is taken for the model's own. If the embeddings were resized, save with "
            "save_embedding_layers=True",
            stacklevel=4,
        )
    return {name: p for name, p in parameters.items() if p.requires_grad or base_name(name) in held}


def _vocabulary_changed(model: Any, config: C3AConfig) -> bool | None:
    """Whether the vocabulary has another size than the base model's; None where that cannot be found out.

    The base model's configuration comes from its folder or transformers' cache; nothing is asked of the hub.
    """
    own, name = getattr(model, "config", None), config.base_model_name_or_path
    size = _vocab_size(own)
    if size is None or not name or not hasattr(type(own), "from_pretrained"):
        return False
    revision = {} if config.revision is None else {"revision": config.revision}
    try:
        base = type(own).from_pretrained(name, local_files_only=True, **revision)  # type: ignore[union-attr]
    except (OSError, ValueError):
        return None
    return size != _vocab_size(base)


def _vocab_size(config: Any) -> int | None:
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # not of transformers; one with several text models
        text = None
    return getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)


def embeddings_in(file: AdapterFile, model: nn.Module) -> set[str]:
    """Which of a model's embeddings' parameters a file holds, by the base model's names."""
    names = {base_name(name) for name in file.tensors}
    return {base_name(name) for name in embedding_parameters(model)} & names


def warn_embeddings(model: nn.Module, replaced: Iterable[tuple[nn.Parameter, Tensor]], others: Iterable[str]) -> None:
    """Warn where a file's embeddings take the place of those with which other adapters were trained."""
    weights: dict[int, str] = {}
    for name, parameter in embedding_parameters(model).items():
        weights.setdefault(id(parameter), base_name(name))
    changed: dict[str, None] = {}
    for parameter, value in replaced:
        own, new = own_part(parameter.detach(), value.to(parameter.dtype))
        if id(parameter) in weights and not torch.equal(own.cpu(), new.cpu()):
            changed[weights[id(parameter)]] = None
    if changed:
        warnings.warn(
            f"the file's {' and '.join(changed)} take the place of the model's, for {', '.join(map(repr, others))} too",
            stacklevel=4,
        )


def warn_unsaved(model: nn.Module, saved: Iterable[nn.Parameter], told: set[str]) -> None:
    """Warn about parameters that are trained and in no adapter's file, once for each.

    Args:
        model: the adapted model.
        saved: what the files of its adapters hold.
        told: the names that were told before, to which those told now are added.
    """
    known = {id(parameter) for parameter in saved}
    names = [
        unwrapped_name(base_name(name))
        for name, parameter in model.named_parameters()
        # FSDP1 keeps kernels in flat parameters of its own.
        if parameter.requires_grad and id(parameter) not in known and not name.endswith("_flat_param")
    ]
    if new := _untold(names, told):
        warnings.warn(
            f"trained, but not saved with the adapter: {new}. They are parameters of the base "
            "model that were made trainable after apply: name their modules in modules_to_save (biases: "
            'bias="c3a_only" or "all") when the model is adapted, or save them yourself',
            stacklevel=4,
        )


def _untold(names: list[str], told: set[str]) -> str:
    """The first of the names that were not told before, as text, or nothing; they are told now."""
    new = [name for name in names if name not in told]
    told.update(new)
    return some(new)


def watch_statistics(model: nn.Module) -> None:
    """Let the first training call of an adapted model warn as `warn_statistics` does."""
    if any(_tracks(module) for _, module in base_modules(model)):
        unwatch_statistics(model)
        model.register_forward_pre_hook(_before_forward)


def unwatch_statistics(model: nn.Module) -> None:
    """Undo `watch_statistics`."""
    remove_hooks(model, lambda hook: hook is _before_forward)


def _before_forward(model: Any, args: Any) -> None:
    if model.training and not torch.compiler.is_compiling() and warn_statistics(model, model.c3a._told_unsaved):
        unwatch_statistics(model)


def warn_statistics(model: nn.Module, told: set[str]) -> bool:
    """Warn, once for each, about layers in training mode that collect running statistics, which no file holds.

    Those that `modules_to_save` copies are not meant: their statistics are in the file.

    Args:
        model: the adapted model.
        told: the names that were told before, to which those told now are added.

    Returns:
        Whether there are such layers.
    """
    names = [unwrapped_name(name) for name, module in base_modules(model) if module.training and _tracks(module)]
    if new := _untold(names, told):
        warnings.warn(
            f"{new} go on collecting running statistics in training, although the base is frozen, "
            "and the adapter's file does not hold them: loaded again, the model computes with the base's. Name these "
            "layers in modules_to_save, or keep them as they are: eval() on each after model.train(), or momentum = 0",
            stacklevel=4,
        )
    return bool(names)


def _tracks(module: Any) -> bool:
    """Whether a layer changes statistics of its own in training, as BatchNorm's relatives do."""
    return (
        not isinstance(module, ModulesToSave)
        and bool(getattr(module, "track_running_stats", False))
        and getattr(module, "running_mean", None) is not None
        and getattr(module, "momentum", None) != 0
    )
