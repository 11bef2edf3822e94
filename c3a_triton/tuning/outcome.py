"""What a run has found, as data: the choice, its table, the front it lies on, and peers on the same layers."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from c3a_triton.adapters.report import format_seconds, format_table
from c3a_triton.errors import ConfigError
from c3a_triton.files.config import C3AConfig
from c3a_triton.operator import dispatch

from .costs import LORA_RANKS, PEFT_C3A, PEFT_LORA, Case, Costs
from .groups import Group, adapter_file_overhead, lora_params, rule_block_size
from .solver import Choice, pareto_front, solve

__all__ = ["Budget", "Outcome", "Point", "Row", "choose_sizes"]

_HEADER = ("group", "layers", "in", "out", "b", "parameters", "backend", "time", "share")
_NUMBERS = set(range(len(_HEADER))) - {0, _HEADER.index("backend")}


@dataclass(frozen=True)
class Budget:
    """The most parameters, how the user said it, and the LoRA rank for the authors' rule of block sizes."""

    max_params: int
    text: str
    rank: float

    @classmethod
    def of(
        cls, groups: Sequence[Group], max_params: int | None, like_lora_rank: int | None, max_adapter_mb: float | None
    ) -> "Budget":
        """The budget that exactly one of the three states.

        A file of X MB (10⁶ bytes) holds float32 values and what safetensors says about each tensor. The rank is the one
        given, else that at which the rule √(in·out)/rank would use up the budget.

        Raises:
            ConfigError: none or several are given, or one that is not positive.
        """
        given = {"max_params": max_params, "like_lora_rank": like_lora_rank, "max_adapter_mb": max_adapter_mb}
        stated = {name: value for name, value in given.items() if value is not None}
        if len(stated) != 1:
            raise ConfigError(f"give exactly one budget of {', '.join(given)}; got {', '.join(stated) or 'none'}")
        ((name, value),) = stated.items()
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ConfigError(f"{name} must be a positive number, got {value!r}")
        if name != "max_adapter_mb" and value != int(value):
            raise ConfigError(f"{name} must be a whole number, got {value!r}")
        if like_lora_rank is not None:
            most = lora_params(groups, int(like_lora_rank))
            return cls(most, f"as many parameters as LoRA of rank {like_lora_rank}: {most:,}", float(like_lora_rank))
        if max_adapter_mb is not None:
            most = max(0, int((max_adapter_mb * 1e6 - adapter_file_overhead(groups)) // 4))
            text = f"an adapter file of {max_adapter_mb:g} MB: {most:,} float32 parameters"
        else:
            assert max_params is not None
            most, text = int(max_params), f"{int(max_params):,} parameters"
        of_rank_one = sum(group.n_matrices * math.sqrt(group.in_features * group.out_features) for group in groups)
        return cls(most, text, max(most, 1) / of_rank_one)


class Row(NamedTuple):
    """A group's choice: seconds of all its layers, base included, and their share of all groups'."""

    group: Group
    b: int
    parameters: int
    backend: str
    seconds: float
    share: float


class Point(NamedTuple):
    """A way to adapt all layers: its parameters and seconds."""

    label: str
    parameters: int
    seconds: float


def choose_sizes(
    groups: Sequence[Group], sizes: Sequence[Sequence[int]], costs: Costs, budget: Budget, objective: str
) -> list[int]:
    """The block size of each group.

    Raises:
        ConfigError: nothing of a group could be measured, or what could be is over the budget.
    """
    known, choices = _choices(groups, sizes, costs, budget)
    least = sum(min(choice.parameters for choice in of_group) for of_group in choices)
    if least > budget.max_params:
        raise ConfigError(
            f"the block sizes that could be measured need at least {least:,} parameters, "
            f"{least - budget.max_params:,} more than the budget of {budget.max_params:,}"
        )
    return [known[i][pick] for i, pick in enumerate(solve(choices, budget.max_params, objective))]


def _choices(
    groups: Sequence[Group], sizes: Sequence[Sequence[int]], costs: Costs, budget: Budget
) -> tuple[list[list[int]], list[list[Choice]]]:
    """For each group the sizes whose time is known, and what each means to the solver."""
    known: list[list[int]] = []
    choices: list[list[Choice]] = []
    for group, valid in zip(groups, sizes, strict=True):
        n_layers, rule = len(group.names), rule_block_size(group, budget.rank)
        found = {b: fastest for b in valid if (fastest := costs.fastest(group, b)) is not None}
        if not found:
            raise ConfigError(f"{group.label}: no block size of these layers could be measured")
        known.append(list(found))
        choices.append(
            [
                Choice(group.parameters(b), n_layers * seconds, n_layers * abs(math.log(b / rule)))
                for b, (_, seconds) in found.items()
            ]
        )
    return known, choices


@dataclass
class Outcome:
    """The choice for one model, and all that it was made of.

    Attributes:
        model: the model's name.
        config: the adapter configuration.
        groups, sizes, chosen: the groups, the block sizes that were in question, the one that was chosen.
        costs: times of all cases.
        peer_costs: times of LoRA and of PEFT's C3A, where they are known.
        budget, objective: what was asked for.
        tokens: the tokens asked for; `costs.setting.n_tokens` is the power of two that stands for them.
        environment: device and versions, in the order of display.
    """

    model: str
    config: C3AConfig
    groups: list[Group]
    sizes: list[list[int]]
    chosen: list[int]
    costs: Costs
    peer_costs: Costs
    budget: Budget
    objective: str
    tokens: int
    environment: dict[str, str]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """One for each group."""
        found = []
        for group, b in zip(self.groups, self.chosen, strict=True):
            fastest = self.costs.fastest(group, b)
            assert fastest is not None, "a block size that nothing is known of was chosen"
            found.append((group, b, fastest[0], len(group.names) * fastest[1]))
        total = sum(seconds for *_, seconds in found)
        return [Row(group, b, group.parameters(b), name, seconds, seconds / total) for group, b, name, seconds in found]

    @property
    def parameters(self) -> int:
        """Parameters of the adapter."""
        return sum(row.parameters for row in self.rows)

    @property
    def seconds(self) -> float:
        """Seconds of all adapted layers in a step, base included."""
        return sum(row.seconds for row in self.rows)

    @functools.cached_property
    def base_seconds(self) -> float | None:
        """Seconds of the same layers without adapters."""
        return self.costs.total(self.groups, (Case.of(group, 0, dispatch.BASE) for group in self.groups))

    @functools.cached_property
    def front(self) -> list[Point]:
        """The Pareto front under the budget, parameters ascending."""
        known, choices = _choices(self.groups, self.sizes, self.costs, self.budget)
        points = []
        for picked in pareto_front(choices, self.budget.max_params):
            taken = [of_group[i] for of_group, i in zip(choices, picked, strict=True)]
            sizes = sorted({of_group[i] for of_group, i in zip(known, picked, strict=True)})
            label = "b = " + ", ".join(map(str, sizes))
            points.append(Point(label, sum(c.parameters for c in taken), sum(c.seconds for c in taken)))
        return points

    @functools.cached_property
    def peers(self) -> list[Point]:
        """LoRA of several ranks and PEFT's C3A of the chosen block sizes on the same layers, where they are known."""
        groups = self.groups
        candidates = [
            (f"LoRA r={rank}", lora_params(groups, rank), [Case.of(group, rank, PEFT_LORA) for group in groups])
            for rank in LORA_RANKS
        ]
        same = [Case.of(group, b, PEFT_C3A) for group, b in zip(groups, self.chosen, strict=True)]
        candidates.append(("PEFT's C3A", self.parameters, same))
        return [
            Point(label, parameters, seconds)
            for label, parameters, cases in candidates
            if (seconds := self.peer_costs.total(groups, cases)) is not None
        ]

    @property
    def step(self) -> str:
        """What a step is, in words."""
        setting = self.costs.setting
        tokens = f"{self.tokens:,} tokens"
        if self.tokens != setting.n_tokens:
            tokens += f" (times are for {setting.n_tokens:,}, the next power of two, as 'auto' decides)"
        return f"{'forward and backward' if setting.train else 'forward'} of the adapted layers, {tokens}"

    def table(self) -> str:
        """The choice as text."""
        label = self.costs.label
        header = tuple(f"{name} ({label})" if name == "time" else name for name in _HEADER)
        lines = [header, *(self.cells(row) for row in self.rows), self.total_cells()]
        base = self.base_seconds
        added = "" if base is None else f"; without adapters {format_seconds(base)} ({label})"
        return "\n".join(
            [
                format_table(lines, _NUMBERS),
                f"One step: {self.step}: {format_seconds(self.seconds)} ({label}){added}.",
                f"Budget: {self.budget.text}; {self.budget.max_params - self.parameters:,} left.",
                f"Times are {label}{self.source}.",
            ]
        )

    @property
    def source(self) -> str:
        """Where the times come from, to follow the word that labels them."""
        if not self.costs.measured:
            return " by the cost model; nothing was measured"
        stacks = any(group.stack for group in self.groups)
        experts = "; those of stacked experts are predicted by the cost model" if stacks else ""
        return f" on {self.environment['device']}{experts}"

    def cells(self, row: Row) -> tuple[str, ...]:
        """A row of the table."""
        group = row.group
        stack = f"{group.stack} × " if group.stack else ""
        sizes = (str(group.in_features), f"{stack}{group.out_features}", str(row.b), f"{row.parameters:,}")
        times = (format_seconds(row.seconds), f"{row.share:.0%}")
        return (group.label, str(len(group.names)), *sizes, row.backend, *times)

    def total_cells(self) -> tuple[str, ...]:
        """The table's last row."""
        layers = sum(len(group.names) for group in self.groups)
        return ("all", str(layers), "", "", "", f"{self.parameters:,}", "", format_seconds(self.seconds), "100%")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for machines. Seconds are of all layers of a group."""
        return {
            "model": self.model,
            "times": self.costs.label,
            "environment": self.environment,
            "objective": self.objective,
            "mode": "train" if self.costs.setting.train else "infer",
            "dtype": str(self.costs.setting.dtype).removeprefix("torch."),
            "tokens": self.tokens,
            "timed_tokens": self.costs.setting.n_tokens,
            "budget": {"max_params": self.budget.max_params, "text": self.budget.text},
            "parameters": self.parameters,
            "seconds": self.seconds,
            "base_seconds": self.base_seconds,
            "groups": [
                {
                    "group": row.group.label,
                    "layers": len(row.group.names),
                    "in_features": row.group.in_features,
                    "out_features": row.group.out_features,
                    "stack": row.group.stack,
                    "block_size": row.b,
                    "parameters": row.parameters,
                    "backend": row.backend,
                    "seconds": row.seconds,
                    "share": row.share,
                }
                for row in self.rows
            ],
            "config": self.config.to_dict(),
        }
