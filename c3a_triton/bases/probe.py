"""What the forward of a layer's class computes, found by calling a copy of the layer with tensors of its own.

Subclasses of torch's layers may compute anything: the product with their weight in other words (Falcon), a scaled
lookup (Gemma, BART), routes to experts (Llama 4), positions (OPT). Their names do not tell. The model takes no part in
it: a copy has random tensors on the CPU, no hooks, and draws from a generator of its own.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .sharded import whole_shape

__all__ = ["Behaviour", "behaviour", "forward_holder", "is_ordinary"]

_BASES = (nn.Linear, nn.Conv2d, nn.Embedding)
# Up to so many elements a weight is made in its real size: in float64, and in float32.
_EXACT_ELEMENTS = 2**22
_MOST_ELEMENTS = 2**25
_FEW_ROWS = 64
_FRESH = nn.Module().__dict__
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)
_known: dict[tuple[Any, ...], "Behaviour"] = {}


@dataclass(frozen=True)
class Behaviour:
    """What a layer's forward does with x and its weight.

    Attributes:
        kind: `"product"` (x Wᵀ + bias, torch's convolution, or rows of the weight, times `scale`), `"other"` (something
            else of the same shape, beside which an adapter computes), or `"unfit"`.
        scale: what a product is multiplied by; only embeddings have another one than 1.
        reason: why nothing can be computed beside it.
    """

    kind: str
    scale: float = 1.0
    reason: str = ""


_PRODUCT = Behaviour("product")
_OTHER = Behaviour("other")


def behaviour(module: nn.Module) -> Behaviour:
    """What the forward of a linear layer, convolution or embedding does. The module stays as it is.

    Quantized layers and whatever else is none of torch's, with an ordinary weight, are `"other"`: only they know.
    """
    base = next((cls for cls in _BASES if isinstance(module, cls)), None)
    if base is None:
        return _OTHER
    forward = _own_forward(module)
    inherited = forward is base.forward
    if inherited and (base is not nn.Conv2d or type(module)._conv_forward is nn.Conv2d._conv_forward):  # type: ignore[attr-defined]
        return _PRODUCT
    weight = module._parameters.get("weight")
    if weight is None or not is_ordinary(weight):
        return _OTHER
    key = _key(module, forward)
    if key is not None and key in _known:
        return _known[key]
    devices = {tensor.device.index for tensor in _tensors(module) if tensor.device.type == "cuda"}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        found = {nn.Linear: _try_linear, nn.Conv2d: _try_conv, nn.Embedding: _try_embedding}[base](module, forward)
    if key is not None and found.kind != "unfit":  # on another device it may be another
        _known[key] = found
    return found


def is_ordinary(weight: Tensor) -> bool:
    """Whether a weight is a tensor of torch itself, of floating-point values that have 16 bits or more."""
    return type(weight) in (Parameter, Tensor) and weight.is_floating_point() and weight.dtype.itemsize >= 2


def forward_holder(module: nn.Module) -> str:
    """Where an instance keeps the forward that computes: accelerate's hooks put theirs before it."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """The function that computes: of the class, or a method put onto the instance (accelerate's calls the class's)."""
    forward = None if "_hf_hook" in module.__dict__ else module.__dict__.get("forward")
    return forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else type(module).forward


def _key(module: nn.Module, forward: Callable[..., Any]) -> tuple[Any, ...] | None:
    """What decides on a layer's behaviour, or None where there is more to it than classes, shapes and plain attributes.

    The values of parameters do not: a copy has random ones. Those of buffers do.
    """
    own = {name: value for name, value in module.__dict__.items() if name not in _FRESH and name not in _PASSING}
    tensors = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    if module._buffers or not all(map(_is_simple, own.values())):
        return None
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        return None
    parts = {name: _key(part, type(part).forward) for name, part in module._modules.items() if part is not None}
    if None in parts.values():
        return None
    shapes = {name: whole_shape(tensor) for name, tensor in tensors.items()}
    return type(module), forward, *(tuple(sorted(found.items())) for found in (own, shapes, parts))


def _is_simple(value: Any) -> bool:
    return isinstance(value, _SIMPLE) or (isinstance(value, tuple) and all(map(_is_simple, value)))


