"""Adapted layers, and copies of modules that are trained whole: built for a model, put into it, taken out again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from c3a_triton.bases.linear_like import geometry
from c3a_triton.bases.parallel import leave
from c3a_triton.bases.quantized import torchao_config_of
from c3a_triton.errors import AdapterStateError, CheckpointError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX
from c3a_triton.files.config import C3AConfig

from . import pretrained
from .conv import C3AConv2d
from .embedding import C3AEmbedding
from .experts import C3AExperts, C3AStacked
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .names import Scope
from .ownership import holds_own, is_own
from .parts import Holder
from .plain_parameters import C3AParameter, C3AParameters
from .targets import Target
from .token_rows import TokenRows
from .token_targets import TokenTarget

__all__ = [
    "Addition",
    "layer_class",
    "new_copy",
    "new_layer",
    "put",
    "put_plain",
    "put_rows",
    "remove_rows",
    "replace_module",
    "without_adapters",
]


@dataclass(frozen=True)
class Addition:
    """All that an adapter needs, built and not in the model yet.

    Attributes:
        adapter_name: its name.
        config: its configuration.
        layers: (target, its layer, the kernel) of what is adapted, in the model's order.
        copies: (name, module, what holds its copies, the copy) of the modules that are trained whole.
        rows: (target, what holds its rows, the rows) of the tokens that are trained.
        replaced: the base model's parameters that get other values, with these.
    """

    adapter_name: str
    config: C3AConfig
    layers: Sequence[tuple[Target, C3ALinear, nn.Parameter]]
    copies: Sequence[tuple[str, nn.Module, ModulesToSave, nn.Module]]
    rows: Sequence[tuple[TokenTarget, TokenRows, nn.Parameter]] = ()
    replaced: Sequence[tuple[nn.Parameter, Tensor]] = ()

    def shared(self) -> dict[str, Any]:
        """What has to be the same in every process that shares the model; a base model may lie elsewhere in each."""
        return {
            "adapter name": self.adapter_name,
            "configuration": self.config.to_dict() | {"base_model_name_or_path": None},
            "targets": [(target.name, target.block_size) for target, _, _ in self.layers],
            "modules_to_save": [name for name, *_ in self.copies],
            "tokens": [([name for name, _ in target.modules], target.indices) for target, _, _ in self.rows],
        }

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is new: kernels, and what the copies hold."""
        yield from (kernel for _, _, kernel in self.layers)
        for *_, module_copy in self.copies:
            yield from chain(module_copy.parameters(), module_copy.buffers())
        yield from (rows for _, _, rows in self.rows)


_CLASSES: dict[str, type[C3ALinear]] = {
    "linear": C3ALinear,
    "conv2d": C3AConv2d,
    "embedding": C3AEmbedding,
    "experts": C3AStacked,
    "parameter": C3AParameter,
}


def layer_class(base: nn.Module) -> type[C3ALinear]:
    """What adapts a base layer."""
    sizes = geometry(base)
    return C3ALinear if sizes is None else _CLASSES[sizes.kind]


