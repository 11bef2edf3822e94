"""The block-circulant operator: public calls, one autograd node, custom ops for compilers and functorch.

Two functional custom ops are closed under differentiation:

    c3a_triton::linear       x Wᵀ + bias + Σ_a x ΔW_aᵀ   (or, transposed, x W + Σ_a x ΔW_a)
    c3a_triton::weight_grad  dw of one ΔW

so double backward is right wherever they are used. Eager calls take `_C3ALinear`, a leaner `autograd.Function` that
shares work between the gradients; torch.compile, functorch and tensor subclasses see the ops.
"""

import functools
from collections.abc import Callable, Sequence
from math import lcm
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as registered_ops
from .._public import public
from ..errors import BackendError, ShapeError
from . import dispatch, fourier, launch, launch_fft, reference, spectra, traced

__all__ = ["add_circulant_", "c3a_linear", "circulant_linear", "circulant_matrix"]

# Rows of W that a merge without Triton works on at a time, in elements: bounds its float32 temporaries to 16 MiB each.
MERGE_CHUNK_ELEMENTS = 2**22

_T = TypeVar("_T")


# Public calls


@public
def circulant_linear(x: Tensor, w: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """x ΔWᵀ with the block-circulant ΔW[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b] (C3A, arXiv 2407.19342).

    Differentiable, twice and more, in x and w. Under autocast it computes in the autocast dtype, as `F.linear` does.

    Args:
        x: `(*, in_blocks * b)`, floating; float64 on the backends `"reference"` and `"torch"`.
        w: `(out_blocks, in_blocks, b)`, float32 as a rule; its gradient has its dtype.
        scale: factor of ΔW; None means 1 / in_features, PEFT's convention.
        backend: a name of `c3a_triton.operator.dispatch.BACKENDS`, but not `"fold"`.

    Returns:
        `(*, out_blocks * b)` in x's dtype (the autocast dtype under autocast).

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, or one that cannot run here.
    """
    if backend == "fold":
        raise BackendError(
            "backend 'fold' adds ΔW to a layer's weight, and circulant_linear has none: use c3a_linear, or 'auto'"
        )
    if _autocasts(x.device.type):
        x = _autocast(x)
        with torch.autocast(x.device.type, enabled=False):
            return circulant_linear(x, w, scale=scale, backend=backend)
    if torch._C._get_tracing_state() is not None:
        return traced.linear(x, None, None, (w,), scale)
    kernels = (w,)
    _check(x, None, None, kernels)
    return _apply(x, None, None, kernels, 1.0 / x.shape[-1] if scale is None else scale, backend)


@public
def c3a_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """x Wᵀ + bias + Σ_a x ΔW_aᵀ: a linear layer and its C3A adapters in one autograd node.

    No sum over activations is launched beside the products, forward or backward. Adapters of equal block size are
    summed as kernels. For the backward pass only x is kept, if a kernel or the weight wants a gradient. Differentiable
    in x, every kernel, bias and, where it requires a gradient, weight. Under autocast it computes in the autocast
    dtype.

    Args:
        x: `(*, in_features)`.
        weight: `(out_features, in_features)`, any strides, x's dtype.
        bias: `(out_features,)` in x's dtype, or None.
        kernels: one w of shape `(out_features / b, in_features / b, b)` per adapter; block sizes may differ. ΔW has the
            scale 1 / in_features.
        backend: how the adapters' part is computed, a name of `c3a_triton.operator.dispatch.BACKENDS`. `"fold"`:
            forward and gradient of x with W + Σ ΔW_a rounded to weight's dtype, as a merged model computes; the
            kernels' gradients are exact, as if nothing had been rounded.

    Returns:
        `(*, out_features)` in x's dtype (the autocast dtype under autocast).

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, or one that cannot run here.
    """
    if _autocasts(x.device.type):
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        with torch.autocast(x.device.type, enabled=False):
            return c3a_linear(x, weight, bias, kernels, backend=backend)
    if torch._C._get_tracing_state() is not None:
        return traced.linear(x, weight, bias, kernels, None)
    _check(x, weight, bias, kernels)
    return _apply(x, weight, bias, kernels, 1.0 / x.shape[-1], backend)


@public
def circulant_matrix(w: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The dense ΔW of `circulant_linear`.

    Args:
        w: `(out_blocks, in_blocks, b)`.
        scale: factor of ΔW; None means 1 / in_features.
        dtype: dtype of the result, rounded once from float32 (float64 for a float64 w); None means w's.

    Returns:
        `(out_blocks * b, in_blocks * b)`, differentiable in w.
    """
    if traced.is_tracing():
        return traced.circulant_matrix(_at_least_float32(w), scale, dtype or w.dtype)
    _check_kernel(w)
    scale = 1.0 / (w.shape[1] * w.shape[2]) if scale is None else scale
    dtype = dtype or w.dtype
    wide = _at_least_float32(w)
    differentiable = torch.is_grad_enabled() and w.requires_grad
    if differentiable or not _is_plain(w) or not _triton_expands(wide, dtype):
        return reference.circulant_matrix(wide, scale, dtype)
    return launch.expand_weight(wide, scale=scale, dtype=dtype)


@torch.no_grad()
def add_circulant_(weight: Tensor, kernels: Sequence[Tensor]) -> None:
    """weight += Σ_a ΔW_a in place, summed in float32 (float64 for a float64 operand) and rounded once.

    Args:
        weight: `(out_features, in_features)`, floating, any strides: a transposed layer passes `weight.t()`.
        kernels: as in `c3a_linear`.
    """
    out_features, in_features = weight.shape
    for w in kernels:
        _check_kernel(w)
        if (w.shape[0] * w.shape[2], w.shape[1] * w.shape[2]) != (out_features, in_features):
            raise ShapeError(f"w of shape {tuple(w.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    _add_circulant(weight, [w for w, _ in _summed(kernels)], 1.0 / in_features)


def _add_circulant(weight: Tensor, summed: Sequence[Tensor], scale: float) -> None:
    out_features, in_features = weight.shape
    if len(summed) == 1 and _triton_expands(summed[0], weight.dtype):
        launch.add_expanded_(weight, summed[0], scale=scale)
        return
    rows = lcm(*(w.shape[2] for w in summed))
    rows *= max(1, MERGE_CHUNK_ELEMENTS // (rows * in_features))
    for start in range(0, out_features, rows):
        chunk = weight[start : start + rows]
        total = chunk.to(torch.promote_types(weight.dtype, summed[0].dtype))
        for w in summed:
            b = w.shape[2]
            total = total + reference.circulant_matrix(w[start // b : (start + rows) // b], scale)
        chunk.copy_(total)


def _folded_weight(weight: Tensor, kernels: Sequence[Tensor], scale: float) -> Tensor:
    """weight + Σ_a ΔW_a as a new tensor, summed and rounded as `add_circulant_` does; weight itself without kernels."""
    if not kernels:
        return weight
    summed = [w for w, _ in _summed(kernels)]
    if len(summed) == 1 and _triton_expands(summed[0], weight.dtype):
        return launch.folded_weight(weight, summed[0], scale=scale)
    folded = weight.clone()
    _add_circulant(folded, summed, scale)
    return folded


# The lean path


def _without_autocast(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, of a tensor and more, with autocast off: what it calls has its dtypes from its operands."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Any) -> _T:
        if not _autocasts(x.device.type):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return run


class _C3ALinear(torch.autograd.Function):
    """`c3a_triton::linear`, not transposed, for eager calls: a few Python frames and shared spectra in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, backend: str, *kernels: Tensor
    ) -> Tensor:
        ctx.scale, ctx.backend = scale, backend
        needs_x, needs_weight, _, _, _, *needs_w = ctx.needs_input_grad
        # x serves the gradients of weight and kernels, weight that of x, kernels both. What is not needed is not kept.
        keep_x = needs_weight or any(needs_w)
        ctx.save_for_backward(x if keep_x else None, weight if needs_x else None, *kernels)
        y = _linear(x, weight, bias, kernels, scale, False, backend, source=x)
        return _as_own(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kernels = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _, *needs_w = ctx.needs_input_grad
        # With create_graph=True the gradients are themselves recorded: the differentiable ops compute them.
        compute = _linear_backward_by_ops if torch.is_grad_enabled() else _linear_backward
        dx, dw = compute(grads[0], x, weight, kernels, ctx.scale, ctx.backend, needs_x, needs_w)
        dweight, dbias = _base_grads(grads[0], x, needs_weight, needs_bias)
        return dx, dweight, dbias, None, None, *dw


def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Sequence[Tensor], scale: float, backend: str
) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not _is_plain(x):
        if torch.onnx.is_in_onnx_export():
            return traced.linear(x, weight, bias, kernels, scale)
        return _linear_call(x, weight, bias, kernels, scale, False, backend)
    if torch.is_grad_enabled():
        return _C3ALinear.apply(x, weight, bias, scale, backend, *kernels)
    return _linear(x, weight, bias, kernels, scale, False, backend, source=x)


def _linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    transpose: bool,
    backend: str,
    source: Tensor | None = None,
) -> Tensor:
    """Implementation of `c3a_triton::linear`, autocast being off.

    With `source`, the x of eager code, its spectrum may be shared: compiled code, which calls the op, writes into the
    same tensors again without counting versions.
    """
    y = _product_of_rows(_rows(x), weight, bias, kernels, scale, transpose, backend, source)
    return y if x.dim() == 2 else _as_own(y, (*x.shape[:-1], y.shape[1]))


