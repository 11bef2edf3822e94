"""One block size for each group, the best under a budget: a multiple-choice knapsack, solved exactly by HiGHS."""

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from c3a_triton.errors import C3AError

__all__ = ["LATENCY_TOLERANCE", "Choice", "pareto_front", "scipy_optimize", "solve"]

# Choices whose times differ by no more than this share count as equally fast: less than measurements scatter.
LATENCY_TOLERANCE = 0.01


class Choice(NamedTuple):
    """What one block size means for a group: parameters, seconds, and how far it is from the authors' rule."""

    parameters: int
    seconds: float
    distance: float = 0.0


def solve(groups: Sequence[Sequence[Choice]], max_params: int, objective: str) -> list[int]:
    """The index of each group's choice, of the best selection with at most `max_params` parameters in all.

    Args:
        groups: the choices of each group; some selection has to be within the budget.
        max_params: the budget.
        objective: `"latency"`: the least time t. `"params"`: the most parameters P, then the least time among the
            selections that have as many. `"balanced"`: the least time/t − parameters/P, the knee of the Pareto front,
            beyond which a per cent of t buys less than a per cent of P. Among the selections whose time, for balanced
            whose sum, is within `LATENCY_TOLERANCE` of that, the one with the least sum of distances is taken.

    Raises:
        C3AError: scipy is not installed, or finds no selection.
    """
    problem = _Knapsack(groups, max_params)
    most = problem.total(problem.parameters, problem.best([-p for p in problem.parameters]))
    enough = (problem.parameters, most if objective == "params" else 0, math.inf)
    least_time = problem.total(problem.seconds, problem.best(problem.seconds, enough))
    costs = [seconds / least_time for seconds in problem.seconds]
    least = 1.0
    if objective == "balanced":
        # Shifted by the same for every choice, so that no summand is negative.
        shift = max(problem.parameters) / most
        costs = [cost + shift - p / most for cost, p in zip(costs, problem.parameters, strict=True)]
        least = problem.total(costs, problem.best(costs, enough))
    return problem.best(problem.distances, enough, (costs, -math.inf, least + LATENCY_TOLERANCE))


def pareto_front(groups: Sequence[Sequence[Choice]], max_params: int, n_points: int = 32) -> list[list[int]]:
    """Selections of the front "more parameters, more time": the fastest with at least P parameters, for growing P.

    P takes up to `n_points` values between the least that the groups can have and the most that the budget allows,
    evenly spaced in their logarithm. Each selection is exact; those that another one beats in both are left out.
    """
    problem = _Knapsack(groups, max_params)
    most = problem.total(problem.parameters, problem.best([-p for p in problem.parameters]))
    least = sum(min(choice.parameters for choice in group) for group in groups)
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for i in range(n_points):
        wanted = min(most, math.floor(least * (most / least) ** (i / max(n_points - 1, 1))))
        picked = problem.best(problem.seconds, (problem.parameters, wanted, math.inf))
        totals = problem.total(problem.parameters, picked), problem.total(problem.seconds, picked)
        found[tuple(picked)] = totals
    front = [
        picked
        for picked, (parameters, seconds) in found.items()
        if not any((p, s) != (parameters, seconds) and p >= parameters and s <= seconds for p, s in found.values())
    ]
    return [list(picked) for picked in sorted(front, key=lambda picked: found[picked])]


def scipy_optimize() -> Any:
    """The module scipy.optimize.

    Raises:
        C3AError: scipy is not installed.
    """
    try:
        return importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise C3AError("choosing block sizes needs scipy: pip install 'c3a_triton[tune]'") from error


class _Knapsack:
    """The selections within a budget as a 0/1 program with a variable for each choice."""

    def __init__(self, groups: Sequence[Sequence[Choice]], max_params: int) -> None:
        choices = [choice for group in groups for choice in group]
        self.parameters = [choice.parameters for choice in choices]
        self.seconds = [choice.seconds for choice in choices]
        self.distances = [choice.distance for choice in choices]
        self.max_params = max_params
        # The variables of each group.
        self.slices = []
        start = 0
        for group in groups:
            self.slices.append(range(start, start + len(group)))
            start += len(group)

    def total(self, values: Sequence[Any], picked: Sequence[int]) -> Any:
        """The sum of `values` over a selection."""
        return sum(values[members[i]] for members, i in zip(self.slices, picked, strict=True))

    def best(self, costs: Sequence[float], *limits: tuple[Sequence[float], float, float]) -> list[int]:
        """The selection of least cost, within the budget and within `limits`: (values, least sum, largest sum)."""
        optimize = scipy_optimize()
        one_each = [[float(i in members) for i in range(len(costs))] for members in self.slices]
        # The solver's tolerances are absolute. Sums of integers stay integers, in the largest unit that they have in
        # common; sums of times are brought to about one, and what alone is too much is left out.
        rows: list[tuple[list[list[float]], float, float]] = [(one_each, 1.0, 1.0)]
        allowed = [1.0] * len(costs)
        for values, low, high in ((self.parameters, -math.inf, self.max_params), *limits):
            unit = math.gcd(*values) if values is self.parameters else high
            allowed = [0.0 if value > high else most for value, most in zip(values, allowed, strict=True)]
            rows.append(([[value / unit for value in values]], low / unit, high / unit))
        lowest, spread = min(costs), max(costs) - min(costs) or 1.0
        scaled = [(cost - lowest) * (1e3 / spread) for cost in costs]
        while True:
            result = optimize.milp(
                scaled,
                integrality=[1] * len(costs),
                bounds=optimize.Bounds(0.0, allowed),
                constraints=[optimize.LinearConstraint(*row) for row in rows],
                options={"mip_rel_gap": 0.0},
            )
            if result.x is None:
                raise C3AError(f"scipy found no selection of block sizes: {result.message}")
            taken = [max(members, key=result.x.__getitem__) for members in self.slices]
            picked = [i - members.start for i, members in zip(taken, self.slices, strict=True)]
            if self.total(self.parameters, picked) <= self.max_params:
                return picked
            # Within the solver's tolerance but not within the budget: that one selection is ruled out.
            rows.append(([[float(i in taken) for i in range(len(costs))]], -math.inf, len(taken) - 1.0))
