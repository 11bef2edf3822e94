"""What one model has to show with C3A adapters: `check_model` builds it, tries all verbs and says what came of each."""

import contextlib
import copy
import functools
import math
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_inputs
import small_models
import torch
import transformers
from model_inputs import ROWS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import c3a_triton
from c3a_triton import C3AConfig, C3AError, circulant_matrix
from c3a_triton.adapters.base_model import embeddings_of
from c3a_triton.commands.folder_merge import merge_folder

# What a check can come to, the worst last. "base": the model itself does not do what the check needs.
OUTCOMES = ("pass", "base", "refused", "warned", "failed", "silent")
CHECKS = (
    "apply", "zero", "forward", "backward", "trained", "rows", "one_name", "load", "merge", "unmerge", "unload",
    "saved_merge", "folder_merge", "head_load", "head_unload", "head_saved_merge", "head_folder_merge",
)  # fmt: skip

_WEAK = 1e-3  # an effect below this proves nothing
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_IGNORED_OUTPUTS = ("loss", "past_key_values", "cache_params", "rnn_state", "mems", "state", "past_buckets_states")

Outputs = list[tuple[str, Tensor]]


class BaseFails(Exception):
    """The model alone cannot be built, run or compared."""


def flat(output: Any, name: str = "") -> Outputs:
    """(name, tensor) of all floating-point tensors of an output, as real numbers."""
    if isinstance(output, Tensor):
        output = torch.view_as_real(output) if output.is_complex() else output
        return [(name, output)] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        items = [(key, value) for key, value in output.items() if key not in _IGNORED_OUTPUTS]
    elif isinstance(output, (list, tuple)):
        items = list(enumerate(output))
    else:
        return []
    return [found for key, value in items for found in flat(value, f"{name}.{key}" if name else str(key))]


def difference(a: Tensor, b: Tensor) -> float:
    """The relative difference of two tensors; infinity where shapes or what is not finite differ."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not torch.isfinite(a[finite]).all():
        return math.inf
    # Numbers that stand for infinity (masks of -1e4 and less) would hide all others.
    masked = finite & (b.abs() > 5e3)
    parts = [(a[chosen], b[chosen]) for chosen in (finite & ~masked, masked)]
    return max(float((x - y).norm() / (y.norm() + 1e-6 * math.sqrt(y.numel()) + 1e-30)) for x, y in parts)


def differences(a: Outputs, b: Outputs) -> float:
    """The largest relative difference between tensors of two outputs."""
    if [name for name, _ in a] != [name for name, _ in b]:
        return math.inf
    return max((difference(x, y) for (_, x), (_, y) in zip(a, b, strict=True)), default=math.inf)


def of_row(value: Any, row: int) -> Any:
    """A row's share of an input: that of every tensor whose first dimension is a multiple of the number of rows."""
    if isinstance(value, dict):
        return {key: of_row(entry, row) for key, entry in value.items()}
    if isinstance(value, list):
        return [of_row(entry, row) for entry in value]
    if isinstance(value, Tensor) and value.dim() and value.shape[0] % ROWS == 0:
        return value.chunk(ROWS)[row]
    return value


@contextlib.contextmanager
def library_warnings() -> Iterator[list[str]]:
    """What the library warns about within the context, others' warnings left out."""
    found: list[str] = []
    original = warnings.warn

    def warn(message: Any, *args: Any, **kwargs: Any) -> None:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("c3a_triton"):
            found.append(str(message))

    warnings.warn = warn  # type: ignore[assignment]
    try:
        yield found
    finally:
        warnings.warn = original


