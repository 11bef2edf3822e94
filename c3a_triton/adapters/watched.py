"""Adapted layers that the model never calls: it reads the weight, or reaches the layer by another way than its name.

Such an adapter neither computes nor trains. What tells is a whole forward of the model, and the first backward pass.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from c3a_triton.bases.sharded import is_sharded

from .base_model import base_modules, embeddings_of
from .hooks import remove_hooks
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .parts import Part as ParameterPart

__all__ = ["Watch"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_N_NAMED = 5

Part = C3ALinear | ModulesToSave


class Watch:
    """Tells once, by name, of the adapted layers and trained copies of a model that it does not call.

    `begin` puts hooks on the model. During its next whole forward each layer has one too, which a call removes, and so
    has whatever holds a layer: a block that did not run (an expert without tokens, a dropped layer, an encoder of
    images that got none) says nothing about its layers and goes on being watched. When all is decided no hook is left
    but on layers that were not called, which wait for their first call.

    Under torch.compile, in torch.jit's and FX's traces and in the replicas of `DataParallel` nothing is decided.

    Args:
        model: the model whose forward is watched.
        merging: what merging does with a layer that is not called, for the message.

    Attributes:
        uncalled: names of the layers that were told of as never called, and were not called since.
    """

    def __init__(self, model: nn.Module, merging: str = "merging leaves it out (merge_uncalled=True does not)") -> None:
        self.model = model
        self._merging = merging
        self.uncalled: set[str] = set()
        self._told: set[str] = set()
        self._watched: set[str] = set()  # names of layers that were given hooks; whether one is called does not change
        self._is_new = False  # whether the next forward is to put the layers' hooks
        self._waits: list[tuple[nn.Module, list[Part]]] = []  # what holds layers and has not run yet, and these layers
        self._lists: dict[Part, nn.Module] = {}  # layers that are entries of a list or dictionary, and which
        self._ran: list[nn.Module] = []
        self._thread: int | None = None
        self._n_frames = 0
        self._has_embeddings = False
        self._gradients: _Gradients | None = None
        self._wants_gradients = False

    def begin(self) -> None:
        """Watch new layers in the next whole forward, and all in the next backward pass in training."""
        self._is_new = self._wants_gradients = True
        if self._before not in self.model._forward_pre_hooks.values():
            self.model.register_forward_pre_hook(self._before, with_kwargs=True)

    def end(self) -> None:
        """Take all hooks away; what was seen stays."""
        for module in self.model.modules():
            _remove(module, self._before, self._after, self._note_call, self._note_run)
        self._stop_gradients()
        self._is_new = False
        self._waits, self._lists = [], {}

    def tell(self, names: Iterable[str], message: str, *, uncalled: bool = True, stacklevel: int = 2) -> None:
        """Warn of those layers that were not told of before; `message` has a place for their names, `{}`."""
        names = list(names)
        if uncalled:
            self.uncalled.update(names)
        new = [name for name in names if name not in self._told]
        if not new:
            return
        self._told.update(new)
        more = f", … ({len(new)} layers)" if len(new) > _N_NAMED else ""
        warnings.warn(message.format(", ".join(new[:_N_NAMED]) + more), stacklevel=stacklevel + 1)

    def without_uncalled(self, work: list[Any]) -> list[Any]:
        """Tuples (name, layer, …) of what is to be merged, without uncalled layers; a warning names those."""
        left_out = [layer.layer_name for _, layer, *_ in work if layer.layer_name in self.uncalled]
        if left_out:
            more = f", … ({len(left_out)} layers)" if len(left_out) > _N_NAMED else ""
            warnings.warn(
                f"left out of the merge: {', '.join(left_out[:_N_NAMED])}{more}. The {type(self.model).__name__} does "
                "not call these layers, so that what adapters have there computes nothing. The merged model computes "
                "what the adapted one did; merge_uncalled=True merges them as well",
                stacklevel=4,
            )
        return [item for item in work if item[1].layer_name not in self.uncalled]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model watches its own tensors.
        return self.__dict__ | {"_gradients": None, "_thread": None}

    # The model's hooks

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if _is_traced() or getattr(model, "_is_replica", False):
            return
        trains = model.training and torch.is_grad_enabled()
        if not (self._is_new or self._waits or (trains and self._wants_gradients)):
            return
        if self._is_new:
            self._is_new = False
            self._put_hooks()
        elif self._ran:  # a forward that failed, or that another thread is in
            for module in self._ran:
                _put(module, self._note_run)
        self._ran = []
        self._has_embeddings = any(kwargs.get(name) is not None for name in ("inputs_embeds", "decoder_inputs_embeds"))
        self._thread = threading.get_ident()
        self._n_frames = _n_compiled_frames()
        if self._after not in model._forward_hooks.values():
            model.register_forward_hook(self._after)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if _is_traced() or self._thread != threading.get_ident():
            return
        self._thread = None
        _remove(model, self._after)
        trains = model.training and torch.is_grad_enabled()
        ran, self._ran = {*self._ran, model}, []
        decided = [part for module, parts in self._waits if module in ran for part in parts]
        self._waits = [(module, parts) for module, parts in self._waits if module not in ran]
        uncalled = [part for part in decided if self._is_passed_by(part)]
        if uncalled and self._has_embeddings:
            embeddings = embeddings_of(model)[0]
            uncalled = [part for part in uncalled if part is not embeddings]
        if uncalled and self._n_frames == _n_compiled_frames() and not any(map(_is_compiled, model.modules())):
            # A copy may be read through its wrapper, and is then what computes: in training its gradient tells.
            self._tell_uncalled(
                part for part in uncalled if isinstance(part, C3ALinear) or not (trains or part.was_read)
            )
        if self._wants_gradients and trains and torch._C._functorch.peek_interpreter_stack() is None:
            self._watch_gradients(output)
        self._rest()

    def _rest(self) -> None:
        if not (self._is_new or self._waits or self._wants_gradients):
            _remove(self.model, self._before, self._after)

    def _tell_uncalled(self, parts: Iterable[Part]) -> None:
        self.tell(
            [part.layer_name for part in parts],
            f"never called by a forward of {type(self.model).__name__}, though what holds them ran: {{}}. The model "
            "reads their weights, has them elsewhere as well (a list, a fused or tied layer) or does not use them. "
            f"What adapters add there is neither computed nor trained, and {self._merging}. Leave these layers out of "
            "target_modules, target_parameters or modules_to_save. Where only other inputs need them, nothing is wrong",
            stacklevel=3,
        )

    def _put_hooks(self) -> None:
        holders: dict[nn.Module, list[Part]] = {}
        modules = dict(base_modules(self.model))
        for name, part in modules.items():
            if not isinstance(part, (C3ALinear, ModulesToSave)) or part.layer_name in self._watched:
                continue
            self._watched.add(part.layer_name)
            if isinstance(part, ModulesToSave):
                part.was_read = False  # by whomever, but not by the model's forward
            elif isinstance(part, ParameterPart):
                part.was_reached = False
            _put(part, self._note_call)
            holder = name.rpartition(".")[0]
            container = modules.get(holder)
            if isinstance(container, _CONTAINERS):
                self._lists[part] = container
                for entry in container.children():
                    if not isinstance(entry, (C3ALinear, ModulesToSave)):
                        _put(entry, self._note_run)
            while holder and isinstance(modules.get(holder), _CONTAINERS):
                holder = holder.rpartition(".")[0]
            holders.setdefault(modules.get(holder, self.model), []).append(part)
        self._waits += holders.items()
        for module in holders:
            if module is not self.model:
                _put(module, self._note_run)

    def _note_call(self, part: nn.Module, args: Any) -> None:
        if not _is_traced():
            _remove(part, self._note_call)
            self.uncalled.discard(part.layer_name)

    def _note_run(self, module: nn.Module, args: Any) -> None:
        if not _is_traced() and self._thread == threading.get_ident():
            _remove(module, self._note_run)
            self._ran.append(module)

    def _is_uncalled(self, module: nn.Module) -> bool:
        if isinstance(module, ParameterPart) and module.was_reached:
            return False
        return any(hook in (self._note_call, self._note_run) for hook in module._forward_pre_hooks.values())

    def _is_passed_by(self, part: Part) -> bool:
        """Whether a layer, whose holder ran, was not called, and not because another entry of a list was chosen."""
        entries = self._lists[part].children() if part in self._lists else ()
        return self._is_uncalled(part) and all(map(self._is_uncalled, entries))

    # Gradients

    def _watch_gradients(self, output: Any) -> None:
        if self._gradients is None:
            parts = [module for _, module in base_modules(self.model) if isinstance(module, (C3ALinear, ModulesToSave))]
            self._gradients = _Gradients(parts, self._judge_gradients)
            if not self._gradients.parameters:
                self._stop_gradients()
                return
        self._gradients.wait_for(output)

    def _stop_gradients(self) -> None:
        if self._gradients is not None:
            self._gradients.remove()
        self._gradients = None
        self._wants_gradients = False

    def _judge_gradients(self, without: list[Part]) -> None:
        self._stop_gradients()
        # What holds layers and has other methods than forward (Gemma 3n's AltUp) was at work if it called one of them.
        waiting = {part for _, parts in self._waits for part in parts if all(map(self._is_uncalled, parts))}
        at_work = {part for _, parts in self._waits for part in parts} - waiting
        without = [part for part in without if part not in waiting]
        uncalled = [part for part in without if self._is_uncalled(part)]
        self._tell_uncalled(
            part
            for part in uncalled
            if part in at_work or (isinstance(part, ModulesToSave) and self._is_passed_by(part))
        )
        self.tell(
            [part.layer_name for part in without if part not in uncalled],
            "called, but the first backward pass gave no gradient to what is trained there: {}. Either the loss does "
            "not depend on these layers, or the model computes them without gradients (torch.no_grad, detach, "
            "reentrant checkpoints whose inputs have none). Where only other losses need them, nothing is wrong",
            uncalled=False,
            stacklevel=3,
        )
        self._rest()


class _Gradients:
    """What of the trained parameters a backward pass reaches.

    The model's outputs tell that it begins; reentrant checkpoints are backward passes within it.
    """

    def __init__(self, parts: Iterable[Part], judge: Callable[[list[Part]], None]) -> None:
        self.judge = judge
        self.parameters = {part: found for part in parts if (found := _trained_parameters(part))}
        self.reached: set[nn.Parameter] = set()
        self.pass_id = -1
        self.handles: list[Any] = []
        for parameter in (parameter for found in self.parameters.values() for parameter in found):
            self.handles.append(parameter.register_hook(lambda grad, parameter=parameter: self.reached.add(parameter)))

    def wait_for(self, output: Any) -> None:
        """Judge after the backward pass of a model's output, whichever of its tensors that begins with."""
        leaves = _pytree.tree_leaves([vars(x) if is_dataclass(x) else x for x in _pytree.tree_leaves(output)])
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(self._start)

    def _start(self, grad: Tensor) -> None:
        if self.handles and self.pass_id != (current := torch._C._current_graph_task_id()):
            self.pass_id = current
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        if self.reached and self.handles:  # otherwise torch.autograd.grad of something else
            self.judge([part for part, found in self.parameters.items() if not self.reached & set(found)])

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _trained_parameters(part: Part) -> list[nn.Parameter]:
    """What of a part must get a gradient, as far as one can tell."""
    if part.disable_adapters or (isinstance(part, C3ALinear) and part.merged):
        return []
    parameters = list((part.c3a_kernel if isinstance(part, C3ALinear) else part.active_module()).parameters())
    # Sharding libraries collect gradients in their own way.
    return [w for w in parameters if w.requires_grad and w.is_leaf and not is_sharded(w)]


def _put(module: nn.Module, hook: Callable[..., None]) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)


def _remove(module: nn.Module, *hooks: Callable[..., None]) -> None:
    remove_hooks(module, lambda hook: hook in hooks)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()


def _n_compiled_frames() -> int:
    """How much Dynamo has compiled so far: layers that are called from compiled code call no hook."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 0)


def _is_compiled(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )
