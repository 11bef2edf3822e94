"""What a model of transformers has to be told while it is adapted in place. transformers is not imported."""

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import CONFIG_NAME
from .errors import AdapterStateError
from .layer import C3ALinear
from .targets import base_name, embeddings_of, unwrapped_name

__all__ = ["SavePretrained", "adapted_head", "is_fused_by_trl", "prepare", "refuse_adapted_head", "release"]

# Libraries whose forward of a causal model hands lm_head's weight to a fused loss and does not call lm_head.
_FUSED_LOSSES = ("liger_kernel", "cut_cross_entropy")
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-\d+")


def prepare(model: nn.Module) -> None:
    """Make a model of transformers fit for training and saving with adapters; other models are left alone.

    Warns where training it as usual would fail, or would not train the adapters.
    """
    if not (callable(getattr(type(model), "save_pretrained", None)) and hasattr(model, "config")):
        return
    if "save_pretrained" not in model.__dict__:
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
        model.register_forward_pre_hook(_before_training_forward, with_kwargs=True)
    _warn_quantized(model)
    _warn_fused_loss(model, {})
    for module in model.modules():
        if callable(getattr(type(module), "fuse_qkv_projections", None)):
            module.fuse_qkv_projections = FuseProjections(module)  # type: ignore[assignment]


def release(model: nn.Module) -> None:
    """Undo `prepare`."""
    if isinstance(model.__dict__.get("save_pretrained"), SavePretrained):
        del model.save_pretrained
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_training_forward:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        if isinstance(module.__dict__.get("fuse_qkv_projections"), FuseProjections):
            del module.fuse_qkv_projections


class SavePretrained:
    """`save_pretrained` of an adapted model: it warns that no plain model can load what it writes.

    The Trainer's checkpoints are written through it, and resume. With `adapter_only` they leave out whatever is
    frozen, which the Trainer does not need in order to resume.

    Attributes:
        model: the adapted model.
        adapter_only: whether frozen tensors are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapter_only = False

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own method."""
        if left_out := self._left_out():
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in state_dict.items() if unwrapped_name(name) not in left_out}
        if not (self.adapter_only and _is_resumed_or_complete(os.fspath(save_directory))):
            warnings.warn(
                f"save_pretrained of a {type(self.model).__name__} with C3A adapters in place writes the layers under "
                "names that from_pretrained does not know. Save the adapter with model.c3a.save_pretrained(directory), "
                "or a plain model after model.c3a.merge_and_unload(). Only the Trainer, resuming, can read this",
                stacklevel=2,
            )
        # FSDP2 changes the model's class, so that it is asked for late.
        save: Any = type(self.model).save_pretrained  # type: ignore[attr-defined]
        if state_dict is not None:
            kwargs["state_dict"] = state_dict
        return save(self.model, save_directory, *args, **kwargs)

    def _left_out(self) -> set[str]:
        """Names of parameters that are not to be saved."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if self.adapter_only:
            names = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        else:
            # transformers drops one of two names of a tied weight only if it knows both, and it does not know these.
            firsts = {name for name, _ in self.model.named_parameters()}
            names = {name for name in parameters if name not in firsts and base_name(name) != name}
        return set(map(unwrapped_name, names))


def _is_resumed_or_complete(directory: str) -> bool:
    """Whether a folder is a checkpoint of the Trainer, or holds the adapter in its own form."""
    folder = os.path.basename(os.path.normpath(directory))
    return _CHECKPOINT_FOLDER.fullmatch(folder) is not None or os.path.exists(os.path.join(directory, CONFIG_NAME))


def _before_training_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: what can only be seen when training starts.

    A reentrant checkpoint passes no gradient on to parameters unless one of its inputs wants one, and with a frozen
    base none does.
    """
    if torch.compiler.is_compiling():
        return
    trains = model.training and torch.is_grad_enabled()
    if trains or "fused_lm_head" in kwargs:
        _warn_fused_loss(model, kwargs)
    if not trains:
        return
    hooked = getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None)
    if hooked or not hasattr(model, "enable_input_require_grads"):
        return
    if any(map(_checkpoints_reentrantly, model.modules())):
        model.enable_input_require_grads()


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


