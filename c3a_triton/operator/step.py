"""One product and its gradients, by whichever backend is chosen: what the eager node and the custom ops compute.

Nothing here is recorded by autograd.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import arguments, backends, dense, dispatch, spectra
from .cost_model import Sizes
from .launch import decode, fft, specs
from .launch.plans import planned
from .launch.specs import Spec

__all__ = ["as_own", "base_grads", "choose", "linear", "linear_backward", "rows_of", "spectrum_of", "weight_grad"]


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    transpose: bool,
    backend: str,
    source: Tensor | None = None,
    keep: bool = False,
) -> Tensor:
    """Implementation of `c3a_triton::linear`, autocast being off.

    With `source`, the x of eager code, its spectrum may be shared: compiled code, which calls the op, writes into the
    same tensors again without counting versions. With `keep` it is shared however small, for `spectrum_of`.
    """
    # The adapters first, so that the base GEMM's epilogue adds their sum; for a few tokens both in one kernel.
    rows = rows_of(x)
    if backend == "fold":
        if weight is not None:
            weight, kernels = dense.folded_weight(weight, kernels, scale), ()
        else:
            backend = "auto"  # a term of a derivative without the weight: nothing to fold into
    summed = arguments.summed(kernels)
    y = None
    if weight is not None and not transpose and len(summed) == 1 and decode.decodes(rows, weight):
        w = summed[0][0]
        if choose(backend, rows, w) == "direct":
            y, weight, summed = decode.decode_linear(rows, weight, w, bias, scale=scale), None, []
    for w, members in summed:
        first = bias if y is None else None
        is_shared = source is not None and (keep or source.nbytes >= spectra.LEAST_SHARED)
        shared = (source, kernels[members[0]]) if is_shared else None
        run = _planned_product(
            backend,
            dispatch.situation(backend, rows.device),
            specs.spec(rows),
            specs.spec(w),
            None if y is None else specs.spec(y),
            None if first is None else specs.spec(first),
            transpose,
            specs.precision(rows.dtype),
            shared is not None,
        )
        y = run(rows, w, first, y, scale, shared)
    if weight is not None:
        matrix = weight if transpose else weight.t()
        if y is not None:
            y.addmm_(rows, matrix)
        else:
            y = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    assert y is not None, "neither a weight nor a kernel"
    # In place, as a view would not be a tensor of its own for autograd, and `as_own` takes longer.
    return y if x.dim() == 2 else y.contiguous().resize_(*x.shape[:-1], y.shape[1])


def as_own(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Not a view for autograd: what a Function returns as a view cannot be modified in place by its user."""
    return torch.ops.aten._unsafe_view.default(y, shape)


def rows_of(x: Tensor) -> Tensor:
    """x [*, features] as [tokens, features]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@arguments.without_autocast
def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    backend: str,
    needs_x: bool,
    needs_w: Sequence[bool],
    x_is_spectrum: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the dw's of `linear` (not transposed), each spectrum computed once where a backend has spectra.

    With `x_is_spectrum`, what is given as x is what `spectrum_of` returned.
    """
    if x_is_spectrum:
        assert x is not None
        return _backward_of_spectrum(dy, x, weight, kernels, scale, needs_x, needs_w)
    if backend == "fold":
        # The folded weight is built again: kept from the forward it would be as large as the weight, in every layer.
        dx = linear(dy, weight, None, kernels, scale, True, backend) if needs_x else None
        return dx, linear_backward(dy, x, None, kernels, scale, "auto", False, needs_w)[1]
    rows = rows_of(dy)
    x_rows = None if x is None else rows_of(x)
    dx = None
    dws: list[Tensor | None] = [None] * len(kernels)
    for w, members in arguments.summed(kernels):
        wanted = [i for i in members if needs_w[i]]
        shared = (x, kernels[members[0]]) if x is not None and x.nbytes >= spectra.LEAST_SHARED else None
        if needs_x and wanted:
            assert x_rows is not None
            run = _planned_backward(
                backend,
                dispatch.situation(backend, rows.device),
                specs.spec(rows),
                specs.spec(x_rows),
                specs.spec(w),
                None if dx is None else specs.spec(dx),
                specs.precision(rows.dtype),
                shared is not None,
            )
            dx, dw = run(rows, x_rows, w, dx, scale, shared)
        else:
            chosen = backends.BY_NAME[choose(backend, rows, w, backward=True)]
            if needs_x:
                dx = chosen.product(rows, w, scale=scale, transpose=True, bias=None, out=dx)
            if wanted:
                more = {"source": shared} if chosen.shares_spectra else {}
                dw = chosen.weight_grad(rows, x_rows, w.shape[2], scale=scale, dtype=w.dtype, **more)
        for i in wanted:
            dws[i] = dw if dw.dtype == kernels[i].dtype else dw.to(kernels[i].dtype)
    if needs_x:
        if weight is not None:
            dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
        assert dx is not None
        dx = dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, dws