def _as_own(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Not a view for autograd: what a Function returns as a view cannot be modified in place by its user."""
    return torch.ops.aten._unsafe_view.default(y, shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _product_of_rows(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    transpose: bool,
    backend: str,
    source: Tensor | None,
) -> Tensor:
    """The adapters first, so that the base GEMM's epilogue adds their sum; for a few tokens both in one kernel."""
    if backend == "fold":
        if weight is not None:
            weight, kernels = _folded_weight(weight, kernels, scale), ()
        else:
            backend = "auto"  # a term of a derivative without the weight: nothing to fold into
    summed = _summed(kernels)
    if weight is not None and not transpose and len(summed) == 1 and launch.decodes(rows, weight):
        w = summed[0][0]
        if _choose(backend, rows, w) == "direct":
            return launch.decode_linear(rows, weight, w, bias, scale=scale)
    y = None
    for w, members in summed:
        name = _choose(backend, rows, w)
        shared = _shared(source, kernels[members[0]]) if name == "fft" else {}
        y = _PRODUCTS[name](
            rows, w, scale=scale, transpose=transpose, bias=bias if y is None else None, out=y, **shared
        )
    if weight is not None:
        matrix = weight if transpose else weight.t()
        if y is not None:
            y.addmm_(rows, matrix)
        else:
            y = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    assert y is not None, "neither a weight nor a kernel"
    return y


@_without_autocast
def _linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    backend: str,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the dw's of `_linear` (not transposed), each spectrum computed once where a backend has spectra."""
    if backend == "fold":
        # The folded weight is built again: kept from the forward it would be as large as the weight, in every layer.
        dx = _linear(dy, weight, None, kernels, scale, True, backend) if needs_x else None
        return dx, _linear_backward(dy, x, None, kernels, scale, "auto", False, needs_w)[1]
    rows = _rows(dy)
    x_rows = None if x is None else _rows(x)
    dx = None
    dws: list[Tensor | None] = [None] * len(kernels)
    for w, members in _summed(kernels):
        name = _choose(backend, rows, w, backward=True)
        wanted = [i for i in members if needs_w[i]]
        if needs_x and wanted and name in _BACKWARDS:
            assert x_rows is not None
            shared = _shared(x, kernels[members[0]]) if name == "fft" else {}
            dx, dw = _BACKWARDS[name](rows, x_rows, w, scale=scale, out=dx, **shared)
        else:
            if needs_x:
                dx = _PRODUCTS[name](rows, w, scale=scale, transpose=True, bias=None, out=dx)
            if wanted:
                assert x_rows is not None
                shared = _shared(x, kernels[members[0]]) if name == "fft" else {}
                dw = _WEIGHT_GRADS[name](rows, x_rows, w.shape[2], scale=scale, dtype=w.dtype, **shared)
        for i in wanted:
            dws[i] = dw if dw.dtype == kernels[i].dtype else dw.to(kernels[i].dtype)
    if needs_x:
        if weight is not None:
            dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
        assert dx is not None
        dx = dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, dws


# The custom ops: implementation, fake, autograd


@_without_autocast
def _weight_grad(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    """Implementation of `c3a_triton::weight_grad`."""
    backend = "auto" if backend == "fold" else backend
    dy, x = _rows(dy), _rows(x)
    wide = torch.float64 if dtype == torch.float64 else dy.dtype
    sizes = (dy.shape[0], x.shape[1], dy.shape[1], block_size)
    name = dispatch.choose(backend, dy.device, wide, *sizes, True)
    return _WEIGHT_GRADS[name](dy, x, block_size, scale=scale, dtype=dtype)


def _linear_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    axis = 1 if transpose else 0
    features = kernels[0].shape[axis] * kernels[0].shape[2] if weight is None else weight.shape[axis]
    return x.new_empty(*x.shape[:-1], features)


def _weight_grad_fake(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    return x.new_empty(dy.shape[-1] // block_size, x.shape[-1] // block_size, block_size, dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, kernels, ctx.scale, ctx.transpose, ctx.backend = inputs
    # Everything is saved: a compiler's partitioner drops what the wanted gradients do not read.
    ctx.save_for_backward(x, weight, *kernels)


def _linear_op_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, *kernels = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_w, *_ = ctx.needs_input_grad
    dx, dw = _linear_backward_by_ops(dy, x, weight, kernels, ctx.scale, ctx.backend, needs_x, needs_w, ctx.transpose)
    dweight, dbias = _base_grads(dy, x, needs_weight, needs_bias, ctx.transpose)
    return dx, dweight, dbias, dw, None, None, None


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(dy, x)


def _weight_grad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    # weight_grad is linear in dy and in x, and ⟨v, weight_grad(dy, x)⟩ = ⟨dy, x ΔW(v)ᵀ⟩ = ⟨x, dy ΔW(v)⟩.
    dy, x = ctx.saved_tensors
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    ddy = _linear_call(x, None, None, [v], ctx.scale, False, ctx.backend) if needs_dy else None
    dx = _linear_call(dy, None, None, [v], ctx.scale, True, ctx.backend) if needs_x else None
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
    _without_autocast(_linear),
    _linear_fake,
    _linear_setup,
    _linear_op_backward,
)
register(
    "weight_grad",
    "(Tensor dy, Tensor x, int block_size, float scale, ScalarType dtype, str backend) -> Tensor",
    _weight_grad,
    _weight_grad_fake,
    _weight_grad_setup,
    _weight_grad_backward,
)


def _linear_call(
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


def _weight_grad_call(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
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
    dx = _linear_call(dy, weight, None, kernels, scale, not transpose, backend) if needs_x else None
    left, right = (x, dy) if transpose else (dy, x)
    dws: list[Tensor | None] = [None] * len(kernels)
    computed: list[tuple[int, Tensor]] = []  # a list: a traced block size may be symbolic, which no dict can hold
    for i, w in enumerate(kernels):
        if needs_w[i]:
            b = w.shape[2]
            dw = next((known for size, known in computed if size == b), None)
            if dw is None:
                dw = _weight_grad_call(left, right, b, scale, torch.promote_types(w.dtype, torch.float32), backend)
                computed.append((b, dw))
            dws[i] = dw.to(w.dtype)
    return dx, dws


def _base_grads(
    dy: Tensor, x: Tensor | None, needs_weight: bool, needs_bias: bool, transpose: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the base layer's own parameters, in plain torch: right at any order."""
    if not (needs_weight or needs_bias):
        return None, None
    dweight = dbias = None
    rows = _rows(dy)
    if needs_weight:
        assert x is not None
        x_rows = _rows(x)
        dweight = x_rows.T @ rows if transpose else rows.T @ x_rows
    if needs_bias:
        dbias = rows.sum(0)
    return dweight, dbias


# functorch: torch's own registration gives an op neither a batching rule nor a forward-mode rule, and no reverse-mode
# rule under transforms, so these two Functions carry them.


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
        dweight, dbias = _base_grads(grads[0], x, needs_weight, needs_bias, ctx.transpose)
        return dx, dweight, dbias, None, None, None, *dw

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight, *kernels = ctx.saved_tensors
        tx, tweight, tbias, _, _, _, *tkernels = tangents
        moved = [t for t in tkernels if t is not None]
        parts = []
        if tx is not None:
            parts.append(_linear_call(tx, weight, None, kernels, ctx.scale, ctx.transpose, ctx.backend))
        if tweight is not None or moved:
            parts.append(_linear_call(x, tweight, None, moved, ctx.scale, ctx.transpose, ctx.backend))
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
            parts.append(_weight_grad_call(tdy, x, *ctx.rest))
        if tx is not None:
            parts.append(_weight_grad_call(dy, tx, *ctx.rest))
        return torch.stack(parts).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = [_FunctorchWeightGrad.apply(*_slice(args, in_dims, i)) for i in range(info.batch_size)]
        return torch.stack(rows), 0


def _slice(args: Sequence[Any], dims: Sequence[int | None], i: int) -> list[Any]:
    return [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)]


# Backends


def _expand_product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The product through a dense ΔW in x's dtype and cuBLAS. The scale is left to the GEMM: scaled down by 1 /
    in_features, the elements of ΔW would be subnormal in float16."""
    delta_weight = launch.expand_weight(w, scale=1.0, dtype=x.dtype)
    matrix = delta_weight if transpose else delta_weight.t()
    if bias is not None and out is None:
        return torch.addmm(bias, x, matrix, alpha=scale)
    beta = 1
    if out is None:
        out, beta = torch.empty(x.shape[0], matrix.shape[1], dtype=x.dtype, device=x.device), 0
    return out.addmm_(x, matrix, beta=beta, alpha=scale)


def _triton_weight_grad(dy: Tensor, x: Tensor, block_size: int, *, scale: float, dtype: torch.dtype) -> Tensor:
    return launch.weight_grad(dy, x, block_size, scale=scale)  # float32, as every w that these backends are chosen for


def _fft_weight_grad(
    dy: Tensor,
    x: Tensor,
    block_size: int,
    *,
    scale: float,
    dtype: torch.dtype,
    source: spectra.Source | None = None,
) -> Tensor:
    return launch_fft.fft_weight_grad(dy, x, block_size, scale=scale, source=source)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.product,
    "torch": fourier.product,
    "direct": launch.direct_product,
    "fft": launch_fft.fft_product,
    "expand": _expand_product,
}
_WEIGHT_GRADS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.weight_grad,
    "torch": fourier.weight_grad,
    "direct": _triton_weight_grad,
    "fft": _fft_weight_grad,
    "expand": _triton_weight_grad,
}
# Backends that compute both gradients in one call, with the spectrum of dy computed once.
_BACKWARDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "torch": fourier.backward,
    "fft": launch_fft.fft_backward,
}


def _shared(x: Tensor | None, w: Tensor) -> dict[str, Any]:
    """The argument by which `"fft"` may share the spectrum of x with other calls."""
    return {} if x is None else {"source": spectra.Source(x, w)}


def _choose(backend: str, rows: Tensor, w: Tensor, *, backward: bool = False) -> str:
    out_blocks, in_blocks, b = w.shape
    dtype = torch.float64 if w.dtype == torch.float64 else rows.dtype
    return dispatch.choose(backend, rows.device, dtype, rows.shape[0], in_blocks * b, out_blocks * b, b, backward)


def _triton_expands(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether the dense matrix of w in `dtype` is written by Triton: on GPUs, not in its interpreter."""
    return w.device.type == "cuda" and w.dtype == torch.float32 and dispatch.why_not("expand", w.device, dtype) is None


def _summed(kernels: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """Kernels of equal block size as one sum each, in at least float32, with the positions of its members."""
    if len(kernels) == 1:  # nearly every call
        return [(_at_least_float32(kernels[0]), [0])]
    groups: dict[int, list[int]] = {}
    for i, w in enumerate(kernels):
        groups.setdefault(w.shape[2], []).append(i)
    summed = []
    for members in groups.values():
        total = _at_least_float32(kernels[members[0]])
        for i in members[1:]:
            total = total + kernels[i]
        summed.append((total, members))
    return summed


# Checks and casts


def _at_least_float32(w: Tensor) -> Tensor:
    return w if w.dtype == torch.float32 else w.to(torch.promote_types(w.dtype, torch.float32))


def _is_plain(x: Tensor) -> bool:
    """A real tensor of torch's own: no subclass, not fake, not on the meta device."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype of its device; float64 and integers are left alone, as torch does."""
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check_kernel(w: Tensor) -> None:
    if w.dim() != 3:
        message = f"w has the shape {tuple(w.shape)}: it must be (out_blocks, in_blocks, block_size)"
        if hasattr(w, "ds_id"):
            message += ". DeepSpeed's ZeRO-3 keeps it in parts: put it together with deepspeed.zero.GatheredParameters"
        raise ShapeError(message)
    if not w.is_floating_point():
        raise ShapeError(f"w is {w.dtype}: it must be a floating dtype, float32 as a rule")


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Sequence[Tensor]) -> None:
    """Raise `ShapeError` for operands that do not fit together. The messages are built only on failure."""
    in_features = x.shape[-1] if x.dim() else 0
    out_features = None if weight is None else weight.shape[0]
    if not x.is_floating_point() or not in_features:
        raise ShapeError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be floating, (*, in_features)")
    for w in kernels:
        _check_kernel(w)
        out_blocks, in_blocks, b = w.shape
        if in_blocks * b != in_features:
            raise ShapeError(
                f"x has {in_features} features, but w of shape {tuple(w.shape)} takes in_blocks * b = {in_blocks * b}"
            )
        if out_features is not None and out_blocks * b != out_features:
            raise ShapeError(
                f"the weight has {out_features} rows, but w of shape {tuple(w.shape)} gives out_blocks * b = "
                f"{out_blocks * b}"
            )
        if w.device != x.device:
            raise ShapeError(f"x is on {x.device} and w on {w.device}: move one of them")
    if weight is None:
        return
    if weight.dim() != 2 or weight.shape[1] != in_features:
        raise ShapeError(f"x has {in_features} features, but the weight has the shape {tuple(weight.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"x is {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ShapeError(f"{dtypes}: they must be the same, as for torch.nn.functional.linear")
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        raise ShapeError(f"x is on {x.device} and the weight on {weight.device}: move one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"the bias has the shape {tuple(bias.shape)}: it must be ({weight.shape[0]},)")
