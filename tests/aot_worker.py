"""Compiles every kernel for one card without a GPU, through the launchers themselves, and prints what came out as JSON.

Run by test_aot.py as a program of its own, without TRITON_INTERPRET: `python aot_worker.py sm_90 [case]`, where `few`
leaves out `MORE_CASES`. A stand-in for Triton's driver names the card; each launch is turned into a compilation, so
that tiles, constants and the alignment of every argument are those of a real call. The tensors are never read.
"""

import json
import sys
from typing import Any

import bench_package  # noqa: F401
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.precompile import resources
from c3a_triton.operator.launch import decode, direct, expand, fft, grouped, specs, weight_grad

CARD = sys.argv[1]
CAPABILITY = int(CARD.removeprefix("sm_"))


class _Driver:
    """The part of a driver that compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def steps(kernel: str, constants: dict[str, Any]) -> dict[str, int]:
    """Of a spectral product: rows of its tile and steps of its sum over a constant length."""
    if kernel == "outer_kernel":
        return {"rows": constants["BLOCK_O"], "steps": 0}
    lengths = {
        "analysis_kernel": lambda c: c["b"],
        "synthesis_kernel": lambda c: c["b"] + c["b"] % 2,
        "mix_kernel": lambda c: 2 * c["col_blocks"],
    }
    return {"steps": -(-lengths[kernel](constants) // constants["BLOCK_K"])} if kernel in lengths else {}


def product(dtype: torch.dtype, n_tokens: int, width: int, b: int, transpose: bool = False) -> None:
    """A square layer's product: forward into an existing output, transposed with a bias."""
    x, w = tensor(n_tokens, width, dtype=dtype), tensor(width // b, width // b, b)
    if transpose:
        direct.direct_product(x, w, scale=1 / width, transpose=True, bias=tensor(width, dtype=dtype))
    else:
        direct.direct_product(x, w, scale=1 / width, out=tensor(n_tokens, width, dtype=dtype))


def layer(dtype: torch.dtype, n_tokens: int, in_features: int, out_features: int, b: int) -> None:
    """A whole layer for a few tokens."""
    x, weight = tensor(n_tokens, in_features, dtype=dtype), tensor(out_features, in_features, dtype=dtype)
    w = tensor(out_features // b, in_features // b, b)
    decode.decode_linear(x, weight, w, tensor(out_features, dtype=dtype), scale=1 / in_features)


def dense(dtype: torch.dtype, width: int, b: int) -> None:
    """ΔW written, added to a weight, and added to a transposed weight."""
    w = tensor(width // b, width // b, b)
    expand.expand_weight(w, scale=1 / width, dtype=dtype)
    expand.add_expanded_(tensor(width, width, dtype=dtype), w, scale=1 / width)
    expand.add_expanded_(tensor(width, width, dtype=dtype).T, w, scale=1 / width)


def gradient(dtype: torch.dtype, n_tokens: int, width: int, b: int) -> None:
    x = tensor(n_tokens, width, dtype=dtype)
    weight_grad.weight_grad(x, x, b, scale=1 / width)


def spectral(dtype: torch.dtype, n_tokens: int, width: int, b: int) -> None:
    """A square layer by spectra: forward into an existing output, and both gradients."""
    x, w = tensor(n_tokens, width, dtype=dtype), tensor(width // b, width // b, b)
    fft.fft_product(x, w, scale=1 / width, out=tensor(n_tokens, width, dtype=dtype))
    fft.fft_backward(x, x, w, scale=1 / width)


def rows(dtype: torch.dtype, n_rows: int, tokens_per_row: int, in_features: int, out_features: int, b: int) -> None:
    """A batch whose first row has no adapter and every other one its own: forward, and transposed with a bias."""
    n_tokens = n_rows * tokens_per_row
    kernels = [tensor(out_features // b, in_features // b, b) for _ in range(n_rows - 1)]
    adapters = range(-1, n_rows - 1)
    grouped.grouped_product(tensor(n_tokens, in_features, dtype=dtype), kernels, adapters, scale=1.0)
    dy, bias = tensor(n_tokens, out_features, dtype=dtype), tensor(in_features, dtype=dtype)
    grouped.grouped_product(dy, kernels, adapters, scale=1.0, transpose=True, bias=bias)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Together every tile of the table and every branch of the kernels, on sizes of real models.
CASES = (
    (product, BF16, 8192, 4096, 256),
    (product, BF16, 8192, 4096, 256, True),
    (product, BF16, 8192, 3072, 96),
    (product, BF16, 8192, 4096, 16),
    (product, BF16, 2048, 1600, 25),
    (product, BF16, 2048, 1600, 40),
    (product, BF16, 512, 4096, 256),
    (product, BF16, 40, 4096, 256),
    (product, FP32, 8192, 4096, 256),
    (product, FP32, 512, 4096, 64),
    (product, BF16, 1, 4096, 256),
    (product, FP16, 16, 3072, 64, True),
    (product, FP32, 4, 4096, 256),
    (layer, BF16, 1, 4096, 4096, 256),
    (layer, FP16, 4, 3072, 8192, 64),
    (layer, BF16, 8, 4096, 14336, 256),
    (layer, BF16, 16, 14336, 4096, 1024),
    (layer, BF16, 1, 1600, 1600, 25),
    (dense, BF16, 4096, 256),
    (dense, FP32, 3072, 192),
    (gradient, BF16, 8192, 4096, 256),
    (gradient, BF16, 8192, 3072, 192),
    (gradient, BF16, 8192, 3072, 96),
    (gradient, BF16, 8192, 3072, 64),
    (gradient, BF16, 8192, 1600, 25),
    (gradient, FP32, 8192, 4096, 256),
    (gradient, FP32, 8192, 3072, 64),
    (rows, BF16, 128, 1, 4096, 4096, 256),
    (rows, FP16, 4, 1, 3072, 8192, 64),
    (rows, BF16, 32, 1, 1600, 4800, 25),
    (rows, FP32, 64, 1, 4096, 4096, 256),
    (rows, BF16, 16, 512, 4096, 4096, 256),
    (rows, FP16, 16, 100, 1600, 4800, 80),
    (rows, FP32, 16, 512, 4096, 4096, 256),
    (spectral, BF16, 8192, 4096, 256),
    (spectral, BF16, 8192, 3072, 64),
    (spectral, BF16, 2048, 1600, 100),
    (spectral, BF16, 8192, 4096, 512),
    (spectral, BF16, 8192, 4096, 4096),
    (spectral, FP32, 8192, 4096, 128),
    (spectral, FP32, 8192, 4096, 1024),
)
# Neighbours of the above in size or dtype.
MORE_CASES = (
    (product, BF16, 8192, 3072, 64),
    (product, FP16, 8192, 4096, 256),
    (layer, BF16, 1, 4096, 1024, 128),
    (layer, BF16, 4, 1600, 4800, 80),
    (layer, FP16, 16, 4096, 4096, 8),
    (gradient, BF16, 8192, 1600, 100),
    (gradient, FP16, 8192, 4096, 256),
    (spectral, BF16, 32768, 4096, 256),
    (spectral, BF16, 8192, 3072, 192),
    (spectral, BF16, 2048, 4096, 16),
    (spectral, BF16, 8192, 4096, 1024),
    (spectral, FP16, 8192, 4096, 256),
)


def main() -> None:
    driver.set_active(_Driver())
    specs.unavailable_reason = lambda device: None
    specs.card_of = lambda device: CARD
    case = ""
    seen = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash in seen:
            return
        seen.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        row = {
            "case": case,
            "kernel": self.__name__,
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
        }
        row |= {
            name: ptx.count(name)
            for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.c", "cp.async.cg")
        }
        row |= steps(self.__name__, kwargs)
        print(json.dumps(row | resources(kernel.asm["cubin"])), flush=True)

    JITFunction.run = compile_only
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    for make, dtype, *sizes in CASES if wanted == "few" else CASES + MORE_CASES:
        case = " ".join([make.__name__, str(dtype).removeprefix("torch."), *map(str, sizes)])
        if wanted == "few" or wanted in case:
            make(dtype, *sizes)


if __name__ == "__main__":
    main()
