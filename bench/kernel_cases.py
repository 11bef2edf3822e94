"""Every Triton kernel at small and odd sizes, in all dtypes: a table, and how one of its cases is checked.

Sizes are small because tools that watch every access are slow, and odd because it is at the ends of tiles that masks go
wrong. The cases of different operators alternate, so that a run that is cut short has seen every kernel.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from unittest import mock

import torch
from torch import Tensor

from c3a_triton.benchmark import gate
from c3a_triton.operator import autograd, calls, reference, routes
from c3a_triton.operator.launch import decode, direct, expand, fft, grouped, plans, routed, specs, weight_grad
from c3a_triton.operator.rows import c3a_linear_rows

from . import ROOT, guards, overhead

__all__ = ["CASES", "KERNELS", "WORST", "Case", "check", "compare", "computed", "launched"]

SCALE = 0.37
# The largest of many rounding errors is a few times their root mean square.
WORST = 8
# Relative errors that results may have, by dtype: of an operator, where operands are rounded as well (the bounds that
# the tests hold it to); of an exact sum that is rounded once; of a layer the gate's, twice an operator's.
_OPERATOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
_ONCE = {torch.float32: 1e-7, torch.float16: 2.6e-4, torch.bfloat16: 2.1e-3}
_F32, _F16, _BF16 = "float32", "float16", "bfloat16"

# A result of a case: what it is, its value, the truth in float64.
_Result = tuple[str, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of a launcher or an operator."""

    operator: str
    n_tokens: int
    m: int
    n: int
    b: int
    dtype: str = _F32
    options: frozenset[str] = field(default=frozenset())
    """Some of: transpose, bias, out; unaligned (all operands begin an element past an aligned address); apart (rows of
    2-D operands are); chunks (tokens in several); one, many, rest (of a stack's w's all rows have one, most have no
    row, some rows have none); a layout or a backend that the operator has."""

    @property
    def key(self) -> str:
        """Its name in results."""
        sizes = f"T={self.n_tokens} w={self.m}×{self.n}×{self.b} {self.dtype}"
        return " ".join((self.operator, sizes, *sorted(self.options)))

    @property
    def tolerance(self) -> float:
        """The relative error that its results may have."""
        if self.operator == "weight_grad":  # operands are exact, and the sum is float32
            return _OPERATOR[torch.float32]
        bounds = {"layer": gate.TOLERANCES, "rows": gate.TOLERANCES, "expand": _ONCE, "add": _ONCE, "decode": _ONCE}
        return bounds.get(self.operator, _OPERATOR)[getattr(torch, self.dtype)]


class _Operands:
    """Makes the tensors of a case, from seeded values, in guarded memory."""

    def __init__(self, case: Case, memory: guards.Memory, device: torch.device) -> None:
        self.case = case
        self._memory = memory
        self._device = device
        self._random = torch.Generator().manual_seed(0)
        self.dtype: torch.dtype = getattr(torch, case.dtype)

    def __contains__(self, option: str) -> bool:
        return option in self.case.options

    def normal(
        self, name: str, *shape: int, dtype: torch.dtype | None = None, stride: Sequence[int] | None = None
    ) -> Tensor:
        """Random normal values; drawn on the CPU, so that they are the same on every device."""
        values = torch.randn(*shape, generator=self._random)
        if stride is None and len(shape) == 2 and "apart" in self:
            stride = (shape[1] + 3, 1)
        dtype = self.dtype if dtype is None else dtype
        skip = int("unaligned" in self)
        return self._memory.empty(shape, dtype, self._device, name, stride=stride, skip=skip).copy_(values)

    def w(self, m: int | None = None, n: int | None = None, b: int | None = None) -> Tensor:
        case = self.case
        return self.normal("w", m or case.m, n or case.n, b or case.b, dtype=torch.float32)

    def x(self) -> Tensor:
        return self.normal("x", self.case.n_tokens, self.case.n * self.case.b)

    def dy(self) -> Tensor:
        return self.normal("dy", self.case.n_tokens, self.case.m * self.case.b)

    def weight(self) -> Tensor:
        rows, columns = self.case.m * self.case.b, self.case.n * self.case.b
        return self.normal("weight", rows, columns, stride=(1, rows) if "transposed" in self else None)

    def bias(self, features: int, option: str = "bias") -> Tensor | None:
        return self.normal("bias", features) if option in self else None


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _dense(w: Tensor, scale: float = SCALE) -> Tensor:
    return reference.circulant_matrix(_exact(w), scale)


