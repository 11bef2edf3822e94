"""Compiles every kernel for one card without a GPU, through the launchers themselves, and prints what came out as JSON.

Run by test_aot.py as a program of its own, without TRITON_INTERPRET: `python aot_worker.py sm_90 [case]`; in place of
a part of a case's name, `few` takes those that are no neighbours of others, `once` a case or two of each kernel, and of
its variants in a case the first. A stand-in for Triton's driver names the card; each launch is turned into a
compilation, so that tiles, constants and the alignment of every argument are those of a real call. The tensors are
never read.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import bench_package  # noqa: F401
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.precompile import resources
from c3a_triton.operator.launch import specs
from c3a_triton.operator.launch.decode import decode_linear
from c3a_triton.operator.launch.direct import direct_product
from c3a_triton.operator.launch.expand import add_expanded_, expand_weight
from c3a_triton.operator.launch.fft import fft_backward, fft_product
from c3a_triton.operator.launch.grouped import grouped_product
from c3a_triton.operator.launch.routed import routed_backward, routed_direct, routed_product
from c3a_triton.operator.launch.weight_grad import weight_grad as grad_of_w
from c3a_triton.operator.routes import uniform

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
    if kernel in ("outer_kernel", "routed_outer_kernel"):
        return {"rows": constants["BLOCK_O"], "steps": 0}
    lengths = {
        "spectra_kernel": lambda c: c["Q"],
        "results_kernel": lambda c: c["Q"] + c["Q"] % 2,
        "mix_kernel": lambda c: 2 * c["col_blocks"],
        "routed_mix_kernel": lambda c: 2 * c["col_blocks"],
    }
    if kernel not in lengths:
        return {}
    found = {"steps": -(-lengths[kernel](constants) // constants["BLOCK_K"])}
    return found | ({"rows": constants["BLOCK_T"]} if kernel == "routed_mix_kernel" else {})


def waits_first(cubin: bytes) -> bool:
    """Whether the code waits for the launches before it ahead of everything that reads or writes global memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    touched = re.search(r"\b(LDG|STG|LDGSTS|LD|ST|ATOM|ATOMG|RED|UTMALDG|UBLKCP)\b", sass)
    assert touched is not None
    wait = sass.find("ACQBULK")
    return 0 <= wait < touched.start()


