"""PEFT's C3A, computed by this library: PEFT's classes, parameters and files, with another forward and merge.

Two subclasses do it. An object of PEFT's becomes one of them by an exchange of its class, so that nothing that anyone
holds of it (parameters, hooks, optimizers) changes. A few names of PEFT's own are replaced too, whose code knows LoRA
alone or ties a compiled graph to an adapter's name (`_BESIDE`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version  # PEFT needs it, too
from peft import PeftModel, PeftType, helpers
from peft import __version__ as peft_version
from peft.tuners.c3a import layer as peft_layer
from peft.tuners.c3a import model as peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import hotswap, other
from torch import Tensor, nn

from c3a_triton.adapters import layer, merging
from c3a_triton.adapters.merge_state import leave
from c3a_triton.adapters.modules_to_save import CopiesByCall
from c3a_triton.adapters.names import BASE_ROW, Scope
from c3a_triton.adapters.row_names import RowNames
from c3a_triton.adapters.watched import Watch
from c3a_triton.bases.agreement import shared_over
from c3a_triton.bases.partitioned import changed
from c3a_triton.bases.quantized import hold_layout, release_layout, torchao_config_of
from c3a_triton.bases.sharded import is_partitioned, is_sharded, whole_shape
from c3a_triton.bases.weights import stored_tensor
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, ConfigError
from c3a_triton.operator.dispatch import check_backend

__all__ = ["C3ALinear", "C3AModel", "convert", "patch_peft", "unpatch_peft"]

_create_and_replace = peft_model.C3AModel._create_and_replace
_SELECTING_DISABLES = Version(peft_version) < Version("0.19")


class C3ALinear(layer.C3ALinear, peft_layer.C3ALinear):
    """PEFT's layer with this library's forward, ΔW and merge. PEFT builds its own; `convert` makes it one of these.

    The names, the state and the life of adapters are PEFT's. Of this library's layer come, besides the computation,
    `backend`, and that merging keeps the base weight in CPU memory, so that unmerging restores it bit for bit.
    """

    cast_input_dtype_enabled = True
    """What PEFT's `disable_input_dtype_casting` switches: nothing here, where no input is cast to a weight's dtype."""
    reset_c3a_parameters = peft_layer.C3ALayer.reset_c3a_parameters
    active_adapter = BaseTunerLayer.active_adapter
    active_adapters = BaseTunerLayer.active_adapters

    @property
    def _active_adapters(self) -> list[str]:
        """PEFT's state, a name or a list, as this library's layer reads it."""
        names = self._active_adapter
        return [names] if isinstance(names, str) else names

    @_active_adapters.setter
    def _active_adapters(self, names: list[str]) -> None:
        self._active_adapter = names

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        peft_layer.C3ALayer.update_layer(self, adapter_name, *args, **kwargs)
        self._forget_strength(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self._forget_strength(adapter_name)

    def _applied_names(self) -> list[str]:
        # While any adapter is merged, PEFT applies no other.
        return [] if self.merged else super()._applied_names()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        BaseTunerLayer.set_adapter(self, *args, **kwargs)
        self._refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's, but merged adapters are unmerged here and not by the next forward.

        Raises:
            AdapterStateError: the merged weight was changed in between.
        """
        if not enabled and self.merged:
            self.unmerge()
        BaseTunerLayer.enable_adapters(self, enabled)
        self._refresh()

    def merge(
        self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None, *, keep_base: str | None = "cpu"
    ) -> None:
        """As PEFT's, but rounded once, and never by arithmetic on the storage of a quantized weight.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: which adapters; None means the active ones.
            keep_base: where the original is kept: `"cpu"`, `"device"`, or None, after which nothing can be unmerged.

        Raises:
            AdapterStateError: the base layer cannot be merged into or was changed since the last merge, adapters are
                disabled, or with `safe_merge` the result is not finite. The layer stays as it was.
        """
        names = self.unmerged(check_adapters_to_merge(self, adapter_names))
        if names:
            merging.merge(self, names, keep_base, safe_merge)

    def unmerge(self) -> None:
        """Bring back the base weight as it was before anything was merged, bit for bit.

        Raises:
            AdapterStateError: it was not kept, or the merged weight was changed in between.
        """
        if self.merged:
            super().unmerge()
        else:
            peft_layer.C3ALinear.unmerge(self)  # PEFT's warning

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT's `merge_and_unload` and `unload` put in this layer's place. Nothing is kept to unmerge."""
        if merge:
            self.merge(safe_merge, adapter_names, keep_base=None)
        return self.get_base_layer()


class C3AModel(peft_model.C3AModel):
    """PEFT's tuner, whose layers are converted as it builds them, and which gives each row of a batch its adapter.

    It tells of layers that the model never calls, as models do that are adapted in place; PEFT merges them all.
    """

    backend = "auto"
    """What layers that are built from now on get."""

    _scope: Scope
    _watch: Watch

    def _create_and_replace(
        self,
        c3a_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if type(self) is peft_model.C3AModel:
            _refuse_spread(self.model)
        _create_and_replace(self, c3a_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        built = getattr(parent, target_name)
        _convert_tuner(self)
        _copy_reference(self.peft_config, c3a_config, adapter_name, built)
        # Into what PEFT has merged already, only PEFT can reach: it does not keep the original, it subtracts.
        if type(built) is peft_layer.C3ALinear and not built.merged:
            _convert_layer(built, current_key, self.backend, self)
        if isinstance(built, C3ALinear):
            built._scope = self._scope
        self._scope.trials.clear()
        self._watch.begin()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = [module for module in self.modules() if isinstance(module, C3ALinear)]
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        for one in layers:
            leave(one)
        self._watch.end()
        if (hooks := RowNames.of(self)) is not None:
            hooks.remove(self)
        release_layout(self)
        return unloaded

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        super()._cast_adapter_dtype(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, C3ALinear):
                module._refresh()  # an older PEFT casts `.data`, of which nobody hears

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What PEFT enters around forward and generate of its models, so that tuners can read its own keywords.

        PEFT's C3A ignores `adapter_names` without a word.
        """
        if adapter_names is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, C3ALinear)]
        _check_rows(adapter_names, layers, self.training)
        if all(module._disable_adapters for module in layers):
            yield
            return
        self._convert_wrappers()
        with self._scope.bound(is_open=False, names=tuple(adapter_names)):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes its base alone, in this thread or task; another one is refused."""
        for module in self.modules():
            if isinstance(module, C3ALinear) and module.merged:
                module.unmerge()
        self._convert_wrappers()
        with self._scope.bound(disabled=True):
            yield

    def _convert_wrappers(self) -> None:
        for name, module in self.named_modules():
            if type(module) is other.ModulesToSaveWrapper:
                module.__dict__.update(_scope=self._scope, layer_name=name)
                module.__class__ = ModulesToSaveWrapper

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's.

        Raises:
            AdapterStateError: rows are computed with the adapter, or PEFT is one that cannot delete C3A's.
        """
        if adapter_name in self._scope.names_in_use():
            raise AdapterStateError(f"rows are computed with the adapter {adapter_name!r}, in this thread or another")
        if not hasattr(super(), "delete_adapter"):
            raise AdapterStateError(
                f"the adapter {adapter_name!r} cannot be deleted: PEFT does that for C3A since 0.18. Upgrade it, or "
                "adapt the model in place (c3a_triton.apply), which deletes under every release"
            )
        super().delete_adapter(adapter_name)


