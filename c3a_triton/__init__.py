"""c3a_triton: fast C3A (Circular Convolution Adaptation, arXiv 2407.19342) adapters.

    model = c3a_triton.apply(model, C3AConfig(block_size=256, target_modules=["q_proj", "v_proj"]))

adapts a model in place; `model.c3a` is its `AdapterManager`.
"""

from .api import apply, load_adapter
from .config import C3AConfig, suggest_block_size, valid_block_sizes
from .errors import (
    AdapterNotFoundError,
    AdapterStateError,
    BackendError,
    C3AError,
    CheckpointError,
    ConfigError,
    ShapeError,
)
from .explanation import explain
from .layer import C3ALinear
from .learning_rates import param_groups
from .manager import AdapterManager
from .ops import c3a_linear, circulant_linear, circulant_matrix

__version__ = "0.1.0"

__all__ = [
    "AdapterManager",
    "AdapterNotFoundError",
    "AdapterStateError",
    "BackendError",
    "C3AConfig",
    "C3AError",
    "C3ALinear",
    "CheckpointError",
    "ConfigError",
    "ShapeError",
    "apply",
    "c3a_linear",
    "circulant_linear",
    "circulant_matrix",
    "explain",
    "load_adapter",
    "param_groups",
    "suggest_block_size",
    "valid_block_sizes",
]