def _weight_grad(dy: Tensor, x: Tensor, b: int, scale: float = SCALE) -> Tensor:
    return reference.weight_grad(_exact(dy), _exact(x), b, scale=scale, dtype=torch.float64)


# The operators


def _product(given: _Operands, product: Callable[..., Tensor]) -> Iterator[_Result]:
    transpose = "transpose" in given
    x, w = given.dy() if transpose else given.x(), given.w()
    dense = _dense(w) if transpose else _dense(w).T
    bias = given.bias(dense.shape[1])
    out = given.normal("out", x.shape[0], dense.shape[1]) if "out" in given else None
    truth = _exact(x) @ dense
    for summand in (bias, out):
        truth = truth if summand is None else truth + _exact(summand)
    yield "y", product(x, w, scale=SCALE, transpose=transpose, bias=bias, out=out), truth


def _direct(given: _Operands) -> Iterator[_Result]:
    return _product(given, direct.direct_product)


def _fft(given: _Operands) -> Iterator[_Result]:
    with _in_chunks() if "chunks" in given else nullcontext():
        yield from _product(given, fft.fft_product)


def _fft_backward(given: _Operands) -> Iterator[_Result]:
    x, dy, w = given.x(), given.dy(), given.w()
    with _in_chunks() if "chunks" in given else nullcontext():
        dx, dw = fft.fft_backward(dy, x, w, scale=SCALE)
    yield "dx", dx, _exact(dy) @ _dense(w)
    yield "dw", dw, _weight_grad(dy, x, given.case.b)


def _fft_weight_grad(given: _Operands) -> Iterator[_Result]:
    x, dy, b = given.x(), given.dy(), given.case.b
    yield "dw", fft.fft_weight_grad(dy, x, b, scale=SCALE), _weight_grad(dy, x, b)


@contextmanager
def _in_chunks() -> Iterator[None]:
    """Spectra of 128 tokens at a time, as those of many tokens are computed."""
    with mock.patch.object(specs, "scratch_bytes", return_value=1):
        plans.clear_plans()
        yield
    plans.clear_plans()


def _direct_weight_grad(given: _Operands) -> Iterator[_Result]:
    x, dy, b = given.x(), given.dy(), given.case.b
    yield "dw", weight_grad.weight_grad(dy, x, b, scale=SCALE), _weight_grad(dy, x, b)


def _expand(given: _Operands) -> Iterator[_Result]:
    w, transpose = given.w(), "transpose" in given
    matrix = expand.expand_weight(w, scale=SCALE, dtype=given.dtype, transpose=transpose)
    yield "ΔW", matrix, _dense(w).T if transpose else _dense(w)


def _add(given: _Operands) -> Iterator[_Result]:
    weight, w = given.weight(), given.w()
    truth = _exact(weight) + _dense(w)
    yield "W + ΔW", expand.folded_weight(weight, w, scale=SCALE), truth
    expand.add_expanded_(weight, w, scale=SCALE)
    yield "W += ΔW", weight, truth


def _decode(given: _Operands) -> Iterator[_Result]:
    x, weight, w, bias = given.x(), given.weight(), given.w(), given.bias(given.case.m * given.case.b)
    truth = _exact(x) @ (_exact(weight) + _dense(w)).T
    yield (
        "y",
        decode.decode_linear(x, weight, w, bias, scale=SCALE),
        truth if bias is None else truth + _exact(bias),
    )


