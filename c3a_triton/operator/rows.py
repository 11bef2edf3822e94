"""The operator where every row of a batch has an adapter of its own, as when one base serves many fine-tunes.

Two custom ops, closed under differentiation as those of `autograd` are:

    c3a_triton::linear_rows       x Wᵀ + bias + x ΔW_aᵀ, a given for each row   (or, transposed, x W + x ΔW_a)
    c3a_triton::weight_grad_rows  dw of every ΔW_a
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import ops as registered_ops
from ..errors import BackendError, ShapeError
from . import arguments, step
from .autograd import linear_call, linear_fake, register, weight_grad_fake
from .launch import grouped

__all__ = ["c3a_linear_rows"]


def c3a_linear_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    rows: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """x Wᵀ + bias + x ΔW_aᵀ where each row of the batch has an a of its own, or none.

    Where an adapter's share of the tokens is few enough for `"direct"`, one launch serves all adapters of one block
    size; otherwise each adapter has its own. Differentiable in all that `c3a_linear` is, to any order.

    Args:
        x: `(n_rows, *, in_features)`.
        weight: `(out_features, in_features)`, any strides, x's dtype; None leaves the adapters' part alone.
        bias: `(out_features,)` in x's dtype, or None.
        kernels: one w or more as in `c3a_linear`.
        rows: for each of x's rows an index into `kernels`, or −1 for no adapter: integers, or an int64 tensor on the
            CPU, which a compiled graph takes as an input of its own.
        scale: factor of each ΔW; None means 1 / in_features.
        backend: a name of `c3a_triton.operator.dispatch.BACKENDS`, but not `"fold"`.

    Returns:
        `(n_rows, *, out_features)` in x's dtype (the autocast dtype under autocast).

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, or one that cannot run here.
    """
    if backend == "fold":
        raise BackendError("backend 'fold' adds ΔW to a layer's weight, and here each row has its own: use 'auto'")
    if arguments.autocasts(x):
        x, weight, bias = arguments.autocast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return c3a_linear_rows(x, weight, bias, kernels, rows, scale=scale, backend=backend)
    arguments.check(x, weight, bias, kernels)
    if x.dim() < 2 or x.shape[0] != len(rows):
        raise ShapeError(f"x has the shape {tuple(x.shape)} for {len(rows)} rows: give an index for each of x's rows")
    if isinstance(rows, Tensor):
        if not kernels or rows.dtype != torch.int64 or rows.device.type != "cpu":
            raise ShapeError(f"rows of {rows.dtype} on {rows.device} for {len(kernels)} kernels: give int64 on the CPU")
    else:
        _check_indices(rows, len(kernels))
        rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
    scale = 1.0 / x.shape[-1] if scale is None else scale
    if torch._C._are_functorch_transforms_active():
        # torch.func finds no rules on these ops, but on those that they are composed of.
        def product(part: Tensor, w: list[Tensor]) -> Tensor:
            return linear_call(part, None, bias, w, scale, False, backend)

        y = _by_adapter(x, bias, kernels, _checked(rows, kernels), False, product)
        return y if weight is None else y + x @ weight.t()
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not arguments.is_plain(x):
        return _rows_call(x, weight, bias, kernels, rows, scale, False, backend)
    return _linear_rows(x, weight, bias, kernels, rows, scale, False, backend)


def _check_indices(rows: Sequence[int], n_kernels: int) -> None:
    if not n_kernels or not rows or not -1 <= min(rows) <= max(rows) < n_kernels:
        raise ShapeError(f"rows {list(rows)} for {n_kernels} kernels: each must be an index, or −1 for no adapter")


def _checked(rows: Tensor, kernels: Sequence[Any]) -> tuple[int, ...]:
    """The integers: a graph that is being traced did not know them."""
    indices = tuple(rows.tolist())
    _check_indices(indices, len(kernels))
    return indices


def _linear_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    rows: Tensor,
    scale: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    """Implementation of `c3a_triton::linear_rows`, autocast being off.

    The adapters first, so that the base GEMM's epilogue adds them.
    """
    flat = x.reshape(-1, x.shape[-1])
    indices = _checked(rows, kernels)
    if _grouped(flat, kernels, indices, backend):
        y = grouped.grouped_product(flat, kernels, indices, scale=scale, transpose=transpose, bias=bias)
    else:

        def product(part: Tensor, w: list[Tensor]) -> Tensor:
            return step.linear(part, None, bias, w, scale, transpose, backend)

        y = _by_adapter(x, bias, kernels, indices, transpose, product)
        y = y.view(flat.shape[0], y.shape[-1])
    if weight is not None:
        y.addmm_(flat, weight if transpose else weight.t())
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _grouped(flat: Tensor, kernels: Sequence[Tensor], rows: Sequence[int], backend: str) -> bool:
    """Whether one launch serves all adapters: where "direct" is what one adapter's share of the tokens would take."""
    used = {adapter for adapter in rows if adapter >= 0}
    if not used or not flat.shape[0] or not grouped.runs_on(flat.device):
        return False
    share = flat[: -(-flat.shape[0] // len(used))]
    return all(step.choose(backend, share, kernels[adapter]) == "direct" for adapter in used)


def _by_adapter(
    x: Tensor,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    rows: tuple[int, ...],
    transpose: bool,
    product: Callable[[Tensor, list[Tensor]], Tensor],
) -> Tensor:
    """The rows of each adapter through `product` (which adds the bias), one call each; those of none are the bias."""
    order, inverse, runs = grouped.segments(rows)
    features = kernels[0].shape[1 if transpose else 0] * kernels[0].shape[2]
    parts = []
    for (adapter, _), part in zip(runs, _split(x, order, runs), strict=True):
        if adapter >= 0:
            parts.append(product(part, [kernels[adapter]]))
        else:
            empty = part.new_zeros(*part.shape[:-1], features)
            parts.append(empty if bias is None else empty + bias)
    return _taken(torch.cat(parts) if len(parts) > 1 else parts[0], inverse)


def _split(x: Tensor, order: tuple[int, ...], runs: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """The rows of each adapter."""
    return _taken(x, order).split([count for _, count in runs])


def _taken(x: Tensor, order: tuple[int, ...]) -> Tensor:
    if order == tuple(range(len(order))):
        return x
    return x.index_select(0, grouped.on_device(order, x.device))


def _weight_grad_rows(
    dy: Tensor,
    x: Tensor,
    block_sizes: Sequence[int],
    rows: Tensor,
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """Implementation of `c3a_triton::weight_grad_rows`: an adapter that has no rows gets zeros."""
    order, _, runs = grouped.segments(_checked(rows, block_sizes))
    parts = zip(runs, _split(dy, order, runs), _split(x, order, runs), strict=True)
    found = {
        adapter: step.weight_grad(dy_part, x_part, block_sizes[adapter], scale, dtype, backend)
        for (adapter, _), dy_part, x_part in parts
        if adapter >= 0
    }
    empty = _weight_grad_rows_fake(dy, x, block_sizes, rows, scale, dtype, backend)
    return [found[i] if i in found else dw.zero_() for i, dw in enumerate(empty)]


def _linear_rows_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    rows: Tensor,
    scale: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    return linear_fake(x, weight, bias, kernels, scale, transpose, backend)


def _weight_grad_rows_fake(
    dy: Tensor,
    x: Tensor,
    block_sizes: Sequence[int],
    rows: Tensor,
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return [weight_grad_fake(dy, x, b, scale, dtype, backend) for b in block_sizes]


def _linear_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, kernels, rows, ctx.scale, ctx.transpose, ctx.backend = inputs
    ctx.save_for_backward(x, weight, rows, *kernels)


def _linear_rows_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, rows, *kernels = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_w, *_ = ctx.needs_input_grad
    dx = None
    if needs_x:
        dx = _rows_call(dy, weight, None, kernels, rows, ctx.scale, not ctx.transpose, ctx.backend)
    dws: list[Tensor | None] = [None] * len(kernels)
    wanted = [i for i, needed in enumerate(needs_w) if needed]
    if wanted:
        # Rows of the others count as rows of none, as those of −1, the last, do.
        place = {i: place for place, i in enumerate(wanted)}
        rows = torch.tensor([place.get(i, -1) for i in [*range(len(kernels)), -1]], device="cpu")[rows]
        wide = torch.float64 if any(kernels[i].dtype == torch.float64 for i in wanted) else torch.float32
        left, right = (x, dy) if ctx.transpose else (dy, x)
        sizes = [kernels[i].shape[2] for i in wanted]
        found = registered_ops.weight_grad_rows(left, right, sizes, rows, ctx.scale, wide, ctx.backend)
        for i, dw in zip(wanted, found, strict=True):
            dws[i] = dw.to(kernels[i].dtype)
    dweight, dbias = step.base_grads(dy, x, needs_weight, needs_bias, ctx.transpose)
    return dx, dweight, dbias, dws, None, None, None, None


def _weight_grad_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dy, x, _, rows, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(dy, x, rows)


def _weight_grad_rows_backward(ctx: Any, vs: list[Tensor]) -> tuple[Any, ...]:
    # Linear in dy and in x, as one adapter's is: row r of the one times ΔW(v) of r's adapter is the other's gradient.
    dy, x, rows = ctx.saved_tensors
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    ddy = _rows_call(x, None, None, vs, rows, ctx.scale, False, ctx.backend) if needs_dy else None
    dx = _rows_call(dy, None, None, vs, rows, ctx.scale, True, ctx.backend) if needs_x else None
    return ddy, dx, None, None, None, None, None


register(
    "linear_rows",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor[] kernels, Tensor rows, float scale, bool transpose, str backend)"
    " -> Tensor",
    arguments.without_autocast(_linear_rows),
    _linear_rows_fake,
    _linear_rows_setup,
    _linear_rows_backward,
    reads_host=True,
)
register(
    "weight_grad_rows",
    "(Tensor dy, Tensor x, int[] block_sizes, Tensor rows, float scale, ScalarType dtype, str backend) -> Tensor[]",
    _weight_grad_rows,
    _weight_grad_rows_fake,
    _weight_grad_rows_setup,
    _weight_grad_rows_backward,
    reads_host=True,
)


def _rows_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    rows: Tensor,
    scale: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    return registered_ops.linear_rows(x, weight, bias, list(kernels), rows, scale, transpose, backend)
