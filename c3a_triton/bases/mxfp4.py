"""gpt-oss' experts in MXFP4, which transformers computes by fused kernels that have no backward pass.

Left alone, they cut the gradient of everything below them but what passes beside them, without a word. In an adapted
model they pass it on: that of the dequantized experts, which are made for one layer at a time.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.errors import AdapterStateError

from .probe import forward_holder

__all__ = [
    "PROJECTIONS",
    "apply_gate",
    "dequantized",
    "experts_forward",
    "is_mxfp4",
    "pass_gradients",
    "problem",
    "release_gradients",
    "shape_of",
    "stacked_product",
]

_MODULE = "transformers.integrations.mxfp4"
PROJECTIONS = ("gate_up_proj", "down_proj")
_REMEDY = "load the model with quantization_config=Mxfp4Config(dequantize=True)"


def is_mxfp4(module: nn.Module) -> bool:
    """Whether a module is transformers' `Mxfp4GptOssExperts`, told by its class's origin without importing it."""
    return _is_of(module, "Mxfp4GptOssExperts")


def _is_of(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__ == _MODULE for cls in type(module).__mro__)


def _is_old(experts: Any) -> bool:
    """Whether it is one of an older transformers (5.17), whose forward takes the kernels' own form of routes."""
    return not hasattr(experts, "forward_routed")


def shape_of(experts: Any, name: str) -> torch.Size:
    """The shape of one projection's weight, [n_experts, in, out], as `GptOssExperts` has it."""
    inner = experts.intermediate_size
    widths = (experts.hidden_size, 2 * inner) if name == "gate_up_proj" else (inner, experts.hidden_size)
    return torch.Size([experts.num_experts, *widths])


def problem(experts: Any, name: str) -> str | None:
    """Why the weight of one projection cannot be adapted, or None."""
    if name not in PROJECTIONS:
        return f"of this {type(experts).__name__} only {' and '.join(PROJECTIONS)} can be adapted"
    if _is_old(experts):
        return f"this release of transformers computes experts in MXFP4 with what its router makes: {_REMEDY}"
    if getattr(experts, "_is_hooked", False):
        return f"experts in MXFP4 that a plan spreads over processes cannot be adapted: {_REMEDY}"
    if getattr(experts, f"{name}_precision_config") is None:
        return f"its codes are not loaded, so that nothing can compute with them: {_REMEDY}"
    return None


def dequantized(experts: Any, name: str, dtype: torch.dtype) -> Tensor:
    """The weight of one projection, [n_experts, in, out] in bfloat16 or a wider dtype, in which it is exact."""
    from transformers.integrations.mxfp4 import Mxfp4ReverseDeserialize, convert_moe_packed_tensors

    packed = Mxfp4ReverseDeserialize(None).convert({}, model=experts, full_layer_name=f"{name}_blocks")
    weight = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"], dtype=dtype)
    return weight.to(experts.gate_up_proj_bias.device)  # where memory ran out it is on the CPU


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' own forward, and the gradient of hidden states and weights.

    Args:
        experts: the experts.
        hidden_states: [n_tokens, hidden].
        top_k_index: of each token's experts, [n_tokens, k].
        top_k_weights: their shares, [n_tokens, k].

    Returns:
        [n_tokens, hidden].
    """
    return _Experts.apply(experts, hidden_states, top_k_index, top_k_weights)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Any, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        ctx.experts = experts
        ctx.save_for_backward(x, index, shares)
        return type(experts).forward(experts, x, index, shares)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, index, shares = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in (x, shares)]
        with torch.enable_grad():
            y = _plain(ctx.experts, x.dtype)(inputs[0], index, inputs[1])
        dx, dshares = torch.autograd.grad(y, inputs, dy)
        return None, dx, None, dshares


def apply_gate(experts: Any, y: Tensor) -> Tensor:
    """What is between the two projections, [n_rows, 2 · inter] → [n_rows, inter]."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts._apply_gate(experts, y)


