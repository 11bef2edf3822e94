"""One thing of a model that is to be adapted, and why what other processes have a part of cannot be."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from c3a_triton.bases.linear_like import Geometry
from c3a_triton.bases.parallel import part_of
from c3a_triton.bases.sharded import is_partitioned, is_sharded

from .layer import C3ALinear
from .token_rows import rows_at

__all__ = ["Target", "sharding_problem", "token_problem"]


@dataclass(frozen=True)
class Target:
    """A module to adapt: its name, itself (a base layer, or an adapted one), its sizes, b, and what decided on b.

    Where a parameter is adapted by itself, the name is the parameter's, `parameter` its last part, and the module what
    has it, or the adapted parameter.
    """

    name: str
    module: nn.Module
    sizes: Geometry
    block_size: int
    chosen_by: str
    parameter: str = ""


def token_problem(name: str, module: nn.Module) -> str | None:
    """What is wrong with adapting, or copying, a module of which an adapter that is there trains rows, or None."""
    if not any(rows_at(part) for part in module.modules()):
        return None
    return (
        f"another adapter trains tokens of {name} (trainable_token_indices): leave {name} out, or adapt a model "
        "without that adapter"
    )


def sharding_problem(name: str, module: nn.Module, parameter: str = "") -> str | None:
    """What is wrong with adapting a layer of which this process holds a part, or None.

    A kernel that is added after FSDP2 would be neither sharded nor reduced. DeepSpeed's ZeRO-3 takes new parameters in
    when it is initialised, so its weights are as good as whole. Linear layers of a tensor-parallel plan are adapted.

    Args:
        name: what is to be adapted.
        module: the layer, or the module that has the parameter.
        parameter: the name of what is adapted by itself, or "".
    """
    base: Any = module.get_base_layer() if isinstance(module, C3ALinear) else module
    weight: Any = base._parameters.get(parameter or "weight")
    part = None if parameter else part_of(base)
    if isinstance(part, str):
        return f"{name} {part}: leave it out of the plan, or do not adapt it"
    if weight is None or not is_sharded(weight) or is_partitioned(weight):
        return None
    if part is not None and weight.device_mesh == part.mesh:
        return None
    return (
        f"{name} is sharded already (its weight is a DTensor with {weight.placements}), so that an adapter "
        "would not be reduced with the rest. For FSDP2, also over tensor parallelism, adapt the model first and call "
        "fully_shard afterwards. Of a tensor-parallel plan linear layers can be adapted: leave all else out of it"
    )
