"""Which backend computes a product: by name, or by measurements or a cost model where the name is `"auto"`.

The decision is taken inside the operator, at run time, from the device, dtype and sizes of one call, so that traced
code sees neither a table nor a branch on the number of tokens.
"""

import functools
import importlib.metadata
import logging
import os
import platform
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..errors import BackendError
from . import launch, launch_fft, tiles, tuned

__all__ = [
    "BACKENDS",
    "BASE",
    "CEILINGS",
    "Ceilings",
    "base_seconds",
    "cheapest",
    "check_backend",
    "choose",
    "measured_times",
    "predicted_seconds",
    "refresh",
    "tile_key",
    "tiles_of",
    "tuned_key",
    "why_not",
]

BACKENDS = ("auto", "reference", "torch", "direct", "fft", "expand", "fold")
TRITON_BACKENDS = ("direct", "fft", "expand")
# What "auto" chooses from on a GPU.
AUTO_BACKENDS = (*TRITON_BACKENDS, "torch")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The name under which the tuned table holds a layer without adapters.
BASE = "base"

logger = logging.getLogger("c3a_triton")


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
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    n_tokens: int,
    in_features: int,
    out_features: int,
    b: int,
    backward: bool = False,
) -> str:
    """The backend that computes this call.

    Args:
        backend: a name of `BACKENDS`; `"auto"` stands for what C3A_TRITON_BACKEND says, else for the fastest of those
            that run here: by the tuned table where it holds what the cost model would take, else by the cost model.
            Under deterministic algorithms the table, which depends on timing, is left alone.
        device: device of the operands.
        dtype: the widest dtype among the operands.
        n_tokens: rows of x.
        in_features: columns of ΔW.
        out_features: rows of ΔW.
        b: block size.
        backward: whether the call computes gradients, or the product.

    Raises:
        BackendError: the name is unknown, or that backend cannot run here; the message says why.
    """
    said_by = "backend="
    if backend == "auto" and "C3A_TRITON_BACKEND" in os.environ:
        backend, said_by = os.environ["C3A_TRITON_BACKEND"], "C3A_TRITON_BACKEND="
    # Buckets of powers of two keep the cache small when the number of tokens varies from call to call.
    sizes = (tuned.token_bits(n_tokens), in_features, out_features, b)
    by_timing = not torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda" and (by_timing is not _tiles_by_timing or device not in _with_tiles):
        _install_tiles(device, by_timing)
    return _choose(backend, said_by, device, dtype, *sizes, backward, by_timing)


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
    backward: bool,
    by_timing: bool,
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
    if not _kernels_pay(device):
        _say_once(device.type, f"'auto' computes with 'torch' on {device.type}: Triton kernels need an NVIDIA GPU")
        return "torch"
    if reason is not None:
        _say_once("cuda", f"'auto' computes with 'torch' instead of Triton kernels: {reason}")
        return "torch"
    sizes = (1 << token_bits, in_features, out_features, b, dtype)
    predicted = cheapest(*sizes, backward=backward)
    measured = measured_times(device, *sizes, backward=backward) if by_timing else {}
    # Without the model's own pick among them, an interrupted run may have measured only slow ones.
    if predicted not in measured:
        return predicted
    return min((name for name in AUTO_BACKENDS if name in measured), key=measured.__getitem__)


def _kernels_pay(device: torch.device) -> bool:
    """Whether `"auto"` considers Triton's kernels here: where they run elsewhere, it is in an interpreter."""
    return device.type == "cuda"


def cheapest(
    n_tokens: int, in_features: int, out_features: int, b: int, dtype: torch.dtype, *, backward: bool = False
) -> str:
    """What `"auto"` chooses by the cost model on a GPU, for the next power of two of tokens."""
    sizes = (1 << tuned.token_bits(n_tokens), in_features, out_features, b, dtype)
    return min(AUTO_BACKENDS, key=lambda name: predicted_seconds(name, *sizes, backward=backward))


@functools.cache
def _table() -> tuned.Table:
    """The tuned table as the first call finds it: the file is not looked at again before `refresh`."""
    return tuned.load()


def refresh() -> None:
    """Read the tuned table anew and forget the choices made by the old one; `autotune` does so when it has measured."""
    global _tiles_by_timing
    _table.cache_clear()
    _choose.cache_clear()
    _tiles_by_timing = None
    _with_tiles.clear()


# Whether the tiles in use are those of the tuned table, the committed ones, or (None) not decided yet.
_tiles_by_timing: bool | None = None
# The devices for which that was decided.
_with_tiles: set[torch.device] = set()


def _install_tiles(device: torch.device, by_timing: bool) -> None:
    """Take the tuned table's tiles for this device, or with `by_timing` off none of them.

    One table serves the process: where devices have different ones, as cards of two models do, none is taken.
    """
    global _tiles_by_timing
    _with_tiles.add(device)
    found, *others = (tiles_of(one) if by_timing else {} for one in _with_tiles)
    if tiles.override(found if all(other == found for other in others) else {}):
        launch.clear_plans()
    _tiles_by_timing = by_timing