# What accelerate and others leave on an instance, which a copy must not take along.
_PASSING = ("forward", "_old_forward", "_hf_hook", "_hf_device", "_is_hf_initialized")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _copy_of(module: nn.Module, made: Callable[[str, Tensor, bool], Tensor], prefix: str = "") -> nn.Module:
    """A copy in evaluation, without hooks, whose tensors are `made` of (name, tensor, whether it is a parameter)."""
    copied = object.__new__(type(module))
    state = {name: value for name, value in module.__dict__.items() if name not in _PASSING}
    # What a forward collects in a list, it collects in the copy's.
    state = {name: copy.copy(value) if isinstance(value, (list, dict, set)) else value for name, value in state.items()}
    state |= {name: copy.copy(value) for name, value in _FRESH.items() if "hook" in name}
    state["_parameters"] = {
        name: None if value is None else Parameter(made(prefix + name, value, True), requires_grad=False)
        for name, value in module._parameters.items()
    }
    state["_buffers"] = {
        name: None if value is None else made(prefix + name, value, False) for name, value in module._buffers.items()
    }
    state["_modules"] = {
        name: None if value is None else _copy_of(value, made, f"{prefix}{name}.")
        for name, value in module._modules.items()
    }
    state |= {"training": False, "_compiled_call_impl": None}
    copied.__dict__.update(state)
    return copied


def _invented(
    generator: torch.Generator, dtype: torch.dtype, given: dict[str, Tensor]
) -> Callable[[str, Tensor, bool], Tensor]:
    """Tensors for a copy on the CPU: those given, random parameters, buffers with their values (random on meta)."""

    def made(name: str, tensor: Tensor, is_parameter: bool) -> Tensor:
        if name in given:
            return given[name]
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu().clone()
        if is_parameter or tensor.is_meta:
            return torch.randn(whole_shape(tensor), generator=generator, dtype=dtype)
        return tensor.detach().to("cpu", dtype, copy=True)

    return made


def _called(module: nn.Module, forward: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor | None, Any]:
    """(x, output) of the first input that the forward takes, or (None, the last error). Its errors are of any type."""
    error: Exception | None = None
    for x in inputs:
        try:
            return x, forward(module, x.clone())
        except Exception as raised:
            error = raised
    return None, error


def _misfit(y: Any, expected: Iterable[int], what: str) -> Behaviour | None:
    """Why an adapter's part cannot be added to an output, or None."""
    if not isinstance(y, Tensor):
        return Behaviour("unfit", reason=f"its forward gives a {type(y).__name__}, not {what}")
    if tuple(y.shape) != tuple(expected):
        return Behaviour("unfit", reason=f"its forward gives the shape {list(y.shape)}, not {list(expected)} ({what})")
    return None


def _raised(error: BaseException) -> Behaviour:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Behaviour("unfit", reason=f"its forward fails with x alone ({text[:120]})")


