"""What a layer computes where its base layer computes by itself, or where each row of a batch has its own adapter."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from c3a_triton.bases.agreement import agree
from c3a_triton.bases.linear_like import is_plain
from c3a_triton.bases.parallel import Part, beside
from c3a_triton.bases.quantized import quantizes_activations
from c3a_triton.bases.sharded import gather_with, is_sharded
from c3a_triton.errors import AdapterStateError, BackendError, ShapeError
from c3a_triton.operator.rows import c3a_linear_rows

from .names import expand_rows, rows_of_call

__all__ = ["check_base", "check_rows", "general_forward"]


def general_forward(
    layer: Any, kind: str, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
) -> Tensor:
    """The base layer's output plus what holds for this call, in x's dtype.

    Args:
        layer: the `C3ALinear`, which stands on this file.
        kind: what the call computes, of `Scope.kind`.
        x: as in `C3ALinear.forward`.
        adapter_names: as in `C3ALinear.forward`.
        args, kwargs: passed on to the base layer.

    Raises:
        ShapeError: sizes that do not fit.
        AdapterStateError: names of rows, or the base alone, while adapters are merged; a base layer that passes no
            gradient on.
        BackendError: the layer's backend cannot run here.
    """
    # All of them, whichever this call applies: DeepSpeed expects each call to fetch the same parameters.
    gather_with(layer, layer._stored_kernels())
    if kind == "probe":
        layer._scope.note(layer._label, x)
    if kind == "tokens":
        return _forward_tokens(layer, x, *args, **kwargs)
    if kind == "base":
        check_base(layer)
    if layer._disable_adapters or kind == "probe":
        kind = "base"
    elif adapter_names is not None and kind != "base":
        names = expand_rows(adapter_names, x.shape[0], exact=True)
        present = tuple(name for name in dict.fromkeys(names) if name in layer.c3a_kernel)
        index = {name: i for i, name in enumerate(present)}
        rows = torch.tensor([index.get(name, -1) for name in names], device="cpu")
        return _forward_rows(layer, present, rows, x, *args, **kwargs)
    if kind == "rows":
        is_vector = x.dim() == 1 and layer.kind == "linear"  # a single one, which is no batch
        x = x[None] if is_vector else x
        call = rows_of_call(layer._scope, layer._label, x, layer.c3a_kernel)
        y = _forward_rows(layer, *call, x, *args, **kwargs)
        return y[0] if is_vector else y
    if kind == "base":
        y = layer.base_layer(x, *args, **kwargs)
    else:
        y = beside(layer, partial(_add_applied, layer), x, *args, **kwargs)
    return y.to(x.dtype) if x.is_floating_point() else y


def _add_applied(layer: Any, x: Tensor, y: Tensor, part: Part | None) -> Tensor:
    """The base layer's output plus that of the adapters that are applied."""
    # With offloading or several devices the base layer's hook decides where it computes.
    x = x.to(y.device)
    if part is not None and not layer.agreed:
        _agree_on_kernels(layer, part)
    kernels = layer._kernels_on(x.device)
    if kernels and torch._C._get_tracing_state() is None:
        _check_base_output(layer, x, y, part)

    def compute(x: Tensor, kernels: list[Tensor]) -> Tensor:
        return layer._delta(x, kernels[0], _backend_beside_base(layer))

    for kernel in _sums_by_block_size(kernels):
        delta = compute(x, [kernel]) if part is None else part.product(x, [kernel], compute)
        y = y + delta.to(y.dtype)
    return y


def _agree_on_kernels(layer: Any, part: Part) -> None:
    """Refuse kernels that each process has drawn for itself, before a plan has spread the layer that it adapted.

    Every process calls the layer, so that each of them comes here. What compiled code meets is left to a call without.

    Raises:
        AdapterStateError: they differ.
    """
    if torch.compiler.is_compiling():
        return
    kernels = dict(layer.c3a_kernel.items())
    if not any(is_sharded(kernel) or kernel.is_meta for kernel in kernels.values()):
        agree([part.mesh], f"{layer._label} (reset, or adapted before the model was spread)", {"kernels": kernels})
    layer.agreed = True


def check_base(layer: Any) -> None:
    """Refuse to compute the base alone where adapters are merged into it.

    Raises:
        AdapterStateError: they are.
    """
    if layer.merged_adapters:
        raise AdapterStateError(
            f"{layer._label}: {layer.merged_adapters} were merged while adapters are disabled (disable_adapter) in a "
            "thread, which cannot compute the base alone any more: unmerge them first"
        )


def check_rows(layer: Any) -> None:
    """Refuse adapters of the rows' own where some are merged.

    Raises:
        AdapterStateError: some are.
    """
    if layer.merged_adapters:
        raise AdapterStateError(
            f"{layer._label}: rows cannot have adapters of their own while {layer.merged_adapters} are merged; "
            "unmerge them first"
        )