def spectrum_of(x: Tensor, kernels: Sequence[Tensor], backend: str) -> Tensor | None:
    """The spectrum of x that `linear` has just left with these kernels, where it can stand for x; or None."""
    if backend == "fold" or len({w.shape[2] for w in kernels}) != 1:
        return None
    widest = max(kernels, key=Tensor.element_size)  # as their sum is
    # Another layer may have left one too.
    return fft.kept_spectrum(x, widest.shape[2]) if choose(backend, rows_of(x), widest) == "fft" else None


def _backward_of_spectrum(
    dy: Tensor,
    spectrum: Tensor,
    weight: Tensor | None,
    kernels: Sequence[Tensor],
    scale: float,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`linear_backward` where x is not there, but its spectrum."""
    ((w, _),) = arguments.summed(kernels)
    rows = rows_of(dy)
    dx, dw = fft.fft_backward_of_spectrum(rows, spectrum, w, scale=scale, needs_x=needs_x)
    if dx is not None:
        dx = dx if weight is None else dx.addmm_(rows, weight)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, [dw.to(kernel.dtype) if needed else None for kernel, needed in zip(kernels, needs_w, strict=True)]


@arguments.without_autocast
def weight_grad(dy: Tensor, x: Tensor, block_size: int, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    """Implementation of `c3a_triton::weight_grad`."""
    backend = "auto" if backend == "fold" else backend
    dy, x = rows_of(dy), rows_of(x)
    wide = torch.float64 if dtype == torch.float64 else dy.dtype
    sizes = Sizes(dy.shape[0], x.shape[1], dy.shape[1], block_size, wide, dy.device)
    chosen = backends.BY_NAME[dispatch.choose(backend, sizes, backward=True)]
    return chosen.weight_grad(dy, x, block_size, scale=scale, dtype=dtype)


def base_grads(
    dy: Tensor, x: Tensor | None, needs_weight: bool, needs_bias: bool, transpose: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the base layer's own parameters, in plain torch: right at any order."""
    if not (needs_weight or needs_bias):
        return None, None
    dweight = dbias = None
    rows = rows_of(dy)
    if needs_weight:
        assert x is not None
        x_rows = rows_of(x)
        dweight = x_rows.T @ rows if transpose else rows.T @ x_rows
    if needs_bias:
        dbias = rows.sum(0)
    return dweight, dbias


@planned
def _planned_product(
    backend: str,
    situation: tuple[bool, str | None],
    x: Spec,
    w: Spec,
    out: Spec | None,
    bias: Spec | None,
    transpose: bool,
    precision: str,
    shares: bool,
) -> Callable[..., Tensor]:
    """What computes the product of such operands in this situation."""
    chosen = backends.BY_NAME[choose(backend, x, w)]
    if chosen.planned_product is not None:
        return chosen.planned_product(x, w, out, bias, transpose, precision, shares)
    return lambda x, w, bias, out, scale, source: chosen.product(
        x, w, scale=scale, transpose=transpose, bias=bias, out=out
    )


@planned
def _planned_backward(
    backend: str,
    situation: tuple[bool, str | None],
    dy: Spec,
    x: Spec,
    w: Spec,
    out: Spec | None,
    precision: str,
    shares: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes both gradients of such operands in this situation."""
    chosen = backends.BY_NAME[choose(backend, dy, w, backward=True)]
    if chosen.planned_backward is not None:
        return chosen.planned_backward(dy, x, w, out, precision, shares)

    def run(
        dy: Tensor, x: Tensor, w: Tensor, out: Tensor | None, scale: float, source: spectra.Source | None
    ) -> tuple[Tensor, Tensor]:
        if chosen.backward is not None:
            return chosen.backward(dy, x, w, scale=scale, out=out)
        dx = chosen.product(dy, w, scale=scale, transpose=True, bias=None, out=out)
        return dx, chosen.weight_grad(dy, x, w.shape[2], scale=scale, dtype=w.dtype)

    return run


def choose(backend: str, rows: Tensor | Spec, w: Tensor | Spec, *, backward: bool = False) -> str:
    """The name of the backend that multiplies rows by ΔW, or computes the gradients of that."""
    out_blocks, in_blocks, b = w.shape
    dtype = torch.float64 if w.dtype == torch.float64 else rows.dtype
    # As the constructor does, in one frame less.
    sizes = tuple.__new__(Sizes, (rows.shape[0], in_blocks * b, out_blocks * b, b, dtype, rows.device))
    return dispatch.choose(backend, sizes, backward=backward)
