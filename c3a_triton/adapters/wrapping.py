"""Models that a library has wrapped to train them on several devices: what is inside, and what may still be adapted.

`DataParallel` copies its module in each call and takes adapters as they come. DDP has told its reducer which parameters
there are, so it is built again over the adapted model, by its own constructor; where its arguments cannot all be told
from it, it is refused. Whatever shards, or holds an optimizer, is refused: there the model is adapted first.
"""

import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from c3a_triton.errors import AdapterStateError, ConfigError

from .hooks import remove_hooks
from .ownership import own_parts

__all__ = ["Wrappers", "check_rebuild", "rebuild", "unwatch", "unwrapped", "watch"]

_ORDER = "Adapt the model first, with c3a_triton.apply(model, config), and wrap it afterwards"
_FRESH = nn.Module().__dict__
# Arguments that are no attributes of the same name, or whose default is all that is accepted.
_TOLD_OTHERWISE = {
    "module",
    "device_ids",
    "init_sync",
    "process_group",
    "bucket_cap_mb",
    "bucket_cap_mb_list",
    "broadcast_buffers",
    "forward_sync_buffers",
    "check_reduction",
    "static_graph",
    "mixed_precision",
    "device_mesh",
    "delay_all_reduce_named_params",
    "param_to_hook_all_reduce",
}


def _is_ddp(module: nn.Module) -> bool:
    return torch.distributed.is_available() and isinstance(module, nn.parallel.DistributedDataParallel)


def _wrapper_kind(module: nn.Module) -> str | None:
    """The name of the class that makes a module a wrapper, of those that cannot be looked through, or None."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("deepspeed.runtime.") and hasattr(module, "module"):
            return cls.__name__
        if cls.__name__ == "FullyShardedDataParallel":
            return cls.__name__
    return None


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The model that is adapted where this one is given, and the DDP or DataParallel around it, if there is one.

    torch.compile's wrappers pass attributes through and are looked through.

    Raises:
        ConfigError: a wrapper under which a model cannot be adapted any more; it is named, with the order that works.
    """
    wrapper: nn.Module | None = None
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif wrapper is None and (_is_ddp(inner) or isinstance(inner, nn.DataParallel)):
            wrapper, inner = inner, inner.module
        else:
            break
    for name, module in inner.named_modules():
        kind = (
            type(module).__name__ if _is_ddp(module) or isinstance(module, nn.DataParallel) else _wrapper_kind(module)
        )
        if kind is not None:
            where = f"{name} in this {type(inner).__name__}" if name else "the model"
            raise ConfigError(f"{where} is wrapped in {kind}, under which no adapter can be added. {_ORDER}")
    prepared = next((m for m in (model, wrapper, inner) if getattr(m, "_is_accelerate_prepared", False)), None)
    if prepared is not None and (_is_ddp(prepared) or not hasattr(inner, "c3a")):
        raise ConfigError(
            "the model is prepared by accelerate already, whose optimizer would not train the adapter. Adapt it before "
            "accelerator.prepare or the Trainer; if what it was prepared for is over, unwrap it "
            "(accelerator.unwrap_model) and delete the model's _is_accelerate_prepared"
        )
    return inner, wrapper


def _reason_against(wrapper: Any) -> str | None:
    """What of a DDP cannot be carried over to another one, or None."""
    if type(wrapper) is not nn.parallel.DistributedDataParallel:
        return f"is of a class of its own ({type(wrapper).__name__})"
    if wrapper.static_graph:
        return "has a static graph"
    if wrapper._comm_hooks or hasattr(wrapper, "buffer_hook") or _has_builtin_hook(wrapper):
        return "has a communication hook"
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "computes in mixed precision of its own"
    if getattr(wrapper, "_delay_all_reduce_params", None) or wrapper.parameters_to_ignore:
        return "leaves parameters out"
    if hasattr(wrapper, "device_mesh"):
        return "is on a device mesh"
    if not wrapper.require_backward_grad_sync:
        return "is in no_sync()"
    unknown = [name for name in _arguments(wrapper) if name not in _TOLD_OTHERWISE and not hasattr(wrapper, name)]
    return f"has arguments that it does not tell ({', '.join(unknown)})" if unknown else None


def _has_builtin_hook(wrapper: Any) -> bool:
    # torch's own hooks are known to its reducer alone, which tells its log of them.
    return bool(wrapper._get_ddp_logging_data().get("comm_hook"))


def _arguments(wrapper: Any) -> list[str]:
    return list(inspect.signature(type(wrapper)).parameters)


def check_rebuild(wrapper: nn.Module) -> None:
    """Raise what `rebuild` would raise, and change nothing.

    Raises:
        AdapterStateError: a DDP that cannot be built again as it was.
    """
    if _is_ddp(wrapper) and (reason := _reason_against(wrapper)):
        raise AdapterStateError(
            f"this DistributedDataParallel {reason}, and cannot be built again over a model whose trained parameters "
            f"change. {_ORDER}"
        )


