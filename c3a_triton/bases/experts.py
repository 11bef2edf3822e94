"""Experts whose weights are stacked in one parameter: what they are, and how an adapter's forward gets its turn there.

A model of transformers computes its experts through an interface: the class's forward asks the instance's configuration
for an implementation (`"eager"`, `"grouped_mm"`, …) and calls that. An adapted instance has a configuration that names
ours, so that whatever stands around the forward (accelerate's hooks, expert parallelism, FSDP2) goes on standing there.
Other modules get a forward of their own, in the innermost place as well.
"""

import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c3a_triton.errors import BackendError, ConfigError

from . import fp8, mxfp4
from .linear_like import Geometry, geometry
from .parallel import parallel_mesh
from .probe import forward_holder, is_ordinary
from .sharded import whole_shape

__all__ = [
    "Layout",
    "Spread",
    "base_forward",
    "dispatch",
    "foreign_product",
    "is_stored_transposed",
    "layout",
    "parameter_geometry",
    "parameter_names",
    "parameter_shape",
    "problem",
    "rows_per_token",
    "spread",
    "stacked_names",
    "undispatch",
]

# The name of our implementation in transformers' interface.
_IMPLEMENTATION = "c3a_triton"
# Classes whose parameters are read by what holds them, which then calls them with what it has read.
_READ_FROM_OUTSIDE = ("DbrxExpertGLU",)
# Classes that store [n_experts, in, out] in transformers 4, where no attribute says so.
_TRANSPOSED = ("GptOssExperts", "Qwen3VLMoeTextExperts")


@dataclass(frozen=True)
class Layout:
    """Where experts that we know keep their two projections.

    Attributes:
        kind: `"dispatched"`, by transformers' interface; `"llama4"`, which gets equally many rows for each expert; or
            `"mxfp4"`, whose weights are no parameters.
        up: the parameter of the first projection, `"gate_up_proj"` or `"up_proj"`.
        down: that of the second.
        n_experts: how many experts there are, in this process where a plan spreads them.
        transposed: whether the parameters are [n_experts, in, out], not [n_experts, out, in].
        gated: whether the first projection computes a gate besides.
        concatenated: whether the gate's rows come first, then the others; otherwise they alternate.
    """

    kind: str
    up: str
    down: str
    n_experts: int
    transposed: bool
    gated: bool
    concatenated: bool


def layout(module: nn.Module) -> Layout | None:
    """The layout of an experts module, or None for any other, and for experts of a class that we do not know."""
    found: Any = module
    if _has(module, "gate_up_proj", "down_proj") and _is_of_llama4(module):
        return Layout("llama4", "gate_up_proj", "down_proj", found.num_experts, True, True, True)
    if mxfp4.is_mxfp4(module):
        return Layout("mxfp4", *mxfp4.PROJECTIONS, found.num_experts, True, True, False)
    if not _is_dispatched(module) or not hasattr(module, "has_gate"):
        return None
    up = "gate_up_proj" if found.has_gate else "up_proj"
    if not _has(module, up, "down_proj"):
        return None
    flags = found.is_transposed, found.has_gate, found.is_concatenated
    return Layout("dispatched", up, "down_proj", found.num_experts, *flags)


def _has(module: nn.Module, *names: str) -> bool:
    parametrized: Any = getattr(module, "parametrizations", ())
    return all(name in module._parameters or name in parametrized for name in names)


def _is_of_llama4(module: nn.Module) -> bool:
    return any(
        cls.__name__ == "Llama4TextExperts" and cls.__module__ == "transformers.models.llama4.modeling_llama4"
        for cls in type(module).__mro__
    )


def _is_dispatched(module: nn.Module) -> bool:
    """Whether a module's forward asks transformers' interface for experts, or that of FP8 experts."""
    interface = _interface(type(module).forward)
    if interface is None:
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return interface is ALL_EXPERTS_FUNCTIONS or fp8.is_experts(module)


def _interface(forward: Any) -> Any | None:
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    if "experts_interface" not in names or not hasattr(forward, "__wrapped__"):
        return None
    return forward.__closure__[names.index("experts_interface")].cell_contents


