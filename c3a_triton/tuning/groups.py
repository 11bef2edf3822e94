"""What there is to choose: a model's layers in groups that share one block size, and the sizes that each can take."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from c3a_triton.adapters.targets import find_targets
from c3a_triton.bases.experts import rows_per_token
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
        names: the layers; or parameters that are the stacked weights of experts.
        stack: how many experts each of these has, with widths and an adapter of their own; 0 of layers.
        rows_per_token: how many experts compute each token.
        divided: what the block size has to divide, where that is not the widths.
    """

    label: str
    in_features: int
    out_features: int
    names: tuple[str, ...]
    stack: int = 0
    rows_per_token: int = 1
    divided: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.in_features, self.out_features

    @property
    def n_matrices(self) -> int:
        """How many matrices of this shape are adapted."""
        return len(self.names) * max(self.stack, 1)

    @property
    def block_sizes(self) -> list[int]:
        """The block sizes that its layers can take, ascending."""
        return valid_block_sizes(*(self.divided or self.shape))

    def parameters(self, b: int) -> int:
        """Parameters of all layers at block size b."""
        return self.n_matrices * self.in_features * self.out_features // b


def find_groups(model: nn.Module, config: C3AConfig) -> list[Group]:
    """The groups of the layers that `config` adapts, in the model's order; its block sizes are not looked at.

    Raises:
        ConfigError: no layer is meant, or one that is neither linear nor the stacked weights of experts.
    """
    members: dict[Group, list[str]] = {}
    for target in find_targets(model, config):
        sizes, role = target.sizes, target.name.rpartition(".")[2]
        if sizes.kind not in ("linear", "experts"):
            raise ConfigError(
                f"{target.name}: autotune knows what linear layers and stacked experts cost, and no "
                f"{'other parameter' if target.parameter else type(target.module).__name__}: leave it out, and give it "
                "a block size of your own"
            )
        group = Group(role, sizes.in_features, sizes.out_features, ())
        if sizes.kind == "experts":
            n_rows = rows_per_token(target.module)
            group = replace(group, stack=sizes.stack, rows_per_token=n_rows, divided=sizes.divided)
        members.setdefault(group, []).append(target.name)
    roles = [group.label for group in members]

    def label(group: Group) -> str:
        if roles.count(group.label) == 1:
            return group.label
        stack = f"{group.stack} × " if group.stack else ""
        return f"{group.label} {group.in_features}→{stack}{group.out_features}"

    return [replace(group, label=label(group), names=tuple(names)) for group, names in members.items()]


def lora_params(groups: Iterable[Group], rank: int) -> int:
    """Parameters of LoRA of this rank on the same layers."""
    return sum(group.n_matrices * rank * (group.in_features + group.out_features) for group in groups)


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
    sizes = [group.block_sizes for group in groups]
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
