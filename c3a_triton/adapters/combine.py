"""Several adapters' kernels of one layer as one kernel: a weighted sum, or one of PEFT's combinations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from c3a_triton.errors import ConfigError

__all__ = ["combination"]

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
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights must be finite numbers, got {list(weights)!r}")
    return torch.tensor(weights, dtype=kernel.dtype, device=kernel.device)