def product(dtype: torch.dtype, n_tokens: int, width: int, b: int, transpose: bool = False) -> None:
    """A square layer's product: forward into an existing output, transposed with a bias."""
    x, w = tensor(n_tokens, width, dtype=dtype), tensor(width // b, width // b, b)
    if transpose:
        direct_product(x, w, scale=1 / width, transpose=True, bias=tensor(width, dtype=dtype))
    else:
        direct_product(x, w, scale=1 / width, out=tensor(n_tokens, width, dtype=dtype))


def decode(dtype: torch.dtype, n_tokens: int, in_features: int, out_features: int, b: int) -> None:
    """A whole layer for a few tokens."""
    x, weight = tensor(n_tokens, in_features, dtype=dtype), tensor(out_features, in_features, dtype=dtype)
    w = tensor(out_features // b, in_features // b, b)
    decode_linear(x, weight, w, tensor(out_features, dtype=dtype), scale=1 / in_features)


def expand(dtype: torch.dtype, width: int, b: int) -> None:
    """ΔW written, added to a weight, and added to a transposed weight."""
    w = tensor(width // b, width // b, b)
    expand_weight(w, scale=1 / width, dtype=dtype)
    add_expanded_(tensor(width, width, dtype=dtype), w, scale=1 / width)
    add_expanded_(tensor(width, width, dtype=dtype).T, w, scale=1 / width)


def weight_grad(dtype: torch.dtype, n_tokens: int, width: int, b: int) -> None:
    x = tensor(n_tokens, width, dtype=dtype)
    grad_of_w(x, x, b, scale=1 / width)


def fft(dtype: torch.dtype, n_tokens: int, in_features: int, b: int, out_features: int = 0) -> None:
    """A layer by spectra, square where nothing else is said: forward into an existing output, and both gradients."""
    out_features = out_features or in_features
    x, w = tensor(n_tokens, in_features, dtype=dtype), tensor(out_features // b, in_features // b, b)
    y = tensor(n_tokens, out_features, dtype=dtype)
    fft_product(x, w, scale=1 / in_features, out=y)
    fft_backward(y, x, w, scale=1 / in_features)


def grouped(dtype: torch.dtype, n_rows: int, tokens_per_row: int, in_features: int, out_features: int, b: int) -> None:
    """A batch whose first row has no adapter and every other one its own: forward, and transposed with a bias."""
    n_tokens = n_rows * tokens_per_row
    kernels = [tensor(out_features // b, in_features // b, b) for _ in range(n_rows - 1)]
    rows = range(-1, n_rows - 1)
    grouped_product(tensor(n_tokens, in_features, dtype=dtype), kernels, rows, scale=1.0)
    dy, bias = tensor(n_tokens, out_features, dtype=dtype), tensor(in_features, dtype=dtype)
    grouped_product(dy, kernels, rows, scale=1.0, transpose=True, bias=bias)


def routed(dtype: torch.dtype, n_rows: int, stack: int, in_features: int, out_features: int, b: int) -> None:
    """Rows of a stack's w's: by spectra into an existing output, and both gradients; by indexing both ways."""
    x, y = tensor(n_rows, in_features, dtype=dtype), tensor(n_rows, out_features, dtype=dtype)
    w = tensor(stack, out_features // b, in_features // b, b)
    routes = uniform(stack, n_rows // stack, x.device)
    routed_product(x, w, routes.offsets, scale=1.0, out=y, tiles=routes.tiles)
    routed_backward(y, x, w, routes.offsets, scale=1.0, tiles=routes.tiles)
    routed_direct(x, w, routes.offsets, scale=1.0, out=y, tiles=routes.tiles)
    routed_direct(y, w, routes.offsets, scale=1.0, transpose=True, tiles=routes.tiles)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every kernel, on sizes of real models.
ONE_EACH = (
    (product, BF16, 8192, 4096, 256),
    (product, BF16, 1, 4096, 256),
    (decode, BF16, 1, 4096, 4096, 256),
    (decode, BF16, 1, 4096, 1024, 128),
    (expand, BF16, 4096, 256),
    (weight_grad, BF16, 8192, 4096, 256),
    (weight_grad, BF16, 8192, 3072, 64),
    (grouped, BF16, 128, 1, 4096, 4096, 256),
    (grouped, BF16, 16, 512, 4096, 4096, 256),
    (fft, BF16, 8192, 4096, 256),
    # Gate and up of Qwen3-30B-A3B, 8192 tokens and a few.
    (routed, BF16, 65536, 128, 2048, 1536, 128),
    (routed, BF16, 128, 128, 2048, 1536, 128),
)
# With these every branch of the kernels; with the others, nightly, every tile of the table.
CASES = (
    *ONE_EACH,
    (product, BF16, 8192, 4096, 256, True),
    (product, BF16, 8192, 3072, 96),
    (product, BF16, 2048, 1600, 25),
    (product, BF16, 40, 4096, 256),
    (product, FP32, 8192, 4096, 256),
    (product, FP16, 16, 3072, 64, True),
    (decode, BF16, 16, 14336, 4096, 1024),
    (decode, BF16, 1, 1600, 1600, 25),
    (weight_grad, BF16, 8192, 3072, 96),
    (weight_grad, BF16, 8192, 1600, 25),
    (weight_grad, FP32, 8192, 4096, 256),
    (grouped, BF16, 32, 1, 1600, 4800, 25),
    (grouped, FP16, 16, 100, 1600, 4800, 80),
    (fft, BF16, 2048, 1600, 100),
    (fft, BF16, 8192, 4096, 1024),
    (fft, FP32, 8192, 4096, 128),
    (routed, BF16, 8192, 16, 1536, 1536, 16),
    (fft, FP32, 200, 33, 1, 1),  # rows of one value: a stride of 1, which kernels are compiled for
)
# Neighbours of the above in size or dtype, and the largest transform, which takes the compiler longest.
MORE_CASES = (
    (product, BF16, 8192, 4096, 16),
    (product, BF16, 2048, 1600, 40),
    (product, BF16, 512, 4096, 256),
    (product, FP32, 512, 4096, 64),
    (product, FP32, 4, 4096, 256),
    (decode, FP16, 4, 3072, 8192, 64),
    (decode, BF16, 8, 4096, 14336, 256),
    (expand, FP32, 3072, 192),
    (weight_grad, BF16, 8192, 3072, 192),
    (weight_grad, FP32, 8192, 3072, 64),
    (grouped, FP16, 4, 1, 3072, 8192, 64),
    (grouped, FP32, 64, 1, 4096, 4096, 256),
    (fft, BF16, 2048, 4096, 16),
    (grouped, FP32, 16, 512, 4096, 4096, 256),
    (fft, BF16, 8192, 3072, 64),
    (routed, FP32, 8192, 16, 2048, 768, 64),
    (product, BF16, 8192, 3072, 64),
    (product, FP16, 8192, 4096, 256),
    (decode, BF16, 4, 1600, 4800, 80),
    (decode, FP16, 16, 4096, 4096, 8),
    (weight_grad, BF16, 8192, 1600, 100),
    (weight_grad, FP16, 8192, 4096, 256),
    (fft, BF16, 32768, 4096, 256),
    (fft, BF16, 8192, 4096, 512),
    (fft, BF16, 8192, 4096, 4096),
    (fft, BF16, 8192, 3072, 192),
    (fft, BF16, 8192, 4096, 128, 14336),
    (fft, BF16, 8192, 3072, 64, 1024),
    (fft, FP32, 8192, 4096, 1024),
    (fft, FP16, 8192, 4096, 256),
    (routed, FP16, 65536, 128, 768, 2048, 128),
    (routed, BF16, 8192, 8, 4096, 14336, 256),
)


def main() -> None:
    driver.set_active(_Driver())
    specs.unavailable_reason = lambda device: None
    specs.card_of = lambda device: CARD
    case = ""
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    begun, seen = set(), set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        if wanted == "once" and (case, self.__name__) in begun:
            return
        begun.add((case, self.__name__))
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
            for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.c", "cp.async.cg", "atom.global")
        }
        row["ordered"] = ptx.count("atom.global.gpu.acq_rel.add")
        row |= steps(self.__name__, kwargs)
        if kwargs.get("PDL"):
            row["waits_first"] = waits_first(kernel.asm["cubin"])
        print(json.dumps(row | resources(kernel.asm["cubin"])), flush=True)

    JITFunction.run = compile_only
    named = {"once": ONE_EACH, "few": CASES}
    for make, dtype, *sizes in named.get(wanted, CASES + MORE_CASES):
        case = " ".join([make.__name__, str(dtype).removeprefix("torch."), *map(str, sizes)])
        if wanted in named or wanted in case:
            make(dtype, *sizes)


if __name__ == "__main__":
    main()
