"""Host side of `kernels/fft.py`: the product by transforms of blocks, in three launches a direction.

    forward     spectra (w ‖ x)       → mix            → results (out)
    backward    spectra (w ‖ dy ‖ x)  → mix and outer  → results (dw ‖ dx)

spectra    w as matrices, x [T, n·b] as [SLOTS, T, 2·S·n]: products with the basis of Q values, b = S·Q
mix        per slot [T, 2·S·n] · [2·S·n, 2·S·m]; outer sums dyᵀx, per slot [2·S·m, T] · [T, 2·S·n]
results    the transposes of the transforms, with the epilogue

Mix and outer are two launches where one would spill registers (`tiles.mixes_and_sums`). Tokens are worked off in chunks
that use the same scratch memory (`specs.scratch_bytes`); x is transformed whole where its spectrum takes no more than
half of that. How blocks of each size and dtype are transformed, `fft_bases.py` says.

The spectrum of w is computed in float32 in every call, because w may have changed, and rounded once to the dtype of
the other spectra. Whole spectra of x, and those of frozen w, may outlive a call: `spectra.py` decides.

What a call launches depends on sizes and dtypes alone (`fft_plans.py`), and a repeated call finds it by one look-up.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import spectra
from . import fft_bases, fft_plans, specs
from .fft_plans import GradientPlan, Plan, SpectraLaunches
from .plans import planned
from .specs import Spec

__all__ = [
    "OF_16BIT",
    "correlate",
    "fft_backward",
    "fft_backward_of_spectrum",
    "fft_product",
    "fft_weight_grad",
    "kept_spectrum",
    "multiply",
    "planned_backward",
    "planned_product",
]


# How float32 operands that stand for 16-bit tensors are multiplied.
OF_16BIT = "tf32"


def fft_product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    source: spectra.Source | None = None,
) -> Tensor:
    """x ΔWᵀ (or x ΔW) by transforms of blocks; arguments, result and errors are those of `direct.direct_product`.

    With `source`, which says whose rows x has, its spectrum may be shared with other calls.
    """
    run = planned_product(
        specs.spec(x),
        specs.spec(w),
        None if out is None else specs.spec(out),
        None if bias is None else specs.spec(bias),
        transpose,
        specs.precision(x.dtype),
        source is not None,
    )
    return run(x, w, bias, out, scale, source)


def fft_weight_grad(
    dy: Tensor,
    x: Tensor,
    block_size: int,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
    source: spectra.Source | None = None,
) -> Tensor:
    """dw [m, n, b] from the spectra of dy and x; arguments and errors are those of `weight_grad.weight_grad`.

    The same from run to run: tokens are summed in an order that depends on shapes only. `source` as in `fft_product`.
    """
    precision = specs.precision(x.dtype)
    _, shape, run = _gradient_plan(specs.spec(dy), specs.spec(x), None, None, block_size, precision, source is not None)
    dw = torch.empty(shape, dtype=torch.float32, device=x.device)
    run(specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x), None, None, dw, scale, source)
    return dw if dtype == torch.float32 else dw.to(dtype)


def fft_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    source: spectra.Source | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients of `fft_product(x, w)`, dy transformed once: dx (added to a given `out`) and dw [m, n, b] float32.

    `source` as in `fft_product`.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    run = planned_backward(
        specs.spec(dy),
        specs.spec(x),
        specs.spec(w),
        None if out is None else specs.spec(out),
        specs.precision(x.dtype),
        source is not None,
    )
    return run(dy, x, w, out, scale, source)


def kept_spectrum(x: Tensor, block_size: int) -> Tensor | None:
    """The spectrum of x [*, features] that `fft_product` has left for others, if it is whole and has x's itemsize."""
    if fft_bases.spectrum_itemsize(x.dtype, block_size) != 2:  # float32 ones of 16-bit x would be twice as large
        return None
    features = x.shape[-1]
    return spectra.kept_input(
        x, fft_plans.x_what(x.dtype, OF_16BIT, block_size, x.numel() // features, features // block_size)
    )


def fft_backward_of_spectrum(
    dy: Tensor, spectrum: Tensor, w: Tensor, *, scale: float, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """dx (None unless `needs_x`) and dw [m, n, b] float32 from what `kept_spectrum` returned in place of x."""
    _, n, b = w.shape
    shape, dw_shape, run = _gradient_plan(
        specs.spec(dy),
        Spec(torch.Size((dy.shape[0], n * b)), dy.dtype, dy.device),
        specs.spec(w) if needs_x else None,
        None,
        b,
        specs.precision(dy.dtype),
        True,
    )
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device) if needs_x else None
    dw = torch.empty(dw_shape, dtype=torch.float32, device=dy.device)
    run(specs.with_contiguous_rows(dy), spectrum, w if needs_x else None, dx, dw, scale, None, True)
    return dx, dw


def multiply(
    plan: Plan,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scale: float,
    source: spectra.Source | None,
) -> None:
    """Write a product, as planned."""
    y = plan.y()  # as the other memory in one go: code that has just run is in the cache
    blocks, z = _first_spectra(plan, w, None, None, x, source)
    for chunk in plan.chunks:
        rows = chunk.rows
        if chunk.spectra:
            _launch_spectra(chunk.spectra, None, None, None, None, x[rows], z)
        chunk.mix(z_ptr=z[:, chunk.start :] if chunk.start else z, blocks_ptr=blocks, y_ptr=y)
        chunk.results(
            y_ptr=y,
            bias_ptr=bias,
            out_ptr=out if rows is None else out[rows],
            scale=scale * plan.gain,
            stride_out_t=out.stride(0),
        )


def correlate(
    of_dy: GradientPlan,
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    dx: Tensor | None,
    dw: Tensor,
    scale: float,
    source: spectra.Source | None,
    x_is_spectrum: bool = False,
) -> None:
    """Write dw and, with w, dx, as planned."""
    plan = of_dy.plan
    y = None if dx is None else plan.y()
    g, sums = of_dy.g(), of_dy.sums()
    blocks, z = _first_spectra(plan, w, dy, g, x, source, x_is_spectrum)
    for chunk in plan.chunks:
        rows = chunk.rows
        if chunk.spectra:
            _launch_spectra(chunk.spectra, None, None, dy[rows], g, None if plan.whole else x[rows], z)
        chunk.mix(z_ptr=g, blocks_ptr=blocks, y_ptr=y)
        chunk.outer(
            g_ptr=g,
            z_ptr=z[:, chunk.start :] if chunk.start else z,
            sums_ptr=sums,
            blocks_ptr=blocks if of_dy.mixes else None,
            y_ptr=y if of_dy.mixes else None,
        )
        chunk.results(
            y_ptr=y,
            out_ptr=dx if dx is None or rows is None else dx[rows],
            sums_ptr=sums if chunk.is_last else None,
            dw_ptr=dw if chunk.is_last else None,
            scale=scale * plan.gain,
            stride_out_t=0 if dx is None else dx.stride(0),
        )


def _first_spectra(
    plan: Plan,
    w: Tensor | None,
    dy: Tensor | None,
    g: Tensor | None,
    x: Tensor,
    source: spectra.Source | None,
    x_is_spectrum: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """w's matrices and the spectrum of x, whole or of the first chunk; that of the first chunk of dy is written to g.

    What is known is not computed again, and the rest is computed in one launch.
    """
    blocks = new_w = keep_w = keep_z = new_x = None
    z = x if x_is_spectrum else None
    if w is not None:
        blocks, is_new, keep_w = spectra.of_weight(w, plan.w_what, plan.blocks)
        new_w = w.contiguous() if is_new else None
    if plan.whole and source is not None:
        z, keep_z = spectra.of_input(source, plan.x_what)
    rows = plan.chunks[0].rows
    if z is None:
        z = plan.z()
        new_x = x if plan.whole or rows is None else x[rows]
    if dy is not None and rows is not None:
        dy = dy[rows]
    if new_w is not None or dy is not None or new_x is not None:
        _launch_spectra(plan.spectra, new_w, blocks, dy, g, new_x, z)
    if keep_w is not None and blocks is not None:
        keep_w(blocks)
    if keep_z is not None:
        keep_z(z)
    return blocks, z


def _launch_spectra(
    launches: SpectraLaunches,
    w: Tensor | None,
    blocks: Tensor | None,
    dy: Tensor | None,
    g: Tensor | None,
    x: Tensor | None,
    z: Tensor,
) -> None:
    """The spectra of those that are there."""
    first, first_z, other, other_z = (x, z, None, None) if dy is None else (dy, g, x, z)
    launches[w is not None, x is not None](
        w_ptr=w,
        blocks_ptr=None if w is None else blocks,
        x_ptr=first,
        z_ptr=None if first is None else first_z,
        stride_x_t=0 if first is None else first.stride(0),
        other_ptr=other,
        other_z_ptr=None if other is None else other_z,
        stride_other_t=0 if other is None else other.stride(0),
    )


@planned
def planned_product(
    x: Spec, w: Spec, out: Spec | None, bias: Spec | None, transpose: bool, precision: str, shares: bool
) -> Callable[..., Tensor]:
    """What computes `fft_product` of such operands."""
    shape = specs.product_shape(x, w, out, bias, transpose)
    (n_tokens, _), dtype, device = x
    if n_tokens == 0:
        return lambda x, w, bias, out, *rest: specs.new_or_given(shape, x, out)
    given = bias is not None, out is not None
    plan = fft_plans.product_plan(
        device, dtype, n_tokens, w.shape, transpose, *given, _precision(dtype, precision), shares
    )
    write = specs.on_device(device, functools.partial(multiply, plan))

    def run(
        x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None, scale: float, source: spectra.Source | None
    ) -> Tensor:
        out = specs.new_or_given(shape, x, out)
        write(specs.with_contiguous_rows(x), w, None if bias is None else bias.contiguous(), out, scale, source)
        return out

    return run


@planned
def planned_backward(
    dy: Spec, x: Spec, w: Spec, out: Spec | None, precision: str, shares: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes `fft_backward` of such operands."""
    shape, dw_shape, write = _gradient_plan(dy, x, w, out, w.shape[2], precision, shares)

    def run(
        dy: Tensor, x: Tensor, w: Tensor, out: Tensor | None, scale: float, source: spectra.Source | None
    ) -> tuple[Tensor, Tensor]:
        dx, dw = specs.new_or_given(shape, dy, out), w.new_empty(*dw_shape)
        write(specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x), w, dx, dw, scale, source)
        return dx, dw

    return run


@planned
def _gradient_plan(
    dy: Spec, x: Spec, w: Spec | None, out: Spec | None, b: int, precision: str, shares: bool
) -> tuple[tuple[int, int], tuple[int, int, int], Callable[..., object]]:
    """The shapes of dx (where w is given) and dw, and what writes them."""
    dx_shape = (0, 0) if w is None else specs.product_shape(dy, w, out, None, transpose=True)
    shape = specs.weight_grad_shape(dy, x, b)
    (n_tokens, _), dtype, device = x
    if n_tokens == 0 or 0 in shape:
        return dx_shape, shape, lambda dy, x, w, dx, dw, *rest: dw.zero_()
    given = w is not None, out is not None
    plan = fft_plans.gradient_plan(device, dtype, n_tokens, shape, *given, _precision(dtype, precision), shares)
    return dx_shape, shape, specs.on_device(device, functools.partial(correlate, plan))


def _precision(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else OF_16BIT
