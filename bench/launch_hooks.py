"""Where a Triton kernel is launched, caught: by those who count launches, record them, time them or leave them out."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from c3a_triton.operator.launch import plans

__all__ = ["caught", "noted"]

Launched = Callable[..., Any]  # (kernel, **arguments of the launch)


@contextmanager
def caught(replacement: Callable[[Launched], Launched]) -> Iterator[None]:
    """Within it, every launch is a call of what `replacement` makes of the launch that Triton would make.

    Natively as in the interpreter. Nothing else may have replaced it meanwhile.

    Raises:
        ImportError: Triton is not installed.
    """
    with ExitStack() as stack:
        for module, name in (("jit", "JITFunction"), ("interpreter", "InterpretedFunction")):
            kernel_class = getattr(importlib.import_module(f"triton.runtime.{module}"), name)
            stack.enter_context(mock.patch.object(kernel_class, "run", replacement(kernel_class.run)))
        # Launches that find their kernels themselves would pass it by.
        compiled = importlib.import_module("c3a_triton.operator.launch.compiled")
        stack.enter_context(mock.patch.object(compiled, "keeps", return_value=False))
        # Plans made before hold launches that would not be caught, those made within must not outlive it.
        plans.clear_plans()
        stack.callback(plans.clear_plans)
        yield


@contextmanager
def noted() -> Iterator[list[str]]:
    """The names of the kernels launched meanwhile, in order."""
    names: list[str] = []

    def noting(run: Launched) -> Launched:
        def noted_run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(kernel.__name__)
            return run(kernel, *args, **kwargs)

        return noted_run

    with caught(noting):
        yield names
