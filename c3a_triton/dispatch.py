"""Which backend computes a product: by name, or by a cost model where the name is `"auto"`.

The decision is taken inside the operator, at run time, from the device, dtype and sizes of one call, so that traced
code sees neither a table nor a branch on the number of tokens.
"""

import functools
import logging
import os
import warnings

import torch

from . import launch, launch_fft
from .errors import BackendError

__all__ = ["BACKENDS", "base_seconds", "cheapest", "check_backend", "choose", "predicted_seconds", "why_not"]

BACKENDS = ("auto", "reference", "torch", "direct", "fft", "expand", "fold")
TRITON_BACKENDS = ("direct", "fft", "expand")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger("c3a_triton")

# Ceilings of the cost model, per second: an H200's measured copy bandwidth and cuBLAS rate, and estimates (not
# measurements) of what a plain Triton GEMM and cuFFT's neighbours reach. Other cards have other ceilings but similar
# ratios, and only ratios decide.
BANDWIDTH = 4.2e12
CUBLAS_FLOPS = {2: 650e12, 4: 40e12}  # by bytes per element: tensor cores in 16 bits, CUDA cores in float32
TRITON_FLOPS = {2: 500e12, 4: 150e12}  # float32 runs as three TF32 products on tensor cores
TF32_FLOPS = 300e12
LAUNCH_SECONDS = 2.5e-6


def check_backend(backend: str, said_by: str = "backend=") -> None:
    """Raise `BackendError` unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise BackendError(f"{said_by}{backend!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}")


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot compute tensors of this device and dtype, or None if it can."""
    if backend in TRITON_BACKENDS:
        if dtype not in TRITON_DTYPES:
            return f"it computes float32, float16 and bfloat16, not {dtype}"
        return launch.unavailable_reason(device)
    return None


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, n_tokens: int, in_features: int, out_features: int, b: int
) -> str:
    """The backend that computes this call.

    Args:
        backend: a name of `BACKENDS`; `"auto"` stands for what C3A_TRITON_BACKEND says, else for the cheapest by the
            cost model among those that run here.
        device: device of the operands.
        dtype: the widest dtype among the operands.
        n_tokens: rows of x.
        in_features: columns of ΔW.
        out_features: rows of ΔW.
        b: block size.

    Raises:
        BackendError: the name is unknown, or that backend cannot run here; the message says why.
    """
    said_by = "backend="
    if backend == "auto" and "C3A_TRITON_BACKEND" in os.environ:
        backend, said_by = os.environ["C3A_TRITON_BACKEND"], "C3A_TRITON_BACKEND="
    # Buckets of powers of two keep the cache small when the number of tokens varies from call to call.
    return _choose(backend, said_by, device, dtype, max(n_tokens - 1, 0).bit_length(), in_features, out_features, b)


@functools.lru_cache(maxsize=4096)
def _choose(
    backend: str,
    said_by: str,
    device: torch.device,
    dtype: torch.dtype,
    token_bits: int,
    in_features: int,
    out_features: int,
    b: int,
) -> str:
    check_backend(backend, said_by)
    if backend == "fold":
        raise BackendError(
            f"{said_by}'fold' rounds W + ΔW, so it is never what 'auto' means, C3A_TRITON_BACKEND included: give it to "
            "c3a_linear, apply or set_backend by name"
        )
    if backend != "auto":
        reason = why_not(backend, device, dtype)
        if reason is not None:
            raise BackendError(f"{said_by}{backend!r} cannot run on {device}: {reason}. Use 'auto' or 'torch'.")
        return backend
    reason = why_not("direct", device, dtype)  # asked on a CPU too: a broken installation must not pass as a slow one
    if device.type != "cuda":
        _say_once(device.type, f"'auto' computes with 'torch' on {device.type}: Triton kernels need an NVIDIA GPU")
        return "torch"
    if reason is not None:
        _say_once("cuda", f"'auto' computes with 'torch' instead of Triton kernels: {reason}")
        return "torch"
    return cheapest(1 << token_bits, in_features, out_features, b, dtype)


def cheapest(n_tokens: int, in_features: int, out_features: int, b: int, dtype: torch.dtype) -> str:
    """What `"auto"` chooses by the cost model on a GPU, for the next power of two of tokens."""
    sizes = (1 << (n_tokens - 1).bit_length(), in_features, out_features, b, dtype)
    return min((*TRITON_BACKENDS, "torch"), key=lambda name: predicted_seconds(name, *sizes))


