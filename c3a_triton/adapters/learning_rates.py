"""Learning-rate groups: adapters want another learning rate than what is trained whole beside them."""

from typing import Any

from torch import nn

from c3a_triton._public import public
from c3a_triton.errors import AdapterStateError, ConfigError

__all__ = ["param_groups"]


@public
def param_groups(
    model: nn.Module,
    *,
    lr: float = 1e-1,
    weight_decay: float = 0.0,
    head_lr: float = 1e-3,
    head_weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for an optimizer of torch: `torch.optim.AdamW(param_groups(model))`.

    C3A's ΔW carries a factor 1 / in_features, so its kernels want a learning rate near 1e-1 and next to no weight
    decay. What is trained whole beside them (`modules_to_save`, heads, biases) would diverge at that rate.

    Args:
        model: an adapted model, one of PEFT with C3A layers, or a wrapper of either (DDP, FSDP, torch.compile).
        lr: learning rate of the C3A kernels.
        weight_decay: weight decay of the C3A kernels.
        head_lr: learning rate of every other trainable parameter.
        head_weight_decay: weight decay of these, but of biases and norms, which get none.

    Returns:
        Groups named `"c3a"`, `"heads"` and `"biases and norms"`, those that have parameters, which hold every trainable
        parameter once. DTensors of one mesh have a group of the name to themselves: optimizers that compute a group at
        once (`foreach`, `fused`) take no mixture, such as the kernels of expert-parallel experts and of other layers.

    Raises:
        ConfigError: the model has no C3A adapter, or a rate is negative.
        AdapterStateError: no kernel is trainable, as after loading for inference.
    """
    rates = {"lr": lr, "weight_decay": weight_decay, "head_lr": head_lr, "head_weight_decay": head_weight_decay}
    for name, value in rates.items():
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
    kernels: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    adapted = False
    containers = {
        container
        for module in model.modules()
        # PEFT's layers have the same attribute.
        if isinstance(container := getattr(module, "c3a_kernel", None), nn.ParameterDict)
    }
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            adapted |= module in containers
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            # Not by the number of dimensions: sharding libraries flatten what they shard.
            is_bias = name == "bias" or type(module).__name__.endswith("Norm")
            (kernels if module in containers else biases if is_bias else heads).append(parameter)
    if not adapted:
        raise ConfigError(
            f"{type(model).__name__} has no C3A adapter: adapt it first, with c3a_triton.apply(model, config)"
        )
    if not kernels:
        raise AdapterStateError(
            "every C3A kernel is frozen: activate an adapter for training (model.c3a.set_adapter(name)), or load it "
            "with is_trainable=True"
        )
    groups: list[dict[str, Any]] = [
        {"name": "c3a", "params": kernels, "lr": lr, "weight_decay": weight_decay},
        {"name": "heads", "params": heads, "lr": head_lr, "weight_decay": head_weight_decay},
        {"name": "biases and norms", "params": biases, "lr": head_lr, "weight_decay": 0.0},
    ]
    return [part for group in groups for part in _by_mesh(group)]


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    parts: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [group | {"params": parameters} for parameters in parts.values()]
