"""Which backend computes a product: by name, or by measurements or a cost model where the name is `"auto"`.

The decision is taken inside the operator, at run time, from the device, dtype and sizes of one call, so that traced
code sees neither a table nor a branch on the number of tokens.
"""

import functools
import importlib.metadata
import logging
import os
import platform
import threading
import warnings

import torch

from ..errors import BackendError
from . import backends, bounds, tuned
from .cost_model import ROUTED, Sizes, added_seconds, routed_launches
from .launch import plans, specs, tiles
from .routes import share

__all__ = [
    "AUTO_BACKENDS",
    "BACKENDS",
    "BASE",
    "TRITON_BACKENDS",
    "ceilings_of",
    "cheapest",
    "cheapest_routed",
    "check_backend",
    "choose",
    "measured_times",
    "refresh",
    "situation",
    "tile_key",
    "tiles_of",
    "tuned_key",
    "why_not",
]

BACKENDS = ("auto", *backends.BY_NAME, "fold")
TRITON_BACKENDS = tuple(name for name, backend in backends.BY_NAME.items() if backend.by_triton)
# What "auto" chooses from on a GPU.
AUTO_BACKENDS = (*TRITON_BACKENDS, "torch")
# The name under which the tuned table holds a layer without adapters.
BASE = "base"

logger = logging.getLogger("c3a_triton")


def check_backend(backend: str, said_by: str = "backend=") -> None:
    """Raise `BackendError` unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise BackendError(f"{said_by}{backend!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}")


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot compute tensors of this device and dtype, or None if it can."""
    if backend in TRITON_BACKENDS:
        if dtype not in specs.DTYPES:
            return f"it computes float32, float16 and bfloat16, not {dtype}"
        return specs.unavailable_reason(device)
    return None


def choose(backend: str, sizes: Sizes, *, backward: bool = False, stack: int = 0) -> str:
    """The backend that computes this call.

    Args:
        backend: a name of `BACKENDS`; `"auto"` stands for what C3A_TRITON_BACKEND says, else for the fastest of those
            that run here: by the tuned table where it holds what the cost model would take, else by the cost model.
            Under deterministic algorithms the table, which depends on timing, is left alone.
        sizes: of the call, on the device of its operands.
        backward: whether the call computes gradients, or the product.
        stack: number of w's of which each row has one; `sizes` are those of one w, and of all rows. 0: one w for all.

    Raises:
        BackendError: the name is unknown, or that backend cannot run here, or not with a stack; the message says why.
    """
    by_timing, by_user = situation(backend, sizes.device)
    said_by = "backend="
    if by_user is not None:
        backend, said_by = by_user, "C3A_TRITON_BACKEND="
    return _choose(backend, said_by, sizes, backward, by_timing, stack)


def situation(backend: str, device: torch.device) -> tuple[bool, str | None]:
    """What besides sizes a choice follows, for those who keep what was chosen: whether times count, and the user's say.

    Kernels' tiles follow it as well, from here on.
    """
    by_timing = not torch._C._get_deterministic_algorithms()
    if _tiles_by_timing.get(device) is not by_timing and device.type == "cuda":
        _install_tiles(device, by_timing)
    return by_timing, os.environ.get("C3A_TRITON_BACKEND") if backend == "auto" else None


@plans.planned
def _choose(backend: str, said_by: str, sizes: Sizes, backward: bool, by_timing: bool, stack: int) -> str:
    # Decided for powers of two alone, as numbers of tokens vary from call to call.
    rounded = sizes._replace(n_tokens=1 << tuned.token_bits(sizes.n_tokens))
    if rounded != sizes:
        return _choose(backend, said_by, rounded, backward, by_timing, stack)
    device = sizes.device
    check_backend(backend, said_by)
    if stack and backend not in ("auto", *backends.ROUTED):
        raise BackendError(
            f"{said_by}{backend!r} writes out dense weights, and here are {stack}, one for each group of rows: use "
            f"{', '.join(map(repr, ('auto', *backends.ROUTED)))}"
        )
    if backend == "fold":
        raise BackendError(
            f"{said_by}'fold' rounds W + ΔW, so it is never what 'auto' means, C3A_TRITON_BACKEND included: give it to "
            "c3a_linear, apply or set_backend by name"
        )
    if backend != "auto":
        reason = why_not(backend, device, sizes.dtype)
        if reason is not None:
            raise BackendError(f"{said_by}{backend!r} cannot run on {device}: {reason}. Use 'auto' or 'torch'.")
        return backend
    reason = why_not(
        "direct", device, sizes.dtype
    )  # asked on a CPU too: a broken installation must not pass as a slow one
    if not _kernels_pay(device):
        _say_once(device.type, f"'auto' computes with 'torch' on {device.type}: Triton kernels need an NVIDIA GPU")
        return "torch"
    if reason is not None:
        _say_once("cuda", f"'auto' computes with 'torch' instead of Triton kernels: {reason}")
        return "torch"
    if stack:
        return cheapest_routed(sizes, stack, backward=backward)
    predicted = cheapest(sizes, backward=backward)
    measured = measured_times(sizes, backward=backward) if by_timing else {}
    # Without the model's own pick among them, an interrupted run may have measured only slow ones.
    if predicted not in measured:
        return predicted
    return min((name for name in AUTO_BACKENDS if name in measured), key=measured.__getitem__)


