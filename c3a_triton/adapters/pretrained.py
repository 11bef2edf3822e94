"""What a model of transformers has to be told while it is adapted in place. transformers is not imported."""

import contextlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from c3a_triton.bases.agreement import in_step, shared_over
from c3a_triton.bases.model_names import unwrapped_name
from c3a_triton.bases.sharded import is_sharded
from c3a_triton.errors import AdapterStateError
from c3a_triton.files.config import MODEL_CONFIG_NAME, C3AConfig

from .base_model import base_name, embeddings_of
from .hooks import remove_hooks
from .layer import C3ALinear
from .token_rows import rows_at
from .tying import keep_ties, release_ties

__all__ = [
    "SavePretrained",
    "adapted_head",
    "is_fused_by_trl",
    "prepare",
    "refuse_adapted_head",
    "release",
    "save_adapters",
    "warn_dequantized_save",
    "warn_outer_save",
    "with_auto_mapping",
]

# Libraries whose forward of a causal model hands lm_head's weight to a fused loss and does not call lm_head.
_FUSED_LOSSES = ("liger_kernel", "cut_cross_entropy")
# The Trainer's checkpoints; some releases write them under another name first.
_CHECKPOINT_FOLDER = re.compile(r"(?:tmp-)?checkpoint-\d+")


def prepare(model: nn.Module) -> None:
    """Make a model of transformers fit for training and saving with adapters; other models are left alone.

    Warns where training it as usual would fail, or would not train the adapters.
    """
    if not (callable(getattr(type(model), "save_pretrained", None)) and hasattr(model, "config")):
        return
    if "save_pretrained" not in model.__dict__:
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
        model.register_forward_pre_hook(_before_training_forward, with_kwargs=True)
    if not hasattr(model, "create_or_update_model_card"):
        model.create_or_update_model_card = ModelCard(model)  # type: ignore[assignment]
    if callable(getattr(type(model), "generate_batch", None)) and "generate_batch" not in model.__dict__:
        model.generate_batch = GenerateBatch(model)  # type: ignore[assignment]
    keep_ties(model)
    _warn_quantized(model)
    _warn_fused_loss(model, {})
    for module in model.modules():
        if callable(getattr(type(module), "fuse_qkv_projections", None)):
            module.fuse_qkv_projections = FuseProjections(module)  # type: ignore[assignment]


def release(model: nn.Module) -> None:
    """Undo `prepare`."""
    if isinstance(model.__dict__.get("save_pretrained"), SavePretrained):
        del model.save_pretrained
    if isinstance(model.__dict__.get("create_or_update_model_card"), ModelCard):
        del model.create_or_update_model_card
    if isinstance(model.__dict__.get("generate_batch"), GenerateBatch):
        del model.generate_batch
    release_ties(model)
    remove_hooks(model, lambda hook: hook is _before_training_forward)
    for module in model.modules():
        if isinstance(module.__dict__.get("fuse_qkv_projections"), FuseProjections):
            del module.fuse_qkv_projections


class ModelCard:
    """`create_or_update_model_card` of an adapted model: the Trainer calls it where its folder is an adapter's.

    Attributes:
        model: the adapted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, output_dir: str | os.PathLike[str]) -> None:
        """As the manager's, for the active adapter."""
        manager: Any = self.model.c3a
        manager.create_or_update_model_card(output_dir, next(iter(manager.active_adapters or manager.adapters)))


class GenerateBatch:
    """`generate_batch` of an adapted model: it knows `adapter_names`, which transformers passes over without a word.

    Attributes:
        model: the adapted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The manager's where there are names, the model's own otherwise, with the active adapters."""
        model: Any = self.model
        if adapter_names is None:
            return type(model).generate_batch(model, *args, **kwargs)
        return model.c3a.generate_batch(*args, adapter_names=adapter_names, **kwargs)


