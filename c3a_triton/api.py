"""The two calls that adapt a model: `apply` and `load_adapter`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from ._public import public
from .adapters import pretrained
from .adapters.beside import watch_statistics
from .adapters.manager import AdapterManager
from .adapters.row_names import RowNames
from .adapters.wrapping import check_rebuild, unwrapped, watch
from .bases.agreement import in_step
from .errors import AdapterStateError, ConfigError
from .files.config import C3AConfig
from .operator.dispatch import check_backend

__all__ = ["apply", "load_adapter"]

Model = TypeVar("Model", bound=nn.Module)


@public
def apply(
    model: Model,
    cfg: C3AConfig | Mapping[str, Any] | Any = None,
    adapter_name: str = "default",
    *,
    backend: str = "auto",
) -> Model:
    """Adapt a model in place with C3A; everything but the adapter, `bias` and `modules_to_save` is frozen.

    Every layer is checked before the first one is replaced: a call that fails leaves the model as it was.

    With a model that has C3A layers of PEFT's (a `PeftModel`, or one with adapters that transformers added), leave
    `cfg` out: these layers, and those that PEFT adds to them, then compute through this library. The model keeps its
    parameters, their names and PEFT's verbs, and gets no `c3a`.

    Args:
        model: the model; afterwards `model.c3a` is its `AdapterManager`. An adapted one gets a further adapter.
        cfg: a `C3AConfig`, a `peft.C3AConfig` or a dict; None means `C3AConfig()`.
        adapter_name: the adapter's name; PEFT's adapters keep theirs.
        backend: how adapters are computed, a name of `c3a_triton.operator.dispatch.BACKENDS`.

    Returns:
        The model, the same object.

    Raises:
        ConfigError: a configuration that cannot be used on this model.
        ShapeError: a block size that does not divide a layer's widths.
        AdapterStateError: the adapter's name is taken, or PEFT has merged its adapters.
        BackendError: an unknown backend.

    Example:
        >>> cfg = C3AConfig(block_size=256, target_modules=["q_proj", "v_proj"])
        >>> model = c3a_triton.apply(model, cfg)
        >>> ...  # train
        >>> model.c3a.save_pretrained("adapter")
    """
    if cfg is None and _has_layers_of_peft(model):
        from .integrations import peft

        peft.convert(model, backend=backend)
        return model
    with _bound(model, backend, "apply") as manager:
        manager.add_adapter(adapter_name, C3AConfig() if cfg is None else cfg)
    return model


@public
def load_adapter(
    model: Model,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    backend: str = "auto",
) -> Model:
    """Put an adapter from disk, saved by this library or by PEFT, onto a bare or an adapted model, in place.

    Args:
        model: the model.
        directory: the adapter's folder.
        adapter_name: its name here.
        is_trainable: whether it is to be trained on.
        backend: as in `apply`.

    Returns:
        The model, the same object.

    Raises:
        CheckpointError: the folder cannot be read, or does not fit the model; nothing has changed.
        ConfigError: a configuration that is not C3A's or cannot be used.
        AdapterStateError: the adapter's name is taken.
        BackendError: an unknown backend.
    """
    with _bound(model, backend, "load_adapter") as manager:
        manager.load_adapter(directory, adapter_name, is_trainable=is_trainable)
    return model


def _is_of(module: nn.Module, package: str) -> bool:
    """Whether a module's class or one of its bases comes from a package, which need not be imported to tell."""
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(module).__mro__)


def _has_layers_of_peft(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(_is_of(module, "peft.tuners.c3a.layer") for module in model.modules())


def _manager_of(model: nn.Module, backend: str) -> AdapterManager:
    """The model's manager, or a new one that is not bound to it yet."""
    if _is_of(model, "peft"):
        raise ConfigError(
            f"{type(model).__name__} is PEFT's wrapper: adapt the plain model, which its unload() or "
            "merge_and_unload() returns, or, where its adapters are C3A's, leave cfg out"
        )
    if _has_layers_of_peft(model):
        raise ConfigError(
            f"{type(model).__name__} has C3A layers of PEFT: add and load adapters with PEFT's verbs, and leave cfg "
            "out to let them compute through this library"
        )
    manager = getattr(model, "c3a", None)
    if isinstance(manager, AdapterManager):
        check_backend(backend)
        if backend not in ("auto", manager.backend):
            raise AdapterStateError(
                f"the model is adapted already (backend {manager.backend!r}): use model.c3a.set_backend({backend!r})"
            )
        return manager
    if manager is not None:
        raise ConfigError(f"{type(model).__name__} has an attribute c3a of its own, where its AdapterManager has to go")
    return AdapterManager(model, backend=backend)


@contextmanager
def _bound(model: Any, backend: str, verb: str) -> Iterator[AdapterManager]:
    """The manager of a model, or of the one in a wrapper, to which an adapter is added; then it is the model's."""
    inner: Any
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch module to adapt, got {type(model).__name__}")
    with in_step(model, verb):
        inner, wrapper = unwrapped(model)
        manager = _manager_of(inner, backend)
        if wrapper is not None:
            if getattr(wrapper, "c3a", manager) is not manager:
                raise ConfigError(f"this {type(wrapper).__name__} has an attribute c3a that is not its model's manager")
            check_rebuild(wrapper)
    known, flags = set(manager.adapters), [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    yield manager
    if wrapper is not None:
        try:
            manager.wrappers.add(wrapper, manager, renew=not known)
        except BaseException:
            for name in manager.adapters.keys() - known:
                manager.delete_adapter(name)
            if not known:
                manager.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
    inner.c3a = manager
    pretrained.prepare(inner)
    watch(inner)
    watch_statistics(inner)
    hooks = RowNames.of(inner)
    if hooks is None or hooks.scope is not manager._scope:
        RowNames((inner,), manager._scope, manager.check_rows)
    from .integrations import trl

    trl.patch_trl_when_imported()
