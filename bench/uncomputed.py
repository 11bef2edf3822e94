"""Native launches without a GPU: Triton's own Python runs up to the call of the driver, and nothing is compiled.

For those who time the host's part of launches, and for tests of which kernel a launch takes.
"""

import copy
import functools
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from c3a_triton.operator.launch import plans

__all__ = ["Driver", "launches", "native", "nothing", "target"]

Called = Callable[..., None]


def target(card: str) -> Any:
    """The card as Triton's compiler names it."""
    return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", int(card.removeprefix("sm_")), 32)


@functools.cache
def native(kernel: Any) -> Any:
    """A kernel as it is without the interpreter, with nothing compiled."""
    jit = importlib.import_module("triton.runtime.jit")
    native = copy.copy(kernel) if isinstance(kernel, jit.JITFunction) else jit.JITFunction(kernel.fn, **kernel.kwargs)
    native.device_caches = defaultdict(native.create_binder)
    return native


def nothing(*arguments: Any) -> None:
    """In place of Triton's launcher in C."""


class Driver:
    """In place of Triton's driver: `card`, on which nothing happens.

    Args:
        called: in place of the launcher in C, with its arguments: the grid, the stream, the function and more.
        card: "sm_90", say.

    Attributes:
        device: the current one.
        loaded: the kernels that were loaded; each one's place + 1 is what the launcher gets as its function.
    """

    def __init__(self, called: Called = nothing, card: str = "sm_90") -> None:
        nvidia = importlib.import_module("triton.backends.nvidia.driver")
        self.device = 0
        self.loaded: list[Any] = []
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            launch=called,
            build_signature_metadata=len,
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": 2**20},
        )
        self._card = card

    def get_current_device(self) -> int:
        """As Triton's."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """What the compiler is told of the card."""
        return target(self._card)

    def _load(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, ...]:
        self.loaded.append(kernel)
        return 1, len(self.loaded), 0, 0, 1024


def _compile(src: Any, target: Any, options: dict[str, Any], **more: Any) -> Any:
    """In place of Triton's compiler: a kernel of these specialisations that has no code."""
    compiler = importlib.import_module("triton.compiler.compiler")

    class Uncompiled(compiler.CompiledKernel):  # type: ignore[name-defined]
        def __init__(self) -> None:
            sizes = [f"{kind}_scratch_{size}" for kind in ("global", "profile") for size in ("size", "align")]
            more = dict.fromkeys(sizes, 0) | {"target": target, "warp_size": 32, "shared": 0, "tensordesc_meta": None}
            self.metadata = SimpleNamespace(**options | more)
            self.packed_metadata = (options["num_warps"], options["num_ctas"], 0)
            self.src, self.name, self.hash = src, src.name, ""
            self.metadata_group: dict[str, str] = {}
            self.kernel = self
            self.module = self.function = self._run = None

        def __del__(self) -> None:
            """Nothing is loaded."""

    return Uncompiled()


@contextmanager
def launches(driver: Driver) -> Iterator[None]:
    """Within it, launches of this library's kernels are native ones on `driver`.

    Raises:
        ImportError: Triton is not installed.
    """
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    KernelInterface = importlib.import_module("triton.runtime.jit").KernelInterface
    launcher = SimpleNamespace(launch=driver.utils.launch)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(importlib.import_module("triton.runtime").driver, "_active", driver))
        enter(mock.patch.object(importlib.import_module("triton.compiler"), "compile", _compile))
        # What makes a launcher, by Triton's version.
        for name, value in {
            "compile_module_from_src": lambda **source: launcher,
            "library_dirs": list,
            "PyKernelArg": SimpleNamespace,
            "ARG_CONSTEXPR": 0,
            "ARG_KERNEL": 1,
        }.items():
            enter(mock.patch.object(nvidia, name, value, create=True))
        native.cache_clear()
        for module in plans.kernels():
            # Kernels, and their helpers, which are part of what kernels are.
            functions = [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]
            natives = {name: native(getattr(module, name)) for name in functions}
            enter(mock.patch.multiple(module, **natives))
        plans.clear_plans()
        stack.callback(plans.clear_plans)
        yield
