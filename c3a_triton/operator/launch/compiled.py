"""Launches of compiled kernels, made without looking for them as Triton does each time.

`JITFunction.run` binds a launch's arguments, describes each of them, looks the description up and calls hooks, in
Python, before it launches; a launch made here describes only what calls change and goes to the function in C that the
first like it ended in. It goes through `run` whenever there is more to it: nothing like it was launched before, or
somebody watches launches or changes how kernels are compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["keeps", "launch"]

# Those between the two whose `JITFunction.run` and launchers were read. In a later one launches go through `run`, until
# it is known what that one tells arguments apart by.
_OLDEST, _NEWEST = (3, 6), (3, 9)

# A launch, with the names of its arguments in it: as `**arguments` they would take as long as the launch does. They
# must not be names of this text.
_SOURCE = """
def bind(grid, call, hooks, kept, {constants}):
    def launch(*, {passed}, **more):
        active = driver.active
        device = active.get_current_device()
        stream = active.get_current_stream(device)
        {addresses}
        key = (device, stream, {key})
        known = kept.get(key)
        watched = (
            more
            or hooks
            or getattr(runtime.launch_enter_hook, "calls", True)
            or getattr(runtime.launch_exit_hook, "calls", True)
            or runtime.add_stages_inspection_hook
            or runtime.debug
            or compilation.instrumentation_mode
        )
        if known is None or watched:
            compiled = call({keywords}, **more)
            if not watched and (known := prepared(compiled, grid, stream)):
                kept[key] = known
            return
        launch_in_c, _ = known
        launch_in_c({arguments})
    return launch
"""


def keeps(kernel: Any) -> bool:
    """Whether launches of this kernel are made here: a native one, of a Triton that is known."""
    return isinstance(kernel, JITFunction) and _OLDEST <= _version() <= _NEWEST


def _version() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))


def _takes_a_tuple() -> bool:
    """Whether the function in C takes a kernel's arguments as one."""
    return _version() > (3, 6)


def _prepared(compiled: Any, grid: tuple[int, int, int], stream: int) -> tuple["functools.partial[None]", Any] | None:
    """The function in C of a kernel's arguments, and who owns what else it takes.

    None where a launch allocates or reports something, where the function is of another form than it is known to be,
    and where the kernel was found but not launched.
    """
    function = getattr(compiled, "function", None)
    if function is None:
        return None
    run, metadata = compiled.run, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    if hasattr(run, "kernel_signature") is not _takes_a_tuple():
        return None
    first, hooks, scratch = (function, run.launch_cooperative_grid, run.launch_pdl), (None, None, None), (None, None)
    last: tuple[Any, ...]
    if _takes_a_tuple():
        last = (metadata, *hooks, *scratch, run.arg_annotations, run.kernel_signature)
    else:
        last = (*scratch, metadata, *hooks)
    return functools.partial(run.launch, *grid, stream, *first, *last), compiled


def launch(kernel: Any, call: "functools.partial[Any]", grid: tuple[int, int, int]) -> Callable[..., None]:
    """`call`, which is `kernel.run` with some of its keyword arguments, as a function of the others."""
    defaults = {p.name: p.default for p in kernel.signature.parameters.values() if p.default is not p.empty}
    constants = {name: value for name, value in (defaults | call.keywords).items() if name in kernel.arg_names}
    bind: Any = _binding(kernel, tuple(constants))
    return bind(grid, call, kernel.pre_run_hooks, {}, **constants)


@functools.cache
def _binding(kernel: Any, constants: tuple[str, ...]) -> Callable[..., Callable[..., None]]:
    """What makes launches of a kernel of which these arguments do not change."""
    passed = [param for param in kernel.params if param.name not in constants]
    # As tensors they would be asked for their addresses again, and the driver whether it knows those.
    addresses = {param.name: f"{param.name}_at" for param in passed if param.name.endswith("_ptr")}
    arguments = ", ".join(addresses.get(name, name) for name in kernel.arg_names)
    source = _SOURCE.format(
        constants=", ".join(constants),
        passed=", ".join(param.name for param in passed),
        addresses="; ".join(f"{at} = None if {name} is None else {name}.data_ptr()" for name, at in addresses.items()),
        key=", ".join(_told_apart(param.name, param.is_constexpr) for param in passed),
        keywords=", ".join(f"{param.name}={param.name}" for param in passed),
        arguments=f"({arguments},)" if _takes_a_tuple() else arguments,
    )
    found: dict[str, Any] = {
        "__name__": __name__,
        "prepared": _prepared,
        "driver": driver,
        "runtime": knobs.runtime,
        "compilation": knobs.compilation,
    }
    exec(source, found)
    bind: Callable[..., Callable[..., None]] = found["bind"]
    return bind


def _told_apart(name: str, is_constexpr: bool) -> str:
    """An expression of what Triton compiles other kernels for: as fine as that or finer. Tensors are called "…_ptr"."""
    if is_constexpr:
        return f"{name}.__class__, {name}"
    if name.endswith("_ptr"):
        return f"{name} is None or {name}.dtype, {name}_at and {name}_at % 16"
    # 1 is a constant, multiples of 16 are known to be that, integers have 32 or 64 bits; floats have nothing.
    return f"({name} % 16 + 2 if 2 <= {name} < 2**31 else {name}) if {name}.__class__ is int else {name}.__class__"
