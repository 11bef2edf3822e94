"""The cost model: what a product takes on a GPU, predicted from counted bytes, operations and launches."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..errors import BackendError
from .launch.fft_bases import spectrum_itemsize, taken_apart
from .launch.tiles import SMALL_T

__all__ = ["CEILINGS", "Ceilings", "Sizes", "base_seconds", "predicted_seconds"]


class Sizes(NamedTuple):
    """A layer and a call of it, as far as times depend on them."""

    n_tokens: int
    in_features: int
    out_features: int
    b: int
    """The block size; 0 of a layer without adapters."""
    dtype: torch.dtype
    """The widest among the operands."""
    device: torch.device = torch.device("cuda")


class Ceilings(NamedTuple):
    """What a card can do, as the cost model sees it: bytes and FLOPs per second, seconds per launch."""

    bandwidth: float
    cublas_flops: Mapping[int, float]  # by bytes per element
    triton_flops: Mapping[int, float]  # the same, of a plain GEMM in Triton
    tf32_flops: float
    launch_seconds: float


# About what others report of an H200's copies and of cuBLAS on it, and estimates of what a plain Triton GEMM and
# cuFFT's neighbours reach: none of it was measured with this library. Other cards have other ceilings but similar
# ratios, and only ratios decide.
CEILINGS = Ceilings(
    bandwidth=4.2e12,
    cublas_flops={2: 650e12, 4: 40e12},  # tensor cores in 16 bits, CUDA cores in float32
    triton_flops={2: 500e12, 4: 150e12},  # float32 runs as three TF32 products on tensor cores
    tf32_flops=300e12,
    launch_seconds=2.5e-6,
)


def predicted_seconds(backend: str, sizes: Sizes, *, backward: bool = False, ceilings: Ceilings = CEILINGS) -> float:
    """Predicted GPU time of one product x ΔWᵀ, or of both its gradients (dx and dw) with `backward`.

    Launches, and the larger of bytes and FLOPs over their ceilings. A model, not a measurement. Counted for each path
    (d = in_features + out_features, elements per token):

    - direct: reads x, writes y (itemsize·d) and reads w, or with more than `SMALL_T` tokens a table of 32 bytes
      per element of w; the FLOPs of a dense product. Backward: the same for dx; for dw it reads dy and x, at the FLOPs
      of another dense product.
    - expand: writes ΔW densely and reads it back, then a cuBLAS product. Backward: the same for dx, direct's dw.
    - fft: reads x, writes y (itemsize·d), writes and reads back the spectra of both (2·d of their itemsize, which is 4
      where x is not bfloat16); 2·b·d FLOPs a token for the transforms (4·(P + Q)·d in two levels of b = P·Q) and
      4·in·out / b for the product per frequency. One launch for w and three for all tokens: those of further chunks
      hide behind the chunk before. Backward: reads dy and x, writes dx; the spectra of dx and x are written and read,
      that of dy written and read twice; three transforms, two products per frequency, eight launches.
    - torch: float32 copies, complex spectra, their transposition and the batched product: about 26·d bytes a token, and
      8·n_freqs·n·m FLOPs a token on CUDA cores. Backward: three transforms in place of two, two products.
    - fold: reads W and writes W + ΔW; the product is the base layer's own. Never chosen, only told, and only forward.

    Raises:
        BackendError: a backend, or a direction of it, that the model does not know.
    """
    n_tokens, in_features, out_features, b, dtype, _ = sizes
    itemsize = dtype.itemsize
    tokens_bytes = itemsize * n_tokens * (in_features + out_features)
    dense_elements = in_features * out_features
    dense_flops = 2 * n_tokens * dense_elements
    if backend == "direct":
        w_bytes = (4 if n_tokens <= SMALL_T else 32) * dense_elements / b
        product = max((tokens_bytes + w_bytes) / ceilings.bandwidth, dense_flops / ceilings.triton_flops[itemsize])
        seconds = 2 * ceilings.launch_seconds + product
    elif backend == "expand":
        gemm = max(tokens_bytes / ceilings.bandwidth, dense_flops / ceilings.cublas_flops[itemsize])
        seconds = 2 * ceilings.launch_seconds + 2 * itemsize * dense_elements / ceilings.bandwidth + gemm
    elif backend == "fold" and not backward:
        seconds = ceilings.launch_seconds + 2 * itemsize * dense_elements / ceilings.bandwidth
    elif backend == "fft":
        real = spectrum_itemsize(dtype, b)  # bytes
        # w is read, its spectrum written as 2 × 2 blocks and read back.
        w_bytes = 4 * (1 + real) * dense_elements / b
        if backward:
            launches, products, transformed = 8, 2, 2 * in_features + out_features
            token_bytes = itemsize * transformed + real * (4 * in_features + 3 * out_features)
            w_bytes += 12 * dense_elements / b  # float32: the sums per frequency, 2 × 2 blocks, and dw
        else:
            launches, products, transformed = 4, 1, in_features + out_features
            token_bytes = (itemsize + 2 * real) * transformed
        per_value = 2 * taken_apart(b)[1]
        # 16-bit operands multiply in TF32 where their spectra are float32, and inside two-level transforms.
        two_level = per_value < 2 * b
        mix_rate = ceilings.tf32_flops if real > itemsize else ceilings.triton_flops[itemsize]
        transform_rate = ceilings.tf32_flops if two_level and itemsize == 2 else mix_rate
        flops_seconds = products * 4 * n_tokens * dense_elements / b / mix_rate
        flops_seconds += per_value * n_tokens * transformed / transform_rate
        seconds = launches * ceilings.launch_seconds + max(
            (n_tokens * token_bytes + w_bytes) / ceilings.bandwidth, flops_seconds
        )
    elif backend == "torch":
        launches, products, transformed = (
            (16, 2, 2 * in_features + out_features) if backward else (10, 1, in_features + out_features)
        )
        mix_flops = products * 8 * n_tokens * (b // 2 + 1) * dense_elements / b**2
        seconds = (
            launches * ceilings.launch_seconds
            + 26 * n_tokens * transformed / ceilings.bandwidth
            + mix_flops / ceilings.cublas_flops[4]
        )
    else:
        raise BackendError(f"the cost model knows no {'backward of ' if backward else ''}backend {backend!r}")
    if backward and backend in ("direct", "expand"):  # whose dw is a product of its own
        dw_bytes = tokens_bytes + 4 * dense_elements / b
        seconds += 2 * ceilings.launch_seconds + max(
            dw_bytes / ceilings.bandwidth, dense_flops / ceilings.triton_flops[itemsize]
        )
    return seconds


def base_seconds(sizes: Sizes, *, ceilings: Ceilings = CEILINGS) -> float:
    """Predicted GPU time of the base layer's own product x Wᵀ in the same model; of the gradient of x too."""
    n_tokens, in_features, out_features, _, dtype, _ = sizes
    itemsize = dtype.itemsize
    weights_bytes = itemsize * in_features * out_features
    tokens_bytes = itemsize * n_tokens * (in_features + out_features)
    flops = 2 * n_tokens * in_features * out_features
    return ceilings.launch_seconds + max(
        (weights_bytes + tokens_bytes) / ceilings.bandwidth, flops / ceilings.cublas_flops[itemsize]
    )
