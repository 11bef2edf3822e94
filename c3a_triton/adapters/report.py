"""What a model's adapters look like: counts and a table, as text; and how quantities are written."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from c3a_triton.bases.sharded import whole_shape

from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .token_rows import TokenRows

__all__ = ["count_parameters", "format_bytes", "format_seconds", "format_table", "summary_table"]

_HEADER = ("layer", "adapter", "in", "out", "b", "chosen by", "parameters", "backend", "state")
_NUMBERS = {_HEADER.index(name) for name in ("in", "out", "b", "parameters")}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters) of a model, counted as PEFT counts them."""
    counts = [(_count(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)


def _count(parameter: nn.Parameter) -> int:
    """A parameter's elements, those that DeepSpeed keeps elsewhere and those packed in 4-bit bytes included."""
    count = whole_shape(parameter).numel()
    if type(parameter).__name__ == "Params4bit":
        count *= 2 * parameter.element_size()
    return count


def summary_table(
    parts: Iterable[tuple[str, nn.Module]], active: Sequence[str], chosen_by: Mapping[str, Mapping[str, str]]
) -> str:
    """A table with a row for each adapter of each adapted layer, module that is trained whole, and trained tokens.

    Args:
        parts: (name, module) of the model; other modules are passed over.
        active: names of the active adapters.
        chosen_by: adapter name → layer name → what decided on its block size.
    """
    rows: list[tuple[str, ...]] = [_HEADER]
    total = 0
    for name, module in parts:
        if isinstance(module, C3ALinear):
            for adapter, b in module.block_size.items():
                count = _count(module.c3a_kernel[adapter])
                total += count
                stack = f"{module._geometry.stack} × " if module._geometry.stack else ""
                widths = (str(module.in_features), f"{stack}{module.out_features}", str(b))
                key = chosen_by.get(adapter, {}).get(name, "")
                state = "merged" if adapter in module.merged_adapters else "active" if adapter in active else ""
                if (strength := module.scaling[adapter]) != 1.0:
                    state = f"{state} × {strength:g}".lstrip()
                rows.append((name, adapter, *widths, key, f"{count:,}", module.backend, state))
        elif isinstance(module, ModulesToSave):
            for adapter, module_copy in module.modules_to_save.items():
                count = sum(map(_count, module_copy.parameters()))
                total += count
                state = "active" if adapter in active else ""
                rows.append((name, adapter, "", "", "", "modules_to_save", f"{count:,}", "", state))
        tokens = module._modules.get("token_adapter")
        if isinstance(tokens, TokenRows):
            for adapter, indices in tokens.indices.items():
                count = _count(tokens.trainable_tokens_delta[adapter])
                total += count
                state = "merged" if adapter in tokens.merged_adapters else "active" if adapter in active else ""
                rows.append((name, adapter, "", "", "", f"{len(indices)} tokens", f"{count:,}", "", state))
    return f"{format_table(rows, _NUMBERS)}\n{total:,} parameters"


def format_table(rows: Sequence[Sequence[str]], numbers: Collection[int]) -> str:
    """Rows, the header first, as lines of aligned columns; those of these indices to the right."""
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, columns, strict=True))
        ).rstrip()
        for row in rows
    )


def format_seconds(seconds: float) -> str:
    """Three figures with a unit, for example `12.3 ms`."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def format_bytes(n_bytes: float) -> str:
    """Three figures with a binary unit, for example `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} GiB"