@functools.cache
def _say_once(device_type: str, message: str) -> None:
    # On a CPU this is what anyone expects: told to those who listen. On a GPU it costs time: told to everyone.
    if device_type == "cuda":
        warnings.warn(message, stacklevel=2)
    else:
        logger.info(message)


def predicted_seconds(
    backend: str, n_tokens: int, in_features: int, out_features: int, b: int, dtype: torch.dtype
) -> float:
    """Predicted GPU time of one product x ΔWᵀ: launches, and the larger of bytes and FLOPs over their ceilings.

    A model, not a measurement. Counted for each path (d = in_features + out_features, elements per token):

    - direct: reads x, writes y (itemsize·d) and reads w, or with more than `launch.SMALL_T` tokens a table of 32 bytes
      per element of w; the FLOPs of a dense product.
    - expand: writes ΔW densely and reads it back, then a cuBLAS product.
    - fft: reads x, writes y (itemsize·d), writes and reads back the spectra of both (2·d of their itemsize, which is 4
      where x is not bfloat16); 2·b·d FLOPs a token for the transforms (4·(P + Q)·d in two levels of b = P·Q) and
      4·in·out / b for the product per frequency. One launch for w and three for all tokens: those of further chunks
      hide behind the chunk before.
    - torch: float32 copies, complex spectra, their transposition and the batched product: about 26·d bytes a token, and
      8·n_freqs·n·m FLOPs a token on CUDA cores.
    - fold: reads W and writes W + ΔW; the product is the base layer's own. Never chosen, only told.
    """
    itemsize = dtype.itemsize
    tokens_bytes = itemsize * n_tokens * (in_features + out_features)
    dense_elements = in_features * out_features
    dense_flops = 2 * n_tokens * dense_elements
    if backend == "direct":
        w_bytes = (4 if n_tokens <= launch.SMALL_T else 32) * dense_elements / b
        return 2 * LAUNCH_SECONDS + max((tokens_bytes + w_bytes) / BANDWIDTH, dense_flops / TRITON_FLOPS[itemsize])
    if backend == "fold":
        return LAUNCH_SECONDS + 2 * itemsize * dense_elements / BANDWIDTH
    if backend == "expand":
        gemm = max(tokens_bytes / BANDWIDTH, dense_flops / CUBLAS_FLOPS[itemsize])
        return 2 * LAUNCH_SECONDS + 2 * itemsize * dense_elements / BANDWIDTH + gemm
    if backend == "fft":
        spectrum_itemsize = launch_fft.spectrum_itemsize(dtype, b)
        spectra_bytes = 2 * spectrum_itemsize * n_tokens * (in_features + out_features)
        # w is read, its spectrum written as 2 × 2 blocks and read back.
        w_bytes = 4 * (1 + spectrum_itemsize) * dense_elements / b
        per_value = launch_fft.transform_flops(b)
        transform_flops = per_value * n_tokens * (in_features + out_features)
        mix_flops = 4 * n_tokens * dense_elements / b
        # 16-bit operands multiply in TF32 where their spectra are float32, and inside two-level transforms.
        two_level = per_value < 2 * b
        mix_rate = TF32_FLOPS if spectrum_itemsize > itemsize else TRITON_FLOPS[itemsize]
        transform_rate = TF32_FLOPS if two_level and itemsize == 2 else mix_rate
        seconds = mix_flops / mix_rate + transform_flops / transform_rate
        return 4 * LAUNCH_SECONDS + max((tokens_bytes + spectra_bytes + w_bytes) / BANDWIDTH, seconds)
    if backend == "torch":
        mix_flops = 8 * n_tokens * (b // 2 + 1) * dense_elements / b**2
        spectra_bytes = 26 * n_tokens * (in_features + out_features)
        return 10 * LAUNCH_SECONDS + spectra_bytes / BANDWIDTH + mix_flops / CUBLAS_FLOPS[4]
    raise BackendError(f"the cost model knows no backend {backend!r}")


def base_seconds(n_tokens: int, in_features: int, out_features: int, dtype: torch.dtype) -> float:
    """Predicted GPU time of the base layer's own product x Wᵀ, in the same model."""
    itemsize = dtype.itemsize
    weights_bytes = itemsize * in_features * out_features
    tokens_bytes = itemsize * n_tokens * (in_features + out_features)
    flops = 2 * n_tokens * in_features * out_features
    return LAUNCH_SECONDS + max((weights_bytes + tokens_bytes) / BANDWIDTH, flops / CUBLAS_FLOPS[itemsize])