def _grouped(given: _Operands) -> Iterator[_Result]:
    """Rows of three adapters, one of them with blocks twice as large, and of none."""
    case, rows = given.case, (2, -1, 0, 1)
    kernels = [given.w(), given.w(case.m // 2, case.n // 2, 2 * case.b), given.w()]
    transpose = "transpose" in given
    features = (case.m, case.n) if transpose else (case.n, case.m)
    x = given.normal("x", case.n_tokens, features[0] * case.b)
    bias = given.bias(features[1] * case.b)
    truth = _of_rows(x, kernels, rows, transpose)
    result = grouped.grouped_product(x, kernels, rows, scale=SCALE, transpose=transpose, bias=bias)
    yield "y", result, truth if bias is None else truth + _exact(bias)


def _of_rows(x: Tensor, kernels: Sequence[Tensor], rows: Sequence[int], transpose: bool = False) -> Tensor:
    parts = []
    for part, adapter in zip(_exact(x).chunk(len(rows)), rows, strict=True):
        dense = _dense(kernels[adapter]) * (adapter >= 0)
        parts.append(part @ (dense if transpose else dense.T))
    return torch.cat(parts)


class _Stack:
    """A stack of w's and rows that have them, sorted: as options say, all of them have the same one, some have none, or
    most w's have no row.
    """

    def __init__(self, given: _Operands, device: torch.device) -> None:
        case = given.case
        size = 2 * case.n_tokens + 1 if "many" in given else 3
        index = torch.arange(case.n_tokens) * 2 % size if "many" in given else torch.arange(case.n_tokens) % 2 * 2
        if "one" in given:
            index.fill_(1)
        if "rest" in given:
            index[::3], index[1::4] = -1, size
        self.w = given.normal("w", size, case.m, case.n, case.b, dtype=torch.float32)
        self.routes = routes.make(index[:, None].to(device), size, partial="rest" in given)
        self._groups = index[self.routes.order.cpu()].tolist()
        self._dense = [_dense(w) for w in self.w]

    def product(self, x: Tensor, transpose: bool = False) -> Tensor:
        """What each row's own matrix makes of it."""
        rows = torch.zeros(len(x), self._dense[0].shape[int(transpose)], dtype=torch.float64)
        for row, (one, group) in enumerate(zip(_exact(x), self._groups, strict=True)):
            if 0 <= group < len(self._dense):
                rows[row] = one @ (self._dense[group] if transpose else self._dense[group].T)
        return rows

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """dw of each from its own rows."""
        of_group = [torch.tensor([g == group for g in self._groups]) for group in range(len(self._dense))]
        b = self.w.shape[3]
        return torch.stack([_weight_grad(_exact(dy)[own], _exact(x)[own], b) for own in of_group])


def _routed(given: _Operands, product: Callable[..., Tensor] = routed.routed_product) -> Iterator[_Result]:
    transpose = "transpose" in given
    x = given.dy() if transpose else given.x()
    stack = _Stack(given, x.device)
    truth = stack.product(x, transpose)
    out = given.normal("out", *truth.shape) if "out" in given else None
    truth = truth if out is None else truth + _exact(out)
    of = stack.routes
    with _in_chunks() if "chunks" in given else nullcontext():
        y = product(x, stack.w, of.offsets, scale=SCALE, transpose=transpose, out=out, tiles=of.tiles)
    yield "y", y, truth


def _routed_direct(given: _Operands) -> Iterator[_Result]:
    return _routed(given, routed.routed_direct)


def _routed_backward(given: _Operands) -> Iterator[_Result]:
    x, dy = given.x(), given.dy()
    stack = _Stack(given, x.device)
    of = stack.routes
    with _in_chunks() if "chunks" in given else nullcontext():
        dx, dw = routed.routed_backward(dy, x, stack.w, of.offsets, scale=SCALE, tiles=of.tiles)
    yield "dx", dx, stack.product(dy, transpose=True)
    yield "dw", dw, stack.weight_grad(dy, x)


def _layer(given: _Operands) -> Iterator[_Result]:
    """A layer and its gradients, through autograd and through the custom op that compiled code calls."""
    (backend,) = given.case.options & {"direct", "fft", "expand", "fold"}
    x, dy, w, weight, bias = given.x(), given.dy(), given.w(), given.weight(), given.bias(given.case.m * given.case.b)
    truth = gate.Truth.of(_exact(weight), _exact(w), _exact(x), _exact(dy))
    y_truth = truth.y if bias is None else truth.y + _exact(bias)
    leaves = x.requires_grad_(), w.requires_grad_()
    y = calls.c3a_linear(x, weight, bias, (w,), backend=backend)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    by_op = autograd.registered_ops.linear(x, weight, bias, [w], 1 / x.shape[1], False, backend)
    dw_by_op = autograd.registered_ops.weight_grad(dy, x, w.shape[2], 1 / x.shape[1], torch.float32, backend)
    yield from (("y", y, y_truth), ("dx", dx, truth.dx), ("dw", dw, truth.dw))
    yield from (("y of the op", by_op, y_truth), ("dw of the op", dw_by_op, truth.dw))


def _rows(given: _Operands) -> Iterator[_Result]:
    case, rows = given.case, (1, 0, -1, 1)
    x = given.normal("x", len(rows), case.n_tokens, case.n * case.b)
    weight, kernels = given.weight(), [given.w(), given.w()]
    flat = x.view(-1, x.shape[2])
    truth = _exact(flat) @ _exact(weight).T + _of_rows(flat, kernels, rows) / SCALE / x.shape[2]
    y = c3a_linear_rows(x, weight, None, kernels, rows, backend="direct")
    yield "y", y, truth.view(y.shape)


_OPERATORS: dict[str, Callable[[_Operands], Iterator[_Result]]] = {
    "direct": _direct,
    "weight_grad": _direct_weight_grad,
    "fft": _fft,
    "fft_backward": _fft_backward,
    "fft_weight_grad": _fft_weight_grad,
    "expand": _expand,
    "add": _add,
    "decode": _decode,
    "grouped": _grouped,
    "layer": _layer,
    "rows": _rows,
    "routed": _routed,
    "routed_direct": _routed_direct,
    "routed_backward": _routed_backward,
}

# The table: (tokens, m, n, b), dtype, options


def _cases(operator: str, *rows: tuple[tuple[int, int, int, int], str, str]) -> list[Case]:
    return [Case(operator, *sizes, dtype, frozenset(options.split())) for sizes, dtype, options in rows]


def _alternating(*operators: list[Case]) -> tuple[Case, ...]:
    return tuple(case for case in chain.from_iterable(zip_longest(*operators)) if case is not None)


CASES = _alternating(
    _cases(
        "direct",
        # A few tokens: no table. 40 blocks split the sum.
        ((3, 5, 3, 7), _F32, "bias"),
        ((1, 3, 5, 16), _F16, "transpose"),
        ((7, 2, 3, 24), _BF16, "out bias"),
        ((2, 1, 40, 16), _F32, "out bias"),
        ((2, 1, 20, 33), _F16, "unaligned bias out"),
        ((3, 2, 3, 5), _F32, "unaligned bias out"),
        # Many tokens, blocks large enough for a table of shifted rows.
        ((33, 3, 2, 24), _F32, "bias"),
        ((17, 2, 3, 72), _BF16, ""),
        ((70, 3, 2, 40), _F16, "transpose out"),
        ((19, 3, 2, 72), _F32, "unaligned transpose bias out"),
        ((21, 2, 2, 40), _BF16, "apart out"),
        # Small or odd blocks: a dense matrix.
        ((130, 5, 3, 7), _F32, "apart"),
        ((17, 33, 20, 1), _F16, "bias"),
        ((18, 5, 9, 3), _BF16, "transpose out"),
        ((20, 5, 3, 5), _F16, "unaligned"),
    ),
    _cases(
        "fft",
        ((3, 20, 33, 1), _F32, "bias"),
        ((40, 5, 3, 2), _F16, "transpose"),
        ((19, 5, 3, 7), _BF16, "out"),
        ((33, 2, 3, 31), _F32, "unaligned transpose bias out"),
        ((17, 3, 2, 34), _BF16, "bias"),
        ((5, 1, 2, 96), _F16, "apart"),
        ((3, 1, 2, 192), _BF16, "transpose unaligned"),
        ((2, 1, 1, 512), _F32, "bias"),
        ((1, 1, 2, 512), _BF16, "out"),
        ((2, 1, 1, 512), _F16, "unaligned transpose bias out"),
        ((150, 3, 2, 7), _F32, "chunks bias"),
    ),
    _cases(
        "weight_grad",
        ((9, 5, 3, 7), _F32, ""),
        ((17, 2, 3, 24), _BF16, "unaligned"),
        ((33, 2, 1, 64), _F16, "apart"),
        ((600, 1, 2, 16), _F32, ""),
        ((9, 2, 1, 97), _F32, "unaligned"),
        ((35, 1, 2, 96), _BF16, ""),
        ((5, 2, 1, 72), _F16, "apart"),
        ((300, 1, 1, 66), _F32, ""),
        ((3, 1, 2, 256), _BF16, "unaligned"),
        ((1, 9, 5, 3), _F16, ""),
    ),
    _cases(
        "fft_backward",
        ((19, 3, 4, 5), _F32, ""),
        ((33, 2, 3, 31), _F16, "unaligned"),
        ((9, 3, 2, 34), _BF16, "apart"),
        ((150, 2, 3, 6), _F32, "chunks"),
        ((150, 2, 1, 34), _BF16, "chunks"),
        ((5, 1, 2, 136), _BF16, "unaligned"),
        ((3, 2, 1, 144), _F32, ""),
    ),
    _cases(
        "decode",
        ((1, 3, 2, 16), _BF16, "bias"),
        ((4, 2, 5, 3), _F16, ""),
        ((9, 3, 1, 64), _F16, "unaligned bias"),
        ((16, 4, 3, 15), _BF16, "apart"),
        ((2, 2, 1, 97), _BF16, "unaligned"),
        ((5, 1, 40, 16), _F16, "bias"),
        ((3, 3, 40, 1), _F16, "bias"),
        # The step of the sum divides it.
        ((6, 2, 16, 16), _BF16, ""),
        ((2, 3, 32, 4), _F16, "bias"),
    ),
    _cases(
        "expand",
        ((0, 5, 3, 7), _F32, ""),
        ((0, 2, 3, 97), _BF16, "unaligned"),
        ((0, 3, 5, 16), _F16, "transpose"),
        ((0, 33, 20, 1), _BF16, "transpose"),
    ),
    _cases(
        "add",
        ((0, 5, 3, 7), _BF16, ""),
        ((0, 2, 3, 97), _F16, "transposed"),
        ((0, 2, 3, 40), _F32, "unaligned apart"),
    ),
    _cases(
        "grouped",
        # Few tokens; 40 blocks split the sum.
        ((4, 6, 4, 3), _F32, "bias"),
        ((8, 4, 2, 8), _F16, "unaligned transpose bias"),
        ((4, 2, 4, 33), _BF16, "unaligned"),
        ((4, 2, 80, 8), _F32, "bias"),
        # Many tokens.
        ((80, 6, 4, 3), _F32, "transpose"),
        ((68, 2, 4, 16), _BF16, "bias"),
        ((132, 4, 2, 33), _F16, "unaligned apart bias"),
    ),
    _cases(
        "layer",
        ((5, 3, 2, 8), _F32, "direct bias"),
        ((18, 3, 2, 7), _BF16, "fft bias"),
        ((20, 2, 3, 24), _F16, "direct"),
        ((3, 2, 3, 16), _BF16, "direct bias unaligned"),
        ((9, 3, 2, 5), _F32, "expand"),
        ((7, 2, 3, 12), _F16, "fold"),
    ),
    _cases(
        "fft_weight_grad",
        ((7, 2, 5, 3), _BF16, ""),
        ((600, 1, 2, 4), _F32, "unaligned"),
        ((5, 2, 1, 100), _F16, ""),
        ((2, 1, 1, 512), _BF16, ""),
    ),
    _cases("rows", ((3, 3, 2, 8), _F32, ""), ((9, 2, 3, 7), _BF16, "")),
    _cases(
        "routed",
        ((7, 2, 3, 5), _F32, "rest"),
        ((5, 3, 2, 8), _BF16, "many transpose unaligned out"),
        ((140, 1, 2, 4), _F16, "one chunks apart"),
        ((20, 9, 1, 4), _F16, "rest transpose"),
    ),
    _cases(
        "routed_direct",
        # Few rows; 40 blocks split the sum.
        ((7, 2, 3, 5), _F32, "rest out"),
        ((5, 3, 2, 8), _F16, "many transpose unaligned"),
        ((4, 2, 80, 8), _BF16, "one out"),
        # Many rows.
        ((70, 2, 3, 5), _F16, "rest unaligned transpose out"),
        ((81, 1, 4, 16), _BF16, "one apart"),
        ((60, 3, 2, 33), _F32, "rest out"),
    ),
    _cases(
        "routed_backward",
        ((7, 2, 3, 5), _BF16, "rest"),
        ((5, 3, 2, 8), _F16, "many unaligned"),
        ((140, 1, 2, 4), _F32, "chunks rest"),
        ((33, 2, 1, 6), _F32, "one"),
    ),
)

# Every kernel that there is, by its name; what else is compiled is part of them.
KERNELS = frozenset(
    name
    for path in (ROOT / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
)


# Checking


def computed(
    case: Case, device: torch.device, *, guard: int = guards.GUARD, operands: type[_Operands] = _Operands
) -> tuple[list[_Result], list[str], _Operands]:
    """Compute a case in guarded memory.

    Args:
        case: one of `CASES`, or one like them.
        device: a GPU, or the CPU under Triton's interpreter.
        guard: bytes around each tensor; 0 for tools that watch allocations themselves.
        operands: what makes its tensors.

    Returns:
        Its results, a line for each tensor outside of which something was written, and the maker of its tensors.
    """
    memory = guards.Memory(guard)
    given = operands(case, memory, device)
    with guards.guarded(memory) if guard else nullcontext():
        results = list(_OPERATORS[case.operator](given))
    return results, memory.damage(), given


def check(case: Case, device: torch.device, *, guard: int = guards.GUARD) -> None:
    """Compute a case as `computed` does, and hold its results against the dense float64 definition.

    Raises:
        GateError: a result is wrong or not finite, or something was written outside of a tensor.
    """
    results, damage, _ = computed(case, device, guard=guard)
    if damage:
        raise gate.GateError("; ".join(damage))
    for name, value, truth in results:
        compare(name, value, truth, case.tolerance)


def compare(name: str, value: Tensor, truth: Tensor, tolerance: float) -> None:
    """Hold one result against the truth, its norm and its worst element.

    Raises:
        GateError: it is wrong, not finite or of another shape.
    """
    value = _exact(value)
    if value.shape != truth.shape:
        raise gate.GateError(f"{name} has the shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    if not torch.isfinite(value).all():
        raise gate.GateError(f"{name} has {int((~torch.isfinite(value)).sum())} values that are not finite")
    error = gate.relative_error(value, truth)
    if not error <= tolerance:
        raise gate.GateError(f"{name} is wrong: relative error {error:.2g}, allowed: {tolerance:.2g}")
    # One wrong element among many right ones hides in the norm.
    size = torch.maximum(truth.abs(), truth.square().mean().sqrt())
    worst = float(((value - truth).abs() / size).max())
    if not worst <= WORST * tolerance:
        raise gate.GateError(f"{name} is wrong at one element: error {worst:.2g}")


def launched() -> Iterator[tuple[Case, frozenset[str]]]:
    """Every case and the kernels that it launches; nothing is computed."""
    names: set[str] = set()
    with overhead.stubbed_launches(lambda kernel, **arguments: names.add(kernel.__name__)):
        for case in CASES:
            names.clear()
            with suppress(gate.GateError):
                check(case, torch.device("cpu"))
            yield case, frozenset(names)