def _check_base_output(layer: Any, x: Tensor, y: Tensor, part: Part | None) -> None:
    """Refuse a base layer whose output an adapter's part cannot be added to."""
    out_features, in_features = (layer.out_features, layer.in_features) if part is None else part.shape
    if layer.kind == "linear" and (x.shape[-1:], y.shape[-1:]) != ((in_features,), (out_features,)):
        raise ShapeError(
            f"{layer._label}: x has the shape {tuple(x.shape)} and the base layer gives {tuple(y.shape)}, where "
            f"in_features={in_features} and out_features={out_features}"
            + (" of this process" if part is not None else "")
            + ". Of layers of which each process computes a part those can be adapted that are spread by a plan of "
            "transformers, by torch's parallelize_module, or by FSDP2 (fully_shard)"
        )
    passes = y.requires_grad and not quantizes_activations(layer.get_base_layer())
    if x.requires_grad and not passes and torch.is_grad_enabled():
        # The adapter's part alone would pass one on, a wrong one.
        raise AdapterStateError(
            f"{layer._label}: this {type(layer.get_base_layer()).__name__} passes no gradient on to its input, "
            "as some quantized layers do not (torchao's with quantized activations, older transformers' FP8 layers): "
            "layers below it cannot be trained. Load the base model in another format, or adapt no layer below this one"
        )


def _forward_rows(layer: Any, present: tuple[str, ...], rows: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's output plus, for each row, that of the adapter of its index among these, if it has one."""
    check_rows(layer)
    base: Any = layer.base_layer
    if present and layer.kind == "linear" and not args and not kwargs and is_plain(base, x):
        return _delta_rows(layer, x, base.weight, base.bias, present, rows).to(x.dtype)
    if present:
        y = beside(layer, partial(_add_rows, layer, present, rows), x, *args, **kwargs)
    else:
        y = base(x, *args, **kwargs)
    return y.to(x.dtype) if x.is_floating_point() else y


def _forward_tokens(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's output plus, for each token of a packed row, that of its slot."""
    check_rows(layer)
    y = layer.base_layer(x, *args, **kwargs)
    delta = layer._scope.local.tokens.update(layer, x.to(y.device))
    y = y if delta is None else y + delta.to(y.dtype)
    return y.to(x.dtype) if x.is_floating_point() else y


def _add_rows(layer: Any, present: tuple[str, ...], rows: Tensor, x: Tensor, y: Tensor, part: Part | None) -> Tensor:
    """The base layer's output plus, for each row, that of its adapter."""
    x = x.to(y.device)
    if part is not None and not layer.agreed:
        _agree_on_kernels(layer, part)
    _check_base_output(layer, x, y, part)
    return y + _delta_rows(layer, x, None, None, present, rows, part).to(y.dtype)


def _delta_rows(
    layer: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    names: tuple[str, ...],
    rows: Tensor,
    part: Part | None = None,
) -> Tensor:
    """What the adapters add for x, each row by that of its index into `names` (−1 for none), and x Wᵀ + bias."""
    kernels = [layer._kernel_on(name, x.device) for name in names]
    if layer.kind != "linear":
        return _delta_by_adapter(layer, x, kernels, rows)
    scale, backend = 1.0 / layer.in_features, _backend_beside_base(layer)

    def compute(x: Tensor, kernels: list[Tensor]) -> Tensor:
        return c3a_linear_rows(x, weight, bias, kernels, rows, scale=scale, backend=backend)

    try:
        return compute(x, kernels) if part is None else part.product(x, kernels, compute)
    except ShapeError as error:
        raise ShapeError(f"{layer._label}: {error}") from None


def _delta_by_adapter(layer: Any, x: Tensor, kernels: list[Tensor], rows: Tensor) -> Tensor:
    """The adapters' part of `_delta_rows`, one adapter after another: of layers that have no kernels for rows."""
    total: Tensor | None = None
    for i, kernel in enumerate(kernels):
        # A graph cannot depend on how many rows an adapter has: there each adapter computes them all.
        chosen = None if torch.compiler.is_compiling() else (rows == i).nonzero().squeeze(1).to(x.device)
        part = layer._delta(x if chosen is None else x.index_select(0, chosen), kernel, _backend_beside_base(layer))
        if total is None:
            total = part.new_zeros(x.shape[0], *part.shape[1:])
        # An adapter that was added after a cast to float64 is in float32 beside the others.
        dtype = torch.promote_types(total.dtype, part.dtype)
        total, part = total.to(dtype), part.to(dtype)
        if chosen is None:
            mine = (rows == i).to(x.device).view(-1, *(1,) * (part.dim() - 1))
            total = torch.where(mine, part, total)
        else:
            total = total.index_add(0, chosen, part)
    assert total is not None, "no adapter for any row"
    return total


def _sums_by_block_size(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Kernels of equal block size summed: the product is linear in them."""
    sums: dict[int, Tensor] = {}
    for kernel in kernels:
        b = kernel.shape[-1]
        sums[b] = sums[b] + kernel if b in sums else kernel
    return list(sums.values())


def _backend_beside_base(layer: Any) -> str:
    """The backend of adapters that are computed beside the base layer."""
    if layer.backend != "auto" and not layer.has_backends:
        raise BackendError(
            f"{layer._label}: backend {layer.backend!r} is for linear layers; a {layer.kind} layer has no choice of "
            "backend: leave it at 'auto'"
        )
    if layer.backend == "fold":
        raise BackendError(
            f"{layer._label}: backend 'fold' adds the adapters to the weight of a plain nn.Linear. Here they are "
            "computed beside the base layer: it is of another kind, hooked, offloaded or called with more than x, "
            "the adapters are on another device or of 8 bits, or each row of the batch has its "
            "own. Choose another backend for this layer, such as 'auto'"
        )
    return layer.backend
