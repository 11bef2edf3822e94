"""Quantized base layers: the registry of linear-like classes, and how a quantized weight is merged into.

No quantization is computed here. A registered class brings its own functions, transformers' FP8 layers have theirs in
`fp8.py`; for bitsandbytes, torchao and HQQ PEFT (0.20 or later) knows how a weight is dequantized and quantized again.
Nothing is ever added to the storage itself.
"""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.errors import AdapterStateError, ConfigError

from . import fp8, mxfp4

__all__ = [
    "LinearLike",
    "QuantizedWeight",
    "hold_layout",
    "holds_values",
    "quantized_weight",
    "quantizes_activations",
    "register_linear_like",
    "registered",
    "release_layout",
    "torchao_config_of",
]


@dataclass(frozen=True)
class LinearLike:
    """What is known of a registered class; see `register_linear_like`."""

    widths: Callable[[Any], tuple[int, int]] | None
    dequantize: Callable[[Any], Tensor] | None
    requantize: Callable[[Any, Tensor], nn.Module] | None


_registry: dict[type[nn.Module], LinearLike] = {}


@public
def register_linear_like(
    layer_class: type[nn.Module],
    *,
    widths: Callable[[Any], tuple[int, int]] | None = None,
    dequantize: Callable[[Any], Tensor] | None = None,
    requantize: Callable[[Any, Tensor], nn.Module] | None = None,
) -> None:
    """Make a class of layers known as linear, so that `"all-linear"` means it too and, if it can be, it is merged into.

    Any module with integer `in_features` and `out_features` and a `forward(x)` that is linear in x and passes gradients
    on to it (GPTQ's and AWQ's layers, for example) can be adapted by name without being registered. Subclasses are
    covered; registering a class again replaces what was known of it.

    Args:
        layer_class: the class. Its `forward` computes the base layer; nothing else of it is called unless given here.
        widths: layer → (in_features, out_features), where it has no such attributes.
        dequantize: layer → its weight [out_features, in_features], a floating-point tensor that is the caller's to
            change.
        requantize: (layer, weight [out_features, in_features] in the dtype that `dequantize` gave) → the layer that
            takes its place: a new one, or the same one, changed. Without these two, merging is refused.

    Raises:
        ConfigError: no class of modules, one that is known already (`nn.Linear`), or only one of the two functions.

    Example:
        >>> register_linear_like(
        ...     Int8Linear,
        ...     dequantize=lambda layer: layer.codes * layer.scale,
        ...     requantize=lambda layer, weight: Int8Linear.from_weight(weight),
        ... )
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise ConfigError(f"register_linear_like takes a class of modules, got {layer_class!r}")
    if layer_class in (nn.Module, nn.Linear):
        raise ConfigError(f"{layer_class.__name__} itself cannot be registered: give the class of your layers")
    if (dequantize is None) != (requantize is None):
        raise ConfigError(
            f"{layer_class.__name__}: merging needs both dequantize and requantize; give both, or neither to refuse it"
        )
    _registry[layer_class] = LinearLike(widths, dequantize, requantize)


def registered(module: nn.Module) -> LinearLike | None:
    """What is known of a module's class, or of the nearest of its bases, by registration."""
    return next((_registry[cls] for cls in type(module).__mro__ if cls in _registry), None)


class QuantizedWeight:
    """A quantized weight as a `WeightAccess`. What is kept is a copy of the whole base layer, on its device."""

    in_place = False

    def __init__(
        self, owner: Any, dequantize: Callable[[nn.Module], Tensor], requantize: Callable[[Any, Tensor], None]
    ) -> None:
        self._owner = owner
        self._dequantize = dequantize
        self._requantize = requantize

    def place(self) -> Hashable | None:
        """None: what is written is this layer's alone."""
        return None

    def read(self) -> Tensor:
        """The weight, dequantized, [out, in]."""
        base = self._owner.get_base_layer()
        hold_layout(base)
        try:
            weight = self._dequantize(base).detach()
        except NotImplementedError as error:
            raise AdapterStateError(f"this {_kind(base)} cannot be dequantized: {error}") from error
        expected = (self._owner.out_features, self._owner.in_features)
        if not weight.is_floating_point() or tuple(weight.shape) != expected:
            raise AdapterStateError(
                f"this {_kind(base)} dequantizes to {weight.dtype} of shape {tuple(weight.shape)}, not to a "
                f"floating-point matrix of shape {expected}: it may be sharded or not the layer's whole weight"
            )
        return weight

    def write(self, weight: Tensor) -> None:
        """Quantize again; if that fails, or gives a weight of another kind, the layer is as it was."""
        base = self._owner.get_base_layer()
        before, kind = copy_of(base), _kind(base)
        try:
            self._requantize(self._owner, weight)
            problem = None
            if (new_kind := _kind(self._owner.get_base_layer())) != kind:
                problem = f"gave a {new_kind}: the configuration is not the one that it was quantized with"
        except Exception as error:
            self.restore(before)
            raise AdapterStateError(f"quantizing the merged weight of this {kind} failed: {error}") from error
        if problem:
            self.restore(before)
            raise AdapterStateError(f"quantizing the merged weight of this {kind} {problem}")

    def keep(self, where: str) -> nn.Module:
        """A copy of the base layer with all that its library keeps beside the weight."""
        return copy_of(self._owner.get_base_layer())

    def restore(self, kept: Tensor | nn.Module) -> None:
        """Put the copy in the base layer's place."""
        assert isinstance(kept, nn.Module)
        self._owner.base_layer = kept.train(self._owner.base_layer.training)


