"""The operator over a stack of w's, one for each group of rows, as the experts of a layer have.

Custom ops, closed under differentiation as those of `autograd` are:

    c3a_triton::routed              Σ_a x_s ΔW_{a,g}ᵀ, g being the group of row s   (or, transposed, Σ_a x_s ΔW_{a,g})
    c3a_triton::routed_weight_grad  dw of every ΔW_g
    c3a_triton::grouped_base        x_s W_gᵀ   (or, transposed, x_s W_g)
    c3a_triton::grouped_outer       the gradient of that in W

Eager calls take `_Routed`, one node for a frozen base and its adapters; compilers and trained bases take the ops.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from .._ops import ops as registered_ops
from ..errors import BackendError
from . import arguments, backends, dispatch
from .autograd import register
from .cost_model import Sizes
from .routes import Routes, tile_table

__all__ = ["c3a_routed", "grouped_base"]

Tiles = Callable[..., Tensor]


def c3a_routed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    *,
    gather: bool = False,
    transposed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x_s W_gᵀ + bias_g + Σ_a x_s ΔW_{a,g}ᵀ for every row s and its group g: one autograd node.

    Nothing of the size of a stack of dense weights is allocated, forward or backward. For the backward pass x as it is
    given and the kernels are kept, beside the routes. Differentiable in x and every kernel to any order, and where they
    require a gradient in weight and bias. Autocast is left alone: all is computed in x's dtype.

    Args:
        x: `(n_rows, in_features)`, rows in the order of the groups; or the tokens, `(n_tokens, in_features)`.
        weight: `(n_groups, out_features, in_features)`, or with `transposed` `(n_groups, in_features, out_features)`,
            in x's dtype; None leaves the adapters' part alone.
        bias: `(n_groups, out_features)` in x's dtype, or None.
        kernels: one stack of w's or more, `(n_groups, out_blocks, in_blocks, b)`; block sizes may differ. ΔW has the
            scale 1 / in_features.
        routes: the groups of the rows.
        gather: x has the tokens, and row s is `x[routes.source[s]]`; the rows are not kept for the backward pass.
        transposed: how the weight is stored.
        backend: how the adapters' part is computed: `"auto"` or a name of `c3a_triton.operator.backends.ROUTED`.

    Returns:
        `(n_rows, out_features)` in x's dtype. Rows without a group are 0, as are their gradients.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, `"expand"` or `"fold"`, which write out dense weights, one that cannot run
            here, or a transform of torch.func or torch.jit.trace, of which this operator has no rules.
    """
    if torch._C._are_functorch_transforms_active():
        raise BackendError("torch.func's transforms have no rules for rows that have groups: use torch.autograd")
    if torch._C._get_tracing_state() is not None:
        raise BackendError("torch.jit.trace would keep the groups of the rows that it sees: use torch.compile")
    arguments.check_routed(x, weight, bias, kernels, routes, gather, transposed)
    return _apply(x, weight, bias, kernels, routes, gather, transposed, backend)


