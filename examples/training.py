"""The demo's base model, its training loop, and what is measured on the way: the same for every adapter."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
import transformers
from rich.progress import Progress
from torch import Tensor, nn

__all__ = ["SHORT", "Job", "Run", "Size", "bits_per_byte", "logits", "train", "train_base"]

BASE_LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    width: int = 256
    layers: int = 3
    block_size: int = 32
    base_steps: int = 240
    base_batch: int = 8
    steps: int = 100
    batch: int = 4
    length: int = 128
    held_out_windows: int = 64
    evaluations: int = 5


SHORT = Size(
    width=64, layers=2, block_size=8, base_steps=8, steps=6, batch=2, length=64, held_out_windows=4, evaluations=2
)


@dataclass
class Run:
    """One adapter's training: what the table and the plot show."""

    method: str
    trainable_parameters: int
    seconds_per_step: float
    before: float  # bits per byte of held-out text, as the two below
    after: float
    curve: list[tuple[int, float]]
    training_curve: list[float]
    adapter_bytes: int = 0


def train(
    model: nn.Module,
    batches: list[Tensor],
    learning_rate: float,
    device: torch.device,
    advance: Callable[[str], None],
    evaluate: Callable[[int], None] = lambda step: None,
) -> tuple[list[float], list[float]]:
    """AdamW without weight decay, a short warm-up, then linear decay; returns each step's loss (nats) and seconds."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, len(batches) // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0) * (1.0 - step / len(batches))
    )
    losses, seconds = [], []
    model.train()
    for step, batch in enumerate(batches):
        evaluate(step)
        batch = batch.to(device)
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device, so the clock below counts its work
        seconds.append(time.perf_counter() - start)
        advance(f"loss {losses[-1]:.2f}")
    evaluate(len(batches))
    return losses, seconds


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in float32."""
    model.eval()
    return model(input_ids=inputs).logits.float()


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor, bytes_per_token: float) -> float:
    """Mean loss over `windows` `(count, length)`, in bits per byte of their text."""
    training = model.training
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in windows.split(8)]
    model.train(training)
    return statistics.fmean(losses) / math.log(2) / bytes_per_token


@dataclass(frozen=True)
class Job:
    """What every adapter shares: the text, the batches in their order, the held-out windows, the device."""

    batches: list[Tensor]
    windows: Tensor  # (count, length) of held-out text
    bytes_per_token: float
    before: float  # the base's bits per byte
    evaluations: int
    device: torch.device
    progress: Progress
    lr_scale: float = 1.0  # factor on every adapter's learning rate

    def train(self, method: str, model: nn.Module, learning_rate: float) -> Run:
        """Train the adapter that `model` carries and take down its figures."""
        curve: list[tuple[int, float]] = []
        last = self.evaluations - 1
        marks = {round(i * len(self.batches) / last) for i in range(self.evaluations)}

        def evaluate(step: int) -> None:
            if step in marks:
                curve.append((step, bits_per_byte(model, self.windows, self.bytes_per_token)))

        advance = task_on(self.progress, method, len(self.batches))
        rate = learning_rate * self.lr_scale
        losses, seconds = train(model, self.batches, rate, self.device, advance, evaluate)
        return Run(
            method=method,
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            seconds_per_step=statistics.median(seconds),
            before=self.before,
            after=curve[-1][1],
            curve=curve,
            training_curve=[loss / math.log(2) / self.bytes_per_token for loss in losses],
        )


def train_base(folder: Path, size: Size, device: torch.device, progress: Progress) -> None:
    """Teach a byte-level Llama the English of Python's documentation and save it to `folder`."""
    config = transformers.LlamaConfig(
        vocab_size=corpus.BYTES + 2,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=corpus.BYTES,
        eos_token_id=corpus.BYTES + 1,
        pad_token_id=corpus.BYTES + 1,
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    tokens = corpus.tokens_of(corpus.documentation(), None)
    batches = corpus.sample_batches(tokens, size.base_steps, size.base_batch, size.length, seed=0)
    train(model, batches, BASE_LEARNING_RATE, device, task_on(progress, "the base, on English", len(batches)))
    model.save_pretrained(folder)


def task_on(progress: Progress, name: str, steps: int) -> Callable[[str], None]:
    """A bar for `name`; the function returned moves it by one step and shows a note."""
    task = progress.add_task(name, total=steps, note="")
    return lambda note: progress.update(task, advance=1, note=note)
