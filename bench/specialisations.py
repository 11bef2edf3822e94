"""What Triton would compile for every launch on a card, recorded on a machine that has none.

Triton compiles a kernel anew for every combination of argument types, constants, sizes that are 1 or divisible by 16,
and options. Which one a launch asks for is found by Triton itself: its `JITFunction.run` is given the arguments, is
told of another card, and is stopped where it would compile. So launches may be replaced by nothing, on CPU or meta
tensors, or made in the interpreter besides.

A part of the GPU job whose launches are to be compiled beforehand has in its module a function

    launches(device) -> Iterator[tuple[str, Callable[[], object]]]

of what to call, under a name each: a call makes its tensors on `device`, which is "meta", and launches once what the
part launches on a GPU. `job_launches` finds these functions; launches compute nothing there, `specs.card_of` names
the card, "auto" chooses as on a GPU, and meta tensors go where real ones go.
"""

import functools
import importlib
import json
import lzma
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from unittest import mock

import torch

from c3a_triton.benchmark import gate, layer
from c3a_triton.operator import dispatch
from c3a_triton.operator.launch import plans, specs

from . import ROOT, kernel_cases, launch_hooks, overhead
from .uncomputed import native, target

__all__ = [
    "CARD",
    "Recorder",
    "Specialisation",
    "as_on",
    "guards_launches",
    "job_launches",
    "of_layers",
    "parts",
    "read",
    "record",
    "recorded",
    "recorder",
    "target",
    "unique",
]

CARD = "sm_90"
META = torch.device("meta")
OURS = ("c3a_triton.kernels.", "bench.")
METHODS = tuple(f"ours:{name}" for name in dispatch.BACKENDS if name not in ("reference", "torch"))


@dataclass(frozen=True)
class Specialisation:
    """One thing to compile."""

    kernel: str  # with its module
    arguments: list[tuple[str, str, Any]]  # (name, type, attributes such as divisibility or None)
    constants: dict[str, Any]  # of the arguments of the type "constexpr"
    options: dict[str, Any]  # that the launch gives: warps, stages
    purpose: str  # who asked for it first

    @property
    def identity(self) -> str:
        """Equal for what is compiled once."""
        return json.dumps([self.kernel, self.arguments, self.constants, self.options], sort_keys=True)

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.rpartition(".")[2]

    def as_line(self) -> str:
        """JSON that `read` reads."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"

    def source(self) -> Any:
        """What `triton.compile` takes; this process must not run Triton's interpreter."""
        module, _, name = self.kernel.rpartition(".")
        kernel = getattr(importlib.import_module(module), name)
        signature = {name: kind for name, kind, _ in self.arguments}
        attributes = {(i,): known for i, (_, _, known) in enumerate(self.arguments) if known is not None}
        return importlib.import_module("triton.compiler").ASTSource(kernel, signature, self.constants, attributes)


def unique(found: Iterable[Specialisation]) -> list[Specialisation]:
    """Each once, as it came first."""
    first: dict[str, Specialisation] = {}
    for one in found:
        first.setdefault(one.identity, one)
    return list(first.values())


def read(paths: Iterable[Path]) -> list[Specialisation]:
    """What recorders wrote, each once; files may be compressed by xz."""
    found = []
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
            found += [Specialisation(**json.loads(line)) for line in lines]
    return unique(found)


# Recording