@dataclass(frozen=True)
class Spread:
    """How a plan spreads the stacked weight of experts over processes, and so their kernels: each has the same part.

    Attributes:
        mesh: the processes, in one dimension.
        placement: which part of w [n_experts, out / b, in / b, b] each has, of DTensor's placements. It is that of the
            weight, so that what a process computes is all that its kernels do, and no gradient of theirs is elsewhere.
        cuts: into how many parts n_experts, out and in are cut, each in one process.
        shape: that of one process' part of W, [n_experts, out, in].
    """

    mesh: Any
    placement: Any
    cuts: tuple[int, ...]
    shape: tuple[int, ...]

    def of_weight(self, weight: Tensor) -> Tensor:
        """This process' part of the weight, the very memory."""
        return weight.to_local()  # type: ignore[attr-defined]

    def of_kernel(self, kernel: nn.Parameter) -> nn.Parameter:
        """This process' part of a whole w, as a DTensor. The processes exchange nothing."""
        from torch.distributed.tensor import distribute_tensor

        part = distribute_tensor(kernel.detach(), self.mesh, [self.placement], src_data_rank=None)
        return nn.Parameter(part, requires_grad=kernel.requires_grad)


def spread(module: nn.Module, name: str) -> Spread | None:
    """How a plan spreads a projection of experts that we know, or None for any other, and where FSDP2 does."""
    found, weight, mesh = layout(module), module._parameters.get(name), parallel_mesh(module)
    if found is None or name not in (found.up, found.down) or mesh is None or mesh.ndim > 1:
        return None
    if getattr(weight, "device_mesh", None) != mesh:
        return None
    (placement,) = weight.placements  # type: ignore[union-attr]
    if getattr(placement, "dim", None) is None:
        return None
    axes = (0, 2, 1) if found.transposed else (0, 1, 2)
    dim, n_segments = axes[placement.dim % 3], getattr(placement, "split_factor", None)
    placement = type(placement)(dim) if n_segments is None else type(placement)(dim, split_factor=n_segments)
    n_parts = [mesh.size() if axis == dim else 1 for axis in range(3)]
    cuts = [count * (n_segments or 1) if count > 1 else 1 for count in n_parts]
    shape = [weight.shape[axis] // count for axis, count in zip(axes, n_parts, strict=True)]  # type: ignore[union-attr]
    return Spread(mesh, placement, tuple(cuts), tuple(shape))


def is_stored_transposed(module: nn.Module, name: str) -> bool:
    """Whether a parameter is [n_experts, in, out]."""
    found = layout(module)
    if found is None and type(module).__name__ in _TRANSPOSED and not hasattr(module, "is_transposed"):
        return name in ("gate_up_proj", "down_proj")
    return found is not None and found.transposed and name in (found.up, found.down)


def parameter_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters, and of what only its kernels can read."""
    packed = mxfp4.PROJECTIONS if mxfp4.is_mxfp4(module) else ()
    return list(dict.fromkeys((*module._parameters, *getattr(module, "parametrizations", ()), *packed)))


def parameter_shape(module: nn.Module, name: str) -> torch.Size:
    """The shape of the values of a parameter, () where there is none."""
    if mxfp4.is_mxfp4(module) and name in mxfp4.PROJECTIONS:
        return mxfp4.shape_of(module, name)
    parameter = module._parameters.get(name)
    return torch.Size() if parameter is None else whole_shape(parameter)


def parameter_geometry(module: nn.Module, name: str) -> Geometry | None:
    """The geometry of a parameter that is adapted by itself, or None where it has neither two nor three dimensions.

    Its kind is `"experts"` where we compute the experts' products, otherwise `"parameter"`.
    """
    shape = parameter_shape(module, name)
    if len(shape) not in (2, 3):
        return None
    *stack, out_features, in_features = shape
    if is_stored_transposed(module, name):
        out_features, in_features = in_features, out_features
    found = layout(module)
    if found is None or name not in (found.up, found.down):
        widths = in_features, out_features
        return Geometry("parameter", *widths, widths, stack=stack[0] if stack else 0)
    has_halves = name == found.up and found.gated and found.concatenated
    divided = in_features, out_features // (2 if has_halves else 1)
    what = ["in, and gate and up each"] if has_halves else []
    if (held := spread(module, name)) is not None and held.cuts[1:] != (1, 1):
        divided = in_features // held.cuts[2], math.gcd(divided[1], out_features // held.cuts[1])
        what.append("of the part that one process has")
    return Geometry("experts", in_features, out_features, divided, f" ({', '.join(what)})" if what else "", stack[0])


def problem(module: nn.Module, name: str) -> str | None:
    """Why a parameter cannot be adapted by itself, as a sentence with a way out, or None.

    Args:
        module: what has the parameter.
        name: its name there, of one for which there is a geometry or that is parametrized.
    """
    kind = type(module).__name__
    parameter = module._parameters.get(name)
    if mxfp4.is_mxfp4(module):
        return mxfp4.problem(module, name)
    if parameter is None:
        return (
            f"{kind} computes it from other tensors (torch.nn.utils.parametrize, as bitsandbytes does with experts): "
            "load the model in 16 or 32 bits"
        )
    found = layout(module)
    is_known = found is not None and name in (found.up, found.down)
    if (held := spread(module, name)) is not None and (sizes := parameter_geometry(module, name)) is not None:
        uneven = [
            f"{size} into {cuts}" for size, cuts in zip(sizes.matrix_shape, held.cuts, strict=True) if size % cuts
        ]
        if uneven:
            return f"its plan cuts {uneven[0]} parts, which are not equal: load the model for fewer processes"
    readable = parameter.is_floating_point() and (parameter.dtype.itemsize >= 2 or fp8.is_experts(module))
    if not (readable and (is_known or is_ordinary(parameter))):
        return (
            f"its values in this {kind} are {parameter.dtype} ({type(parameter).__name__}), to which nothing can be "
            "added: load the model in 16 or 32 bits, for example with dequantize=True in its quantization_config"
        )
    if hasattr(module, "base_layer"):
        return f"this {kind} has a base_layer of its own, as what is adapted calls what it stands for: rename it"
    if inner := [child for child, part in module.named_modules() if child and geometry(part) is not None]:
        return f"this {kind} holds layers ({', '.join(inner[:3])}), which could not be adapted any more: adapt those"
    if found is not None and found.kind == "dispatched":
        return None if is_known else f"of this {kind} only {found.up} and {found.down} can be adapted"
    if parallel_mesh(module) is not None:
        return (
            f"a plan spreads this {kind} over processes, and no adapter can join in: leave the {kind} out of the plan"
        )
    if isinstance(module, nn.RNNBase) or kind in _READ_FROM_OUTSIDE or type(module).forward is nn.Module.forward:
        return f"{kind} does not read it in a forward of its own, so that nothing can be put in its place"
    if "forward" in module.__dict__ and forward_holder(module) == "forward" and not _is_own_forward(module):
        return (
            f"the forward of this {kind} has been replaced, so that nobody can tell whether it reads the parameter: "
            "adapt the model first, and change the forward afterwards"
        )
    return None


def rows_per_token(module: nn.Module) -> int:
    """How many rows experts that we know compute for each token: one for each expert that it is routed to.

    That is what the configuration says, under one of the names that models have for it; 1 where it says nothing.
    """
    found = layout(module)
    if found is not None and found.kind == "llama4":
        return found.n_experts
    config = getattr(module, "config", None)
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    value = next((value for name in names if (value := getattr(config, name, None))), 1)
    return max(value) if isinstance(value, list) else int(value)


def stacked_names(module: nn.Module) -> list[str]:
    """The names of a module's own stacked expert weights.

    Experts of a class that we do not know are told by the class's name, their weights by three dimensions.
    """
    known = layout(module)
    if known is not None:
        return [known.up, known.down]
    kind = type(module).__name__
    if "Experts" not in kind and kind not in _READ_FROM_OUTSIDE:
        return []
    n_dims = 2 if kind in _READ_FROM_OUTSIDE else 3
    return [name for name, p in module._parameters.items() if p is not None and len(whole_shape(p)) == n_dims]


# Our turn


class _AdaptedConfig:
    """An experts module's configuration, but that it names our implementation. What is set is the former's.

    Args:
        config: the module's own, which other modules have as well.
        layer: what computes in the module's place, with a method `compute`.
    """

    _experts_implementation = _IMPLEMENTATION

    def __init__(self, config: Any, layer: nn.Module) -> None:
        self.__dict__.update(_config=config, c3a_layer=layer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # in a process that has unpickled it


def _experts_forward(experts: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(experts.config, _AdaptedConfig):
        raise _chosen(type(experts))
    return experts.config.c3a_layer.compute(*args, **kwargs)


def _chosen(kind: type) -> ConfigError:
    return ConfigError(
        f"experts_implementation={_IMPLEMENTATION!r} is what adapted experts name by themselves, and no way in which "
        f'{kind.__name__} computes without adapters: call set_experts_implementation("grouped_mm"), or with "eager"'
    )


def _register() -> None:
    from transformers.integrations.moe import ExpertsInterface

    for interface in (ExpertsInterface, *ExpertsInterface.__subclasses__()):
        interface.register(_IMPLEMENTATION, _experts_forward)


def dispatch(module: Any, layer: Any) -> None:
    """Let `layer.compute` compute in the innermost place of a module's forward, until `undispatch`."""
    found = layout(module)
    if found is not None and found.kind == "dispatched":
        _register()
        config = module.config
        module.config = _AdaptedConfig(config._config if isinstance(config, _AdaptedConfig) else config, layer)
    else:
        setattr(module, forward_holder(module), layer.compute)


def undispatch(module: Any) -> None:
    """Undo `dispatch`, if it was done."""
    if isinstance(module.__dict__.get("config"), _AdaptedConfig):
        module.config = module.config._config
    elif _is_own_forward(module):
        if forward_holder(module) == "forward":
            del module.forward
        else:
            module._old_forward = types.MethodType(type(module).forward, module)


def _is_own_forward(module: nn.Module) -> bool:
    forward: Any = module.__dict__.get(forward_holder(module))
    return getattr(forward, "__name__", "") == "compute" and getattr(forward.__self__, "base_layer", None) is module


def base_forward(module: Any) -> Callable[..., Tensor]:
    """What an adapted module computes by itself: the implementation that its own configuration names, or its class's.

    It takes the module first.

    Raises:
        ConfigError: the configuration names our implementation.
    """
    if mxfp4.is_mxfp4(module):
        return mxfp4.experts_forward
    forward: Any = type(module).forward
    config = module.__dict__.get("config")
    if not isinstance(config, _AdaptedConfig):
        return forward
    name = _own_implementation(module)
    if name == _IMPLEMENTATION:
        raise _chosen(type(module))
    interface: Any = _interface(forward)
    return interface.get_interface(name, inspect.unwrap(forward))  # FP8 experts are wrapped once for each layer


def _own_implementation(module: nn.Module) -> Any:
    """The implementation that a module's own configuration names, `"eager"` where it names none."""
    config: Any = module.__dict__.get("config")
    config = config._config if isinstance(config, _AdaptedConfig) else config
    return getattr(config, "_experts_implementation", "eager")


def foreign_product(module: nn.Module, name: str, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """One projection, without its bias, of experts whose weight is of a class that only transformers may compute with.

    Args:
        module: the experts.
        name: the projection's parameter.
        x: [n_rows, in], in the order of the experts.
        offsets: [n_experts], where each expert's rows end, int32; rows behind the last are of no expert.
        transposed: how the weight is stored.

    Returns:
        [n_rows, out]; of rows without an expert nobody knows what.

    Raises:
        BackendError: this class does not compute it in the way that the model's own implementation does.
    """
    from transformers.integrations.moe import _grouped_linear

    weight, own = getattr(module, name), _own_implementation(module)
    if fp8.is_experts(module):
        return fp8.stacked_product(module, name, x, offsets, own)
    if mxfp4.is_mxfp4(module):
        return mxfp4.stacked_product(module, name, x, offsets)
    try:
        if own == "eager":
            return _product_of_each(x, weight, offsets.tolist(), transposed)
        return _grouped_linear(x, weight, offsets, is_transposed=transposed)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError too, which is one
        raise BackendError(
            f"{name} of {type(module).__name__} is a {type(weight).__name__}, which does not compute as "
            f'experts_implementation={own!r} does ({error}): choose another one, such as "eager", or load '
            "the model in another format"
        ) from error


def _product_of_each(x: Tensor, weight: Tensor, ends: list[int], transposed: bool) -> Tensor:
    rows = [x[start:end] for start, end in zip([0, *ends], [*ends, len(x)], strict=True)]
    parts = [
        own @ weight[expert] if transposed else F.linear(own, weight[expert])
        for expert, own in enumerate(rows[:-1])
        if len(own)
    ]
    out_features = weight.shape[-1 if transposed else -2]
    return torch.cat([*parts, x.new_zeros(len(rows[-1]), out_features)])