def grouped_base(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, partial: bool) -> Tensor:
    """x_s W_gᵀ for every row s and its group g: by `torch.nn.functional.grouped_mm` where that takes the operands.

    Elsewhere (float64, rows that do not begin at multiples of 16 bytes) each group has a product of its own, and a GPU
    waits for the host to read where groups begin.

    Args:
        x: `(n_rows, in_features)`, floating; any number of rows, any width.
        weight: `(n_groups, out_features, in_features)`, or with `transposed` `(n_groups, in_features, out_features)`,
            in x's dtype.
        offsets: as in `Routes`.
        transposed: how the weight is stored.
        partial: whether rows may have no group: theirs are 0.

    Returns:
        `(n_rows, out_features)`, differentiable in x and weight, to any order.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not arguments.is_plain(x):
        return registered_ops.grouped_base(x, weight, offsets, transposed, partial)
    return _grouped_base(x, weight, offsets, transposed, partial)


@arguments.without_autocast
def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    gather: bool,
    transposed: bool,
    backend: str,
) -> Tensor:
    base = [tensor for tensor in (weight, bias) if tensor is not None]
    if torch.compiler.is_compiling() or not all(map(arguments.is_plain, (x, *base))):
        return _by_ops(x, weight, bias, kernels, routes, gather, transposed, backend)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, kernels, routes, gather, transposed, backend)
    if any(tensor.requires_grad for tensor in base):
        return _by_ops(x, weight, bias, kernels, routes, gather, transposed, backend)
    return _Routed.apply(x, weight, bias, routes, gather, transposed, backend, *kernels)


def _by_ops(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    gather: bool,
    transposed: bool,
    backend: str,
) -> Tensor:
    """What `_forward` computes, in differentiable operations."""
    rows = x.index_select(0, routes.source) if gather else x
    scale = 1.0 / x.shape[-1]
    y = registered_ops.routed(rows, list(kernels), routes.offsets, scale, False, routes.partial, backend)
    if weight is not None:
        y = y + grouped_base(rows, weight, routes.offsets, transposed, routes.partial)
    return y if bias is None else y + _of_rows(bias, routes)


def _of_rows(bias: Tensor, routes: Routes) -> Tensor:
    """bias_g for every row, `(n_rows, out_features)`; 0 for those without a group."""
    rows = bias.index_select(0, routes.groups)
    return rows.masked_fill(~routes.valid()[:, None], 0) if routes.partial else rows


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    gather: bool,
    transposed: bool,
    backend: str,
) -> Tensor:
    """The base first, and the adapters added in place: their kernels add in float32 what is rounded once."""
    rows = x.index_select(0, routes.source) if gather else x
    y = None if weight is None else _grouped_base(rows, weight, routes.offsets, transposed, routes.partial)
    if bias is not None:
        y = _of_rows(bias, routes) if y is None else y.add_(_of_rows(bias, routes))
    return _update(rows, kernels, routes.offsets, 1.0 / x.shape[1], False, backend, routes.tiles, y)


def _update(
    x: Tensor,
    kernels: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    transpose: bool,
    backend: str,
    tiles: Tiles,
    out: Tensor | None = None,
) -> Tensor:
    """Σ_a x_s ΔW_{a,g}ᵀ, or transposed, added to what `out` holds."""
    for w, _ in arguments.summed(kernels):
        chosen = backends.ROUTED[_choose(backend, x, w)]
        out = chosen.product(x, w, offsets, scale=scale, transpose=transpose, out=out, **_tiles_for(chosen, tiles))
    assert out is not None, "no kernels"
    return out


def _tiles_for(chosen: backends.Backend, tiles: Tiles) -> dict[str, Tiles]:
    """The argument by which a backend of Triton's finds tiles of rows."""
    return {"tiles": tiles} if chosen.by_triton else {}


class _Routed(torch.autograd.Function):
    """`c3a_routed` for eager calls, with a base that is frozen: spectra are shared between the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        routes: Routes,
        gather: bool,
        transposed: bool,
        backend: str,
        *kernels: Tensor,
    ) -> Tensor:
        ctx.gather, ctx.transposed, ctx.backend = gather, transposed, backend
        ctx.n_features = x.shape[1]
        needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        tensors, ctx.routes = routes[:5], routes[5:]
        # x serves the kernels' gradients, the weight that of x. What is not needed is not kept.
        ctx.save_for_backward(x if any(needs_w) else None, weight if needs_x else None, *tensors, *kernels)
        return _forward(x, weight, bias, kernels, routes, gather, transposed, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, order, source, inverse, groups, offsets, *kernels = ctx.saved_tensors
        routes = Routes(order, source, inverse, groups, offsets, *ctx.routes)
        needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        rows = x.index_select(0, source) if ctx.gather and x is not None else x
        # With create_graph=True the gradients are themselves recorded: the differentiable ops compute them.
        backward = _backward_by_ops if torch.is_grad_enabled() else _backward
        scale = 1.0 / ctx.n_features
        dx, dws = backward(
            grads[0], rows, weight, kernels, routes, scale, ctx.transposed, ctx.backend, needs_x, needs_w
        )
        if dx is not None and ctx.gather:
            # A token's rows lie side by side again: their sum is the same from run to run, as no scattered one is.
            dx = dx.index_select(0, inverse).view(-1, routes.top_k, dx.shape[1]).sum(1)
        return dx, None, None, None, None, None, None, *dws


@arguments.without_autocast
def _backward(
    dy: Tensor,
    rows: Tensor | None,
    weight: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    scale: float,
    transposed: bool,
    backend: str,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx of the rows and the dw's, each spectrum computed once where a backend has both gradients in one call."""
    offsets = routes.offsets
    dx = None
    if needs_x and weight is not None:
        dx = _grouped_base(dy, weight, offsets, not transposed, routes.partial)
    dws: list[Tensor | None] = [None] * len(kernels)
    for w, members in arguments.summed(kernels):
        chosen = backends.ROUTED[_choose(backend, dy, w, backward=True)]
        tiles = _tiles_for(chosen, routes.tiles)
        wanted = [i for i in members if needs_w[i]]
        if needs_x and wanted and chosen.backward is not None:
            dx, dw = chosen.backward(dy, rows, w, offsets, scale=scale, out=dx, **tiles)
        else:
            if needs_x:
                dx = chosen.product(dy, w, offsets, scale=scale, transpose=True, out=dx, **tiles)
            if wanted:
                dw = chosen.weight_grad(dy, rows, w.shape[3], offsets, scale=scale, dtype=w.dtype, **tiles)
        for i in wanted:
            dws[i] = dw.to(kernels[i].dtype)
    return dx, dws


