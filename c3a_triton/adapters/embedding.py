"""`C3AEmbedding`: an embedding and its C3A adapters, of whose update only the rows that are looked up are made."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.bases.linear_like import Geometry
from c3a_triton.bases.probe import behaviour
from c3a_triton.bases.weights import stored_tensor
from c3a_triton.errors import ConfigError
from c3a_triton.operator.dense import add_circulant_, circulant_matrix

from .layer import C3ALinear

__all__ = ["C3AEmbedding", "fixed_scale", "scaled"]


@public
class C3AEmbedding(C3ALinear):
    """An `nn.Embedding` with C3A adapters: y[t] = s · (E[v_t] + Σ ΔE_a[v_t]), where s is 1 for torch's own.

    ΔE [num_embeddings, embedding_dim] is the ΔW of the linear layer that has E as its weight, so that an output layer
    tied to E could take the same kernel: ΔE[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b] with scale =
    1 / embedding_dim. b divides embedding_dim alone: vocabularies are of any size (50257), so the last of the
    ⌈num_embeddings / b⌉ rows of blocks is cut off where the vocabulary ends. The row of `padding_idx` stays as it is.

    Classes that scale what they look up (Gemma's, BART's) scale the update too, as in PEFT: ΔE is what merging adds
    to E. s is the base layer's `embed_scale`, or else what a trial of its forward shows.

    A row of ΔE is read from w by index; nothing of the size of E is made. There is no choice of backend, and PEFT has
    no such layer: it cannot load these adapters.

    Args, attributes and errors are those of `C3ALinear`; in_features is embedding_dim, out_features num_embeddings.

    Raises:
        ConfigError: besides, an embedding with `max_norm`, which rewrites its weight as it is read, or
            `scale_grad_by_freq`, which the adapter's gradient would not follow.
    """

    kind = "embedding"
    has_backends = False

    def _prepare(self, backend: str, layer_name: str, sizes: Geometry | None = None) -> None:
        super()._prepare(backend, layer_name, sizes)
        base: Any = self.get_base_layer()
        if base.max_norm is not None or base.scale_grad_by_freq:
            what = "max_norm, which rewrites its weight as it is read" if base.max_norm else "scale_grad_by_freq"
            raise ConfigError(f"{self._label}: an embedding cannot be adapted with {what}")
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features
        self.padding_idx: int | None = base.padding_idx
        # None: the base layer's attribute, which is read in each call, as the base layer reads it.
        self._scale = fixed_scale(base)

    def _delta(self, x: Tensor, kernel: Tensor, backend: str) -> Tensor:
        b = kernel.shape[-1]
        shifts = torch.arange(b, device=x.device) - (x % b).unsqueeze(-1)
        # [..., b, in_blocks]: two indices with a slice between them put their own axes first.
        rows = kernel[(x // b).unsqueeze(-1), :, shifts % b]
        delta = scaled(rows.transpose(-1, -2).flatten(-2) / self.in_features, self.get_base_layer(), self._scale)
        return delta if self.padding_idx is None else delta.masked_fill((x == self.padding_idx).unsqueeze(-1), 0.0)

    def _delta_weight(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        delta = circulant_matrix(kernel, dtype=dtype)[: self.out_features]
        if self.padding_idx is not None:
            delta[self.padding_idx] = 0
        return delta

    def _add_delta_(self, weight: Tensor, names: Iterable[str]) -> None:
        kernels = [self._kernel_on(name, weight.device) for name in names]
        padding = None if self.padding_idx is None else weight[self.padding_idx].clone()
        # A last row of blocks that the vocabulary cuts off is added in a matrix that has room for it.
        step = math.lcm(*(w.shape[-1] for w in kernels))
        rows = -(-self.out_features // step) * step
        tall = weight if rows == self.out_features else F.pad(weight, (0, 0, 0, rows - self.out_features))
        add_circulant_(tall, [F.pad(w, (0, 0, 0, 0, 0, rows // w.shape[-1] - w.shape[0])) for w in kernels])
        if tall is not weight:
            weight.copy_(tall[: self.out_features])
        if padding is not None:
            weight[self.padding_idx] = padding


def fixed_scale(base: nn.Module) -> float | None:
    """What an embedding multiplies its rows by; None where its `embed_scale` says so, which each call reads."""
    return None if _has_scale(base) else behaviour(base).scale


def scaled(rows: Tensor, base: Any, scale: float | None) -> Tensor:
    """Rows times what an embedding multiplies its own by; `scale` is what `fixed_scale` said."""
    if scale is not None:
        return rows if scale == 1.0 else rows * scale
    if not isinstance(base.embed_scale, Tensor):
        return rows * base.embed_scale
    # Gemma rounds its scale to the weight's dtype, as all that are kept as tensors.
    return rows * stored_tensor(base, "embed_scale").to(rows.device, base.weight.dtype)


def _has_scale(base: Any) -> bool:
    """Whether a base layer's `embed_scale` is what it multiplies by: its forward says so, or cannot tell."""
    scale = getattr(base, "embed_scale", None)
    if not isinstance(scale, (int, float)) and not (isinstance(scale, Tensor) and scale.numel() == 1):
        return False
    found = behaviour(base)
    on_meta = isinstance(scale, Tensor) and scale.is_meta
    return found.kind == "other" or on_meta or math.isclose(float(scale), found.scale, rel_tol=1e-6)
