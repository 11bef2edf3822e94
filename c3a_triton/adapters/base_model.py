"""A model as it is without its adapters: its modules, their names, its embeddings, and what is tied in it."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .parts import Holder, Part
from .token_rows import TokenRows

__all__ = [
    "base_module_names",
    "base_modules",
    "base_name",
    "embedding_weights",
    "embeddings_of",
    "model_name_or_path",
    "near_names",
    "output_embeddings_of",
    "tied_names",
    "warn_tied",
]

# What is longer is no module's name, and takes long to compare with them.
_LONGEST_NAME = 1000


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of a model; adapted layers and modules that are trained whole hide what they hold.

    What stands in the place of a module with adapted parameters is followed by its parts.
    """
    hidden: str | None = None
    for name, module in model.named_modules():
        if hidden is not None and name.startswith(hidden):
            continue
        if isinstance(module, TokenRows):  # a child that the base model does not have
            hidden = f"{name}."
            continue
        if isinstance(module, Holder):
            hidden = f"{name}.base_layer"
        else:
            hidden = f"{name}." if isinstance(module, (C3ALinear, ModulesToSave)) else None
        yield name, module


def base_module_names(model: nn.Module) -> list[str]:
    """The names of all modules that the model has without adapters, as `named_modules` gave them then."""
    names = []
    for name, module in base_modules(model):
        if isinstance(module, Part):
            continue
        inner = module.original_module if isinstance(module, ModulesToSave) else module
        inner = inner.base_layer if isinstance(inner, (C3ALinear, Holder)) else inner
        names.append(name)
        if inner is not module:
            names += [f"{name}.{suffix}" for suffix, _ in inner.named_modules() if suffix]
    return names


def base_name(name: str) -> str:
    """A tensor's name in the model without adapters."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def near_names(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests names like this one, or nothing."""
    if len(name) > _LONGEST_NAME:
        return ""
    known = list(known)
    last_parts = {other.rpartition(".")[2] for other in known}
    close = difflib.get_close_matches(name, last_parts, n=3) or difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def embeddings_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What transformers' models call their input and output embeddings; None for a part that a model does not have."""
    return _part(model, "get_input_embeddings"), output_embeddings_of(model)


def output_embeddings_of(model: nn.Module) -> nn.Module | None:
    """The second of `embeddings_of`."""
    return _part(model, "get_output_embeddings")


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    """What a method of transformers' models gives. An error within one of somebody's own model is theirs to see."""
    method: Any = getattr(model, getter, None)
    try:
        return None if method is None else method()
    except NotImplementedError:
        return None
    except AttributeError:
        # transformers' own raise it for backbones without such a part, and transformers passes it over.
        if not getattr(method, "__module__", "").startswith("transformers."):
            raise
        return None


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The weights of `embeddings_of`, where they have one."""
    weights = [getattr(module, "weight", None) for module in embeddings_of(model)]
    return [weight for weight in weights if isinstance(weight, Tensor)]


def tied_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Module name → names of the other parameters that are the same as its weight, where there are any."""
    holders: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            holders.setdefault(id(parameter), []).append(base_name(name))
    wanted = {f"{name}.weight": name for name in names}
    return {
        wanted[name]: [other for other in dict.fromkeys(group) if other != name]
        for group in holders.values()
        if len(set(group)) > 1
        for name in dict.fromkeys(group)
        if name in wanted
    }


def warn_tied(model: nn.Module, names: Iterable[str], what: str) -> None:
    """Warn about modules whose weight other modules share, as tied embeddings do."""
    parameters = {base_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    embeddings = embedding_weights(model)
    for name, others in tied_names(model, names).items():
        is_embedding = any(parameters[others[0]] is weight for weight in embeddings)
        remedy = (
            "To keep them apart, load the model with tie_word_embeddings=False"
            if is_embedding
            else "Where that is not meant, leave it unmerged"
        )
        warnings.warn(f"{name}.weight is one tensor with {', '.join(others)} (tied): {what}. {remedy}", stacklevel=2)


def model_name_or_path(model: Any) -> str | None:
    """Where transformers loaded the model from, or None."""
    return getattr(model, "name_or_path", None) or None
