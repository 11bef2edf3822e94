"""Modules that are trained and saved whole beside the adapters, one copy per adapter, under PEFT's names."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from c3a_triton.bases.sharded import whole
from c3a_triton.errors import AdapterStateError, ConfigError

from .layer import C3ALinear
from .names import Scope, rows_of_call, uncompiled

__all__ = ["CopiesByCall", "ModulesToSave"]

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class CopiesByCall(nn.Module):
    """What a module with a copy per adapter computes in a call: the active one's, or those that hold for it."""

    original_module: nn.Module
    modules_to_save: nn.ModuleDict
    layer_name: str
    _scope: Scope

    def _is_disabled(self) -> bool:
        """Whether the original computes, set by `enable_adapters`."""
        raise NotImplementedError

    @property
    def disable_adapters(self) -> bool:
        """Whether the original computes, set by `enable_adapters`, or within `disable_adapter`."""
        return self._is_disabled() or (self._scope.watched and self._scope.kind() in ("base", "tokens"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copies that hold for this call, or the original, make of it."""
        kind = self._scope.kind() if self._scope.watched and not self._is_disabled() else "active"
        if kind == "active":
            return self._forward_active(*args, **kwargs)
        if kind == "ask":
            return self._uncompiled_forward(*args, **kwargs)
        if kind == "rows":
            return self._forward_rows(*args, **kwargs)
        if kind == "probe" and (x := _first_tensor(args, kwargs)) is not None:
            self._scope.note(self.layer_name, x)
        return self.original_module(*args, **kwargs)

    def _forward_active(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @uncompiled
    def _uncompiled_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def _forward_rows(self, *args: Any, **kwargs: Any) -> Tensor:
        x = _first_tensor(args, kwargs)
        if x is None or not x.dim():
            raise AdapterStateError(f"{self.layer_name}: its input has no tensor whose rows could go their own ways")
        present, rows = rows_of_call(self._scope, self.layer_name, x, self.modules_to_save)
        compiling = torch.compiler.is_compiling()
        y: Tensor | None = None
        for i in range(-1, len(present)):
            module = self.original_module if i < 0 else self.modules_to_save[present[i]]
            chosen = None if compiling else (rows == i).nonzero().squeeze(1).to(x.device)
            if chosen is not None and not len(chosen):
                continue
            own_args, own_kwargs = (args, kwargs) if chosen is None else _of_rows((args, kwargs), chosen, x.shape[0])
            part = module(*own_args, **own_kwargs)
            if not isinstance(part, Tensor):
                raise AdapterStateError(
                    f"{self.layer_name}: rows can go through a module that returns a tensor, not {type(part).__name__}"
                )
            if chosen is None:
                mine = (rows == i).to(part.device).view(-1, *(1,) * (part.dim() - 1))
                y = part if y is None else torch.where(mine, part, y)
            else:
                y = part.new_zeros(x.shape[0], *part.shape[1:]) if y is None else y
                y = y.index_copy(0, chosen.to(part.device), part)
        assert y is not None
        return y


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _of_rows(arguments: Any, chosen: Tensor, n_rows: int) -> Any:
    """The arguments with these rows alone of every tensor that has a row for each of the batch's."""

    def part(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.shape[:1] == (n_rows,)
        return leaf.index_select(0, chosen.to(leaf.device)) if has_rows else leaf

    return pytree.tree_map(part, arguments)


class ModulesToSave(CopiesByCall):
    """A module with a trainable copy per adapter: the active adapter's computes, or the original where there is none.

    Attributes that this module lacks are those of whichever computes, so that a model may still read `lm_head.weight`.

    Args:
        original_module: the module to wrap; it is frozen when the first copy is installed.
        layer_name: its full name in the model, for messages.

    Raises:
        ConfigError: a module that has no forward of its own, or is adapted itself.
    """

    was_read = False
    """Whether a tensor of the module was read through this one, which a model may do in place of a call."""

    def __init__(self, original_module: nn.Module, layer_name: str = "") -> None:
        super().__init__()
        if isinstance(original_module, _CONTAINERS):
            kind = type(original_module).__name__
            raise ConfigError(f"modules_to_save: {layer_name} is a {kind}, which has no forward to train")
        if any(isinstance(module, (C3ALinear, ModulesToSave)) for module in original_module.modules()):
            raise ConfigError(
                f"modules_to_save: another adapter has layers in {layer_name}, so that it cannot be copied"
            )
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.layer_name = layer_name
        self.training = self.modules_to_save.training = original_module.training
        self._active: str | None = None
        self._disabled = False
        self._scope = Scope()

    @torch.inference_mode(False)  # as for kernels: the copy is to be trained
    def new_copy(self) -> nn.Module:
        """A copy of the original, not yet installed.

        Raises:
            ConfigError: the original's parameters are offloaded, so that a copy could not be trained.
        """
        hook = getattr(self.original_module, "_hf_hook", None)
        if hook is not None and any(parameter.is_meta for parameter in self.original_module.parameters()):
            raise ConfigError(
                f"modules_to_save: {self.layer_name} is offloaded and cannot be trained; give it a device of its own "
                "in the device map"
            )
        if hasattr(self.original_module, "ds_id"):  # which the engine gives to every module beside its hooks
            raise ConfigError(
                f"modules_to_save: {self.layer_name} is in a DeepSpeed engine of ZeRO-3, which no later copy of it can "
                "join: add or load the adapter before deepspeed.initialize"
            )
        with whole(self.original_module.parameters()):
            return copy.deepcopy(self.original_module)

    def install(self, adapter_name: str, module: nn.Module) -> None:
        """Take a copy as this adapter's, frozen until it is set."""
        self.original_module.requires_grad_(False)
        self.modules_to_save[adapter_name] = module.requires_grad_(False)

    def set_adapter(self, adapter_names: Iterable[str], inference_mode: bool = False) -> None:
        """Let the one of these adapters that has a copy here compute, trainable unless `inference_mode`.

        Raises:
            AdapterStateError: more than one of them has a copy.
        """
        active = self.check_set_adapter(adapter_names)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name == active and not inference_mode)
        self._active = active

    def check_set_adapter(self, adapter_names: Iterable[str]) -> str | None:
        """Which of these adapters would be set; raises as `set_adapter` and changes nothing."""
        names = [name for name in adapter_names if name in self.modules_to_save]
        if len(names) > 1:
            raise AdapterStateError(
                f"{self.layer_name}: {' and '.join(map(repr, names))} each have a copy of this module "
                "(modules_to_save), of which only one can compute: set one of them"
            )
        return names[0] if names else None

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active copy compute, trainable, or the original, everything frozen."""
        self._disabled = not enabled
        for name, module in self.modules_to_save.items():
            module.requires_grad_(enabled and name == self._active)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's copy, if there is one."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        if self._active == adapter_name:
            self._active = None

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        modules = [(new if name == old else name, module) for name, module in self.modules_to_save.items()]
        self.modules_to_save.clear()
        self.modules_to_save.update(dict(modules))
        if self._active == old:
            self._active = new

    def computing(self) -> list[str]:
        """The name of the adapter whose copy computes; none where the original does."""
        return [] if self._active is None else [self._active]

    def active_module(self) -> nn.Module:
        """Whichever computes: the active adapter's copy, or the original."""
        if self._active is None or self.disable_adapters:
            return self.original_module
        return self.modules_to_save[self._active]

    def _is_disabled(self) -> bool:
        return self._disabled

    def _forward_active(self, *args: Any, **kwargs: Any) -> Any:
        return self.active_module()(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Give the original another parameter, as who ties weights does; the trained copies keep theirs."""
        setattr(self.original_module, name, param)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names belong to whoever looks for them here, and before __init__ has run there is nothing to ask.
            if name.startswith("_") or "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
        value = getattr(self.active_module(), name)
        if isinstance(value, Tensor) and not torch.compiler.is_compiling():
            self.__dict__["was_read"] = True
        return value
