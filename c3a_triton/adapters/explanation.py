"""Why a layer is computed as it is: the backend that `"auto"` chooses, and the measured or predicted time of each."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from c3a_triton._public import public
from c3a_triton.bases.experts import rows_per_token
from c3a_triton.bases.quantized import holds_values
from c3a_triton.errors import ConfigError
from c3a_triton.files.block_sizes import check_block_size
from c3a_triton.files.values import some
from c3a_triton.operator import dispatch
from c3a_triton.operator.bounds import seconds
from c3a_triton.operator.cost_model import ROUTED, Sizes, added_seconds, base_seconds, routed_launches
from c3a_triton.operator.launch import specs
from c3a_triton.operator.routes import share

from .layer import C3ALinear
from .manager import AdapterManager
from .report import format_table

__all__ = ["explain"]

Shape = tuple[int, int, int]

_DTYPES = specs.DTYPES
_NOTES = (
    "Microseconds of a forward: the base layer's, and what one adapter adds to it; predicted (cost model): what "
    "launches move\nand compute over the ceilings of the card, or of an H200; with a * measured on this machine by "
    "autotune. 'auto' decides\nfor the next power of two of tokens, for the forward and for the gradients ('grad'); "
    "it never takes fold, which rounds."
)
_STACKED_NOTE = (
    "\nStacked experts (E×out): what the adapter of all E adds, where each token goes to as many experts as the model "
    "says,\nspread evenly over them."
)


class _Case(NamedTuple):
    """What layers have in common that a row of the table is for."""

    in_features: int
    out_features: int
    block_size: int
    backend: str = ""
    stack: int = 0  # of experts, 0 for a linear layer
    rows_per_token: int = 1


@public
def explain(
    layer_or_shapes: C3ALinear | AdapterManager | nn.Module | Shape | Iterable[Shape],
    tokens: int | Sequence[int] = (1, 1024, 8192),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Which backend `"auto"` chooses, and the time of every backend, measured or predicted, as a table.

    Args:
        layer_or_shapes: a `C3ALinear`; an adapted model or its `AdapterManager`; `(in_features, out_features,
            block_size)`, or several of those.
        tokens: rows of x, one number or several.
        device: where it runs; by default where the layers are, for shapes the GPU if there is one. A GPU may be asked
            about on a machine without one.
        dtype: what x is; by default the layers' own, for shapes bfloat16.

    Returns:
        A table with a row for each distinct shape and number of tokens, and how to read it. Times that `autotune` has
        measured on this machine bear a `*`; the others are predictions of
        `c3a_triton.operator.cost_model`.

    Raises:
        ConfigError: something else than layers or shapes, no tokens, or a dtype that the model does not know.
        ShapeError: a block size that does not divide both widths.
        BackendError: C3A_TRITON_BACKEND names a backend that is unknown or cannot run on the device.

    Example:
        >>> print(c3a_triton.explain((4096, 14336, 256), tokens=[1, 8192], device="cuda"))
    """
    found = _layers(layer_or_shapes)
    layers = found and [layer for layer in found if layer.has_backends]
    others = [layer.layer_name for layer in found or () if not layer.has_backends]
    without = f"without a backend to choose: {some(others)}" if others else ""
    counts = [tokens] if isinstance(tokens, int) else list(tokens)
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ConfigError(f"tokens must be one positive number or several, got {tokens!r}")
    if layers is None:
        cases = {_Case(*shape): 1 for shape in _checked(layer_or_shapes)}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or torch.bfloat16
    else:
        if not layers:
            raise ConfigError(f"no adapted layer to explain{without and f' ({without})'}")
        cases = {}
        for layer in layers:
            for b in sorted({layer.block_size[name] for name in layer.active_adapters if name in layer.block_size}):
                case = _Case(layer.in_features, layer.out_features, b, layer.backend)
                if stack := layer._geometry.stack:
                    case = case._replace(stack=stack, rows_per_token=rows_per_token(layer.base_layer))
                cases[case] = cases.get(case, 0) + 1
        weight = layers[0].weight
        device = device or weight.device
        dtype = dtype or (weight.dtype if holds_values(weight) else torch.bfloat16)
    if dtype not in _DTYPES:
        raise ConfigError(f"the cost model knows {', '.join(map(str, _DTYPES))}, not {dtype}")
    return _table(cases, counts, torch.device(device), dtype) + (without and f"\nOther adapted layers, {without}.")


