"""What a model that a plan spreads over processes cannot have beside adapters, checked before anything changes."""

from collections.abc import Collection, Iterator

from torch import nn

from c3a_triton.bases.agreement import shared_over
from c3a_triton.bases.parallel import parallel_mesh
from c3a_triton.errors import ConfigError
from c3a_triton.files.config import C3AConfig

from .base_model import base_modules, base_name, tied_names
from .layer import C3ALinear
from .modules_to_save import ModulesToSave

__all__ = ["check_spread"]


def check_spread(
    model: nn.Module, config: C3AConfig, adapted: Collection[str], saved: Collection[tuple[str, nn.Module]]
) -> None:
    """Refuse an adapter that would train parts of a model's own tensors, and a plan that tears tied ones apart.

    Args:
        model: the model; one that no plan spreads is passed over.
        config: the adapter's configuration.
        adapted: the names of the layers that it adapts.
        saved: (name, module) of the modules that it trains whole.

    Raises:
        ConfigError: a module that is trained whole, or a bias, lies in the plan, or one of two tied layers alone does.
    """
    if not shared_over(model):
        return
    for name, module in saved:
        for inner, part in _original(module).named_modules(prefix=name):
            if parallel_mesh(part) is not None:
                raise ConfigError(
                    f"modules_to_save: {name} cannot be trained whole, because the plan spreads {inner} over "
                    f"processes: leave it out of modules_to_save, or {inner} out of the plan"
                )
    for name, parameter in model.named_parameters():
        module_name, _, last = base_name(name).rpartition(".")
        is_trained = last == "bias" and (config.bias == "all" or (config.bias == "c3a_only" and module_name in adapted))
        if is_trained and hasattr(parameter, "full_tensor"):
            raise ConfigError(
                f"bias={config.bias!r}: {module_name}.bias cannot be trained, because the plan spreads {module_name} "
                f'over processes: use bias="none", or leave {module_name} out of the plan'
            )
    modules = {name: _original(module) for name, module in base_modules(model)}
    for one, other in _tied(model, modules):
        spread, whole = (one, other) if parallel_mesh(modules[one]) is not None else (other, one)
        if parallel_mesh(modules[spread]) is not None and parallel_mesh(modules[whole]) is None:
            raise ConfigError(
                f"{spread} and {whole} have one weight (tied), but the plan spreads {spread} alone over processes: "
                "put both into the plan, or load the model with tie_word_embeddings=False"
            )


def _original(module: nn.Module) -> nn.Module:
    if isinstance(module, ModulesToSave):
        return module.original_module
    return module.get_base_layer() if isinstance(module, C3ALinear) else module


def _tied(model: nn.Module, modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names of two modules whose weights are one, or, as transformers knows, were before a plan took one apart."""
    pairs = [(name, other) for name, others in tied_names(model, modules).items() for other in others]
    for prefix, part in model.named_modules():
        keys = getattr(part, "all_tied_weights_keys", None) or {}
        pairs += [(f"{prefix}.{key}".strip("."), f"{prefix}.{other}".strip(".")) for key, other in keys.items()]
    for one, other in pairs:
        names = one.removesuffix(".weight"), other.removesuffix(".weight")
        if names[0] in modules and names[1] in modules:
            yield names
