"""c3a_triton: fast C3A (Circular Convolution Adaptation, arXiv 2407.19342) adapters.

    model = c3a_triton.apply(model, C3AConfig(block_size=256, target_modules=["q_proj", "v_proj"]))

adapts a model in place; `model.c3a` is its `AdapterManager`.

A public name is imported when it is first asked for: torch takes seconds, and `c3a-triton --help` needs none of it.
Where torch is imported already, the custom ops are registered at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.conv import C3AConv2d as C3AConv2d
    from .adapters.embedding import C3AEmbedding as C3AEmbedding
    from .adapters.experts import C3AExperts as C3AExperts
    from .adapters.explanation import explain as explain
    from .adapters.layer import C3ALinear as C3ALinear
    from .adapters.learning_rates import param_groups as param_groups
    from .adapters.manager import AdapterManager as AdapterManager
    from .adapters.plain_parameters import C3AParameters as C3AParameters
    from .api import apply as apply
    from .api import load_adapter as load_adapter
    from .bases.quantized import register_linear_like as register_linear_like
    from .errors import AdapterNotFoundError as AdapterNotFoundError
    from .errors import AdapterStateError as AdapterStateError
    from .errors import BackendError as BackendError
    from .errors import C3AError as C3AError
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import ShapeError as ShapeError
    from .files.block_sizes import suggest_block_size as suggest_block_size
    from .files.block_sizes import valid_block_sizes as valid_block_sizes
    from .files.config import C3AConfig as C3AConfig
    from .operator.calls import c3a_linear as c3a_linear
    from .operator.calls import circulant_linear as circulant_linear
    from .operator.dense import circulant_matrix as circulant_matrix
    from .tuning.tuner import autotune as autotune

__version__ = "0.1.0"

# Where a public name lives: what the imports above say to type checkers, which do not run what is below.
_HOMES = {
    "AdapterManager": "adapters.manager",
    "AdapterNotFoundError": "errors",
    "AdapterStateError": "errors",
    "BackendError": "errors",
    "C3AConfig": "files.config",
    "C3AConv2d": "adapters.conv",
    "C3AEmbedding": "adapters.embedding",
    "C3AError": "errors",
    "C3AExperts": "adapters.experts",
    "C3ALinear": "adapters.layer",
    "C3AParameters": "adapters.plain_parameters",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ShapeError": "errors",
    "apply": "api",
    "autotune": "tuning.tuner",
    "c3a_linear": "operator.calls",
    "circulant_linear": "operator.calls",
    "circulant_matrix": "operator.dense",
    "explain": "adapters.explanation",
    "load_adapter": "api",
    "param_groups": "adapters.learning_rates",
    "register_linear_like": "bases.quantized",
    "suggest_block_size": "files.block_sizes",
    "valid_block_sizes": "files.block_sizes",
}

if not TYPE_CHECKING:
    __all__ = [*_HOMES]

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    # Who only loads an exported program asks for no name, and needs the custom ops.
    if "torch" in sys.modules:
        importlib.import_module(f"{__name__}.operator.rows")

    def __dir__() -> list[str]:
        return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