def stacked_product(experts: Any, name: str, x: Tensor, ends: Tensor) -> Tensor:
    """One projection without its bias, by the dequantized weight, which is made for the call, and for its backward.

    Args:
        experts: the experts.
        name: `"gate_up_proj"` or `"down_proj"`.
        x: [n_rows, in], in the order of the experts.
        ends: [n_experts], where each expert's rows end, int32.

    Returns:
        [n_rows, out].
    """
    return _Product.apply(experts, name, x, ends)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Any, name: str, x: Tensor, ends: Tensor) -> Tensor:
        from transformers.integrations.moe import _grouped_linear

        ctx.weight_of = experts, name
        ctx.save_for_backward(ends)
        return _grouped_linear(x, dequantized(experts, name, x.dtype), ends, is_transposed=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from transformers.integrations.moe import _grouped_linear

        (ends,) = ctx.saved_tensors
        experts, name = ctx.weight_of
        return None, None, _grouped_linear(dy, dequantized(experts, name, dy.dtype), ends), None


def _plain(experts: Any, dtype: torch.dtype) -> Any:
    """`GptOssExperts` with the same weights, dequantized."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = types.SimpleNamespace(
        num_local_experts=experts.num_experts,
        intermediate_size=experts.intermediate_size,
        hidden_size=experts.hidden_size,
        swiglu_alpha=experts.alpha,
        swiglu_limit=experts.limit,
        _experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        plain: Any = GptOssExperts(config)
    for name in PROJECTIONS:
        for parameter, value in (
            (name, dequantized(experts, name, dtype)),
            (f"{name}_bias", getattr(experts, f"{name}_bias").to(dtype)),
        ):
            setattr(plain, parameter, nn.Parameter(value, requires_grad=False))
    return plain


def pass_gradients(model: nn.Module) -> None:
    """Let what holds such experts in a model ask its router and them, where a gradient is wanted, until released.

    Those of older transformers, those that a plan spreads over processes, and those whose MLP computes by a forward
    that somebody else has put there (a kernel of the hub), refuse to compute where one is wanted.
    """
    for module in model.modules():
        if _is_of(module, "Mxfp4GptOssMLP"):
            holder = forward_holder(module)
            forward = getattr(module.__dict__.get(holder), "__func__", module.__dict__.get(holder))
            if forward in (None, type(module).forward):
                setattr(module, holder, types.MethodType(_mlp_forward, module))
            elif forward is not _mlp_forward:
                _refuse_gradients(module)
        elif is_mxfp4(module) and _is_old(module):
            _refuse_gradients(module)


def _refuse_gradients(module: nn.Module) -> None:
    if _refuse_gradient not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_refuse_gradient)


def release_gradients(model: nn.Module) -> None:
    """Undo `pass_gradients`."""
    for module in model.modules():
        holder = forward_holder(module)
        if getattr(module.__dict__.get(holder), "__func__", None) is _mlp_forward:
            if holder == "forward":
                del module.forward
            else:
                setattr(module, holder, types.MethodType(type(module).forward, module))
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _refuse_gradient:
                del module._forward_pre_hooks[key]


def _mlp_forward(mlp: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    is_adapted = not is_mxfp4(mlp.experts)
    if not is_adapted and not _wants_gradient(hidden_states):
        return type(mlp).forward(mlp, hidden_states)
    if getattr(mlp.experts, "_is_hooked", False):
        _refuse_gradient(mlp.experts, (hidden_states,))
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits, shares, index = mlp.router(x)
    y = mlp.experts(x, index, shares) if is_adapted else experts_forward(mlp.experts, x, index, shares)
    return y.view_as(hidden_states), logits


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _refuse_gradient(module: nn.Module, args: Any) -> None:
    kind = type(module).__name__
    if _wants_gradient(args[0]):
        raise AdapterStateError(
            f"this {kind} has no backward pass here, and layers below it would be trained on wrong gradients: {_REMEDY}"
        )
    if not is_mxfp4(getattr(module, "experts", module)):
        raise AdapterStateError(f"this {kind} computes past its adapted experts, by a forward put there: {_REMEDY}")
