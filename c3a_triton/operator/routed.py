"""The operator over a stack of w's, one for each group of rows, as the experts of a layer have.

Two custom ops, closed under differentiation as those of `autograd` are:

    c3a_triton::routed              x_s ΔW_gᵀ, g being the group of row s   (or, transposed, x_s ΔW_g)
    c3a_triton::routed_weight_grad  dw of every ΔW_g
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from . import fourier_routed, reference
from .routes import Routes

__all__ = ["BACKENDS", "Backend", "c3a_routed", "grouped_base"]


class Backend(NamedTuple):
    """One way of computing the update; the arguments are those of `fourier_routed`'s functions.

    Those of Triton's take one more, `tiles`: `Routes.tiles`.
    """

    product: Callable[..., Tensor]
    weight_grad: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]]
    by_triton: bool = True


# launch/routed.py's go here: "direct", "fft".
BACKENDS = {
    "reference": Backend(
        reference.routed_product, reference.routed_weight_grad, reference.routed_backward, by_triton=False
    ),
    "torch": Backend(
        fourier_routed.product, fourier_routed.weight_grad, fourier_routed.backward, by_triton=False
    ),
}


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
        x: rows in the order of the groups, `(n_rows, in_features)`; with `gather` the tokens, `(n_tokens, in_features)`.
        weight: `(n_groups, out_features, in_features)`, or with `transposed` `(n_groups, in_features, out_features)`,
            in x's dtype; None leaves the adapters' part alone.
        bias: `(n_groups, out_features)` in x's dtype, or None.
        kernels: one stack of w's or more, `(n_groups, out_blocks, in_blocks, b)`; block sizes may differ. ΔW has the
            scale 1 / in_features.
        routes: the groups of the rows.
        gather: row s is `x[routes.source[s]]`; it is never kept for the backward pass.
        transposed: how the weight is stored.
        backend: how the adapters' part is computed: `"auto"` or a name of `BACKENDS`.

    Returns:
        `(n_rows, out_features)` in x's dtype. Rows without a group are 0, as are their gradients.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, `"expand"` or `"fold"`, which would write out dense weights for all groups, one
            that cannot run here, or a transform of torch.func, for which this operator has no rules.
    """
    raise NotImplementedError


def grouped_base(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, partial: bool) -> Tensor:
    """x_s W_gᵀ, row by row: `torch.nn.functional.grouped_mm` where it computes that, a product for each group elsewhere.

    Args:
        x: `(n_rows, in_features)`, floating; any number of rows, any width.
        weight: `(n_groups, out_features, in_features)`, or with `transposed` `(n_groups, in_features, out_features)`.
        offsets: as in `Routes`.
        transposed: how the weight is stored.
        partial: whether rows may have no group: theirs are 0.

    Returns:
        `(n_rows, out_features)`, differentiable in x and weight.
    """
    raise NotImplementedError
