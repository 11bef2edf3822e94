"""What is measured, as data."""

from dataclasses import dataclass

__all__ = [
    "CALL",
    "EXPAND",
    "LAYERS",
    "LAYERS_TINY",
    "LORA_RANK",
    "OPERATOR",
    "SAVED",
    "CallCase",
    "ExpandCase",
    "LayerCase",
    "OperatorCase",
]

LORA_RANK = 16


@dataclass(frozen=True)
class OperatorCase:
    """x of `(n_tokens, in_blocks * b)` times a circulant of `(out_blocks, in_blocks, b)`, float32."""

    n_tokens: int
    b: int
    in_blocks: int
    out_blocks: int


@dataclass(frozen=True)
class ExpandCase:
    """ΔW of one layer, float32."""

    out_features: int
    in_features: int
    b: int


@dataclass(frozen=True)
class CallCase:
    """A layer so small that a call costs what Python and autograd cost; float32."""

    n_tokens: int
    in_features: int
    out_features: int
    b: int


@dataclass(frozen=True)
class LayerCase:
    """One adapted linear layer with a frozen base, x requiring its gradient as inside a model."""

    n_tokens: int
    in_features: int
    out_features: int
    b: int
    dtype: str = "bfloat16"


OPERATOR = (
    OperatorCase(512, 64, 48, 48),  # 3072 wide: Llama-3.2-3B's q_proj, as in PEFT's comparison
    OperatorCase(512, 256, 16, 16),
    OperatorCase(512, 1024, 4, 4),
    OperatorCase(512, 128, 6, 6),
    OperatorCase(16, 256, 16, 16),
)
EXPAND = ExpandCase(4096, 4096, 256)
CALL = CallCase(1, 32, 32, 8)
SAVED = LayerCase(512, 1024, 1024, 64)

# Training sizes come first: they are worth most where the time runs out.
LAYERS = tuple(LayerCase(n_tokens, 4096, 4096, b) for n_tokens in (8192, 1024, 1, 16) for b in (256, 64, 1024))
LAYERS_TINY = tuple(LayerCase(n_tokens, 64, 64, b, "float32") for n_tokens in (8, 1) for b in (8, 32))
