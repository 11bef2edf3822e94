"""Parameters that DeepSpeed's ZeRO-3 keeps in parts, changed by all processes that have them, or by none."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .agreement import agree
from .sharded import is_partitioned, partitioned_over, zero

__all__ = ["changed", "together"]


@contextmanager
def together(parameters: Iterable[Tensor], what: str) -> Iterator[list[Any]]:
    """Where one of the processes that hold parts of these parameters fails within it, all of them do.

    Every process has to enter. For other parameters nothing happens.

    Args:
        parameters: the parameters.
        what: what is done, for messages.

    Yields:
        A list for what has to be the same in every process.

    Raises:
        AdapterStateError: another process fails, or does something else.
    """
    shared: list[Any] = []
    problem = None
    try:
        yield shared
    except Exception as error:
        problem = error
    agree(partitioned_over(parameters), what, shared, problem)


@contextmanager
def changed(parameters: Iterable[Tensor], what: str) -> Iterator[None]:
    """Within it parameters that ZeRO-3 keeps in parts are put together, and afterwards the parts are of what they became.

    Every process has to enter and to make the same of them. What one fails in, all fail in, and the parameters stay as
    they were. Other parameters are changed as they are.

    Raises:
        AdapterStateError: as `together`.
    """
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield
        return
    # Without the rank whose values count DeepSpeed would keep the former ones.
    with zero().GatheredParameters(parts, modifier_rank=0):
        try:
            with together(parts, what):
                yield
        except Exception:
            first: Any = parts[0]
            first.partition(parts)  # forgets what has been made of them
            first.all_gather(parts)
            raise
    for part in parts:
        _tell_optimizer(part)


def _tell_optimizer(parameter: Any) -> None:
    """Let the optimizer's own copy, which it has of parameters in 16 bits and trains in their place, be this one's."""
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None or optimizer.get_param_id(parameter) not in optimizer.grad_position:
        return
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True)  # of others DeepSpeed sets nothing, though it has a copy
    optimizer.set_local_hp_param(parameter.ds_tensor, parameter)
    parameter.requires_grad_(is_trained)
