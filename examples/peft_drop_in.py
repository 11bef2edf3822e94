"""A fine-tuning script of PEFT and the Trainer, as it is and with one more line, side by side.

    python peft_drop_in.py

It trains the same model on the same batches twice, and then measures a training step (forward and backward): its time,
and the bytes that autograd saves. The frozen base alone is measured too, so that what C3A adds to it can be told.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import peft
import torch
import transformers
from einops import rearrange
from torch import Tensor, nn

import c3a_triton


@dataclass(frozen=True)
class Measured:
    """One model's step.

    Attributes:
        step_ms: median time of forward and backward, in milliseconds.
        saved_bytes: activations that autograd keeps between forward and backward.
    """

    step_ms: float
    saved_bytes: int


def base_model(options: argparse.Namespace) -> Any:
    """A Llama of random weights, or the user's model; in either case bytes are its tokens."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model:
        return transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    config = transformers.LlamaConfig(
        vocab_size=corpus.BYTES,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        max_position_embeddings=options.length,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(options: argparse.Namespace, *, faster: bool) -> Any:
    """The script's model. What `faster` adds is the one line."""
    config = peft.C3AConfig(block_size=options.block_size, target_modules="all-linear", task_type="CAUSAL_LM")
    base = base_model(options)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    if faster:
        model = c3a_triton.apply(model)
    return model


def windows(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """English text, cut into as many examples as the training takes."""
    text = torch.frombuffer(bytearray(corpus.documentation()), dtype=torch.uint8).long()
    examples = options.steps * options.batch
    rows = rearrange(text[: examples * options.length], "(row position) -> row position", row=examples)
    return [{"input_ids": row, "labels": row} for row in rows]


def finetune(model: nn.Module, options: argparse.Namespace) -> list[float]:
    """The script itself; the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=0.1,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=windows(options))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure(models: dict[str, Any], options: argparse.Namespace) -> dict[str, Measured]:
    """Each model's step on the same batch; the models take turns, so that what else the machine does meets all."""
    device = next(next(iter(models.values())).parameters()).device
    ids = torch.stack([window["input_ids"] for window in windows(options)[: options.batch]]).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        # Without it a frozen base has no backward pass; with it every model's goes down to the embeddings.
        model.enable_input_require_grads()
        model.train()
        step(model, ids)
    for _ in range(options.rounds):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, ids)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measured(1e3 * statistics.median(seconds[name]), saved_bytes(model, ids))
        for name, model in models.items()
    }


def step(model: nn.Module, ids: Tensor) -> None:
    """One forward and backward pass."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    if ids.is_cuda:
        torch.cuda.synchronize()


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Memory that autograd keeps for one backward pass, parameters and buffers left out, each storage counted once."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)  # an address is not given away twice while its storage lives
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(storages.values())
    loss.backward()
    return total


def table(measured: dict[str, Measured], losses: dict[str, list[float]]) -> str:
    """What was measured, and what C3A adds to the frozen base in each."""
    base, theirs, ours = measured.values()

    def row(what: str, *values: object) -> str:
        return f"{what:<42}" + "".join(f"{value!s:>16}" for value in values)

    def compared(what: str, left: float, right: float, unit: str) -> str:
        return row(what, f"{left:.1f} {unit}", f"{right:.1f} {unit}", f"{left / right:.2f}" if right > 0 else "-")

    first, last = ([losses[name][index] for name in losses] for index in (0, -1))
    mib = 2**20
    return "\n".join(
        [
            row("", *losses, "ratio"),
            row("loss of the first step", *(f"{loss:.4f}" for loss in first), ""),
            row("loss of the last step", *(f"{loss:.4f}" for loss in last), ""),
            compared("step", theirs.step_ms, ours.step_ms, "ms"),
            compared(f"C3A's part (base: {base.step_ms:.1f} ms)", theirs.step_ms - base.step_ms,
                     ours.step_ms - base.step_ms, "ms"),
            compared("saved for backward", theirs.saved_bytes / mib, ours.saved_bytes / mib, "MiB"),
            compared(f"C3A's part (base: {base.saved_bytes / mib:.1f} MiB)",
                     (theirs.saved_bytes - base.saved_bytes) / mib, (ours.saved_bytes - base.saved_bytes) / mib, "MiB"),
        ]
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Train twice, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of transformers in a folder, in place of a random one")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--width", type=int, default=512, help="hidden size of the random model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of an example")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="training steps")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each model")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(argv)

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    models = {"PEFT": adapted(options, faster=False), "with one line": adapted(options, faster=True)}
    losses = {name: finetune(copy.deepcopy(model), options) for name, model in models.items()}
    base = base_model(options).requires_grad_(False).to(models["PEFT"].device)
    measured = measure({"base": base} | models, options)
    print(table(measured, losses))
    print(
        "The first losses agree: the forward pass is the same. The later ones need not: PEFT's input gradient is "
        "wrong, so that with PEFT only the topmost adapters are trained on the right one."
    )
    if options.json:
        report = {"losses": losses} | {name: asdict(one) for name, one in measured.items()}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
