"""What is measured, as data."""

from dataclasses import dataclass

__all__ = [
    "ALL_LINEAR",
    "BLOCK_SIZES",
    "CALL",
    "COMPARISON",
    "DECODERS",
    "DECODERS_TINY",
    "DECODING",
    "DECODING_TINY",
    "EXPAND",
    "GENERATION",
    "GENERATION_TINY",
    "LAYERS",
    "LAYERS_TINY",
    "LLAMA_3B",
    "LLAMA_TINY",
    "LORA_RANK",
    "MEMORY",
    "MEMORY_CPU",
    "MEMORY_TINY",
    "MERGE",
    "MERGE_CPU",
    "MERGE_TINY",
    "MODELS",
    "MODELS_TINY",
    "MODEL_LORA_RANK",
    "OPERATOR",
    "OVERHEAD",
    "QV",
    "SAVED",
    "SIZES",
    "TOKENS",
    "CallCase",
    "DecoderCase",
    "ExpandCase",
    "LayerCase",
    "ModelCase",
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

    @property
    def label(self) -> str:
        """Its widths."""
        return f"{self.in_features}→{self.out_features}"

    @property
    def parts(self) -> tuple[tuple[int, "LayerCase"], ...]:
        """(which input, layer) of every layer: here one of one."""
        return ((0, self),)


@dataclass(frozen=True)
class DecoderCase:
    """The seven linear layers of a Llama decoder layer: q, k, v of one input, o, gate and up of one input, down."""

    n_tokens: int
    hidden: int
    kv: int
    intermediate: int
    b: int
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """Its widths."""
        return f"seven linears {self.hidden}/{self.kv}/{self.intermediate}"

    @property
    def parts(self) -> tuple[tuple[int, LayerCase], ...]:
        """(which input, layer) of every layer."""
        sizes = (
            (0, self.hidden, self.hidden),
            (0, self.hidden, self.kv),
            (0, self.hidden, self.kv),
            (1, self.hidden, self.hidden),
            (2, self.hidden, self.intermediate),
            (2, self.hidden, self.intermediate),
            (3, self.intermediate, self.hidden),
        )
        return tuple(
            (source, LayerCase(self.n_tokens, in_features, out_features, self.b, self.dtype))
            for source, in_features, out_features in sizes
        )


@dataclass(frozen=True)
class ModelCase:
    """A training step of a Llama-shaped model, or a generation, with adapters of block size b on `targets`."""

    name: str  # what is adapted, for short
    n_tokens: int
    targets: tuple[str, ...]
    batch: int = 4
    b: int = 64


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

# One layer. The first of each are worth most where the time runs out: sizes and tokens in this order.
SIZES = ((4096, 4096), (4096, 14336), (3072, 3072), (3072, 1024), (8192, 28672))
TOKENS = (8192, 1024, 32768, 1, 16)
BLOCK_SIZES = (128, 64, 256, 1024, 32, 512)
LAYERS = tuple(LayerCase(n_tokens, *size, b) for n_tokens in TOKENS for size in SIZES for b in BLOCK_SIZES)
LAYERS_TINY = tuple(LayerCase(n_tokens, 64, 64, b, "float32") for n_tokens in (8, 1) for b in (8, 32))

# q and v of Llama-3.2-3B in PEFT's method comparison: batches of 4 of 212 tokens on average.
COMPARISON = (LayerCase(848, 3072, 3072, 64), LayerCase(848, 3072, 1024, 64))

DECODERS = (DecoderCase(8192, 4096, 1024, 14336, 128),)  # Llama-3.1-8B
DECODERS_TINY = (DecoderCase(6, 32, 16, 48, 8, "float32"),)

# One token per sequence, under a CUDA graph.
DECODING = (
    *(LayerCase(n_tokens, *size, 128) for size in SIZES[:2] for n_tokens in (1, 4, 16)),
    LayerCase(1, 3072, 3072, 64),
)
DECODING_TINY = (LayerCase(1, 64, 64, 8, "float32"),)

MEMORY = tuple(LayerCase(8192, *size, b) for size in SIZES for b in (128, 1024))
MEMORY_CPU = (SAVED, LayerCase(512, 1024, 1024, 256), LayerCase(512, 1024, 4096, 64))
MEMORY_TINY = (LayerCase(8, 64, 96, 8), LayerCase(8, 64, 96, 32))

MERGE = (LayerCase(1, 4096, 4096, 128), LayerCase(1, 4096, 4096, 1024), LayerCase(1, 8192, 28672, 128))
MERGE_CPU = MERGE[:2]
MERGE_TINY = (LayerCase(1, 64, 96, 8),)

# One token takes other kernels than many; the base product must cost next to nothing.
OVERHEAD = (LayerCase(32, 64, 64, 64, "float32"), LayerCase(1, 64, 64, 64, "float32"))

# As Llama-3.2-3B in PEFT's method comparison: batches of 4, sequences of 212 tokens on average and of 768 at most.
LLAMA_3B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
QV = ("q_proj", "v_proj")
ALL_LINEAR = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = tuple(
    ModelCase(name, n_tokens, targets)
    for name, targets in (("q, v", QV), ("all linear", ALL_LINEAR))
    for n_tokens in (212, 768)
)
MODELS_TINY = tuple(ModelCase(name, 6, targets, 2, 16) for name, targets in (("q, v", QV), ("all linear", ALL_LINEAR)))
GENERATION = ModelCase("q, v", 128, QV, 1)
GENERATION_TINY = ModelCase("q, v", 4, QV, 1, 16)
MODEL_LORA_RANK = 32
