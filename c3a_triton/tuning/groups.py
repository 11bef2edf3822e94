"""What there is to choose: a model's layers in groups that share one block size, and the sizes that each can take."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from c3a_triton.adapters.targets import find_targets
from c3a_triton.bases.linear_like import linear_widths
from c3a_triton.errors import ConfigError
from c3a_triton.files.block_sizes import valid_block_sizes
from c3a_triton.files.config import C3AConfig

__all__ = ["Group", "adapter_file_overhead", "affordable_sizes", "find_groups", "lora_params", "rule_block_size"]


@dataclass(frozen=True)
class Group:
    """Layers of one role (the last part of their names) and one shape: they get the same block size.

    Attributes:
        label: the role, with the shape where the role has several.
        in_features, out_features: widths of each layer.
        names: the layers.
    """

    label: str
    in_features: int
    out_features: int
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.in_features, self.out_features

    def parameters(self, b: int) -> int:
        """Parameters of all layers at block size b."""
        return len(self.names) * self.in_features * self.out_features // b


def find_groups(model: nn.Module, config: C3AConfig) -> list[Group]:
    """The groups of the layers that `config` adapts, in the model's order; its block sizes are not looked at.

    Raises:
        ConfigError: no layer is meant, or one that is not linear.
    """
    members: dict[tuple[str, int, int], list[str]] = {}
    for target in find_targets(model, config):
        widths = linear_widths(target.module)
        assert widths is not None, "a target without widths"
        members.setdefault((target.name.rpartition(".")[2], *widths), []).append(target.name)
    roles = [role for role, _, _ in members]
    return [
        Group(role if roles.count(role) == 1 else f"{role} {n_in}→{n_out}", n_in, n_out, tuple(names))
        for (role, n_in, n_out), names in members.items()
    ]


def lora_params(groups: Iterable[Group], rank: int) -> int:
    """Parameters of LoRA of this rank on the same layers."""
    return sum(len(group.names) * rank * (group.in_features + group.out_features) for group in groups)


def adapter_file_overhead(groups: Iterable[Group]) -> int:
    """Bytes of an adapter's weights file that are not values, rounded up: safetensors describes each tensor in JSON."""
    names = [name for group in groups for name in group.names]
    return 4096 + sum(len(name.encode()) + 160 for name in names)


def rule_block_size(group: Group, rank: float) -> float:
    """√(in·out)/rank: the block size of C3A's authors for a rank, not rounded to a valid one (arXiv 2407.19342)."""
    return math.sqrt(group.in_features * group.out_features) / rank


def affordable_sizes(groups: Sequence[Group], max_params: int) -> list[list[int]]:
    """For each group the valid block sizes that some choice within the budget has, ascending.

    Raises:
        ConfigError: no choice is within the budget; says by how much the smallest one misses it.
    """
    sizes = [valid_block_sizes(*group.shape) for group in groups]
    least = [group.parameters(valid[-1]) for group, valid in zip(groups, sizes, strict=True)]
    if (needed := sum(least)) > max_params:
        raise ConfigError(
            f"the budget of {max_params:,} parameters cannot be met: the largest block sizes of these "
            f"{sum(len(group.names) for group in groups)} layers still need {needed:,}, {needed - max_params:,} more. "
            "Raise the budget, or adapt fewer modules"
        )
    return [
        [b for b in valid if group.parameters(b) + needed - own <= max_params]
        for group, valid, own in zip(groups, sizes, least, strict=True)
    ]
