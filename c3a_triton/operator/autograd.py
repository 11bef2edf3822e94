"""The block-circulant operator for autograd, compilers and functorch: one eager node, custom ops.

Two functional custom ops are closed under differentiation:

    c3a_triton::linear       x Wᵀ + bias + Σ_a x ΔW_aᵀ   (or, transposed, x W + Σ_a x ΔW_a)
    c3a_triton::weight_grad  dw of one ΔW

so double backward is right wherever they are used. Eager calls take `_C3ALinear`, a leaner `autograd.Function` that
shares work between the gradients; torch.compile, functorch and tensor subclasses see the ops.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as registered_ops
from ..errors import BackendError
from . import arguments, step, traced

__all__ = ["apply", "linear_call", "linear_fake", "register", "weight_grad_fake"]


class _C3ALinear(torch.autograd.Function):
    """`c3a_triton::linear`, not transposed, for eager calls: a few Python frames and shared spectra in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        backend: str,
        save_spectrum: bool,
        *kernels: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.backend = scale, backend
        needs_x, needs_weight, _, _, _, _, *needs_w = ctx.needs_input_grad
        y = step.linear(x, weight, bias, kernels, scale, False, backend, source=x, keep=save_spectrum)
        # x serves the gradients of weight and kernels, weight that of x, kernels both. What is not needed is not kept.
        keep_x = needs_weight or any(needs_w)
        spectrum = step.spectrum_of(x, kernels, backend) if save_spectrum and keep_x and not needs_weight else None
        ctx.saves_spectrum = spectrum is not None
        kept = x if spectrum is None else spectrum
        ctx.save_for_backward(kept if keep_x else None, weight if needs_x else None, *kernels)
        return step.as_own(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kernels = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _, _, *needs_w = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # With create_graph=True the gradients are themselves recorded: the differentiable ops compute them.
            if ctx.saves_spectrum:
                raise BackendError(
                    "create_graph=True: a second derivative needs x, of which save_spectrum=True has kept the spectrum "
                    "alone. Compute the first one again with save_spectrum=False (manager: save_spectra(save=False))"
                )
            dx, dw = _linear_backward_by_ops(grads[0], x, weight, kernels, ctx.scale, ctx.backend, needs_x, needs_w)
        else:
            dx, dw = step.linear_backward(
                grads[0], x, weight, kernels, ctx.scale, ctx.backend, needs_x, needs_w, ctx.saves_spectrum
            )
        dweight, dbias = step.base_grads(grads[0], x, needs_weight, needs_bias)
        return dx, dweight, dbias, None, None, None, *dw


# `_C3ALinear.apply` without what torch's does for functorch, in Python, on its way there.
_eager: Callable[..., Tensor] = super(torch.autograd.Function, _C3ALinear).apply


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    backend: str,
    save_spectrum: bool,
) -> Tensor:
    """x Wᵀ + bias + Σ_a x ΔW_aᵀ by the eager node, or by the op where someone looks on. Autocast is off."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not arguments.is_plain(x):
        if torch.onnx.is_in_onnx_export():
            return traced.linear(x, weight, bias, kernels, scale)
        return linear_call(x, weight, bias, kernels, scale, False, backend)
    if torch.is_grad_enabled():
        return _eager(x, weight, bias, scale, backend, save_spectrum, *kernels)
    return step.linear(x, weight, bias, kernels, scale, False, backend, source=x)


def linear_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    """The result of `c3a_triton::linear` without its values."""
    axis = 1 if transpose else 0
    features = kernels[0].shape[axis] * kernels[0].shape[2] if weight is None else weight.shape[axis]
    return x.new_empty(*x.shape[:-1], features)


def weight_grad_fake(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    """The result of `c3a_triton::weight_grad` without its values."""
    return x.new_empty(dy.shape[-1] // block_size, x.shape[-1] // block_size, block_size, dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, kernels, ctx.scale, ctx.transpose, ctx.backend = inputs
    # Everything is saved: a compiler's partitioner drops what the wanted gradients do not read.
    ctx.save_for_backward(x, weight, *kernels)


def _linear_op_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, *kernels = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_w, *_ = ctx.needs_input_grad
    dx, dw = _linear_backward_by_ops(dy, x, weight, kernels, ctx.scale, ctx.backend, needs_x, needs_w, ctx.transpose)
    dweight, dbias = step.base_grads(dy, x, needs_weight, needs_bias, ctx.transpose)
    return dx, dweight, dbias, dw, None, None, None


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(dy, x)


def _weight_grad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    # weight_grad is linear in dy and in x, and ⟨v, weight_grad(dy, x)⟩ = ⟨dy, x ΔW(v)ᵀ⟩ = ⟨x, dy ΔW(v)⟩.
    dy, x = ctx.saved_tensors
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    ddy = linear_call(x, None, None, [v], ctx.scale, False, ctx.backend) if needs_dy else None
    dx = linear_call(dy, None, None, [v], ctx.scale, True, ctx.backend) if needs_x else None
    return ddy, dx, None, None, None, None


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    *,
    reads_host: bool = False,
) -> None:
    """Register a custom op under this package's own namespace, for all devices.

    With `reads_host` the op reads a tensor on the CPU, whose values a CUDA graph would keep: a compiler leaves it out.
    """
    qualified = add_op_namespace_prefix(name)
    torch.library.define(qualified, schema, tags=(torch.Tag.cudagraph_unsafe,) if reads_host else ())
    torch.library.impl(qualified, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=setup)


register(
    "linear",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor[] kernels, float scale, bool transpose, str backend) -> Tensor",
    arguments.without_autocast(step.linear),
    linear_fake,
    _linear_setup,
    _linear_op_backward,
)
register(
    "weight_grad",
    "(Tensor dy, Tensor x, int block_size, float scale, ScalarType dtype, str backend) -> Tensor",
    step.weight_grad,
    weight_grad_fake,
    _weight_grad_setup,
    _weight_grad_backward,
)


def linear_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    """`c3a_triton::linear`, differentiable to any order, under a compiler, functorch or plain autograd."""
    if torch._C._are_functorch_transforms_active():
        return _FunctorchLinear.apply(x, weight, bias, scale, transpose, backend, *kernels)
    return registered_ops.linear(x, weight, bias, list(kernels), scale, transpose, backend)


def weight_grad_call(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    """`c3a_triton::weight_grad`, differentiable to any order, under a compiler, functorch or plain autograd."""
    if torch._C._are_functorch_transforms_active():
        return _FunctorchWeightGrad.apply(dy, x, block_size, scale, dtype, backend)
    return registered_ops.weight_grad(dy, x, block_size, scale, dtype, backend)


def _linear_backward_by_ops(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    backend: str,
    needs_x: bool,
    needs_w: Sequence[bool],
    transpose: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the dw's of `c3a_triton::linear` in terms of the two ops: differentiable again, and traceable."""
    dx = linear_call(dy, weight, None, kernels, scale, not transpose, backend) if needs_x else None
    left, right = (x, dy) if transpose else (dy, x)
    dws: list[Tensor | None] = [None] * len(kernels)
    computed: list[tuple[int, Tensor]] = []  # a list: a traced block size may be symbolic, which no dict can hold
    for i, w in enumerate(kernels):
        if needs_w[i]:
            b = w.shape[2]
            dw = next((known for size, known in computed if size == b), None)
            if dw is None:
                dw = weight_grad_call(left, right, b, scale, torch.promote_types(w.dtype, torch.float32), backend)
                computed.append((b, dw))
            dws[i] = dw.to(w.dtype)
    return dx, dws