class SavePretrained:
    """`save_pretrained` of an adapted model: it adds the adapters to what the model writes, in their own form.

    The weights have names that no plain model knows: only a resuming Trainer can read them. `from_pretrained` must not
    take them for a model with layers missing. An empty tensor under the plain name of an adapted weight makes it refuse
    the file. Where PEFT is installed and the adapter knows its base model, the folder gets no `config.json` either: it
    is an adapter's folder then, from which transformers loads the base model and the adapter.

    With `adapter_only` whatever is frozen is left out, which the Trainer does not need in order to resume; and in a
    folder that is no checkpoint of the Trainer, whatever is not in the adapters' files.

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
        is_checkpoint = _CHECKPOINT_FOLDER.fullmatch(os.path.basename(os.path.abspath(save_directory))) is not None
        writes = bool(kwargs.get("is_main_process", args[0] if args else True))
        if state_dict is None and shared_over(self.model):
            with in_step(self.model, "save_pretrained"):  # every process calls, because the base is put together
                save_adapters(self.model, save_directory, is_main_process=writes)
        # DeepSpeed's parts may not have been put together; then the dict is empty.
        elif writes and (state_dict or (state_dict is None and not any(map(is_sharded, self.model.parameters())))):
            save_adapters(self.model, save_directory, state_dict)
        if self.adapter_only and not is_checkpoint and not kwargs.get("push_to_hub"):
            return None
        if not (self.adapter_only and is_checkpoint):
            warnings.warn(
                f"save_pretrained of a {type(self.model).__name__} with C3A adapters in place writes the layers under "
                "names that from_pretrained does not know. Save the adapter with model.c3a.save_pretrained(directory), "
                "or a plain model after model.c3a.merge_and_unload(). Only the Trainer, resuming, can read this; the "
                "adapter is beside it",
                stacklevel=2,
            )
        left_out = self._left_out()
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        state_dict = {name: tensor for name, tensor in state_dict.items() if unwrapped_name(name) not in left_out}
        # FSDP2 changes the model's class, so that it is asked for late.
        save: Any = type(self.model).save_pretrained  # type: ignore[attr-defined]
        adapted: Any = self.model.c3a.layers()  # type: ignore[union-attr, operator]
        if any(layer.is_part for _, layer in adapted) and "save_original_format" in inspect.signature(save).parameters:
            # Otherwise transformers takes kernels of stacked experts for experts, and saves each by itself.
            kwargs["save_original_format"] = False
        result = save(self.model, save_directory, *args, state_dict=state_dict | self._refused(), **kwargs)
        default = self.model.c3a.adapters.get("default")  # type: ignore[union-attr, operator]
        if writes and default is not None and default.base_model_name_or_path and importlib.util.find_spec("peft"):
            Path(save_directory, MODEL_CONFIG_NAME).unlink(missing_ok=True)
        return result

    def _refused(self) -> dict[str, torch.Tensor]:
        """A tensor that an adapted model passes over, and for which a plain one has another shape."""
        layers: Any = self.model.c3a.layers()  # type: ignore[union-attr, operator]
        weights = (
            unwrapped_name(name) + ("" if layer.is_part else ".weight")
            for name, layer in layers
            if (layer.parameter or "weight") in layer.base_layer._parameters
        )
        return {name: torch.empty(0) for name in islice(weights, 1)}

    def _left_out(self) -> set[str]:
        """Names of parameters that are not to be saved."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if self.adapter_only:
            names = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        else:
            # transformers drops one of two names of a tied weight only if it knows both, and it does not know these.
            firsts = {name for name, _ in self.model.named_parameters()}
            again = [name for name in parameters if name not in firsts]
            names = {name for name in again if base_name(name) != name or ".modules_to_save." in name}
        return set(map(unwrapped_name, names))


def save_adapters(
    model: Any,
    directory: str | os.PathLike[str],
    state_dict: dict[str, Any] | None = None,
    *,
    is_main_process: bool = True,
) -> None:
    """Save all adapters of a model, as PEFT does: `"default"` in the folder itself, others in folders of their names.

    Args:
        model: the adapted model.
        directory: the folder.
        state_dict: the model's, where it was put together already. Without it every process has to call where
            parameters are sharded.
        is_main_process: whether this process may write.
    """
    for name in model.c3a.adapters:
        folder = Path(directory) if name == "default" else Path(directory, name)
        model.c3a.save_pretrained(folder, name, state_dict=state_dict, is_main_process=is_main_process)