def quantized_weight(owner: Any) -> QuantizedWeight | fp8.TiledWeight | str:
    """How the quantized weight under an adapter layer is merged into, or the reason why it cannot be.

    Args:
        owner: what `weight_access` takes; its `quantization_config`, where it is set, is the torchao configuration by
            which its weight is quantized again.
    """
    base = owner.get_base_layer()
    if (known := registered(base)) is not None:
        if known.dequantize is None or known.requantize is None:
            return "its class is registered (register_linear_like) without the functions dequantize and requantize"
        requantize = known.requantize

        def replace_base(owner: Any, weight: Tensor) -> None:
            owner.base_layer = requantize(owner.get_base_layer(), weight)

        return QuantizedWeight(owner, known.dequantize, replace_base)
    if fp8.is_linear(base) or fp8.is_experts(base):
        name = owner.parameter or "weight"
        return fp8.unmergeable(base, name) or fp8.TiledWeight(base, name)
    if mxfp4.is_mxfp4(base):
        return (
            "its codes of 4 bits would lose most of an update: merge into the model loaded with "
            "quantization_config=Mxfp4Config(dequantize=True)"
        )
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        return "if it is quantized, PEFT 0.20 or later knows how to merge into it: pip install 'peft>=0.20'"
    config = getattr(owner, "quantization_config", None)
    try:
        backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=None if config is None else lambda: config
        )
    except ValueError:
        return (
            "the torchao configuration that it was quantized with is not known: load the model through transformers' "
            "TorchAoConfig, or set quantization_config of this layer to what quantize_ got"
        )
    if backend is None:
        return "a class that can be dequantized and quantized again joins through c3a_triton.register_linear_like"
    if not backend.supports_merge:
        return f"{backend.backend_name} weights cannot be quantized again"
    weight: Any = getattr(base, "weight", None)
    if type(weight).__name__ in ("Params4bit", "Int8Params") and weight.is_floating_point():
        return "bitsandbytes has not quantized it: move the model to its device first, with has_fp16_weights=False"
    return QuantizedWeight(owner, backend.get_base_weight, backend.set_base_weight)


def torchao_config_of(model: nn.Module) -> Any | None:
    """The torchao configuration by which transformers quantized a model as it loaded it, or None."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    get = getattr(config, "get_apply_tensor_subclass", None)
    return None if get is None else get()


def quantizes_activations(base: nn.Module) -> bool:
    """Whether a layer's weight is one of torchao's that quantizes x, too.

    The output of its float8 product seems to have a gradient, and then the backward pass fails.
    """
    return getattr(getattr(base, "weight", None), "act_quant_kwargs", None) is not None


def holds_values(weight: Any) -> bool:
    """Whether a weight has its values' dtype, and not one of codes (int8, float8, or what no tensor is, as MXFP4)."""
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1


def copy_of(base: nn.Module) -> nn.Module:
    """A deep copy of a base layer."""
    copied: Any = copy.deepcopy(base)
    weight: Any = getattr(copied, "weight", None)
    if getattr(weight, "module", None) is base:
        # bitsandbytes' 4-bit weight knows its layer, and its copy still knows the old one.
        weight.module = copied
        copied.quant_state = weight.quant_state
    return copied


def hold_layout(model: nn.Module) -> None:
    """Keep quantized layers of a model in a state in which gradients pass, until `release_layout`.

    Experts in MXFP4 get a backward pass (`mxfp4.py`), and calls of FP8 ones that have none are refused (`fp8.py`).

    bitsandbytes is kept from repacking 4-bit weights, and where it has, that is undone. On processors with AVX512-BF16
    it repacks a weight in place in the first forward in eval mode whose input wants no gradient. From then on no
    gradient passes the layer, silently, the bytes mean something else to whoever dequantizes them, and the scales of
    the blocks have lost digits. The price is its faster product in evaluation on such a CPU.
    """
    for module in _four_bit_layers(model):
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            # bitsandbytes unpacks a weight in place when it saves it.
            module.state_dict()
    mxfp4.pass_gradients(model)
    fp8.watch_gradients(model)


def release_layout(model: nn.Module) -> None:
    """Let bitsandbytes repack again where the processor is one for it, and MXFP4 compute by itself."""
    mxfp4.release_gradients(model)
    fp8.unwatch_gradients(model)
    for module in _four_bit_layers(model):
        from bitsandbytes.functional import has_avx512bf16

        module.support_avx512bf16_for_cpu = has_avx512bf16()


def _four_bit_layers(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if any(
            cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__
        )
    ]


def _kind(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    return type(base).__name__ + (f" with a {type(weight).__name__}" if isinstance(weight, torch.Tensor) else "")
