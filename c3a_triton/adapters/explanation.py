"""Why a layer is computed as it is: the backend that `"auto"` chooses, and the measured or predicted time of each."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from c3a_triton._public import public
from c3a_triton.errors import ConfigError
from c3a_triton.files.block_sizes import check_block_size
from c3a_triton.operator import dispatch
from c3a_triton.operator.cost_model import Sizes, added_seconds, base_seconds
from c3a_triton.operator.launch import specs

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
    layers = _layers(layer_or_shapes)
    counts = [tokens] if isinstance(tokens, int) else list(tokens)
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ConfigError(f"tokens must be one positive number or several, got {tokens!r}")
    if layers is None:
        cases = {(*shape, ""): 1 for shape in _checked(layer_or_shapes)}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or torch.bfloat16
    else:
        if not layers:
            raise ConfigError("no adapted layer to explain")
        cases = {}
        for layer in layers:
            for b in sorted({layer.block_size[name] for name in layer.active_adapters if name in layer.block_size}):
                case = (layer.in_features, layer.out_features, b, layer.backend)
                cases[case] = cases.get(case, 0) + 1
        weight = layers[0].weight
        device = device or weight.device
        dtype = dtype or (weight.dtype if weight.dtype.is_floating_point else torch.bfloat16)
    if dtype not in _DTYPES:
        raise ConfigError(f"the cost model knows {', '.join(map(str, _DTYPES))}, not {dtype}")
    return _table(cases, counts, torch.device(device), dtype)


def _layers(subject: object) -> list[C3ALinear] | None:
    """The adapted layers of a layer, manager or model; None for anything else."""
    if isinstance(subject, AdapterManager):
        return [layer for _, layer in subject.layers() if layer.has_backends]
    if isinstance(subject, nn.Module):
        return [module for module in subject.modules() if isinstance(module, C3ALinear) and module.has_backends]
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


def _table(
    cases: dict[tuple[int, int, int, str], int], tokens: Sequence[int], device: torch.device, dtype: torch.dtype
) -> str:
    names = (*dispatch.TRITON_BACKENDS, "torch", "fold")
    header = ("layers", "in", "out", "b", "tokens", "auto", "grad", "base", *names, "set")
    rows: list[tuple[str, ...]] = [header]
    for (in_features, out_features, b, backend), count in cases.items():
        for n_tokens in tokens:
            sizes = Sizes(n_tokens, in_features, out_features, b, dtype, device)
            chosen = [_chosen(sizes, backward=backward) for backward in (False, True)]
            measured = {} if _is_absent(device) else dispatch.measured_times(sizes)
            base, at = measured.get(dispatch.BASE), dispatch.ceilings_of(device)
            cells = [_cell(base, base_seconds(sizes, ceilings=at))]
            for name in names:
                added = None if base is None or name not in measured else max(measured[name] - base, 0.0)
                cells.append(_cell(added, added_seconds(name, sizes, ceilings=at)))
            where = (str(count), str(in_features), str(out_features), str(b), str(n_tokens))
            rows.append((*where, *chosen, *cells, "" if backend == "auto" else backend))
    numbers = set(range(len(header))) - {header.index(name) for name in ("auto", "grad", "set")}
    return f"{device}, {dtype}\n{format_table(rows, numbers)}\n{_NOTES}"


def _cell(measured: float | None, predicted: float) -> str:
    return f"{predicted * 1e6:.1f}" if measured is None else f"{measured * 1e6:.1f}*"


def _is_absent(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_available()


def _chosen(sizes: Sizes, *, backward: bool) -> str:
    if _is_absent(sizes.device):
        return dispatch.cheapest(sizes, backward=backward)
    return dispatch.choose("auto", sizes, backward=backward)
