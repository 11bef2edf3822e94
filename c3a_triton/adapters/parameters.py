"""The parameters of a layer's adapters: which names they can have, who hears of their exchange, their first values."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.linear_like import Geometry
from c3a_triton.bases.sharded import put_values
from c3a_triton.bases.weights import kernel_device, rounding_dtype
from c3a_triton.errors import ConfigError

from .names import BASE_ROW

__all__ = ["check_adapter_name", "initialise", "new_kernel", "set_requires_grad", "watch"]

_RESERVED_NAMES = frozenset(dir(nn.ParameterDict())) | frozenset(dir(nn.ModuleDict()))


def check_adapter_name(name: str) -> None:
    """Refuse a name that torch's containers cannot hold, or that means something else.

    Raises:
        ConfigError: the name is no string, empty, has a dot, or is taken by torch or by this library.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name must be a non-empty string, got {name!r}")
    if "." in name:
        raise ConfigError(f"the adapter name {name!r} has a dot, by which torch separates modules: leave it out")
    if name == BASE_ROW or name in _RESERVED_NAMES:
        raise ConfigError(f"the adapter name {name!r} is reserved: choose another one")


class _WatchedParameters(dict[str, Any]):
    """A ParameterDict's `_parameters` that tells its layer, and shallow copies of it, of every exchange.

    torch replaces parameters behind a module's back: `functional_call`, `load_state_dict(assign=True)`, moves from
    meta, FSDP. All of them write into this dictionary, so the layer's tuple of active parameters follows.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._tell()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._tell()

    def pop(self, *args: Any) -> Any:
        value = super().pop(*args)
        self._tell()
        return value

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self._tell()

    def clear(self) -> None:
        super().clear()
        self._tell()

    def _tell(self) -> None:
        for layer in self.layers:
            layer._refresh()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are plain; the copied layer watches its own.
        return dict, (dict(self),)


def watch(container: nn.ParameterDict, layer: Any) -> None:
    """Let a layer hear of every exchange of its adapters' parameters (`_refresh`), from now on."""
    watched = container._parameters
    if not isinstance(watched, _WatchedParameters):
        watched = _WatchedParameters(watched)
        container.__dict__["_parameters"] = watched
    watched.layers.add(layer)


@torch.inference_mode(False)  # a parameter that is made in inference mode can never be trained
def new_kernel(
    base: nn.Module,
    sizes: Geometry,
    block_size: int,
    init_weights: bool | str,
    layer: str,
    parameter: str = "weight",
) -> nn.Parameter:
    """A new adapter's w for a base layer of these sizes, float32, where that computes.

    Raises:
        ConfigError: an unknown `init_weights`; the message names the layer.
    """
    shape = sizes.kernel_shape(block_size)
    kernel = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=kernel_device(base, parameter)))
    initialise(kernel, init_weights, sizes, layer)
    dtype = rounding_dtype(base, parameter)
    if dtype is not None and init_weights is not True:
        kernel.data = kernel.data.to(dtype).float()
    return kernel


def initialise(kernel: Tensor, init_weights: bool | str, sizes: Geometry, layer: str) -> None:
    """Give a kernel its first values, in place, by PEFT's distributions; True means zeros.

    Raises:
        ConfigError: an unknown `init_weights`; the message names the layer.
    """
    if hasattr(kernel, "to_local"):  # each process draws the whole, of which it takes its part
        values = torch.empty(kernel.shape, dtype=kernel.dtype, device=kernel.device)
        initialise(values, init_weights, sizes, layer)
        with torch.no_grad():
            put_values(kernel, values)
    elif init_weights is True:
        nn.init.zeros_(kernel)
    elif init_weights == "gaussian":
        nn.init.normal_(kernel)
    elif init_weights is False or init_weights == "xavier_uniform":
        bound = math.sqrt(3.0) * math.sqrt(2.0 / (sizes.in_features + sizes.out_features))
        nn.init.uniform_(kernel, -bound, bound)
    elif init_weights == "kaiming_uniform":
        bound = math.sqrt(1.0 / sizes.in_features)
        nn.init.uniform_(kernel, -bound, bound)
    else:
        raise ConfigError(
            f"{layer}: init_weights must be True, False, 'gaussian', 'kaiming_uniform' or 'xavier_uniform', "
            f"got {init_weights!r}"
        )


def set_requires_grad(tensor: Tensor, requires_grad: bool) -> None:
    """Let a parameter be trained, or not."""
    # Sharding libraries put tensors that are no leaves in a parameter's place; their flag cannot be set.
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)
