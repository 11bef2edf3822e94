"""c3a_triton: fast C3A (Circular Convolution Adaptation, arXiv 2407.19342) adapters.

    model = c3a_triton.apply(model, C3AConfig(block_size=256, target_modules=["q_proj", "v_proj"]))

adapts a model in place; `model.c3a` is its `AdapterManager`.
"""

import importlib
from typing import Any

from .adapters.conv import C3AConv2d
from .adapters.embedding import C3AEmbedding
from .adapters.explanation import explain
from .adapters.layer import C3ALinear
from .adapters.learning_rates import param_groups
from .adapters.manager import AdapterManager
from .api import apply, load_adapter
from .bases.quantized import register_linear_like
from .errors import (
    AdapterNotFoundError,
    AdapterStateError,
    BackendError,
    C3AError,
    CheckpointError,
    ConfigError,
    ShapeError,
)
from .files.block_sizes import suggest_block_size, valid_block_sizes
from .files.config import C3AConfig
from .operator.calls import c3a_linear, circulant_linear
from .operator.dense import circulant_matrix

__version__ = "0.1.0"

__all__ = [
    "AdapterManager",
    "AdapterNotFoundError",
    "AdapterStateError",
    "BackendError",
    "C3AConfig",
    "C3AConv2d",
    "C3AEmbedding",
    "C3AError",
    "C3ALinear",
    "CheckpointError",
    "ConfigError",
    "ShapeError",
    "apply",
    "autotune",
    "c3a_linear",
    "circulant_linear",
    "circulant_matrix",
    "explain",
    "load_adapter",
    "param_groups",
    "register_linear_like",
    "suggest_block_size",
    "valid_block_sizes",
]


def __getattr__(name: str) -> Any:
    # The tuner is imported by whoever tunes.
    if name == "autotune":
        return importlib.import_module("c3a_triton.tuning.tuner").autotune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