@arguments.without_autocast
def _backward_by_ops(
    dy: Tensor,
    rows: Tensor | None,
    weight: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    scale: float,
    transposed: bool,
    backend: str,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    dx, dws = _op_gradients(dy, rows, kernels, routes.offsets, scale, False, routes.partial, backend, needs_x, needs_w)
    if dx is not None and weight is not None:
        dx = dx + grouped_base(dy, weight, routes.offsets, not transposed, routes.partial)
    return dx, dws


def _op_gradients(
    dy: Tensor,
    x: Tensor | None,
    kernels: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    transpose: bool,
    partial: bool,
    backend: str,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the dw's of `c3a_triton::routed` in terms of the two ops: differentiable again, and traceable."""
    dx = None
    if needs_x:
        dx = registered_ops.routed(dy, list(kernels), offsets, scale, not transpose, partial, backend)
    left, right = (x, dy) if transpose else (dy, x)
    dws: list[Tensor | None] = [None] * len(kernels)
    for i, w in enumerate(kernels):
        if needs_w[i]:
            wide = torch.promote_types(w.dtype, torch.float32)
            dw = registered_ops.routed_weight_grad(left, right, offsets, w.shape[3], scale, wide, partial, backend)
            dws[i] = dw.to(w.dtype)
    return dx, dws


def _choose(backend: str, rows: Tensor, w: Tensor, *, backward: bool = False) -> str:
    """The name of the backend that computes the update of rows by a stack of w's, or its gradients."""
    stack, out_blocks, in_blocks, b = w.shape
    dtype = torch.float64 if w.dtype == torch.float64 else rows.dtype
    sizes = Sizes(rows.shape[0], in_blocks * b, out_blocks * b, b, dtype, rows.device)
    return dispatch.choose(backend, sizes, backward=backward, stack=stack)


def _tiles_of(offsets: Tensor, partial: bool) -> Tiles:
    """Tiles where there are no `Routes` that keep them."""

    def tiles(block_t: int, start: int, count: int, make: Callable[..., Tensor] = tile_table) -> Tensor:
        return make(offsets, block_t, start, count, partial)

    return tiles


@arguments.without_autocast
def _routed(
    x: Tensor,
    kernels: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    transpose: bool,
    partial: bool,
    backend: str,
) -> Tensor:
    """Implementation of `c3a_triton::routed`."""
    return _update(x, kernels, offsets, scale, transpose, backend, _tiles_of(offsets, partial))


def _routed_fake(
    x: Tensor,
    kernels: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    transpose: bool,
    partial: bool,
    backend: str,
) -> Tensor:
    w = kernels[0]
    return x.new_empty(x.shape[0], w.shape[2 if transpose else 1] * w.shape[3])


def _routed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernels, offsets, *ctx.how = inputs
    ctx.save_for_backward(x, offsets, *kernels)


def _routed_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, offsets, *kernels = ctx.saved_tensors
    needs_x, needs_w, *_ = ctx.needs_input_grad
    scale, transpose, partial, backend = ctx.how
    dx, dws = _op_gradients(dy, x, kernels, offsets, scale, transpose, partial, backend, needs_x, needs_w)
    return dx, dws, None, None, None, None, None


@arguments.without_autocast
def _routed_weight_grad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    block_size: int,
    scale: float,
    dtype: torch.dtype,
    partial: bool,
    backend: str,
) -> Tensor:
    """Implementation of `c3a_triton::routed_weight_grad`."""
    wide = torch.float64 if dtype == torch.float64 else dy.dtype
    sizes = Sizes(dy.shape[0], x.shape[1], dy.shape[1], block_size, wide, dy.device)
    chosen = backends.ROUTED[dispatch.choose(backend, sizes, backward=True, stack=offsets.shape[0] - 1)]
    tiles = _tiles_for(chosen, _tiles_of(offsets, partial))
    return chosen.weight_grad(dy, x, block_size, offsets, scale=scale, dtype=dtype, **tiles)


def _routed_weight_grad_fake(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    block_size: int,
    scale: float,
    dtype: torch.dtype,
    partial: bool,
    backend: str,
) -> Tensor:
    blocks = dy.shape[1] // block_size, x.shape[1] // block_size
    return x.new_empty(offsets.shape[0] - 1, *blocks, block_size, dtype=dtype)


def _routed_weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, offsets, _, ctx.scale, _, ctx.partial, ctx.backend = inputs
    ctx.save_for_backward(dy, x, offsets)


def _routed_weight_grad_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    # Linear in dy and in x, as that of one w is: ⟨v, weight_grad(dy, x)⟩ = ⟨dy, x_s ΔW_g(v)ᵀ⟩ = ⟨x, dy_s ΔW_g(v)⟩.
    dy, x, offsets = ctx.saved_tensors
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    rest = ctx.partial, ctx.backend
    ddy = registered_ops.routed(x, [v], offsets, ctx.scale, False, *rest) if needs_dy else None
    dx = registered_ops.routed(dy, [v], offsets, ctx.scale, True, *rest) if needs_x else None
    return ddy, dx, None, None, None, None, None, None


@arguments.without_autocast
def _grouped_base(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, partial: bool) -> Tensor:
    """Implementation of `c3a_triton::grouped_base`."""
    matrices = weight if transposed else weight.mT
    x = x.contiguous()
    if not x.shape[0] or not _fits(x) or not _fits(matrices):
        return _by_group(x, matrices, offsets)
    y = grouped_mm(x, matrices, offs=offsets[1:])
    if partial:
        rows = torch.arange(y.shape[0], device=y.device)
        y.masked_fill_(((rows < offsets[0]) | (rows >= offsets[-1]))[:, None], 0)
    return y.contiguous()  # it pads odd rows


def _fits(x: Tensor) -> bool:
    """Whether `grouped_mm` takes this operand: of 16 or 32 bits, its rows or its columns at multiples of 16 bytes."""
    strides, per_row = x.stride()[-2:], 16 // x.element_size()
    apart, extent = (strides[0], x.shape[-1]) if strides[1] == 1 else (strides[1], x.shape[-2])
    is_dense = 1 in strides and apart >= extent and apart % per_row == 0
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and is_dense and x.data_ptr() % 16 == 0


def _by_group(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], matrices.shape[2])
    for g, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first < last:
            y[first:last] = x[first:last] @ matrices[g]
    return y