def with_auto_mapping(model: nn.Module, config: C3AConfig) -> C3AConfig:
    """A configuration with the model's class, as PEFT saves it where `task_type` does not say how to load the model.

    By it PEFT's `AutoPeftModelForCausalLM.from_pretrained` and the like find the base model.
    """
    if config.task_type is not None or not hasattr(type(model), "from_pretrained"):
        return config
    # FSDP2 makes a class for the model, which nobody can import; the one that it was made of counts.
    own = next(cls for cls in type(model).__mro__ if getattr(sys.modules[cls.__module__], cls.__name__, None) is cls)
    return replace(config, auto_mapping={"base_model_class": own.__name__, "parent_library": own.__module__})


def warn_outer_save(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook of adapted layers: who saves a model around them as a plain one is told, once for each save.

    Whoever saves asks for the layers' state_dict, which tells nothing of what becomes of it. The callers do: a
    `save_pretrained` is for `from_pretrained`, while a state_dict that a training loop keeps goes back to where it came
    from.
    """
    if getattr(state_dict, "c3a_told", False):
        return
    found: tuple[int, str, str] | None = None
    for depth, frame in enumerate(_callers(), start=2):
        if frame.f_code is SavePretrained.__call__.__code__:
            return
        if found is None and frame.f_code.co_name in ("save_pretrained", "save"):
            owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            if hasattr(type(owner), "save_pretrained"):
                found = depth + 1, frame.f_code.co_name, type(owner).__name__
    if found is None:
        return
    stacklevel, method, outer = found
    with contextlib.suppress(AttributeError):  # a dict of somebody's own
        state_dict.c3a_told = True  # type: ignore[attr-defined]
    name = unwrapped_name(prefix).removesuffix(".")
    warnings.warn(
        f"{method} of a {outer} that holds layers with C3A adapters ({name} and others) writes them under names that "
        "from_pretrained does not know. Save the adapters with part.c3a.save_pretrained(directory), where part is the "
        "module that was adapted, or a plain model after part.c3a.merge_and_unload()",
        stacklevel=stacklevel,
    )


def _callers() -> Iterator[FrameType]:
    """The frames that have led to the caller's, from the inside out."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


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


def warn_dequantized_save(model: nn.Module) -> None:
    """Say how to save a model that transformers dequantized as it loaded it.

    Its `save_pretrained` undoes that: it writes codes (FP8), or weights under the names of codes (MXFP4), in either
    case without the configuration by which they could be loaded, and what is loaded is another model, silently.
    """
    conversions: Any = getattr(model, "_weight_conversions", None) or ()
    operations = (operation for part in conversions for operation in getattr(part, "operations", ()))
    is_dequantized = any("Dequantize" in type(operation).__name__ for operation in operations)
    if is_dequantized and getattr(model, "hf_quantizer", None) is None:
        warnings.warn(
            f"this {type(model).__name__} was dequantized as it was loaded, and transformers' save_pretrained would "
            "write tensors that load as another model: call save_pretrained(..., save_original_format=False)",
            stacklevel=3,
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


def adapted_head(model: nn.Module) -> str | None:
    """The name of a model's output layer, if it is adapted in place, or has rows of tokens of an adapter's own."""
    head = embeddings_of(model)[1]
    if isinstance(head, C3ALinear):
        return head.layer_name
    has_rows = head is not None and rows_at(head) is not None
    return next((name for name, module in model.named_modules() if module is head), None) if has_rows else None


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
            f"{head} is adapted, but {trainer} multiplies by the weight of this layer and does not call it: "
            f"its adapter would be neither applied nor trained. Leave {head} out of target_modules (untied from what "
            f'trainable_token_indices means), or train it whole: modules_to_save=["{head}"]'
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
        [head],
        f"{{}} is adapted, but the forward of {type(model).__name__} is that of {library}, whose "
        "fused loss reads the weight of this layer and does not call it: its adapter is neither applied in "
        f"training nor trained. Leave {head} out of target_modules (untied from what trainable_token_indices means), "
        "train it whole (modules_to_save), or switch the fused linear cross-entropy off",
        uncalled=False,
        stacklevel=4,
    )