def _where(error: BaseException) -> str:
    """The innermost line of the library in an error's traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/c3a_triton/" in frame.filename]
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{Path(innermost.filename).name}:{innermost.lineno}"
    return f"{text} (from {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def _short(text: object, length: int = 300) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[:length] + " …"


class Subject:
    """One model, its inputs, and what has come out so far.

    Args:
        model_class: a class of transformers.
        config: its configuration.
        say: called with the name of each step before it is taken.
    """

    def __init__(self, model_class: Any, config: Any, say: Callable[[str], None]) -> None:
        self.model_class, self.config, self.say = model_class, config, say
        self.results: dict[str, list[str]] = {}
        self.facts: dict[str, Any] = {}
        self.warned: list[str] = []

    # The model alone

    def build(self) -> None:
        """Build the base, find inputs that it takes, and see that it is deterministic and finite."""
        self.say("build")
        torch.manual_seed(0)
        parameters = small_models.count_parameters(self.model_class, self.config)
        if parameters is not None and parameters > small_models.MAX_PARAMETERS:
            raise BaseFails(f"{parameters / 1e6:.0f} million parameters")
        try:
            model = self.model_class(self.config)
        except Exception as error:
            raise BaseFails(f"cannot be built: {type(error).__name__}: {_short(error)} at {_where(error)}") from error
        model.eval().requires_grad_(False)
        small_models.disturb(model)
        self.facts["parameters"] = sum(p.numel() for p in model.parameters())
        self.say("base")
        failures = []
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            try:
                self.inputs = model_inputs.inputs_for(model, functools.partial(self._probe, model), dtype)
                break
            except model_inputs.NoInputs as error:
                where = _where(error.__cause__) if error.__cause__ else ""
                failures.append(f"{error} at {where}")
        else:
            raise BaseFails(f"no inputs: {_short(failures[-1], 600)}")
        self.dtype, self.tolerance, self.base = dtype, _TOLERANCE[dtype], model
        self.facts["dtype"] = str(dtype).removeprefix("torch.")
        self.facts["inputs"] = {k: list(v.shape) if isinstance(v, Tensor) else str(v) for k, v in self.inputs.items()}
        self.plain = self.call(model)
        if not self.plain:
            raise BaseFails("has no output of floating-point tensors")
        if not any(torch.isfinite(value).any() for _, value in self.plain) or any(
            torch.isnan(value).any() for _, value in self.plain
        ):
            raise BaseFails("its output is not finite")
        if (off := differences(self.call(model), self.plain)) > 1e-6:
            raise BaseFails(f"its output is not deterministic ({off:.1e})")

    def _probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        output = self.call(model, inputs)
        if any(torch.isnan(value).any() for _, value in output):
            raise ValueError("its output is not finite")

    def call(self, model: nn.Module, inputs: dict[str, Any] | None = None, grad: bool = False) -> Outputs:
        """The model's output, with the same random numbers every time."""
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad):
            output = flat(model(**copy.copy(self.inputs if inputs is None else inputs)))
        return output if grad else [(name, value.detach().clone()) for name, value in output]

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    # Checks

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[list[str]]:
        """A check: what is raised or warned about within becomes its result. What it yields collects differences."""
        self.say(name)
        wrong: list[str] = []
        outcome, detail = "pass", ""
        with library_warnings() as found:
            try:
                yield wrong
            except BaseFails as error:
                outcome, detail = "base", str(error)
            except C3AError as error:
                outcome, detail = "refused", f"{type(error).__name__}: {_short(error)}"
            except AssertionError as error:
                outcome, detail = "failed", _short(error)
            except Exception as error:
                outcome, detail = "failed", f"{type(error).__name__}: {_short(error)} at {_where(error)}"
        self.warned += [message for message in found if message not in self.warned]
        if outcome == "pass" and wrong:
            detail = "; ".join(wrong)
            # What was said when the adapter was applied or trained counts for what follows from it.
            said = [message for message in self.warned if self._bears_on(name, message)]
            outcome = "warned" if said else "silent"
            detail += "".join(f" | {_short(message)}" for message in said[:2])
        self.results[name] = [outcome, detail]

    @staticmethod
    def _bears_on(name: str, message: str) -> bool:
        about = {
            "trained": ("gradient", "never called", "not called", "no effect", "reads", "bypass", "fused"),
            "rows": ("row",),
            "one_name": ("row",),
            "saved_merge": ("reload", "from_pretrained"),
        }.get(
            name,
            ("reload", "from_pretrained", "never called", "calls all")
            if name.startswith("head_")
            else ("merg", "tied", "saved", "reload", "one tensor", "never called", "not called", "reads"),
        )
        return "is left out" not in message and any(word in message for word in about)

    def equal(self, wrong: list[str], what: str, got: Outputs, wanted: Outputs) -> None:
        off = differences(got, wanted)
        if not off <= self.tolerance:
            wrong.append(f"{what}: {off:.1e}")

    def run(self, folder: Path) -> None:
        """All checks, in order; `results` has what came of each."""
        with self.check("apply"):
            if sum(isinstance(module, (nn.Linear, Conv1D)) for module in self.base.modules()) == 0:
                raise BaseFails("has no linear layer")
            self.model = c3a_triton.apply(self.fresh(), self._config())
        if self.results["apply"][0] != "pass":
            return
        layers = list(self.model.c3a.layers())
        self.facts["layers"] = len(layers)
        with self.check("zero") as wrong:
            self.equal(wrong, "an adapter of zeros changes the output", self.call(self.model), self.plain)
        self._fill("default", 1)
        with self.check("forward"):
            self.out = self._strong_output()
        if self.results["forward"][0] != "pass":
            return
        with self.check("backward"):
            idle = self._gradients()
        if self.results["backward"][0] == "pass":
            self._check_trained(idle)
        self._check_rows()
        base_folder, adapter_folder = folder / "base", folder / "adapter"
        with self.check("load") as wrong:
            self.model.c3a.save_pretrained(adapter_folder)
            loaded = c3a_triton.load_adapter(self.fresh(), adapter_folder)
            self.equal(wrong, "a saved adapter, loaded", self.call(loaded), self.out)
            del loaded
        self._check_merge()
        problem = self._save_base(base_folder)
        self._check_unload(folder / "merged", problem)
        self._check_folder_merge("folder_merge", base_folder, adapter_folder, folder / "by_folder", self.out, problem)
        if (head := self._head()) is not None:
            self._check_head(head, folder, problem)

    def _config(self, modules_to_save: list[str] | None = None) -> C3AConfig:
        return C3AConfig(
            block_size="auto", target_modules="all-linear", init_weights=True, modules_to_save=modules_to_save
        )

    def _fill(self, adapter: str, seed: int, factor: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _, layer in self.model.c3a.layers():
            kernel = layer.c3a_kernel[adapter]
            values = torch.randn(kernel.shape, generator=generator, dtype=kernel.dtype)
            kernel.data.copy_(values * factor * layer.in_features**0.5)

    def _strong_output(self) -> Outputs:
        """The adapted model's output, with kernels that change it well, and leave it finite."""
        out: Outputs = []
        for factor in (0.5, 0.1, 0.02, 0.002, 5.0, 50.0):
            self._fill("default", 1, factor)
            try:
                out = self.call(self.model)
            except RuntimeError as error:  # lengths that such a model predicts ask for all memory
                if "allocate memory" not in str(error):
                    raise
                continue
            effect = differences(out, self.plain)
            if math.isfinite(effect) and effect > _WEAK:
                break
        if not out or any(torch.isnan(value).any() for _, value in out):
            raise BaseFails("its output is not finite with adapters of any size")
        self.factor = factor
        self.facts["effect"] = f"{effect:.1e}"
        if not effect > _WEAK:
            raise BaseFails(f"adapters of all linear layers change the output by {effect:.1e} only")
        return out

    # Gradients

    def _loss(self, model: nn.Module) -> Tensor:
        terms = []
        generator = torch.Generator().manual_seed(3)
        for _, value in self.call(model, grad=True):
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            if value.requires_grad:
                terms.append((torch.where(torch.isfinite(value), value, 0) * weights).double().sum())
        if not terms:
            raise BaseFails("no output has a gradient")
        return torch.stack(terms).sum()

    @contextlib.contextmanager
    def _training(self, model: nn.Module) -> Iterator[None]:
        """Train mode without dropout and statistics; the model's buffers are as before afterwards."""
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        dropped = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
        probabilities = [module.p for module in dropped]
        model.train(self.facts.get("trains", True))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for module in dropped:
            module.p = 0.0
        try:
            yield
        finally:
            model.eval()
            for module, probability in zip(dropped, probabilities, strict=True):
                module.p = probability
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])

    def _gradients(self) -> list[str]:
        """Names of the adapted layers whose kernels a training step gives no gradient, or one of zeros."""
        for trains in (True, False):
            self.facts["trains"] = trains
            try:
                with self._training(self.model):
                    self._loss(self.model).backward()
                break
            except Exception as error:
                base = self.fresh().requires_grad_(True)
                try:
                    with self._training(base):
                        self._loss(base).backward()
                except Exception as own:
                    if not trains:
                        raise BaseFails(f"no backward pass: {type(own).__name__}: {_short(own)}") from own
                else:
                    raise error
        idle = []
        for name, layer in self.model.c3a.layers():
            gradient = layer.c3a_kernel["default"].grad
            if gradient is not None and not torch.isfinite(gradient).all():
                dense = self._dense([]).requires_grad_(True)
                with self._training(dense):
                    self._loss(dense).backward()
                if not torch.isfinite(dense.get_submodule(name).weight.grad).all():
                    raise BaseFails("its own gradients are not finite")
                raise AssertionError(f"{name}: the kernel's gradient is not finite, that of its weight is")
            if gradient is None or not gradient.abs().max() > 0:
                idle.append(name)
        self.model.zero_grad(set_to_none=True)
        return idle

    def _dense(self, without: list[str]) -> nn.Module:
        """The base with the updates of all adapted layers but some added to its weights."""
        dense = self.fresh()
        for name, layer in self.model.c3a.layers():
            if name not in without:
                weight = dense.get_submodule(name).weight
                update = circulant_matrix(layer.c3a_kernel["default"].detach()).to(weight.dtype)
                weight.data += update.T if isinstance(dense.get_submodule(name), Conv1D) else update
        return dense

    def _check_trained(self, idle: list[str]) -> None:
        """Every layer whose weight matters has to have its kernel trained; others are not used by these inputs."""
        self.facts["idle"] = len(idle)
        with self.check("trained") as wrong:
            if not idle:
                return
            dense = self._dense(idle).requires_grad_(True)
            with self._training(dense):
                self._loss(dense).backward()
            gradients = {name: parameter.grad for name, parameter in dense.named_parameters(remove_duplicate=False)}
            owners = Counter(id(parameter) for _, parameter in dense.named_parameters(remove_duplicate=False))
            bypassed = [
                name
                for name in idle
                if (gradient := gradients[f"{name}.weight"]) is not None
                and gradient.abs().max() > 0
                and owners[id(dense.get_submodule(name).weight)] == 1
            ]
            if bypassed:
                called = set()
                handles = [
                    layer.register_forward_hook(lambda module, args, output, name=name: called.add(name))
                    for name, layer in self.model.c3a.layers()
                ]
                self.call(self.model)
                for handle in handles:
                    handle.remove()
                wrong.append(
                    f"{len(bypassed)} of {self.facts['layers']} kernels get no gradient, their weights have one; "
                    f"{len(called.intersection(bypassed))} of these layers are called: {', '.join(bypassed[:4])}"
                )

    # Rows

    def _comparable(self, batch: Outputs, single: Outputs, row: int) -> list[tuple[str, Tensor, Tensor]]:
        """(name, a row of the batch's output, the single output) where there is a row for a row."""
        if [name for name, _ in batch] != [name for name, _ in single]:
            return []
        return [
            (name, whole.chunk(ROWS)[row], part)
            for (name, whole), (_, part) in zip(batch, single, strict=True)
            if whole.dim()
            and part.dim()
            and whole.shape[0] == ROWS * part.shape[0]
            and whole.shape[1:] == part.shape[1:]
        ]

    def _check_rows(self) -> None:
        names = ["default", "other"]
        rows = [of_row(self.inputs, row) for row in range(ROWS)]
        consistent: set[str] = set()
        with self.check("rows") as wrong:
            self.model.c3a.add_adapter("other", self._config())
            self._fill("other", 2, self.factor)
            try:
                alone = [self.call(self.base, row) for row in rows]
            except Exception as error:
                raise BaseFails(f"a row alone does not run: {type(error).__name__}: {_short(error)}") from error
            compared = [self._comparable(self.plain, alone[row], row) for row in range(ROWS)]
            same = [{n for n, a, b in pairs if difference(a, b) < self.tolerance} for pairs in compared]
            consistent = same[0] & same[1]
            if not consistent:
                raise BaseFails("its rows depend on each other")
            wanted = []
            for row, name in enumerate(names):
                self.model.c3a.set_adapter(name)
                wanted.append(self.call(self.model, rows[row]))
            self.model.c3a.set_adapter("default")
            whole = self.call(self.model)
            pairs = self._comparable(whole, wanted[0], 0)
            consistent &= {name for name, a, b in pairs if difference(a, b) < self.tolerance}
            if not consistent:
                raise BaseFails("its rows depend on each other")
            with self.model.c3a.using(names):
                mixed = self.call(self.model)
            for row in range(ROWS):
                for name, got, want in self._comparable(mixed, wanted[row], row):
                    if name in consistent and (off := difference(got, want)) > self.tolerance:
                        wrong.append(f"row {row} of {name}: {off:.1e}")
        if "other" not in self.model.c3a.adapters:
            return
        self.model.c3a.set_adapter("default")
        with self.check("one_name") as wrong:
            with self.model.c3a.using(["default"] * ROWS):
                got = self.call(self.model)
            self.equal(wrong, "rows that all have the active adapter", got, self.out)
        self.model.c3a.delete_adapter("other")

    # Merging

    def _check_merge(self) -> None:
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with self.check("merge") as wrong:
            self.model.c3a.merge_adapter()
            self.equal(wrong, "merged", self.call(self.model), self.out)
        with self.check("unmerge") as wrong:
            if not any(layer.merged for _, layer in self.model.c3a.layers()):
                raise BaseFails("nothing was merged")
            self.model.c3a.unmerge_adapter()
            after = self.model.state_dict()
            changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
            assert not changed, f"unmerged weights differ: {changed[:4]}"
            self.equal(wrong, "unmerged", self.call(self.model), self.out)

    def _save_base(self, folder: Path) -> str | None:
        """Save the base; what is wrong with it when it is loaded again, or None."""
        self.say("save base")
        try:
            self.base.save_pretrained(folder)
            off = differences(self.call(self._reload(folder)), self.plain)
        except Exception as error:
            return f"its own folder does not load: {type(error).__name__}: {_short(error)}"
        return None if off <= self.tolerance else f"its own folder, loaded, differs by {off:.1e}"

    def _reload(self, folder: Path) -> nn.Module:
        return self.model_class.from_pretrained(folder, dtype=self.dtype).eval()

    def _check_unload(self, folder: Path, problem: str | None) -> None:
        merged = None
        with self.check("unload") as wrong:
            merged = self.model.c3a.merge_and_unload()
            self.equal(wrong, "merged and unloaded", self.call(merged), self.out)
        with self.check("saved_merge") as wrong:
            if merged is None or problem:
                raise BaseFails(problem or "nothing was merged")
            in_memory = self.call(merged)
            merged.save_pretrained(folder)
            self.equal(wrong, "merged, saved and loaded", self.call(self._reload(folder)), in_memory)

    def _check_folder_merge(
        self, name: str, base: Path, adapter: Path, output: Path, wanted: Outputs, problem: str | None
    ) -> None:
        with self.check(name) as wrong:
            if problem or not adapter.exists():
                raise BaseFails(problem or "there is no saved adapter")
            merge_folder(base, adapter, output)
            self.equal(wrong, "a merged folder, loaded", self.call(self._reload(output)), wanted)

    # The head, trained whole

    def _head(self) -> str | None:
        """The name of the output embeddings, or None."""
        _, head = embeddings_of(self.base)
        return next((name for name, module in self.base.named_modules() if module is head and name), None)

    def _check_head(self, head: str, folder: Path, problem: str | None) -> None:
        """The same ways out of memory and back with `modules_to_save` for the output embeddings, tied or not."""
        adapter, merged = folder / "head", None
        with self.check("head_load") as wrong:
            self.model = c3a_triton.apply(self.fresh(), self._config([head]))
            self._fill("default", 1, self.factor)
            generator = torch.Generator().manual_seed(13)
            for name, parameter in self.model.named_parameters():
                if ".modules_to_save." in name:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            out = self.call(self.model)
            self.model.c3a.save_pretrained(adapter)
            loaded = c3a_triton.load_adapter(self.fresh(), adapter)
            self.equal(wrong, "a saved adapter, loaded", self.call(loaded), out)
            del loaded
        if self.results["head_load"][0] in ("refused", "failed"):
            return
        with self.check("head_unload") as wrong:
            merged = self.model.c3a.merge_and_unload()
            self.equal(wrong, "merged and unloaded", self.call(merged), out)
        with self.check("head_saved_merge") as wrong:
            if merged is None or problem:
                raise BaseFails(problem or "nothing was merged")
            in_memory = self.call(merged)
            merged.save_pretrained(folder / "head_merged")
            self.equal(wrong, "merged, saved and loaded", self.call(self._reload(folder / "head_merged")), in_memory)
        self._check_folder_merge("head_folder_merge", folder / "base", adapter, folder / "head_by_folder", out, problem)


def check_model(model_class: Any, config: Any, say: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """All checks of one model.

    Returns:
        "status": the worst outcome ("base" only where the model itself could not be tried), "why" in words, "results":
        check → [outcome, detail], "warnings" of the library, "seconds" of the processor, and facts about the model.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.process_time()
    subject = Subject(model_class, config, say)
    status, why = "pass", ""
    folder = Path(tempfile.mkdtemp(prefix="c3a-scan-"))
    try:
        subject.build()
        subject.run(folder)
    except BaseFails as error:
        status, why = "base", str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, (outcome, detail) in subject.results.items():
        if outcome != "base" and OUTCOMES.index(outcome) > OUTCOMES.index(status):
            status, why = outcome, f"{name}: {detail}"
    for name in ("apply", "forward"):  # without these nothing was tried
        if subject.results.get(name, [""])[0] == "base" and status == "pass":
            status, why = "base", subject.results[name][1]
    return {
        "status": status,
        "why": why,
        "results": subject.results,
        "warnings": [_short(message) for message in subject.warned],
        "seconds": round(time.process_time() - started, 1),
        **subject.facts,
    }
