"""`c3a-triton doctor`: versions, devices and which backends really work here, to be pasted into a bug report."""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from c3a_triton.benchmark import gate
from c3a_triton.benchmark.machine import cpu_name, package_versions
from c3a_triton.errors import C3AError
from c3a_triton.operator import calls, dispatch, tuned
from c3a_triton.operator.launch import specs

from .options import print_json

__all__ = ["run"]

PACKAGES = ("c3a_triton", "torch", "triton", "transformers", "peft", "safetensors", "einops", "numpy")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
VARIABLES = re.compile(r"C3A_TRITON_\w+|TRITON_\w+|CUDA_\w+|PYTORCH_\w+|TORCH_\w+|OMP_NUM_THREADS|MKL_NUM_THREADS")
# Relative error of a product and its gradients; Triton's interpreter truncates to bfloat16 instead of rounding.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
# Tokens, in_blocks, out_blocks, b: one for the kernels of few tokens, one for the others, b no power of two.
SHAPES = ((4, 2, 3, 16), (40, 3, 2, 24))


def run(args: argparse.Namespace) -> int:
    """The command."""
    backends = _backends()
    document = {
        "versions": package_versions(PACKAGES) | {"cuda": torch.version.cuda},
        "system": _system(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "triton": _triton_state(),
        "peft_in_transformers": _peft_in_transformers(),
        "tuned_table": _tuned_table(),
        "environment": _environment(),
        "backends": backends,
        "healthy": not any(entry["state"] == "broken" for entry in backends),
    }
    if args.json:
        print_json(document)
    else:
        print(_text(document))
    return 0 if document["healthy"] else 1


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")


# The machine


def _system() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    content = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", content, re.MULTILINE)).split())
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def _triton_state() -> str:
    try:
        reason = specs.unavailable_reason(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except C3AError as error:
        return f"broken: {error}"
    interpreter = "interpreter on (TRITON_INTERPRET=1)" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    return f"not used: {reason}" if reason else interpreter


def _peft_in_transformers() -> str | None:
    """What is wrong with the PEFT here for transformers' own verbs (`model.add_adapter`); None where nothing is."""
    if not all(importlib.util.find_spec(package) for package in ("transformers", "peft")):
        return None
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

        check_peft_version(MIN_PEFT_VERSION)
    except ImportError as problem:
        return _without_home(f"transformers cannot be imported: {problem}")
    except ValueError:
        return (
            f"model.add_adapter and model.load_adapter of this transformers ask for PEFT {MIN_PEFT_VERSION} or newer; "
            "c3a_triton.apply and load_adapter, and PEFT's get_peft_model, work with the one here"
        )
    return None


def _tuned_table() -> dict[str, Any]:
    path = tuned.path()
    table = tuned.load()
    return {
        "path": _without_home(str(path)),
        "exists": path.exists(),
        "times": len(table.times),
        "tiles": len(table.tiles),
    }


def _environment() -> dict[str, str]:
    """Variables that matter. Of those that hold a path only that they are set."""
    found = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    return {name: "(a path)" if os.sep in value else value for name, value in found.items()}


# Backends


def _backends() -> list[dict[str, Any]]:
    """What each backend does on each device: "works" with its error, "not here" or "broken" with the reason."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return [
        {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "backend": backend}
        | _tried(backend, device, dtype)
        for device in devices
        for dtype in TOLERANCES
        for backend in dispatch.BACKENDS
    ]


def _tried(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    # On a GPU that is new to Triton's cache each compiles its kernels, for seconds.
    print(f"doctor: {backend} on {device} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    # A diagnosis: whatever comes up is what has to be told.
    try:
        reason = dispatch.why_not(backend, device, dtype)
        if reason is not None:
            return {"state": "not here", "reason": _without_home(reason), "error": None}
        errors = [error for shape in SHAPES for error in _errors(backend, device, dtype, shape)]
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
        return {"state": "broken", "reason": _without_home(reason), "error": None}
    tolerance = TOLERANCES[dtype]
    if wrong := [error for error in errors if not error <= tolerance]:  # NaN, too
        return {"state": "broken", "reason": f"wrong by {wrong[0]:.2g}, allowed: {tolerance:.2g}", "error": wrong[0]}
    return {"state": "works", "reason": None, "error": max(errors)}


def _errors(backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> list[float]:
    """The relative errors of a layer's output, its dx and dw; base and update are of one size."""
    n_tokens, in_blocks, out_blocks, b = shape
    in_features, out_features = in_blocks * b, out_blocks * b
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, in_features, generator=random).to(device, dtype).requires_grad_()
    weight = torch.randn(out_features, in_features, generator=random).to(device, dtype) / in_features**0.5
    w = (torch.randn(out_blocks, in_blocks, b, generator=random) * in_features**0.5).to(device).requires_grad_()
    dy = torch.randn(n_tokens, out_features, generator=random).to(device, dtype)
    y = calls.c3a_linear(x, weight, None, [w], backend=backend)
    found = (y, *torch.autograd.grad(y, (x, w), dy))
    truth = gate.Truth.of(weight.cpu(), w.cpu(), x.cpu(), dy.cpu())
    return [
        gate.relative_error(value.cpu(), expected)
        for value, expected in zip(found, (truth.y, truth.dx, truth.dw), strict=True)
    ]


def _text(document: dict[str, Any]) -> str:
    system, table = document["system"], document["tuned_table"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in document["versions"].items())
    flags = " ".join(system["cpu_flags"])
    lines = [
        f"versions:     {versions}",
        f"system:       {system['platform']}",
        f"CPU:          {system['cpu']}, {system['cores']} cores, {system['threads']} threads, "
        f"{system['torch_cpu_capability']} ({flags})",
    ]
    lines += [
        f"GPU {index}:        {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"driver {gpu['driver']}"
        for index, gpu in enumerate(document["gpus"])
    ] or ["GPU:          none that torch sees"]
    entries = f"{table['times']} times, {table['tiles']} tiles" if table["exists"] else "not there yet"
    variables = " ".join(f"{name}={value}" for name, value in document["environment"].items())
    lines += [
        f"Triton:       {document['triton']}",
        *([f"PEFT:         {document['peft_in_transformers']}"] if document["peft_in_transformers"] else []),
        f"tuned table:  {table['path']}: {entries}",
        f"environment:  {variables or 'nothing that matters'}",
        "",
    ]
    for entry in document["backends"]:
        where = f"{entry['backend']:<10}{entry['device']:<8}{entry['dtype']:<9}"
        lines.append(
            f"{where} {entry['state']}: {entry['reason'] or format(entry['error'], '.1e') + ' relative error'}"
        )
    return "\n".join(["```text", *lines, "```"])