def _equal(y: Tensor, expected: Tensor) -> bool:
    """Whether two outputs agree, row by row, as well as their dtype and float32 inside of the layer allow."""
    tolerance = 2e-2 if y.dtype.itemsize < 4 else 1e-5
    y, expected = y.double().flatten(0, -2), expected.double().flatten(0, -2)
    return bool(((y - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())


def _takes_one_input(forward: Callable[..., Any]) -> bool:
    """Whether a forward asks for x alone, as far as it can be told."""
    try:
        inspect.signature(forward).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _rows(width: int, generator: torch.Generator, **kwargs: Any) -> list[Tensor]:
    """Inputs as [rows, width] and [batch, time, width]. Their magnitudes differ: a clamp or a norm would show."""
    x = torch.randn(6, width, generator=generator, dtype=torch.float64)
    x = (x * torch.tensor([1.0, 1e-2, 1e2, 1.0, 1e4, 1.0], dtype=torch.float64).unsqueeze(-1)).to(**kwargs)
    return [x[:5], x.view(2, 3, width)]


def _try_linear(module: Any, forward: Callable[..., Any]) -> Behaviour:
    if not _takes_one_input(forward):
        return _OTHER  # the model calls it with more, which cannot be made up
    in_features, out_features = module.in_features, module.out_features
    has_bias = module._parameters.get("bias") is not None
    what = "[..., out_features]"
    meta = {"weight": torch.empty(out_features, in_features, device="meta")}
    meta |= {"bias": torch.empty(out_features, device="meta")} if has_bias else {}

    def on_meta(name: str, tensor: Tensor, is_parameter: bool) -> Tensor:
        return meta[name] if name in meta else tensor.new_empty(whole_shape(tensor), device="meta")

    copied: Any = _copy_of(module, on_meta)
    x, y = _called(copied, forward, *_rows(in_features, torch.Generator(), device="meta", dtype=torch.float32))
    if x is not None and (misfit := _misfit(y, (*x.shape[:-1], out_features), what)):
        return misfit

    # Where the shapes are known to be right, a few rows of a weight tell as much as all.
    for rows in dict.fromkeys([min(out_features, _FEW_ROWS), out_features] if x is not None else [out_features]):
        if in_features * rows > _MOST_ELEMENTS:
            continue
        dtype = torch.float64 if in_features * rows <= _EXACT_ELEMENTS else torch.float32
        generator = torch.Generator().manual_seed(0)
        given = {"weight": torch.randn(rows, in_features, generator=generator, dtype=dtype) / in_features**0.5}
        given |= {"bias": torch.randn(rows, generator=generator, dtype=dtype)} if has_bias else {}
        copied = _copy_of(module, _invented(generator, dtype, given))
        copied.out_features = rows
        x, y = _called(copied, forward, *_rows(in_features, generator, dtype=dtype))
        if x is None:
            continue
        misfit = _misfit(y, (*x.shape[:-1], rows), what)
        if misfit is None:
            return _PRODUCT if _equal(y, nn.functional.linear(x, **given)) else _OTHER
        if rows == out_features:
            return misfit
    return _try_as_it_is(module, forward, what)


def _try_as_it_is(module: Any, forward: Callable[..., Any], what: str) -> Behaviour:
    """With the layer's own tensors where they are: its forward may be for one device or dtype, its weight be huge."""
    weight = module._parameters["weight"].detach()
    if any(tensor.is_meta or not tensor.numel() for tensor in _tensors(module)):
        return Behaviour("unfit", reason="its forward fails on the CPU with x alone, and it has no values to try")
    copied: Any = _copy_of(module, lambda _, tensor, is_parameter: tensor.detach() if is_parameter else tensor.clone())
    rows = _rows(module.in_features, torch.Generator().manual_seed(0), device=weight.device, dtype=weight.dtype)
    x, y = _called(copied, forward, *rows)
    if x is None:
        return _raised(y)
    if misfit := _misfit(y, (*x.shape[:-1], module.out_features), what):
        return misfit
    expected = nn.functional.linear(x, weight, copied._parameters.get("bias"))
    return _PRODUCT if _equal(y, expected) else _OTHER


def _try_conv(module: Any, forward: Callable[..., Any]) -> Behaviour:
    if module.in_channels == 0 or not _takes_one_input(forward):  # a lazy one does not know its channels yet
        return _OTHER
    dtype = torch.float64 if module._parameters["weight"].numel() <= _EXACT_ELEMENTS else torch.float32
    generator = torch.Generator().manual_seed(0)
    copied: Any = _copy_of(module, _invented(generator, dtype, {}))
    extent = [
        (k - 1) * d + 3 * s + 1 for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True)
    ]
    x, y = _called(copied, forward, torch.randn(2, module.in_channels, *extent, generator=generator, dtype=dtype))
    if x is None:
        return _raised(y)
    parameters = copied._parameters
    expected = nn.Conv2d._conv_forward(copied, x, parameters["weight"], parameters.get("bias"))
    if misfit := _misfit(y, expected.shape, "what torch's convolution gives, in which the adapter computes"):
        return misfit
    return _PRODUCT if _equal(y, expected) else _OTHER


def _try_embedding(module: Any, forward: Callable[..., Any]) -> Behaviour:
    count, width = module.num_embeddings, module.embedding_dim
    generator = torch.Generator().manual_seed(0)
    # All rows of a table overlap: E[i, j] is the (i + j)-th of these numbers, so that no vocabulary is too large.
    numbers = torch.randn(count + width, generator=generator, dtype=torch.float64)
    weight = numbers.as_strided((count, width), (1, 1))
    copied = _copy_of(module, _invented(generator, torch.float64, {"weight": weight}))
    # Ids of which a class may make something special are attributes of it.
    special = [value for value in module.__dict__.values() if type(value) is int and 0 <= value < count][:8]
    chosen = torch.randint(count, (14,), generator=generator)
    chosen[: len(special)] = torch.tensor(special, dtype=torch.int64)
    order = torch.randperm(14, generator=generator)
    chosen = chosen[order]
    ids = chosen.view(2, 7)
    x, y = _called(copied, forward, ids)
    if x is None:
        return Behaviour("unfit", reason="its forward takes no ids alone, as embeddings of positions do not")
    if misfit := _misfit(y, (2, 7, width), "one row for each id"):
        return misfit
    rows = weight[ids]
    scale = float((y.double() * rows).sum() / rows.square().sum())
    is_product = scale != 0.0 and _equal(y, scale * rows)
    if not is_product:
        order = torch.randperm(14, generator=generator)
        x, z = _called(copied, forward, chosen[order].view(2, 7))
        if x is None or not isinstance(z, Tensor) or not _equal(z.flatten(0, 1), y.flatten(0, 1)[order]):
            return Behaviour("unfit", reason="it does not look up each id by itself, as embeddings of positions do not")
    for outside in (count, -1):
        if _called(copied, forward, torch.where(ids == ids[0, 0], outside, ids))[0] is not None:
            return Behaviour("unfit", reason=f"it takes ids that its weight has no row for, such as {outside}")
    if count <= _MOST_ELEMENTS:
        x, z = _called(copied, forward, torch.zeros(2, 7, count, dtype=torch.float64))
        if x is not None and isinstance(z, Tensor) and z.shape == y.shape:
            return Behaviour("unfit", reason="it multiplies its weight with vectors, where there are no ids")
    return Behaviour("product", scale) if is_product else _OTHER
