"""The operator over a stack of w's by Triton's backends, against the dense definition in float64: natively on a GPU, in
Triton's interpreter elsewhere. What it computes by torch is tested in test_routed.py.
"""

import bench_package  # noqa: F401
import oracle
import pytest
import torch
from torch import Tensor

from bench import launch_hooks
from c3a_triton.operator import dispatch, routes
from c3a_triton.operator.cost_model import Sizes
from c3a_triton.operator.launch import plans
from c3a_triton.operator.routed import c3a_routed

pytestmark = pytest.mark.usefixtures("nan_filled")

FP32, BF16 = torch.float32, torch.bfloat16
STACK, N_TOKENS, TOP_K, M, N, B = 3, 6, 2, 2, 3, 4


def definition(x: Tensor, weight: Tensor, bias: Tensor, kernels: list[Tensor], of: routes.Routes) -> Tensor:
    """What every row's own matrix makes of it, in float64 and differentiable."""
    rows = []
    for group, row in zip(of.groups.tolist(), x[of.source], strict=True):
        dense = weight[group] + sum(circulants(w[group]) for w in kernels)
        rows.append(dense @ row + bias[group])
    return torch.stack(rows) * of.valid()[:, None]


def circulants(w: Tensor) -> Tensor:
    m, n, b = w.shape
    j, p = torch.arange(b)[:, None], torch.arange(b)
    return w[:, :, (p - j) % b].permute(0, 2, 1, 3).reshape(m * b, n * b) / (n * b)


@pytest.mark.parametrize("partial", [False, True], ids=["all", "partial"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_the_operator(device: torch.device, backend: str, dtype: torch.dtype, partial: bool) -> None:
    """Tokens with two choices each; two adapters, of blocks of 4 and of 2."""
    torch.manual_seed(0)
    index = torch.randint(-1 if partial else 0, STACK + partial, (N_TOKENS, TOP_K), device=device)
    of = routes.make(index, STACK, partial=partial)
    x = torch.randn(N_TOKENS, N * B, device=device).to(dtype).requires_grad_()
    weight = torch.randn(STACK, M * B, N * B, device=device).to(dtype)
    bias = torch.randn(STACK, M * B, device=device).to(dtype)
    kernels = [torch.randn(STACK, M * s, N * s, B // s, device=device, requires_grad=True) for s in (1, 2)]
    dy = torch.randn(N_TOKENS * TOP_K, M * B, device=device).to(dtype)

    with launch_hooks.noted() as names:
        y = c3a_routed(x, weight, bias, kernels, of, gather=True, backend=backend)
        dx, *dws = torch.autograd.grad(y, (x, *kernels), dy)
    assert ("grouped_hankel_kernel" in names) is (backend == "direct")
    assert "routed_outer_kernel" in names

    exact = [t.detach().to("cpu", torch.float64) for t in (x, weight, bias, *kernels)]
    leaves = [exact[0].requires_grad_(), *(w.requires_grad_() for w in exact[3:])]
    of = routes.make(index.cpu(), STACK, partial=partial)
    truth = definition(*exact[:3], exact[3:], of)
    truths = torch.autograd.grad(truth, leaves, dy.to("cpu", torch.float64))
    # The base's product is rounded before the adapters are added to it, once for each.
    bound = 2 * oracle.BOUNDS[dtype]
    oracle.assert_close(y.detach(), truth.detach(), dtype, bound=bound)
    oracle.assert_close(dx, truths[0], dtype, bound=bound)
    for dw, expected in zip(dws, truths[1:], strict=True):
        oracle.assert_close(dw, expected, FP32, bound=oracle.BOUNDS[dtype])


def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of rows: w of each, or the spectra of all."""
    monkeypatch.setattr(dispatch, "_kernels_pay", lambda device: True)
    monkeypatch.setattr(dispatch, "why_not", lambda *args: None)
    plans.clear_plans()
    try:
        chosen = [
            dispatch.choose("auto", Sizes(rows, 2048, 1536, 128, BF16, torch.device("cpu")), stack=128)
            for rows in (8, 65536)
        ]
    finally:
        plans.clear_plans()
    assert chosen == ["direct", "fft"]