def _grouped_base_fake(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, partial: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


def _grouped_base_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, ctx.transposed, ctx.partial = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offsets)


def _grouped_base_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, offsets = ctx.saved_tensors
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = grouped_base(dy, weight, offsets, not ctx.transposed, ctx.partial) if needs_x else None
    left, right = (x, dy) if ctx.transposed else (dy, x)
    dweight = registered_ops.grouped_outer(left, right, offsets, ctx.partial) if needs_weight else None
    return dx, dweight, None, None, None


@arguments.without_autocast
def _grouped_outer(dy: Tensor, x: Tensor, offsets: Tensor, partial: bool) -> Tensor:
    """Implementation of `c3a_triton::grouped_outer`: dyᵀ x of each group, `(n_groups, out_features, in_features)`."""
    outer = x.new_zeros(offsets.shape[0] - 1, dy.shape[1], x.shape[1])
    for g, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first < last:
            torch.mm(dy[first:last].T, x[first:last], out=outer[g])
    return outer


def _grouped_outer_fake(dy: Tensor, x: Tensor, offsets: Tensor, partial: bool) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1])


def _grouped_outer_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, offsets, ctx.partial = inputs
    ctx.save_for_backward(dy, x, offsets)


def _grouped_outer_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    dy, x, offsets = ctx.saved_tensors
    ddy = grouped_base(x, v, offsets, False, ctx.partial)
    return ddy, grouped_base(dy, v, offsets, True, ctx.partial), None, None


register(
    "routed",
    "(Tensor x, Tensor[] kernels, Tensor offsets, float scale, bool transpose, bool partial, str backend) -> Tensor",
    _routed,
    _routed_fake,
    _routed_setup,
    _routed_backward,
)
register(
    "routed_weight_grad",
    "(Tensor dy, Tensor x, Tensor offsets, int block_size, float scale, ScalarType dtype, bool partial, str backend)"
    " -> Tensor",
    _routed_weight_grad,
    _routed_weight_grad_fake,
    _routed_weight_grad_setup,
    _routed_weight_grad_backward,
)
register(
    "grouped_base",
    "(Tensor x, Tensor weight, Tensor offsets, bool transposed, bool partial) -> Tensor",
    _grouped_base,
    _grouped_base_fake,
    _grouped_base_setup,
    _grouped_base_backward,
)
register(
    "grouped_outer",
    "(Tensor dy, Tensor x, Tensor offsets, bool partial) -> Tensor",
    _grouped_outer,
    _grouped_outer_fake,
    _grouped_outer_setup,
    _grouped_outer_backward,
)
