"""What a base layer is: its widths, whether the fused step may read its weight, whether adapters fit beside it.

Of linear layers four kinds are told apart. *Plain*: an `nn.Linear` with an ordinary weight, the only kind whose weight
the fused step reads. *Transposed*: transformers' `Conv1D`, whose weight is [in, out]. *Offloaded*: either of them while
accelerate keeps the weight elsewhere and leaves an empty one on meta. *Foreign*: anything else with an input and an
output width, quantized layers among them, which only its own forward can compute. Beside them there are `nn.Conv2d` and
`nn.Embedding`, whose weights are matrices too, in an order of their own.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import Parameter

from . import fp8
from .probe import behaviour
from .quantized import registered
from .sharded import whole_shape

__all__ = [
    "Geometry",
    "computes_its_weight",
    "geometry",
    "is_linear",
    "is_of_peft",
    "is_plain",
    "is_transposed",
    "linear_widths",
    "unfit_for_adapters",
]


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, told by its class's origin so that transformers is not imported."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear-like module, or None where it is none."""
    known = registered(module)
    if known is not None and known.widths is not None:
        return known.widths(module)
    if is_transposed(module):
        shape = whole_shape(module.weight) if isinstance(module.weight, Tensor) else ()
        return (shape[0], shape[1]) if len(shape) == 2 else None
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) and width > 0 for width in widths):
            return widths  # type: ignore[return-value]
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `"all-linear"` means a module: a linear layer of torch or transformers, registered, or quantized.

    GPTQ's, AWQ's and HQQ's layers are of many classes; what they share are the names of their packed weights.
    """
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    packed = any(isinstance(getattr(module, name, None), Tensor) for name in ("qweight", "W_q"))
    return (packed or registered(module) is not None) and linear_widths(module) is not None


@dataclass(frozen=True)
class Geometry:
    """The matrix [out_features, in_features] that a layer's ΔW is added to, and what its blocks have to divide.

    Attributes:
        kind: `"linear"`, `"conv2d"` or `"embedding"`; of a parameter that is adapted by itself, `"experts"` or
            `"parameter"` (`experts.parameter_geometry`).
        in_features, out_features: the matrix's sizes; the kernel's are [⌈out_features / b⌉, in_features / b, b].
        divided: the two numbers that b has to divide.
        what: what they are, for messages, where they are not the two widths.
        stack: how many such matrices there are, one behind another, each with a kernel of its own: [stack, …]; 0 where
            there is one matrix and no such dimension.
    """

    kind: str
    in_features: int
    out_features: int
    divided: tuple[int, int]
    what: str = ""
    stack: int = 0

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of what ΔW is added to."""
        return *([self.stack] if self.stack else ()), self.out_features, self.in_features

    def kernel_shape(self, block_size: int) -> tuple[int, ...]:
        """The shape of w."""
        blocks = -(-self.out_features // block_size), self.in_features // block_size
        return *([self.stack] if self.stack else ()), *blocks, block_size


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module is one that PEFT puts in a layer's place."""
    return any(cls.__module__.startswith("peft.tuners.") for cls in type(module).__mro__)


def geometry(module: nn.Module) -> Geometry | None:
    """The geometry of a module that can be adapted, or None for any other."""
    if isinstance(module, nn.Conv2d) and module.in_channels > 0:  # a lazy one does not know its channels yet
        channels = module.in_channels // module.groups, module.out_channels // module.groups
        taps = module.kernel_size[0] * module.kernel_size[1]
        what = " (channels of a group)" if module.groups > 1 else " (channels)"
        return Geometry("conv2d", taps * channels[0], module.out_channels, channels, what)
    if isinstance(module, nn.Embedding):
        width = module.embedding_dim
        return Geometry("embedding", width, module.num_embeddings, (width, width), " (embedding_dim)")
    widths = linear_widths(module)
    return None if widths is None else Geometry("linear", *widths, widths)


def is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether base(x) is provably x Wᵀ + bias of the layer's own tensors, so that the fused step may compute it.

    Asked at every forward, because hooks and offloading come and go. Parametrized layers are of another class.
    """
    if type(base) is not nn.Linear:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return False
    # accelerate replaces `forward` on the instance, as anyone may, and puts the method itself there when it is done.
    forward = base.__dict__.get("forward")
    if "_hf_hook" in base.__dict__ or not (forward is None or getattr(forward, "__func__", None) is nn.Linear.forward):
        return False
    weight = base._parameters.get("weight")
    return (type(weight) is Parameter or type(weight) is Tensor) and weight.device == x.device


def computes_its_weight(base: nn.Module) -> bool:
    """Whether a layer computes the product with its weight, whatever that is multiplied by, and nothing else.

    A layer's values do not matter: one on meta is told as well.
    """
    return is_transposed(base) or behaviour(base).kind == "product"


def unfit_for_adapters(base: nn.Module) -> str | None:
    """Why nothing can be computed beside a layer (a router, an embedding of positions), as a sentence, or None."""
    reason = "its inputs are groups, of which it multiplies each by rows of its own" if fp8.is_grouped(base) else ""
    reason = reason or behaviour(base).reason
    return f"this {type(base).__name__} cannot be adapted: {reason}" if reason else None