def new_layer(
    model: nn.Module,
    target: Target,
    adapter_name: str,
    init_weights: bool | str,
    tensors: Mapping[str, Tensor] | None,
    *,
    backend: str,
    active: list[str],
) -> tuple[C3ALinear, nn.Parameter]:
    """The adapted layer of a target, which is not put into the model yet, and a kernel, which is not the layer's yet.

    Args:
        model: the model.
        target: what is to be adapted.
        adapter_name: the adapter's name.
        init_weights: as in `C3AConfig`.
        tensors: a file's, which take the place of initial values.
        backend: what a new layer gets, where there is a choice.
        active: what a new layer has as active adapters.

    Raises:
        AdapterStateError: the layer has an adapter of that name.
        CheckpointError: the layer is on the meta device, where a file's values would be lost.
        ConfigError: an unknown `init_weights`, or an embedding that cannot be adapted.
    """
    layer = target.module
    if not isinstance(layer, C3ALinear):
        new_class = _CLASSES[target.sizes.kind]
        layer = new_class._around(
            layer,
            target.sizes,
            active=active,
            backend=backend if new_class.has_backends else "auto",
            layer_name=target.name,
        )
        layer.quantization_config = torchao_config_of(model)
        layer._register_state_dict_hook(pretrained.warn_outer_save)
        if isinstance(model.get_submodule(target.name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            # torch's fused encoder layer reads the weights and calls no layer; any hook makes it step aside.
            layer.register_forward_pre_hook(_do_nothing)
    elif adapter_name in layer.c3a_kernel:
        raise AdapterStateError(f"{target.name} has an adapter {adapter_name!r} that nobody here knows")
    kernel = layer._new_kernel(target.block_size, init_weights if tensors is None else True)
    if tensors is not None:
        if kernel.is_meta:
            raise CheckpointError(
                f"{target.name} is on the meta device, where values are lost: load the model before its adapter"
            )
        kernel.data.copy_(tensors[target.name + KERNEL_SUFFIX])
    return layer, layer._part_of(kernel)


def _do_nothing(module: nn.Module, args: Any) -> None:
    return None


def new_copy(name: str, module: nn.Module, tensors: Mapping[str, Tensor] | None) -> tuple[ModulesToSave, nn.Module]:
    """What holds the copies of a module of the model, and a copy, with a file's tensors, which it does not have yet."""
    wrapper = module if isinstance(module, ModulesToSave) else ModulesToSave(module, name)
    module_copy = wrapper.new_copy()
    if tensors is not None:
        module_copy.load_state_dict({key: tensors[f"{name}.{key}"] for key in module_copy.state_dict()})
    return wrapper, module_copy


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a model under a name that it has."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def put(model: nn.Module, target: Target, layer: C3ALinear) -> None:
    """Put what `new_layer` gave into the model, if it is not there yet; of a parameter, into what holds its module."""
    if layer is target.module:
        return
    if not target.parameter:
        replace_module(model, target.name, layer)
        return
    name = target.name.rpartition(".")[0]
    holder = model.get_submodule(name)
    if not isinstance(holder, Holder):
        holder = (C3AExperts if target.sizes.kind == "experts" else C3AParameters)(holder)
        replace_module(model, name, holder)
    setattr(holder, target.parameter, layer)


def put_rows(adapter_name: str, target: TokenTarget, rows: TokenRows, values: nn.Parameter) -> None:
    """Give what `new_rows` gave to the modules of a target, if they do not have it yet."""
    rows.install(adapter_name, target.indices, values)
    if target.module._modules.get("token_adapter") is not rows:
        for name, module in target.modules:
            rows.attach(module, name, holds=module is target.module)


def remove_rows(model: nn.Module, rows: TokenRows) -> None:
    """Take all of `put_rows` away."""
    for module in list(model.modules()):
        rows.detach_from(module)


def put_plain(model: nn.Module, scope: Scope, *, with_copies: bool) -> list[tuple[str, nn.Module]]:
    """Put plain layers in the place of a manager's adapted ones, which are returned with their names.

    Args:
        model: the model.
        scope: the manager's.
        with_copies: whether modules that the active adapter trained whole stay as it has them.
    """
    replaced: list[tuple[str, nn.Module]] = []
    # Every name under which a layer is known, not only the first.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if holds_own(module, scope):
            module.release()
            plain = module.base_layer
        elif not is_own(module, scope) or (isinstance(module, C3ALinear) and module.is_part):
            continue
        elif isinstance(module, C3ALinear):
            plain = module.base_layer
            leave(module.get_base_layer())
        else:
            plain = module.active_module() if with_copies else module.original_module
        replace_module(model, name, plain)
        replaced.append((name, module))
    return replaced


@contextmanager
def without_adapters(model: nn.Module, scope: Scope, *, with_copies: bool) -> Iterator[None]:
    """Within it the model is the plain one that `put_plain` makes of it."""
    replaced = put_plain(model, scope, with_copies=with_copies)
    try:
        yield
    finally:
        for name, module in replaced:
            replace_module(model, name, module)
            if isinstance(module, Holder):
                module.attach()
