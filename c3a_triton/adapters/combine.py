"""Several adapters' kernels of one layer as one kernel: a weighted sum, or one of PEFT's combinations."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from c3a_triton.bases.sharded import gathered
from c3a_triton.bases.weights import stored_tensor
from c3a_triton.errors import ConfigError, ShapeError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX

from .layer import C3ALinear
from .targets import Target

__all__ = ["combination", "combined"]

Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_ELECTING = ("ties", "dare_ties")
_SIGN_METHODS = ("total", "frequency")


def combination(combination_type: str, density: float | None = None, majority_sign_method: str = "total") -> Combine:
    """A function of kernels [m, n, b] and as many weights that gives one kernel [m, n, b].

    `"linear"` is Σ weight · w: ΔW is linear in w, so it is exact. TIES (arXiv 2306.01708), DARE (arXiv 2311.03099) and
    pruning by magnitude are `peft.utils.merge_utils`', with a kernel as the task's tensor.

    Args:
        combination_type: `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"` or `"magnitude_prune"`.
        density: the share of elements that pruning leaves, in (0, 1]; not for `"linear"`.
        majority_sign_method: how TIES elects a sign, `"total"` or `"frequency"`.

    Raises:
        ConfigError: a value that cannot be used, or a combination that needs PEFT where there is none.
    """
    if combination_type != "linear" and combination_type not in _PRUNING:
        raise ConfigError(f"combination_type must be one of {('linear', *_PRUNING)}, got {combination_type!r}")
    if majority_sign_method not in _SIGN_METHODS:
        raise ConfigError(f"majority_sign_method must be one of {_SIGN_METHODS}, got {majority_sign_method!r}")
    if combination_type == "linear":
        if density is not None:
            raise ConfigError(f"combination_type='linear' prunes nothing: leave density={density!r} out")
        return _weighted_sum
    if density is None or not 0 < density <= 1:
        raise ConfigError(
            f"combination_type={combination_type!r} needs density, the share of elements to keep, in (0, 1], "
            f"got {density!r}"
        )
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ConfigError(
            f"combination_type={combination_type!r} is PEFT's: pip install peft, or use 'linear'"
        ) from error
    options: dict[str, Any] = {"density": density}
    if combination_type in _ELECTING:
        options["majority_sign_method"] = majority_sign_method
    combine = getattr(merge_utils, combination_type)

    def combined(kernels: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return combine(list(kernels), _factors(weights, kernels[0]), **options)

    return combined


def _weighted_sum(kernels: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.tensordot(_factors(weights, kernels[0]), torch.stack(list(kernels)), dims=1)


def _factors(weights: Sequence[float], kernel: Tensor) -> Tensor:
    largest = torch.finfo(torch.float32).max
    if not all(isinstance(weight, (int, float)) and abs(weight) <= largest for weight in weights):
        raise ConfigError(f"weights must be finite numbers, got {list(weights)!r}")
    return torch.tensor(weights, dtype=kernel.dtype, device=kernel.device)


def combined(
    layers: Iterable[tuple[str, C3ALinear]],
    names: Sequence[str],
    weights: Sequence[float],
    combine: Combine,
    chosen_by: str,
) -> tuple[dict[str, Tensor], list[Target]]:
    """The kernels of adapters combined in each layer that one of them has.

    Args:
        layers: (name, layer) of the adapted layers.
        names: the adapters.
        weights: as many factors, of the strengths that the adapters have in a layer.
        combine: what `combination` gave.
        chosen_by: what is said to have decided on the block size.

    Returns:
        The kernels under the names of a file, and the layers, for the new adapter.

    Raises:
        ConfigError: a weight that is not finite.
        ShapeError: a layer in which the adapters' block sizes differ.
    """
    tensors, targets = {}, []
    for layer_name, layer in layers:
        present = [name for name in names if name in layer.c3a_kernel]
        kernels = {name: gathered(stored_tensor(layer.c3a_kernel, name)) for name in present}
        if not kernels:
            continue
        sizes = {name: kernel.shape[-1] for name, kernel in kernels.items()}
        if len(set(sizes.values())) > 1:
            raise ShapeError(
                f"{layer_name}: the adapters' block sizes differ, {sizes}, and a circulant block of one size is "
                "none of another. Let them be active together, which sums them (set_adapter), or merge them"
            )
        pairs = zip(names, weights, strict=True)
        used = [weight * layer.scaling[name] for name, weight in pairs if name in kernels]
        # After a cast of the model older kernels have another dtype than those added since: the widest computes.
        dtype = functools.reduce(torch.promote_types, (kernel.dtype for kernel in kernels.values()), torch.float32)
        tensors[layer_name + KERNEL_SUFFIX] = combine([gathered(w).detach().to(dtype) for w in kernels.values()], used)
        targets.append(Target(layer_name, layer, layer._geometry, sizes[next(iter(sizes))], chosen_by, layer.parameter))
    return tensors, targets