def _warn_quantized(model: Any) -> None:
    # The Trainer's own rule.
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) and not getattr(quantizer, "is_qat_trainable", False):
        warnings.warn(
            f"this {type(model).__name__} is quantized, and transformers' Trainer trains quantized models only as "
            "PeftModel. For the Trainer call c3a_triton.integrations.peft.patch_peft() and then "
            "peft.get_peft_model(model, peft.C3AConfig(...)) in place of c3a_triton.apply; a training loop of your "
            "own can go on as it is",
            stacklevel=4,
        )


# What diffusers' fuse_qkv_projections puts together.
_FUSED_PROJECTIONS = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}


class FuseProjections:
    """`fuse_qkv_projections` of a model of diffusers: it copies weights, and adapters would be left behind.

    Attributes:
        model: the model, or a part of it, that has the method.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own method.

        Raises:
            AdapterStateError: a projection that would be fused is adapted.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, C3ALinear) and name.rpartition(".")[2] in _FUSED_PROJECTIONS:
                raise AdapterStateError(
                    f"fuse_qkv_projections would copy the weight of {module.layer_name} into a layer of its own and "
                    "leave the adapter behind: call model.c3a.merge_and_unload() first, or fuse the projections before "
                    'adapting the fused ones ("to_qkv", "to_kv")'
                )
        fuse: Any = type(self.model).fuse_qkv_projections  # type: ignore[attr-defined]
        return fuse(self.model, *args, **kwargs)


def adapted_head(model: nn.Module) -> C3ALinear | None:
    """A model's output layer, if it is adapted in place."""
    head = embeddings_of(model)[1]
    return head if isinstance(head, C3ALinear) else None


def is_fused_by_trl(model: nn.Module) -> bool:
    """Whether TRL has put a forward of its own, which does not call the output layer, in the place of the model's."""
    return "trl" in _packages(model.__dict__.get("forward"))


def refuse_adapted_head(model: nn.Module, trainer: str) -> None:
    """Refuse to train a model whose output layer is adapted in place with a trainer that reads that layer's weight.

    Raises:
        AdapterStateError: it is adapted in place.
    """
    head = adapted_head(model)
    if head is not None:
        raise AdapterStateError(
            f"{head.layer_name} is adapted, but {trainer} multiplies by the weight of this layer and does not call it: "
            f"its adapter would be neither applied nor trained. Leave {head.layer_name} out of target_modules, or "
            f'train it whole: modules_to_save=["{head.layer_name}"]'
        )


def _packages(forward: Any) -> set[str]:
    """The packages that the functions of a forward come from; functools.wraps hides the outer one's module."""
    found: set[str] = set()
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        for module in (getattr(function, "__module__", None), getattr(function, "__globals__", {}).get("__name__")):
            found.add(str(module).partition(".")[0])
        forward = getattr(function, "__wrapped__", None)
    return found


def _warn_fused_loss(model: Any, kwargs: Mapping[str, Any]) -> None:
    # The class's own forward too: accelerate's hooks hide it.
    packages = _packages(model.forward) | _packages(type(model).forward)
    library = next((name for name in _FUSED_LOSSES if name in packages), None)
    if kwargs.get("fused_lm_head") is True:
        if "trl" in (getattr(model, "model_tags", None) or ()):
            refuse_adapted_head(model, "this trainer of TRL")
        library = "trl"
    if library is None or (head := adapted_head(model)) is None:
        return
    model.c3a._watch.tell(
        [head.layer_name],
        f"{{}} is adapted, but the forward of {type(model).__name__} is that of {library}, whose "
        "fused loss reads the weight of this layer and does not call it: its adapter is neither applied in "
        f"training nor trained. Leave {head.layer_name} out of target_modules, train it whole (modules_to_save), or "
        "switch the fused linear cross-entropy off",
        uncalled=False,
        stacklevel=4,
    )