def _refuse_spread(model: nn.Module) -> None:
    """Refuse a model that a plan spreads over processes: PEFT's verbs neither draw one kernel for all nor agree."""
    if shared_over(model):
        raise ConfigError(
            f"this {type(model).__name__} is spread over processes (tensor or expert parallel), in which PEFT would "
            "give each of them a C3A adapter of its own: adapt it in place, with c3a_triton.apply(model, "
            "peft.C3AConfig(...)) or c3a_triton.load_adapter(model, directory); the files are PEFT's"
        )


class ModulesToSaveWrapper(CopiesByCall, other.ModulesToSaveWrapper):
    """PEFT's module that is trained whole, where names of rows, or none, hold for a call and not for all threads."""

    _disable_adapters: bool

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters or super().disable_adapters

    def _is_disabled(self) -> bool:
        # PEFT < 0.19 sets it also where the active adapter has no copy, which says nothing of rows that have others.
        return self._disable_adapters and not _SELECTING_DISABLES

    def _forward_active(self, *args: Any, **kwargs: Any) -> Any:
        return other.ModulesToSaveWrapper.forward(self, *args, **kwargs)


@contextmanager
def _disable_adapter(model: Any) -> Iterator[None]:
    """As PEFT's, but nothing is written into layers of this library, which other threads may be calling."""
    context = model.base_model.disabled() if isinstance(model.base_model, C3AModel) else _DISABLE.old(model)
    with context:
        yield


