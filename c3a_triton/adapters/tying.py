"""Weights that an adapted model shares between its embeddings: tying them again, and resizing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from c3a_triton.bases.sharded import whole_shape
from c3a_triton.errors import AdapterStateError
from c3a_triton.files.values import some

from .base_model import base_modules, embedding_weights, embeddings_of
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .parts import Holder
from .token_rows import rows_at

__all__ = ["bare", "keep_ties", "release_ties"]


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Within it the model has its own layers where adapters are, and modules as they were before they were copied."""
    places = [
        (parent, child, module)
        for parent in list(model.modules())
        if not isinstance(parent, (C3ALinear, Holder, ModulesToSave))
        for child, module in parent._modules.items()
        if isinstance(module, (C3ALinear, Holder, ModulesToSave))
    ]
    for parent, child, module in places:
        parent._modules[child] = module.original_module if isinstance(module, ModulesToSave) else module.base_layer
    try:
        yield
    finally:
        for parent, child, module in places:
            parent._modules[child] = module


class _BareMethod:
    """A method of the model's class, called while the model is bare: it knows its layers by their names and classes.

    Args:
        model: the model of transformers.
        name: the method's name.
        root: the adapted model, of which it may be a part.
    """

    def __init__(self, model: nn.Module, name: str, root: nn.Module) -> None:
        self.model = model
        self.name = name
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's method."""
        with bare(self.model):
            return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


class _ResizeTokenEmbeddings(_BareMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's method.

        Raises:
            AdapterStateError: another size for an embedding that is adapted or trained whole, or one without tokens
                whose rows adapters train; nothing has changed.
        """
        wanted = _wanted_rows(self.model, *args, **kwargs)
        held = _held_embeddings(self.model, self.root)
        if changed := [name for name, weight in held if wanted is not None and whole_shape(weight)[0] != wanted]:
            size = whole_shape(dict(held)[changed[0]])[0]
            raise AdapterStateError(
                f"resize_token_embeddings: {' and '.join(changed)} have adapters, or copies that are trained whole "
                f"(modules_to_save), for {size} tokens, not {wanted}. Resize the model before it is adapted; or after "
                "model.c3a.merge_and_unload() or model.c3a.unload()"
            )
        tokens = [(name, module, rows) for name, module in self.root.named_modules() if (rows := rows_at(module))]
        for name, _, rows in tokens:
            if wanted is not None and (beyond := [i for held in rows.indices.values() for i in held if i >= wanted]):
                raise AdapterStateError(
                    f"resize_token_embeddings: adapters train rows of {name} for the tokens {some(map(str, beyond))} "
                    f"(trainable_token_indices), which {wanted} tokens do not reach: keep as many tokens, or resize "
                    "after model.c3a.merge_and_unload() or model.c3a.unload()"
                )
        super().__call__(*args, **kwargs)
        for name, module, rows in tokens:
            if (now := self.root.get_submodule(name)) is not module:  # an output layer is made anew
                holds = module._modules.get("token_adapter") is rows
                rows.detach_from(module)
                rows.attach(now, name, holds=holds)
        return self.model.get_input_embeddings()  # type: ignore[operator]


def _wanted_rows(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> int | None:
    """How many tokens there are to be, or None where the call changes nothing."""
    if not pad_to_multiple_of:
        return new_num_tokens
    if new_num_tokens is None:
        with bare(model):
            new_num_tokens = whole_shape(embeddings_of(model)[0].weight)[0]  # type: ignore[arg-type, union-attr]
    return -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of


def _held_embeddings(model: nn.Module, root: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, weight) of what in `root` has adapters or copies among the embeddings, and what is tied to them."""
    with bare(model):
        weights = embedding_weights(model)
    held = []
    for name, module in base_modules(root):
        if isinstance(module, C3ALinear):
            weight = getattr(module.get_base_layer(), "weight", None)
        elif isinstance(module, ModulesToSave):
            weight = getattr(module.original_module, "weight", None)
        else:
            continue
        if isinstance(weight, Tensor) and any(weight is other for other in weights):
            held.append((name, weight))
    return held


_METHODS = {"tie_weights": _BareMethod, "resize_token_embeddings": _ResizeTokenEmbeddings}


def keep_ties(model: nn.Module) -> None:
    """Let an adapted model of transformers, and models in it, tie their own weights and leave trained copies alone."""
    for part in model.modules():
        for name, method in _METHODS.items():
            if callable(getattr(type(part), name, None)) and name not in part.__dict__:
                setattr(part, name, method(part, name, model))


def release_ties(model: nn.Module) -> None:
    """Undo `keep_ties`."""
    for part in model.modules():
        for name in _METHODS:
            if isinstance(part.__dict__.get(name), _BareMethod):
                delattr(part, name)
