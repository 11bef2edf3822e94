"""Parameters that DeepSpeed's ZeRO-3 keeps in parts, changed by all processes that have them, or by none."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from .agreement import all_or_none
from .sharded import is_partitioned, partitioned_over, zero

__all__ = ["changed", "together"]


def together(parameters: Iterable[Tensor], what: str) -> AbstractContextManager[dict[str, Any]]:
    """`all_or_none` over the processes that hold parts of these parameters; for other parameters nothing happens."""
    return all_or_none(partitioned_over(parameters), what)


@contextmanager
def changed(parameters: Iterable[Tensor], what: str) -> Iterator[None]:
    """Within it parameters that ZeRO-3 keeps in parts are put together; what they become there is parted again.

    Every process has to enter, and to make the same of them. What one fails in, all fail in, and the parameters stay as
    they were. Other parameters are changed as they are.

    Raises:
        AdapterStateError: another process fails.
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
