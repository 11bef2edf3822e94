"""The state of a model's adapters as data, layer by layer and of the whole, with the fields of PEFT's status."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .report import count_parameters
from .token_rows import TokenRows

__all__ = ["LayerStatus", "ModelStatus", "layer_status", "model_status"]

Flag = bool | Literal["irregular"]

# PEFT's names of what it tells apart.
_BACKENDS = {"Linear8bitLt": "bnb 8bit", "Linear4bit": "bnb 4bit", "HQQLinear": "hqq"}


@dataclass
class LayerStatus:
    """One adapted layer, module that is trained whole, or holder of trained tokens. The fields are PEFT's.

    Attributes:
        name: its name in the model; of trained tokens, the embedding's with `.token_adapter`.
        module_type: its class.
        enabled: whether adapters compute there, now and in this thread.
        active_adapters: names of the active adapters, those of other layers included.
        merged_adapters: names of those that are merged there.
        requires_grad: adapter name → whether its parameters there are trained; `"irregular"` where only some are.
        available_adapters: names of those that it has, sorted.
        devices: adapter name → the types of the devices of its parameters there.
        quantization_backend: PEFT's name of how the base layer is quantized (`"bnb 4bit"`, `"bnb 8bit"`, `"hqq"`,
            `"torchao"`), or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class ModelStatus:
    """A model's adapters. The fields are PEFT's; `"irregular"` where layers differ in what should be one.

    Attributes:
        base_model_type: the model's class.
        adapter_model_type: the class of what manages the adapters.
        peft_types: adapter name → `"C3A"`.
        trainable_params, total_params: parameters, counted as PEFT counts them.
        num_adapter_layers: how many `LayerStatus` there are.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: as
            in `LayerStatus`, for all layers together.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Flag
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def layer_status(
    parts: Iterable[tuple[str, C3ALinear | ModulesToSave | TokenRows]], active: Sequence[str]
) -> list[LayerStatus]:
    """The status of each part.

    Args:
        parts: (name, part) of what a manager has in its model.
        active: names of the manager's active adapters.
    """
    found = []
    for name, part in parts:
        own = _own_parameters(part)
        active_here = list(part.active_adapters) if isinstance(part, C3ALinear) else _active(part, own, active)
        found.append(
            LayerStatus(
                name=name,
                module_type=type(part).__name__,
                enabled=not part.disable_adapters,
                active_adapters=active_here,
                merged_adapters=[] if isinstance(part, ModulesToSave) else list(part.merged_adapters),
                requires_grad={
                    adapter: _one(parameter.requires_grad for parameter in parameters)
                    for adapter, parameters in own.items()
                },
                available_adapters=sorted(own),
                devices={
                    adapter: sorted({parameter.device.type for parameter in parameters})
                    for adapter, parameters in own.items()
                },
                quantization_backend=_backend(part.get_base_layer()) if isinstance(part, C3ALinear) else None,
            )
        )
    return found


def _own_parameters(part: Any) -> dict[str, list[nn.Parameter]]:
    """Adapter name → its parameters in a part."""
    if isinstance(part, ModulesToSave):
        return {adapter: list(module.parameters()) for adapter, module in part.modules_to_save.items()}
    held = part.c3a_kernel if isinstance(part, C3ALinear) else part.trainable_tokens_delta
    return {adapter: [parameter] for adapter, parameter in held.items()}


def _active(part: ModulesToSave | TokenRows, available: Mapping[str, Any], active: Sequence[str]) -> list[str]:
    """What computes in a part that knows of its own adapters alone, and the manager's others."""
    own = part.computing()
    return [name for name in active if name in own or name not in available] + [n for n in own if n not in active]


def _one(values: Iterable[Any]) -> Any:
    """The one value of all, or `"irregular"`."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else "irregular"


def _backend(base: nn.Module) -> str | None:
    weight = base._parameters.get("weight")
    if weight is not None and type(weight.data).__module__.partition(".")[0] == "torchao":
        return "torchao"
    return next((_BACKENDS[cls.__name__] for cls in type(base).__mro__ if cls.__name__ in _BACKENDS), None)


def model_status(model: nn.Module, manager: Any, layers: Sequence[LayerStatus]) -> ModelStatus:
    """The status of a model, from that of its parts, which `layer_status` gave."""
    trainable, total = count_parameters(model)
    merged = {name for layer in layers for name in layer.merged_adapters}
    # Copies of modules are not merged, and are none the less what computes.
    left = {
        name
        for layer in layers
        if layer.module_type != ModulesToSave.__name__
        for name in set(layer.available_adapters) - set(layer.merged_adapters)
    }
    active = {tuple(layer.active_adapters) for layer in layers} or {()}
    names = sorted({name for layer in layers for name in layer.available_adapters})
    return ModelStatus(
        base_model_type=type(model).__name__,
        adapter_model_type=type(manager).__name__,
        peft_types={name: config.peft_type for name, config in manager.adapters.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(layer.enabled for layer in layers) if layers else False,
        active_adapters="irregular" if len(active) > 1 else list(active.pop()),
        merged_adapters="irregular" if merged & left else sorted(merged),
        requires_grad={
            name: _one(layer.requires_grad[name] for layer in layers if name in layer.requires_grad) for name in names
        },
        available_adapters=names,
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, ())}) for name in names},
        quantization_backend=_one(layer.quantization_backend for layer in layers) if layers else None,
    )