def _kernels_pay(device: torch.device) -> bool:
    """Whether `"auto"` considers Triton's kernels here: where they run elsewhere, it is in an interpreter."""
    return device.type == "cuda"


def cheapest(sizes: Sizes, *, backward: bool = False, ceilings: bounds.Ceilings | None = None) -> str:
    """What `"auto"` chooses by the cost model on a GPU of these ceilings, for the next power of two of tokens.

    Args:
        sizes: of the call.
        backward: whether it computes gradients.
        ceilings: by default those of the call's device.
    """
    at = ceilings_of(sizes.device) if ceilings is None else ceilings
    sizes = sizes._replace(n_tokens=1 << tuned.token_bits(sizes.n_tokens))
    return min(AUTO_BACKENDS, key=lambda name: added_seconds(name, sizes, backward=backward, ceilings=at))


def cheapest_routed(
    sizes: Sizes, stack: int, *, backward: bool = False, ceilings: bounds.Ceilings | None = None
) -> str:
    """What `"auto"` chooses by the cost model over a stack of w's; `sizes` are of one w and of all rows."""
    at = ceilings_of(sizes.device) if ceilings is None else ceilings
    rows = 1 << tuned.token_bits(sizes.n_tokens)
    of_one = sizes._replace(n_tokens=share(stack, rows))

    def seconds(name: str) -> float:
        return bounds.seconds(routed_launches(name, of_one, stack, rows, backward=backward, ceilings=at), at)

    return min(ROUTED, key=seconds)


def ceilings_of(device: torch.device) -> bounds.Ceilings:
    """The cost model's ceilings of this GPU's family; of anything else, an absent GPU included, an H200's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return bounds.CEILINGS
    name, capability, *_ = _machine(device)
    major, minor = map(int, capability.split("."))
    return bounds.ceilings_of(name, tiles.generation((major, minor)))


@functools.cache
def _table() -> tuned.Table:
    """The tuned table as the first call finds it: the file is not looked at again before `refresh`."""
    return tuned.load()


def refresh() -> None:
    """Read the tuned table anew and forget the choices made by the old one; `autotune` does so when it has measured."""
    with _installing:
        _table.cache_clear()
        _tiles_by_timing.clear()
        plans.clear_plans()


# For each device that was used: whether its tiles are those of the tuned table, or the committed ones.
_tiles_by_timing: dict[torch.device, bool] = {}
# Held by whoever changes them: the threads of a DataParallel begin on all devices at once.
_installing = threading.Lock()


def _install_tiles(device: torch.device, by_timing: bool) -> None:
    """Take the tuned table's tiles for this device, or with `by_timing` off none of them.

    One table serves the process: where devices have different ones, as cards of two models do, none is taken.
    """
    with _installing:
        # The switch is the process's: the other devices' tiles follow it too.
        devices = {*_tiles_by_timing, device}
        found, *others = (tiles_of(one) if by_timing else {} for one in devices)
        if tiles.override(found if all(other == found for other in others) else {}):
            plans.clear_plans()
        _tiles_by_timing.update(dict.fromkeys(devices, by_timing))


def tiles_of(device: torch.device) -> dict[tiles.Lookup, tiles.TileConfig]:
    """The tuned table's tiles for this device."""
    machine = _machine(device)
    of_machine = ((key, tile) for key, tile in _table().tiles.items() if key[:4] == machine)
    return {(key.family, key.arguments): tiles.TileConfig(*tile) for key, tile in of_machine}


def tile_key(device: torch.device, lookup: tiles.Lookup) -> tuned.TileKey:
    """Where the tuned table holds a tile for this device."""
    return tuned.TileKey(*_machine(device), *lookup)


def tuned_key(backend: str, sizes: Sizes) -> tuned.Key:
    """Where the tuned table holds a layer of these sizes on this machine; of `BASE` b is 0."""
    n_tokens, in_features, out_features, b, dtype, device = sizes
    shape = (tuned.token_bits(n_tokens), in_features, out_features, b)
    return tuned.Key(*_machine(device), str(dtype).removeprefix("torch."), *shape, backend)


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


def measured_times(sizes: Sizes, *, backward: bool = False) -> dict[str, float]:
    """Measured seconds of a whole layer by backend, and under `BASE` without adapters: what the tuned table holds."""
    found = {}
    for name in (BASE, *BACKENDS):
        times = _table().times.get(tuned_key(name, sizes._replace(b=0) if name == BASE else sizes))
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
