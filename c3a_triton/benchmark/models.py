"""Models with random weights, adapted in each method's way over the same frozen weights."""

import copy
import importlib
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.api import apply
from c3a_triton.files.config import C3AConfig

from . import cases, gate, peers

__all__ = ["METHODS", "adapted", "check", "llama", "random_model", "shared_copy", "training_step"]

METHODS = ("base", "peft_lora", "peft_c3a", "ours:auto", "ours:fold")
# Of the hidden state after one decoder layer: some ten roundings, not three as in one linear layer.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def llama(device: torch.device, *, tiny: bool = False, n_layers: int | None = None) -> Any:
    """A frozen Llama-3.2-3B-shaped model in bfloat16, or a tiny one in float32; with fewer layers where asked for."""
    transformers = importlib.import_module("transformers")
    shape = dict(cases.LLAMA_TINY if tiny else cases.LLAMA_3B)
    if n_layers is not None:
        shape["num_hidden_layers"] = n_layers
    config = transformers.LlamaConfig(**shape, max_position_embeddings=4096)
    return random_model(transformers.LlamaForCausalLM, config, device, torch.float32 if tiny else torch.bfloat16)


def random_model(cls: Callable[[Any], nn.Module], config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen model of a transformers class with random weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def shared_copy(model: Any) -> Any:
    """A model of its own modules over the same tensors."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def adapted(method: str, model: Any, case: cases.ModelCase) -> Any:
    """A copy of `model` over the same frozen weights, adapted by `method`; the same circulants in each that has any."""
    model = shared_copy(model)
    targets = list(case.targets)
    if method == "base":
        # As an adapter in the first layer would: the gradient passes through every layer.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        return model
    if method.startswith("ours:"):
        config = C3AConfig(block_size=case.b, target_modules=targets)
        model = apply(model, config, backend=method.removeprefix("ours:"))
    else:
        peft = importlib.import_module("peft")
        rank = cases.MODEL_LORA_RANK
        config = (
            peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
            if method == "peft_lora"
            else peft.C3AConfig(block_size=case.b, target_modules=targets)
        )
        model = peft.get_peft_model(model, config)
    if peers.is_c3a(method):
        _fill(model)
    return model


def training_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """A step on the adapter's parameters; its learning rate is zero, so that every step computes the same."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0) if trained else None

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _fill(model: nn.Module) -> None:
    """Fill every circulant from one seed, in the order of layers, which all methods share."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "c3a_kernel" in name:
            out_blocks, in_blocks, b = parameter.shape
            part = cases.LayerCase(1, in_blocks * b, out_blocks * b, b)
            with torch.no_grad():
                parameter.copy_(peers.kernel_values(part, parameter.device))


@torch.no_grad()
def check(models: dict[str, Any], ids: Tensor) -> None:
    """Hold our adapted models against PEFT's C3A by the hidden state after the first layer, where adapters must show.

    Raises:
        GateError: they differ by more than rounding explains, or not from the frozen model.
    """
    if "peft_c3a" not in models:
        return
    hidden = {
        name: model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        for name, model in models.items()
        if name == "base" or peers.is_c3a(name)
    }
    truth = hidden.pop("peft_c3a")
    tolerance = TOLERANCES[truth.dtype]
    if gate.relative_error(hidden.pop("base"), truth) <= 2 * tolerance:
        raise gate.GateError("the adapters do not show in the model's hidden states")
    for name, found in hidden.items():
        error = gate.relative_error(found, truth)
        if not error <= tolerance:
            raise gate.GateError(
                f"hidden states of {name} are wrong: {error:.2g} from PEFT's, allowed: {tolerance:.2g}"
            )