def _copy_reference(configs: Mapping[str, Any], config: Any, adapter_name: str, built: nn.Module) -> None:
    """Give the adapter that is a trainer's reference the values of the one that it stands for.

    TRL adds "ref" with the very configuration of "default" and then copies what has ".default." in its name, as LoRA's
    parameters have it ("lora_A.default.weight"); C3A's kernels end with the adapter's name.
    """
    sources = [name for name, other in configs.items() if other is config and name != adapter_name]
    if adapter_name == "ref" and sources and isinstance(built, peft_layer.C3ALayer) and sources[0] in built.c3a_kernel:
        with torch.no_grad():
            built.c3a_kernel["ref"].copy_(stored_tensor(built.c3a_kernel, sources[0]))


def _check_rows(adapter_names: Sequence[str], layers: Sequence[C3ALinear], training: bool) -> None:
    known = {name for module in layers for name in module.c3a_kernel}
    if unknown := sorted(set(adapter_names) - known - {BASE_ROW}):
        raise AdapterNotFoundError(f"there is no adapter {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    if merged := sorted({name for module in layers for name in module.merged_adapters}):
        raise AdapterStateError(f"rows cannot have adapters of their own while {merged} are merged: unmerge first")
    if training:
        raise AdapterStateError("adapter_names is for inference, as in PEFT: call the model's eval() first")


# What compiled code reads of PEFT's wrapper


class _SharedByAllAdapters:
    """What the configurations of all adapters of a C3A model have in common."""

    peft_type = PeftType.C3A
    is_prompt_learning = is_adaption_prompt = False


def _active_peft_config(model: Any) -> Any:
    """As PEFT's. Code that is being compiled sees what no adapter's name decides, or its graph would be that name's."""
    if torch.compiler.is_compiling() and isinstance(model.base_model, C3AModel):
        return _SharedByAllAdapters
    return _ACTIVE_CONFIG.old.fget(model)


def _has_active_enabled_adapter(model: Any) -> bool:
    """As PEFT's, which looks the active adapter's configuration up to learn that it is none of prompt learning."""
    if torch.compiler.is_compiling() and isinstance(model.base_model, C3AModel):
        return not model._adapters_disabled
    return _HAS_ACTIVE.old.fget(model)


# Hot swapping


def _hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """As PEFT's, and for C3A: an adapter's kernels get these values, in place.

    Raises:
        AdapterNotFoundError: no layer has an adapter of that name.
        AdapterStateError: it is merged, its kernels are elsewhere, or the values are not for exactly these kernels.
            Nothing has changed.
    """
    if config.peft_type != PeftType.C3A:
        _HOTSWAP.old(model, state_dict, adapter_name, config, parameter_prefix)
        return
    layers = {
        f"{name}.c3a_kernel.{adapter_name}": module
        for name, module in getattr(model, "_orig_mod", model).named_modules()
        if isinstance(module, peft_layer.C3ALinear) and adapter_name in module.c3a_kernel
    }
    if not layers:
        raise AdapterNotFoundError(f"there is no adapter {adapter_name!r} whose values could be replaced")
    for name, module in layers.items():
        kernel = module.c3a_kernel[adapter_name]
        if adapter_name in module.merged_adapters:
            raise AdapterStateError(f"{name} is merged: call unmerge_adapter() before its values are replaced")
        if kernel.is_meta or (is_sharded(kernel) and not is_partitioned(kernel)):
            raise AdapterStateError(f"{name} is offloaded or sharded: load the adapter before the model is")
    problems = [f"it has no {name}" for name in layers if name not in state_dict]
    problems += [f"no kernel takes {name}" for name in state_dict if name not in layers]
    problems += [
        f"{name} has shape {list(state_dict[name].shape)}, in the model {list(shape)}"
        for name, module in layers.items()
        if name in state_dict and state_dict[name].shape != (shape := whole_shape(module.c3a_kernel[adapter_name]))
    ]
    if problems:
        more = f" (and {len(problems) - 5} more like these)" if len(problems) > 5 else ""
        raise AdapterStateError(
            f"{adapter_name!r} cannot be swapped for this adapter: {'; '.join(problems[:5])}{more}. Load it under a "
            "name of its own (load_adapter), or, where only biases or modules_to_save are in the way, under this one"
        )
    with torch.no_grad():
        for name, module in layers.items():
            kernel = module.c3a_kernel[adapter_name]
            with changed([kernel], "hotswap_adapter"):
                kernel.copy_(state_dict[name])


# What is replaced of PEFT


@dataclass
class _Replacement:
    """A name of PEFT's, what PEFT has there, and what this library puts there."""

    owner: Any
    name: str
    new: Any

    def __post_init__(self) -> None:
        self.old = vars(self.owner).get(self.name)  # PEFT 0.17 has no `has_active_enabled_adapter`

    def put(self) -> None:
        if self.old is not None:
            setattr(self.owner, self.name, self.new)

    def put_back(self) -> None:
        if self.old is not None:
            setattr(self.owner, self.name, self.old)


_BUILDING = _Replacement(peft_model.C3AModel, "_create_and_replace", C3AModel._create_and_replace)
_ACTIVE_CONFIG = _Replacement(PeftModel, "active_peft_config", property(_active_peft_config))
_HAS_ACTIVE = _Replacement(PeftModel, "has_active_enabled_adapter", property(_has_active_enabled_adapter))
_HOTSWAP = _Replacement(hotswap, "hotswap_adapter_from_state_dict", _hotswap_adapter_from_state_dict)
# Both decide what else a file may hold, of which only kernels can be swapped.
_CHECKED = hotswap.CONFIG_KEYS_TO_CHECK | {PeftType.C3A: ["bias", "modules_to_save"]}
_DISABLE = _Replacement(PeftModel, "disable_adapter", _disable_adapter)
# What `rescale_adapter_scale` asks layers for.
_SCALED = _Replacement(helpers, "LoraLayer", (helpers.LoraLayer, layer.C3ALinear))
_BESIDE = (
    _ACTIVE_CONFIG,
    _HAS_ACTIVE,
    _HOTSWAP,
    _DISABLE,
    _SCALED,
    _Replacement(hotswap, "CONFIG_KEYS_TO_CHECK", _CHECKED),
)


def patch_peft() -> None:
    """Let every C3A layer that PEFT builds from now on compute through this library, in whatever way it is built.

    Layers that exist already change when they get another adapter; `c3a_triton.apply(model)` changes all of a model's.
    PEFT's `hotswap_adapter` takes C3A from then on, and `torch.compile(peft_model)` compiles once for all adapters of
    the same shapes. A second call changes nothing.
    """
    for replacement in (_BUILDING, *_BESIDE):
        replacement.put()


def unpatch_peft() -> None:
    """End `patch_peft`, and what `convert` replaced of PEFT: new models are PEFT's own again.

    Those that were built or converted stay as they are.
    """
    for replacement in (_BUILDING, *_BESIDE):
        replacement.put_back()


def convert(model: nn.Module, *, backend: str = "auto") -> None:
    """Let the C3A layers that PEFT has built in a model compute through this library, and those that it adds to it.

    Parameters, keys and PEFT's verbs stay. A second call sets the backend. As after `patch_peft`, `hotswap_adapter`
    takes C3A and `torch.compile(model)` compiles once for all adapters; other models are built as before.

    Args:
        model: a `PeftModel`, or a model into which PEFT has put adapters.
        backend: how adapters are computed, a name of `c3a_triton.operator.dispatch.BACKENDS`.

    Raises:
        ConfigError: the model has no C3A layer of PEFT's, or a plan spreads it over processes.
        AdapterStateError: adapters are merged by PEFT's own layers. Nothing has changed.
        BackendError: an unknown backend.
    """
    check_backend(backend)
    layers = list(_layers(model))
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no C3A layer that PEFT built: nothing to compute")
    _refuse_spread(model)
    merged = [name for name, module in layers if module.merged and not isinstance(module, C3ALinear)]
    if merged:
        raise AdapterStateError(
            f"{merged[0]}: PEFT has merged adapters into its weight and does not keep the original; call "
            "unmerge_adapter() first"
        )
    hold_layout(model)
    for replacement in _BESIDE:
        replacement.put()
    for name, module in layers:
        _convert_layer(module, name, backend, model)
    for module in model.modules():
        if _convert_tuner(module):
            module.backend = backend  # type: ignore[assignment]
            for _, part in _layers(module):
                part._scope = module._scope


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of PEFT's layers, converted or not; not those of classes that somebody else derived."""
    for name, module in model.named_modules():
        if type(module) in (peft_layer.C3ALinear, C3ALinear):
            yield name, module


def _convert_layer(module: Any, name: str, backend: str, model: nn.Module) -> None:
    if type(module) is peft_layer.C3ALinear:
        module.__class__ = C3ALinear
        module._prepare(backend, name)
    module.backend = backend
    module.quantization_config = torchao_config_of(model)


def _convert_tuner(module: Any) -> bool:
    """Convert a module that is PEFT's tuner; whether it is one of ours now."""
    if type(module) is peft_model.C3AModel:
        module.__class__ = C3AModel
        module._scope = Scope()
        RowNames((module, module.model), module._scope, tuple)
        module._watch = Watch(module.model, "PEFT merges it all the same, which changes what reads the weight")
        module._watch.begin()
        hold_layout(module)  # a layer that is not adapted must pass gradients on to those below it, too
    return type(module) is C3AModel
