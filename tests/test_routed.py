"""The operator over a stack of kernels, one for each group of rows, against the dense definition of every group."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from c3a_triton.errors import BackendError, ShapeError
from c3a_triton.operator import backends, fourier, fourier_routed, routes
from c3a_triton.operator.routed import c3a_routed, grouped_base

ops = torch.ops.c3a_triton
CPU_BACKENDS = [name for name, backend in backends.ROUTED.items() if not backend.by_triton]
# (in, out, block sizes of the adapters): odd and prime ones, as wide as the layer, m ≠ n, two that are summed.
SHAPES = ((24, 16, (8,)), (15, 25, (5,)), (7, 14, (7,)), (12, 18, (6, 3, 6)), (6, 4, (1, 2)))
# (groups of each token, number of groups): groups without rows, all rows of one group, rows without a group.
ROUTES = {
    "one group": ([[0], [0], [0]], 1),
    "spread": ([[2, 0], [1, 2], [2, 0], [0, 2], [1, 0]], 3),
    "gaps": ([[6, 1, 3], [3, 6, 1], [1, 3, 6], [6, 3, 1]], 8),
    "all to one": ([[2]] * 9, 3),
    "sentinels": ([[0, 3], [3, 2], [2, 0], [3, 3]], 3),
    "negative": ([[-1, 2], [2, 3], [0, -1], [2, 0]], 3),
}
PARTIAL = ("sentinels", "negative")


def routes_of(name: str) -> routes.Routes:
    index, n_groups = ROUTES[name]
    return routes.make(torch.tensor(index), n_groups, partial=name in PARTIAL)


class Operands:
    """A layer's tensors and a batch for it, and what the dense definition makes of them."""

    def __init__(
        self,
        shape: tuple[int, int, tuple[int, ...]],
        r: routes.Routes,
        dtype: torch.dtype = torch.float32,
        *,
        gather: bool = False,
        transposed: bool = False,
        base: bool = True,
    ) -> None:
        n_in, n_out, sizes = shape
        self.routes, self.how = r, {"gather": gather, "transposed": transposed}
        n_rows = r.order.shape[0]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = torch.randn(n_rows // r.top_k if gather else n_rows, n_in).to(dtype).requires_grad_()
        matrices = torch.randn(r.n_groups, *((n_in, n_out) if transposed else (n_out, n_in))) / n_in**0.5
        self.weight = matrices.to(dtype) if base else None
        self.bias = torch.randn(r.n_groups, n_out).to(dtype) if base else None
        self.kernels = [
            (n_in**0.5 * torch.randn(r.n_groups, n_out // b, n_in // b, b)).to(wide).requires_grad_() for b in sizes
        ]
        self.dy = torch.randn(n_rows, n_out).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.kernels]

    def call(self, backend: str = "auto", **how: Any) -> Tensor:
        return c3a_routed(
            self.x, self.weight, self.bias, self.kernels, self.routes, backend=backend, **(self.how | how)
        )

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """y, and the gradients of x and of every w, row by row in float64."""
        r, gather, transposed = self.routes, self.how["gather"], self.how["transposed"]
        x, dy = (t.detach().double() for t in (self.x, self.dy))
        y, dx = torch.zeros_like(dy), torch.zeros_like(x)
        dws = [torch.zeros(w.shape, dtype=torch.float64) for w in self.kernels]
        deltas = [[oracle.dense(w_g) for w_g in w] for w in self.kernels]
        valid = r.valid().tolist()
        for s, (source, group) in enumerate(zip(r.source.tolist(), r.groups.tolist(), strict=True)):
            if not valid[s]:
                continue
            row = source if gather else s
            matrix = sum(of[group] for of in deltas)
            if self.weight is not None:
                w_g = self.weight[group].double()
                matrix = matrix + (w_g.T if transposed else w_g)
            y[s] = matrix @ x[row] + (0 if self.bias is None else self.bias[group].double())
            dx[row] += dy[s] @ matrix
            for dw in dws:
                dw[group] += oracle.weight_grad(dy[s, None], x[row, None], dw.shape[3])
        return y, [dx, *dws]


def check(operands: Operands, backend: str, dtype: torch.dtype) -> None:
    y = operands.call(backend)
    expected, gradients = operands.expected()
    oracle.assert_close(y, expected, dtype)
    for leaf, found, gradient in zip(
        operands.leaves, torch.autograd.grad(y, operands.leaves, operands.dy), gradients, strict=True
    ):
        # dw is summed in float32 from 16-bit rows, and x's 16-bit terms are rounded one by one before they are summed.
        oracle.assert_close(found, gradient, leaf.dtype, bound=2 * oracle.BOUNDS[dtype])
    absent = ~operands.routes.valid()
    assert (y[absent] == 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:2])))
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.usefixtures("nan_filled")
def test_against_the_dense_definition(name: str, shape: tuple[int, int, tuple[int, ...]], backend: str) -> None:
    for gather, transposed in ((True, False), (False, True)):
        operands = Operands(shape, routes_of(name), torch.float64, gather=gather, transposed=transposed)
        check(operands, backend, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.usefixtures("nan_filled")
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    # Widths that grouped_mm takes, and widths that it does not; with a base, and without one.
    for shape in ((64, 32, (16, 8)), (15, 25, (5,))):
        for name in ("gaps", "negative"):
            check(Operands(shape, routes_of(name), dtype, transposed=name == "gaps"), backend, dtype)
            check(Operands(shape, routes_of(name), dtype, gather=name == "gaps", base=False), backend, dtype)


def test_the_update_alone_keeps_its_bound() -> None:
    """Added in place to a base's product that has no values of its own, so that none hide the update's error."""
    operands = Operands((64, 32, (16,)), routes_of("gaps"), torch.bfloat16)
    operands.weight, operands.bias = torch.zeros_like(operands.weight), None
    oracle.assert_close(operands.call(), operands.expected()[0], torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.usefixtures("nan_filled")
def test_groups_that_reach_over_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fourier, "CPU_CHUNK_ELEMENTS", 24 * rows // torch.get_num_threads())
    r = routes.make(torch.randint(-1, 6, (20, 2)), 5, partial=True)
    check(Operands((24, 16, (8,)), r, gather=True), "torch", torch.float32)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_rows(backend: str) -> None:
    r = routes.make(torch.zeros(0, 2, dtype=torch.int64), 3)
    for gather in (True, False):
        operands = Operands((16, 24, (8, 4)), r, gather=gather)
        y = operands.call(backend)
        assert y.shape == (0, 24)
        dx, *dws = torch.autograd.grad(y.sum(), operands.leaves)
        assert dx.shape == (0, 16)
        assert all(torch.equal(dw, torch.zeros_like(w)) for dw, w in zip(dws, operands.kernels, strict=True))


def test_uniform_routes_are_a_batched_product() -> None:
    operands = Operands((16, 24, (8,)), routes.uniform(3, 4, torch.device("cpu")))
    matrices = operands.weight.double() + torch.stack([oracle.dense(w) for w in operands.kernels[0]])
    expected = operands.x.detach().double().view(3, 4, 16) @ matrices.mT + operands.bias.double()[:, None]
    oracle.assert_close(operands.call(), expected.flatten(0, 1), torch.float32)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen base", "trained base"])
@pytest.mark.parametrize("name", ["spread", "negative"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_of_gradients(backend: str, name: str, trained: bool) -> None:
    operands = Operands((6, 4, (2,)), routes_of(name), torch.float64, gather=True, transposed=trained)
    base = [operands.weight.requires_grad_(), operands.bias.requires_grad_()] if trained else []

    def call(*leaves: Tensor) -> Tensor:
        x, w, *base = leaves
        weight, bias = base or (operands.weight, operands.bias)
        return c3a_routed(x, weight, bias, [w], operands.routes, backend=backend, **operands.how)

    torch.autograd.gradcheck(call, (*operands.leaves, *base), fast_mode=True)
    torch.autograd.gradgradcheck(call, (*operands.leaves, *base), fast_mode=True)


def test_a_second_derivative_is_that_of_the_first() -> None:
    """The node's own gradients, which share spectra, and those that are recorded are the same."""
    operands = Operands((12, 18, (6, 3, 6)), routes_of("negative"), gather=True)
    y = operands.call()
    plain = torch.autograd.grad(y, operands.leaves, operands.dy, retain_graph=True)
    recorded = torch.autograd.grad(y, operands.leaves, operands.dy, create_graph=True)
    for one, other in zip(plain, recorded, strict=True):
        assert other.requires_grad
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wanted", [("x",), ("w",), ("w", "x")], ids="-".join)
def test_only_what_is_wanted(wanted: tuple[str, ...]) -> None:
    operands = Operands((12, 18, (6, 3, 6)), routes_of("gaps"), gather=True)
    expected = operands.expected()[1]
    operands.x.requires_grad_("x" in wanted)
    for w in operands.kernels[: 3 if "w" not in wanted else 2]:
        w.requires_grad_(False)
    y = operands.call()
    for i, leaf in enumerate(operands.leaves):
        if leaf.requires_grad:
            (found,) = torch.autograd.grad(y, leaf, operands.dy, retain_graph=True)
            oracle.assert_close(found, expected[i], torch.float32)


class Largest(TorchDispatchMode):
    """The number of elements of the largest result, and the products that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        self.products += func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default)
        return result


def test_nothing_of_the_size_of_dense_weights_is_allocated() -> None:
    n_in, n_out, n_groups = 128, 192, 16
    r = routes.make(torch.randint(0, n_groups, (60, 2)), n_groups)
    operands = Operands((n_in, n_out, (32, 64)), r, gather=True)
    operands.bias.requires_grad_(False)
    with Largest() as largest:
        operands.call().backward(operands.dy)
    rows = 120 * n_out
    # Spectra have a frequency more than halves of blocks.
    assert rows <= largest.elements < n_groups * n_in * n_out / 8


def test_groups_without_rows_cost_no_product() -> None:
    r = routes.make(torch.tensor([[3, 900], [900, 17]]), 1000)
    operands = Operands((16, 16, (8,)), r, base=False)
    with Largest() as largest:
        operands.call().backward(operands.dy)
    assert largest.products == 3 * 3  # the product, and the two gradients, of three groups


def kept_bytes(call: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes that are kept for the backward pass, by storage."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    assert y.requires_grad
    return kept


def test_the_tokens_are_kept_and_not_their_rows() -> None:
    n_tokens, top_k = 40, 4
    r = routes.make(torch.randint(0, 6, (n_tokens, top_k)), 6)
    operands = Operands((64, 32, (16,)), r, gather=True)
    kept = kept_bytes(operands.call)
    own = {t.untyped_storage().data_ptr() for t in (operands.x, operands.weight, *operands.kernels, *r[:5])}
    assert kept.keys() <= own
    assert operands.x.untyped_storage().data_ptr() in kept
    for w in operands.kernels:
        w.requires_grad_(False)
    assert operands.x.untyped_storage().data_ptr() not in kept_bytes(operands.call)
    operands.x.requires_grad_(False)
    operands.kernels[0].requires_grad_()
    assert operands.weight.untyped_storage().data_ptr() not in kept_bytes(operands.call)


def test_the_same_bits_again() -> None:
    operands = Operands((64, 32, (16, 8)), routes_of("gaps"), torch.bfloat16, gather=True)

    def run() -> list[Tensor]:
        y = operands.call()
        return [y, *torch.autograd.grad(y, operands.leaves, operands.dy)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", ["gaps", "negative"])
def test_the_ops_keep_what_they_promise(name: str) -> None:
    operands = Operands((12, 18, (6, 3)), routes_of(name))
    offsets, partial = operands.routes.offsets, operands.routes.partial
    x, kernels, dy = operands.x, operands.kernels, operands.dy.requires_grad_()
    weight = operands.weight.requires_grad_()
    for op, arguments in (
        (ops.routed, (x, kernels, offsets, 0.5, False, partial, "torch")),
        (ops.routed, (dy, kernels, offsets, 0.5, True, partial, "torch")),
        (ops.routed_weight_grad, (dy, x, offsets, 3, 0.5, torch.float32, partial, "torch")),
        (ops.grouped_base, (x, weight, offsets, False, partial)),
        (ops.grouped_base, (dy, weight, offsets, True, partial)),
        (ops.grouped_outer, (dy, x, offsets, partial)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("gather", [True, False])
def test_compiled_as_one_graph(gather: bool) -> None:
    index = torch.tensor(ROUTES["gaps"][0])

    def call(operands: Operands, index: Tensor, x: Tensor, *kernels: Tensor) -> Tensor:
        r = routes.make(index, 8, partial=True)
        return c3a_routed(x, operands.weight, operands.bias, kernels, r, **operands.how)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for shift in (0, -1):
        operands = Operands((12, 18, (6, 3, 6)), routes.make(index + shift, 8, partial=True), gather=gather)
        y = compiled(operands, index + shift, *operands.leaves)
        expected, gradients = operands.expected()
        oracle.assert_close(y, expected, torch.float32)
        for found, gradient in zip(torch.autograd.grad(y, operands.leaves, operands.dy), gradients, strict=True):
            oracle.assert_close(found, gradient, torch.float32)


@pytest.mark.parametrize("gather", [True, False])
def test_autocast_is_left_alone(gather: bool) -> None:
    # Of widths that grouped_mm does not take: matrix products would be cast.
    operands = Operands((15, 25, (5,)), routes_of("spread"), gather=gather)
    with torch.autocast("cpu", torch.bfloat16):
        y = operands.call()
        found = torch.autograd.grad(y, operands.leaves, operands.dy)
    expected, gradients = operands.expected()
    oracle.assert_close(y, expected, torch.float32)
    for one, gradient in zip(found, gradients, strict=True):
        oracle.assert_close(one, gradient, torch.float32)


def base_of(x: Tensor, weight: Tensor, r: routes.Routes, transposed: bool) -> Tensor:
    rows = [
        (w.T if transposed else w) @ row * valid for row, w, valid in zip(x, weight[r.groups], r.valid(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", [(32, 16), (16, 5), (5, 16), (1, 4), (4, 1)], ids=lambda w: "x".join(map(str, w)))
@pytest.mark.parametrize("name", ["gaps", "negative"])
@pytest.mark.usefixtures("nan_filled")
def test_the_base(name: str, widths: tuple[int, int], transposed: bool) -> None:
    r, (n_in, n_out) = routes_of(name), widths
    n_rows = r.order.shape[0]
    weight = torch.randn(r.n_groups, *((n_in, n_out) if transposed else (n_out, n_in)), requires_grad=True)
    strided = torch.randn(n_rows, n_in + 3)[:, 1:-2]
    for x in (torch.randn(n_rows, n_in), strided, torch.randn(n_in, n_rows).T):
        x.requires_grad_()
        y = grouped_base(x, weight, r.offsets, transposed, r.partial)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        expected = base_of(*wide, r, transposed)
        oracle.assert_close(y, expected, torch.float32)
        # A gradient that is one number in all places, as that of a sum.
        for found, ref in zip(
            torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(expected.sum(), wide), strict=True
        ):
            oracle.assert_close(found, ref, torch.float32)


def test_the_base_at_any_address() -> None:
    flat = torch.randn(1 + 3 * 8 * 16)
    weight, r = flat[1:].view(3, 8, 16), routes_of("spread")
    assert weight.data_ptr() % 16
    x = torch.randn(10, 16)
    oracle.assert_close(
        grouped_base(x, weight, r.offsets, False, False), base_of(x.double(), weight.double(), r, False), torch.float32
    )


@pytest.mark.parametrize("backend", ["expand", "fold"])
def test_backends_that_write_out_weights_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = Operands((12, 18, (6,)), routes_of("spread"))
    with pytest.raises(BackendError, match=f"backend='{backend}' writes out dense weights.* are 3,.*'auto'"):
        operands.call(backend)
    monkeypatch.setenv("C3A_TRITON_BACKEND", backend)
    with pytest.raises(BackendError, match=f"C3A_TRITON_BACKEND='{backend}' writes out"):
        operands.call()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="backend='fourier' is unknown"):
        Operands((12, 18, (6,)), routes_of("spread")).call("fourier")


def test_transforms_without_rules_are_refused() -> None:
    operands = Operands((12, 18, (6,)), routes_of("spread"))

    def call(x: Tensor) -> Tensor:
        return c3a_routed(x, operands.weight, None, operands.kernels, operands.routes)

    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vjp(call, operands.x.detach())
    with pytest.raises(BackendError, match=r"torch\.jit\.trace"):
        torch.jit.trace(call, operands.x.detach())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(9, 12)}, "x has 9 rows, and the routes are of 10"),
        ({"x": torch.randn(9, 12), "gather": True}, "x has 9 tokens, and the routes are of 5"),
        ({"x": torch.randn(10, 11)}, "x has 11 features, but w of shape .* takes in_blocks \\* b = 12"),
        ({"x": torch.zeros(10, 12, dtype=torch.int64)}, "x is torch.int64 of shape"),
        ({"x": torch.randn(2, 5, 12)}, "x is torch.float32 of shape"),
        ({"kernels": []}, "no kernels"),
        ({"kernels": [torch.randn(3, 2, 6)]}, "w is torch.float32 of shape .* here of 3 groups"),
        ({"kernels": [torch.randn(4, 3, 2, 6)]}, "w is torch.float32 of shape .* here of 3 groups"),
        ({"kernels": [torch.ones(3, 3, 2, 6, dtype=torch.int8)]}, "w is torch.int8 of shape"),
        (
            {"kernels": [torch.randn(3, 3, 2, 6), torch.randn(3, 4, 2, 6)]},
            "the result has 18 features, but w of shape .* = 24",
        ),
        ({"weight": torch.randn(3, 12, 18)}, r"the weight is .* it must be torch.float32 as x is, \(3, 18, 12\)"),
        ({"weight": torch.randn(18, 12)}, "the weight is .* of shape"),
        ({"weight": torch.randn(3, 18, 12).double()}, "the weight is torch.float64"),
        ({"bias": torch.randn(18)}, r"the bias is .* it must be torch.float32 as x is, \(3, 18\)"),
        ({"bias": torch.randn(3, 18).half()}, "the bias is torch.float16"),
        ({"kernels": [torch.empty(3, 3, 2, 6, device="meta")]}, "x is on cpu and w on meta"),
        ({"weight": torch.empty(3, 18, 12, device="meta")}, "x is on cpu and weight on meta"),
    ],
)
def test_operands_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    operands = {
        "x": torch.randn(10, 12),
        "weight": torch.randn(3, 18, 12),
        "bias": torch.randn(3, 18),
        "kernels": [torch.randn(3, 3, 2, 6)],
        "routes": routes_of("spread"),
    }
    c3a_routed(**operands)
    with pytest.raises(ShapeError, match=message):
        c3a_routed(**(operands | changed))


def test_rows_without_a_group_stay_what_they_are_in_a_given_result() -> None:
    r = routes_of("negative")
    out = torch.full((8, 16), 7.0)
    fourier_routed.product(torch.randn(8, 24), torch.randn(3, 2, 3, 8), r.offsets, scale=1.0, out=out)
    assert (out[~r.valid()] == 7).all()
    assert not (out[r.valid()] == 7).any()
