"""What the memory benchmark is going to measure; listing it needs no GPU."""

import bench_package  # noqa: F401
import pytest
import torch

from bench import memory, runs
from c3a_triton.benchmark import timing


def keys(device: str, *, tiny: bool) -> list[str]:
    setting = runs.Setting(torch.device(device), timing.CpuTimer(), ("base", "ours:auto"), tiny=tiny)
    return [task.key for task in memory.tasks(setting)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiny_means_tiny_sizes_on_every_device(device: str) -> None:
    tiny = keys(device, tiny=True)
    layer = "T=8 64→96"
    assert tiny == [f"base {layer} bfloat16", f"ours:auto {layer} b=8 bfloat16", f"ours:auto {layer} b=32 bfloat16"]
    assert not set(tiny) & set(keys(device, tiny=False))


def test_a_gpu_has_larger_cases_than_a_cpu() -> None:
    assert all("T=8192 " in key for key in keys("cuda", tiny=False))
    assert not any("T=8192 " in key for key in keys("cpu", tiny=False))