class _FunctorchLinear(torch.autograd.Function):
    """`c3a_triton::linear` for torch.func: reverse mode, forward mode and vmap, nested as one likes."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        transpose: bool,
        backend: str,
        *kernels: Tensor,
    ) -> Tensor:
        return registered_ops.linear(x, weight, bias, list(kernels), scale, transpose, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.scale, ctx.transpose, ctx.backend, *kernels = inputs
        ctx.save_for_backward(x, weight, *kernels)
        ctx.save_for_forward(x, weight, *kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, *kernels = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _, _, *needs_w = ctx.needs_input_grad
        dx, dw = _linear_backward_by_ops(
            grads[0], x, weight, kernels, ctx.scale, ctx.backend, needs_x, needs_w, ctx.transpose
        )
        dweight, dbias = step.base_grads(grads[0], x, needs_weight, needs_bias, ctx.transpose)
        return dx, dweight, dbias, None, None, None, *dw

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight, *kernels = ctx.saved_tensors
        tx, tweight, tbias, _, _, _, *tkernels = tangents
        moved = [t for t in tkernels if t is not None]
        parts = []
        if tx is not None:
            parts.append(linear_call(tx, weight, None, kernels, ctx.scale, ctx.transpose, ctx.backend))
        if tweight is not None or moved:
            parts.append(linear_call(x, tweight, None, moved, ctx.scale, ctx.transpose, ctx.backend))
        if tbias is not None:
            parts.append(tbias)
        return torch.stack(torch.broadcast_tensors(*parts)).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *args: Any) -> tuple[Tensor, int]:
        x_dim, *dims = in_dims
        if x_dim is not None:
            x = x.movedim(x_dim, 0)
        if all(dim is None for dim in dims):  # only x is batched: its batch is one more leading dimension
            return _FunctorchLinear.apply(x, *args), 0
        rows = [
            _FunctorchLinear.apply(x if x_dim is None else x[i], *_slice(args, dims, i)) for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0


class _FunctorchWeightGrad(torch.autograd.Function):
    """`c3a_triton::weight_grad` for torch.func."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
        return registered_ops.weight_grad(dy, x, block_size, scale, dtype, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, x, *ctx.rest = inputs
        _, ctx.scale, _, ctx.backend = ctx.rest
        ctx.save_for_backward(dy, x)
        ctx.save_for_forward(dy, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _weight_grad_backward(ctx, grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dy, x = ctx.saved_tensors
        tdy, tx, *_ = tangents
        parts = []
        if tdy is not None:
            parts.append(weight_grad_call(tdy, x, *ctx.rest))
        if tx is not None:
            parts.append(weight_grad_call(dy, tx, *ctx.rest))
        return torch.stack(parts).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = [_FunctorchWeightGrad.apply(*_slice(args, in_dims, i)) for i in range(info.batch_size)]
        return torch.stack(rows), 0


def _slice(args: Sequence[Any], dims: Sequence[int | None], i: int) -> list[Any]:
    return [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)]