def _layers(subject: object) -> list[C3ALinear] | None:
    """The adapted layers of a layer, manager or model; None for anything else."""
    if isinstance(subject, AdapterManager):
        return [layer for _, layer in subject.layers()]
    if isinstance(subject, nn.Module):
        return [module for module in subject.modules() if isinstance(module, C3ALinear)]
    return None


def _checked(shapes: object) -> list[Shape]:
    entries = [shapes] if isinstance(shapes, tuple) and all(isinstance(part, int) for part in shapes) else shapes
    checked = []
    for entry in entries if isinstance(entries, Iterable) else [entries]:
        if not isinstance(entry, Sequence) or len(entry) != 3 or not all(isinstance(part, int) for part in entry):
            raise ConfigError(
                f"{entry!r}: explain takes adapted layers, models or (in_features, out_features, block_size)"
            )
        in_features, out_features, b = entry
        check_block_size(b, in_features, out_features, f"({in_features}, {out_features}, {b})")
        checked.append((in_features, out_features, b))
    if not checked:
        raise ConfigError("no shapes to explain")
    return checked


def _table(cases: dict[_Case, int], tokens: Sequence[int], device: torch.device, dtype: torch.dtype) -> str:
    names = (*dispatch.TRITON_BACKENDS, "torch", "fold")
    header = ("layers", "in", "out", "b", "tokens", "auto", "grad", "base", *names, "set")
    rows: list[tuple[str, ...]] = [header]
    for case, count in cases.items():
        for n_tokens in tokens:
            sizes = Sizes(n_tokens, case.in_features, case.out_features, case.block_size, dtype, device)
            out = f"{case.stack}×{case.out_features}" if case.stack else str(case.out_features)
            where = (str(count), str(case.in_features), out, str(case.block_size), str(n_tokens))
            told = _stacked_cells(case, sizes, names) if case.stack else _cells(sizes, names)
            rows.append((*where, *told, "" if case.backend == "auto" else case.backend))
    numbers = set(range(len(header))) - {header.index(name) for name in ("auto", "grad", "set")}
    note = _STACKED_NOTE if any(case.stack for case in cases) else ""
    return f"{device}, {dtype}\n{format_table(rows, numbers)}\n{_NOTES}{note}"


def _cells(sizes: Sizes, names: Sequence[str]) -> list[str]:
    """What a row says of a linear layer: the two choices, the base's time and each backend's."""
    chosen = [_chosen(sizes, backward=backward) for backward in (False, True)]
    measured = {} if _is_absent(sizes.device) else dispatch.measured_times(sizes)
    base, at = measured.get(dispatch.BASE), dispatch.ceilings_of(sizes.device)
    cells = [_cell(base, base_seconds(sizes, ceilings=at))]
    for name in names:
        added = None if base is None or name not in measured else max(measured[name] - base, 0.0)
        cells.append(_cell(added, added_seconds(name, sizes, ceilings=at)))
    return [*chosen, *cells]


def _stacked_cells(case: _Case, sizes: Sizes, names: Sequence[str]) -> list[str]:
    """As `_cells`, of stacked experts; of the base's product there is no model, and some backends cannot compute it."""
    n_rows = sizes.n_tokens * case.rows_per_token
    sizes, of_one = sizes._replace(n_tokens=n_rows), sizes._replace(n_tokens=share(case.stack, n_rows))
    at = dispatch.ceilings_of(sizes.device)
    times = {
        name: seconds(routed_launches(name, of_one, case.stack, n_rows, ceilings=at), at)
        for name in names
        if name in ROUTED
    }
    chosen = [_chosen(sizes, backward=backward, stack=case.stack) for backward in (False, True)]
    return [*chosen, "", *(_cell(None, times[name]) if name in times else "" for name in names)]


def _cell(measured: float | None, predicted: float) -> str:
    return f"{predicted * 1e6:.1f}" if measured is None else f"{measured * 1e6:.1f}*"


def _is_absent(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_available()


def _chosen(sizes: Sizes, *, backward: bool, stack: int = 0) -> str:
    if not _is_absent(sizes.device):
        return dispatch.choose("auto", sizes, backward=backward, stack=stack)
    if stack:
        return dispatch.cheapest_routed(sizes, stack, backward=backward)
    return dispatch.cheapest(sizes, backward=backward)