def rebuild(wrapper: Any) -> None:
    """Build a DDP again in place, over its module as it is now: the same object with the same arguments and hooks.

    As its constructor, it has to be called in every process. A DataParallel needs nothing, nor a DDP around a module
    in which nothing is trained. Where it fails, the wrapper stays as it was.

    Raises:
        AdapterStateError: it cannot be built again as it was.
    """
    if not _is_ddp(wrapper) or not any(parameter.requires_grad for parameter in wrapper.module.parameters()):
        return
    check_rebuild(wrapper)
    names = _arguments(wrapper)
    arguments = {name: getattr(wrapper, name) for name in names if name not in _TOLD_OTHERWISE}
    arguments["device_ids"] = wrapper.device_ids
    arguments["process_group"] = wrapper.process_group
    arguments["broadcast_buffers"] = getattr(
        wrapper, "forward_sync_buffers", getattr(wrapper, "broadcast_buffers", True)
    )
    if not wrapper.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    if caps := getattr(wrapper, "bucket_bytes_cap_list", None):
        arguments["bucket_cap_mb_list"] = [cap / 2**20 for cap in caps]
    before = dict(wrapper.__dict__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the older name of an argument
            type(wrapper).__init__(wrapper, wrapper.module, **arguments)
    except BaseException:
        wrapper.__dict__.clear()
        wrapper.__dict__.update(before)
        raise
    # What its users have put onto it. Everything else is its constructor's.
    wrapper.__dict__.update({name: before[name] for name in _FRESH if "hook" in name or name == "training"})


class Wrappers:
    """The DDPs and DataParallels that are known to be around a manager's model. Copies of a model have none."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[nn.Module]] = []

    def __reduce__(self) -> Any:
        return Wrappers, ()

    def _present(self) -> list[nn.Module]:
        return [wrapper for known in self._known if (wrapper := known()) is not None]

    def add(self, wrapper: nn.Module, manager: Any, *, renew: bool) -> None:
        """Give a wrapper its model's manager as `c3a`, and build it again whenever other parameters are trained.

        Args:
            wrapper: the wrapper.
            manager: the manager of the model in it.
            renew: whether other parameters are trained than when it was made.

        Raises:
            AdapterStateError: it cannot be built again, or nothing is trained, so that it would be of no use.
        """
        if renew and _is_ddp(wrapper) and not any(parameter.requires_grad for parameter in wrapper.parameters()):
            raise AdapterStateError(
                "a DistributedDataParallel is of no use around a model in which nothing is trained: give the model in "
                "it (wrapper.module), or load the adapter with is_trainable=True"
            )
        if renew:
            rebuild(wrapper)
        if all(wrapper is not other for other in self._present()):
            self._known.append(weakref.ref(wrapper))
        wrapper.c3a = manager

    def check(self) -> None:
        """Raise what `rebuild` would raise."""
        for wrapper in self._present():
            check_rebuild(wrapper)

    def rebuild(self) -> None:
        """Build them again, over what is trained now."""
        for wrapper in self._present():
            rebuild(wrapper)

    def forget(self) -> None:
        """Take the manager from them."""
        for wrapper in self._present():
            del wrapper.c3a
        self._known.clear()


# A DDP that was put around an adapted model, and is not known


def watch(model: nn.Module) -> None:
    """Let a model that has its manager as `c3a` see, as it is trained in a DDP, that all its adapters are reduced."""
    if _check_reduced not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_reduced)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    remove_hooks(model, lambda hook: hook is _check_reduced)


def _check_reduced(model: nn.Module, args: Any) -> None:
    """Forward pre-hook: refuse to train what the DDP around the model does not reduce, once for each activation."""
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    wrapper: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or getattr(wrapper, "_use_python_reducer", False) or wrapper.parameters_to_ignore:
        return
    manager: Any = model.c3a
    seen = (id(wrapper.reducer), manager._n_activations)
    if wrapper.__dict__.get("_c3a_seen") == seen:
        return
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    reduced = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    left = [
        f"{name}.{key}"
        for name, part in own_parts(model, manager._scope)
        for key, parameter in part.named_parameters()
        if parameter.requires_grad and id(parameter) not in reduced
    ]
    if left:
        raise AdapterStateError(
            f"{left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''} would be trained in each process apart: "
            "when this DistributedDataParallel was built, it was not there, or not trained. Wrap the model again after "
            "set_adapter, or add adapters through the wrapper (c3a_triton.apply(wrapper, ...)), which is then built "
            "again as they are set"
        )
    wrapper._c3a_seen = seen