def tiles_of(device: torch.device) -> dict[tiles.Lookup, tiles.TileConfig]:
    """The tuned table's tiles for this device."""
    machine = _machine(device)
    of_machine = ((key, tile) for key, tile in _table().tiles.items() if key[:4] == machine)
    return {(key.family, key.arguments): tiles.TileConfig(*tile) for key, tile in of_machine}


def tile_key(device: torch.device, lookup: tiles.Lookup) -> tuned.TileKey:
    """Where the tuned table holds a tile for this device."""
    return tuned.TileKey(*_machine(device), *lookup)


def tuned_key(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    n_tokens: int,
    in_features: int,
    out_features: int,
    b: int,
) -> tuned.Key:
    """Where the tuned table holds a layer of these sizes on this machine; of `BASE` b is 0."""
    sizes = (tuned.token_bits(n_tokens), in_features, out_features, b)
    return tuned.Key(*_machine(device), str(dtype).removeprefix("torch."), *sizes, backend)


@functools.cache
def _machine(device: torch.device) -> tuple[str, str, str, str]:
    """Device name, capability, versions of torch and triton. Triton's is read without importing it."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.cuda.get_device_name(device), f"{major}.{minor}", torch.__version__, triton
    return device.type, platform.machine(), torch.__version__, triton


def measured_times(
    device: torch.device,
    n_tokens: int,
    in_features: int,
    out_features: int,
    b: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> dict[str, float]:
    """Measured seconds of a whole layer by backend, and under `BASE` without adapters: what the tuned table holds."""
    found = {}
    for name in (BASE, *BACKENDS):
        size = 0 if name == BASE else b
        times = _table().times.get(tuned_key(name, device, dtype, n_tokens, in_features, out_features, size))
        seconds = None if times is None else times.backward if backward else times.forward
        if seconds is not None:
            found[name] = seconds
    return found


@functools.cache
def _say_once(device_type: str, message: str) -> None:
    # On a CPU this is what anyone expects: told to those who listen. On a GPU it costs time: told to everyone.
    if device_type == "cuda":
        warnings.warn(message, stacklevel=2)
    else:
        logger.info(message)


def predicted_seconds(
    backend: str,
    n_tokens: int,
    in_features: int,
    out_features: int,
    b: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    ceilings: Ceilings = CEILINGS,
) -> float:
    """Predicted GPU time of one product x ΔWᵀ, or of both its gradients (dx and dw) with `backward`.

    Launches, and the larger of bytes and FLOPs over their ceilings. A model, not a measurement. Counted for each path
    (d = in_features + out_features, elements per token):

    - direct: reads x, writes y (itemsize·d) and reads w, or with more than `launch.SMALL_T` tokens a table of 32 bytes
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
    itemsize = dtype.itemsize
    tokens_bytes = itemsize * n_tokens * (in_features + out_features)
    dense_elements = in_features * out_features
    dense_flops = 2 * n_tokens * dense_elements
    if backend == "direct":
        w_bytes = (4 if n_tokens <= launch.SMALL_T else 32) * dense_elements / b
        product = max((tokens_bytes + w_bytes) / ceilings.bandwidth, dense_flops / ceilings.triton_flops[itemsize])
        seconds = 2 * ceilings.launch_seconds + product
    elif backend == "expand":
        gemm = max(tokens_bytes / ceilings.bandwidth, dense_flops / ceilings.cublas_flops[itemsize])
        seconds = 2 * ceilings.launch_seconds + 2 * itemsize * dense_elements / ceilings.bandwidth + gemm
    elif backend == "fold" and not backward:
        seconds = ceilings.launch_seconds + 2 * itemsize * dense_elements / ceilings.bandwidth
    elif backend == "fft":
        spectrum_itemsize = launch_fft.spectrum_itemsize(dtype, b)
        # w is read, its spectrum written as 2 × 2 blocks and read back.
        w_bytes = 4 * (1 + spectrum_itemsize) * dense_elements / b
        if backward:
            launches, products, transformed = 8, 2, 2 * in_features + out_features
            token_bytes = itemsize * transformed + spectrum_itemsize * (4 * in_features + 3 * out_features)
            w_bytes += 12 * dense_elements / b  # float32: the sums per frequency, 2 × 2 blocks, and dw
        else:
            launches, products, transformed = 4, 1, in_features + out_features
            token_bytes = (itemsize + 2 * spectrum_itemsize) * transformed
        per_value = launch_fft.transform_flops(b)
        # 16-bit operands multiply in TF32 where their spectra are float32, and inside two-level transforms.
        two_level = per_value < 2 * b
        mix_rate = ceilings.tf32_flops if spectrum_itemsize > itemsize else ceilings.triton_flops[itemsize]
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


def base_seconds(
    n_tokens: int, in_features: int, out_features: int, dtype: torch.dtype, *, ceilings: Ceilings = CEILINGS
) -> float:
    """Predicted GPU time of the base layer's own product x Wᵀ in the same model; of the gradient of x too."""
    itemsize = dtype.itemsize
    weights_bytes = itemsize * in_features * out_features
    tokens_bytes = itemsize * n_tokens * (in_features + out_features)
    flops = 2 * n_tokens * in_features * out_features
    return ceilings.launch_seconds + max(
        (weights_bytes + tokens_bytes) / ceilings.bandwidth, flops / ceilings.cublas_flops[itemsize]
    )