class Recorder:
    """Collects what launches ask for, from any thread."""

    def __init__(self, run: Callable[..., Any], file: TextIO | None) -> None:
        self.purpose = ""  # of what is launched from now on
        self.found: dict[str, Specialisation] = {}
        self._run = run
        self._file = file
        self._lock = threading.Lock()
        self._asked: dict[str, Any] = {}

    def note(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """Record what this launch would compile, where the kernel is ours; nothing is launched."""
        if not kernel.fn.__module__.startswith(OURS):
            return
        jitted = native(kernel)
        with self._lock:
            self._run(jitted, *args, **{**kwargs, "warmup": True})
            (attributes,) = self._asked["configs"]
            one = Specialisation(
                f"{kernel.fn.__module__}.{kernel.__name__}",
                [(name, kind, attributes.get((i,))) for i, (name, kind) in enumerate(self._asked["signature"].items())],
                {jitted.arg_names[i]: value for (i,), value in self._asked["constants"].items()},
                {name: kwargs[name] for name in kwargs.keys() - {*jitted.arg_names, "grid", "warmup"}},
                self.purpose,
            )
            if one.identity not in self.found:
                self.found[one.identity] = one
                if self._file is not None:
                    self._file.write(one.as_line())
                    self._file.flush()

    def asked(self, *, compile: dict[str, Any], **more: Any) -> bool:
        """In place of compiling; Triton's `jit_cache_hook`."""
        self._asked = compile
        return True

    def and_run(self, run: launch_hooks.Launched) -> launch_hooks.Launched:
        """For `launch_hooks.caught`: launches are recorded and made."""

        def noting_run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.note(kernel, *args, **kwargs)
            return run(kernel, *args, **kwargs)

        return noting_run


@contextmanager
def recorder(card: str = CARD, file: TextIO | None = None) -> Iterator[Recorder]:
    """A recorder for launches within, which Triton takes to be launches on `card`; it catches none by itself.

    Args:
        card: "sm_90", say.
        file: where what is found is appended at once, a line of JSON each.

    Raises:
        ImportError: Triton is not installed.
    """
    jit, knobs = (importlib.import_module(f"triton.{name}") for name in ("runtime.jit", "knobs"))
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target(card)
    )
    found = Recorder(jit.JITFunction.run, file)
    native.cache_clear()
    with (
        mock.patch.object(jit, "driver", SimpleNamespace(active=driver)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", found.asked),
    ):
        yield found


@contextmanager
def recorded(card: str = CARD, file: TextIO | None = None) -> Iterator[Recorder]:
    """Within it launches in the interpreter are recorded besides; see `recorder`."""
    with recorder(card, file) as found, launch_hooks.caught(found.and_run):
        yield found


@contextmanager
def as_on(card: str = CARD) -> Iterator[None]:
    """Within it tiles are a card's, and "auto" chooses as on a GPU."""

    def forget() -> None:
        dispatch.refresh()
        plans.clear_plans()

    with ExitStack() as stack:
        stack.callback(forget)
        stack.enter_context(mock.patch.object(specs, "card_of", return_value=card))
        stack.enter_context(mock.patch.object(dispatch, "_kernels_pay", return_value=True))
        forget()
        yield


# What is launched


def of_layers(layers: Iterable[layer.Case], device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of layers by each backend, and their forward without gradients: for `launches` of parts."""
    for case in dict.fromkeys(layers):
        for method in METHODS:
            yield layer.key(case, method), functools.partial(_step, case, method, device)


def _step(case: layer.Case, method: str, device: torch.device) -> None:
    work = layer.Workload.of(case, method, device)
    work.both()
    with torch.no_grad():
        work.forward()


def parts() -> list[str]:
    """The modules of this folder that have a function `launches`."""
    paths = sorted((ROOT / "bench").glob("*.py"))
    has = re.compile(r"^def launches\(device\b", re.MULTILINE)
    return [path.stem for path in paths if has.search(path.read_text(encoding="utf-8"))]


def job_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """The launches of all `parts`; to be gone over where nothing is computed, as `record` does."""
    for part in parts():
        for name, call in importlib.import_module(f"{__package__}.{part}").launches(META):
            yield f"{part}: {name}", call


def guards_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Those of `kernel_cases`, on CPU tensors that are aligned as they are on a GPU."""

    def launch_all(case: kernel_cases.Case) -> None:
        with suppress(gate.GateError):  # nothing has computed the results
            kernel_cases.check(case, overhead.CPU)

    for case in kernel_cases.CASES:
        yield f"guards: {case.key}", functools.partial(launch_all, case)


def record(
    calls: Iterable[tuple[str, Callable[[], object]]], card: str = CARD, file: TextIO | None = None
) -> list[Specialisation]:
    """What these calls would launch on a card; nothing is computed."""
    with (
        recorder(card, file) as found,
        as_on(card),
        overhead.stubbed_launches(lambda kernel, **arguments: found.note(kernel, **arguments)),
        # Meta tensors take the path of real ones.
        mock.patch.object(torch.Tensor, "is_meta", property(lambda tensor: False), create=True),
    ):
        for found.purpose, call in calls:
            call()
    return list(found.found.values())
