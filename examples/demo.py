"""Adapt a language model to code with C3A, beside PEFT's C3A and PEFT's LoRA: `python examples/demo.py`.

Without arguments it needs no network and about three minutes on two CPU cores. A byte-level Llama of two million
parameters first learns English from Python's documentation. Three adapters then teach it Python source, from the
standard library: C3A computed by c3a_triton, C3A computed by PEFT, and LoRA, on the same batches and with about the
same number of parameters. The adapter c3a_triton trained is saved, loaded by PEFT and merged, and the logits compared.

`--model FOLDER` takes a causal language model of your own instead, `--data PATH` your own text file or folder.
"""

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine: nothing asks the hub
# Threads that wait by spinning stop one another where the cores are shared; on idle cores sleeping costs nothing here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import corpus
import figures
import peft
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from training import SHORT, Job, Run, Size, bits_per_byte, logits, train_base

import c3a_triton

# Each method's best learning rate in a sweep on this very job, 100 steps (C3A: 0.1, 0.3, 1, 3; LoRA: 3e-3, 1e-2, 2e-2),
# so that none is shown at another's expense. C3A's are larger because its ΔW carries a factor 1 / in_features. Longer
# trainings and larger models usually want about 1e-1 for C3A and 1e-3 for LoRA: `--lr-scale 0.1`.
C3A_LEARNING_RATE = 1.0
LORA_LEARNING_RATE = 1e-2

# Logits in float32 and bfloat16 that differ by no more than this part of the largest logit agree.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def with_c3a_triton(job: Job, base: Path, adapter: Path, block_size: int | str) -> tuple[Run, dict[str, float], int]:
    """The library in use: adapt, train, save, load with PEFT, merge.

    Returns the run, the differences that `compare` found, and the LoRA rank with about as many parameters.
    """
    model: Any = load_model(base, job.device)
    rank = 8 if block_size == "auto" else None  # "auto" takes the size nearest to √(in · out) / rank
    config = c3a_triton.C3AConfig(block_size=block_size, rank=rank, target_modules="all-linear")
    model = c3a_triton.apply(model, config)
    run = job.train("C3A, c3a_triton", model, C3A_LEARNING_RATE)
    model.c3a.save_pretrained(adapter)

    widths = sum(layer.in_features + layer.out_features for _, layer in model.c3a.layers())
    lora_rank = max(1, round(run.trainable_parameters / widths))

    inputs = job.windows[:8]
    adapted = logits(model, inputs)
    loaded_by_peft = peft.PeftModel.from_pretrained(load_model(base, job.device), adapter)
    merged = model.c3a.merge_and_unload()
    differences = {
        "the adapter's file loaded by PEFT": compare(logits(loaded_by_peft, inputs), adapted),
        "merged into the base": compare(logits(merged, inputs), adapted),
    }
    return run, differences, lora_rank


def with_peft(job: Job, method: str, base: Path, adapter: Path, config: Any, learning_rate: float) -> Run:
    """The same with an adapter of PEFT's."""
    model = peft.get_peft_model(load_model(base, job.device), config)
    run = job.train(method, model, learning_rate)
    model.save_pretrained(adapter)
    return run


def compare(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def load_model(folder: Path, device: torch.device) -> nn.Module:
    """The causal language model in `folder`: float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in `folder`; None, meaning bytes, where it holds none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def prepare(
    base: Path,
    text: corpus.Text,
    steps: int,
    size: Size,
    device: torch.device,
    progress: Progress,
    lr_scale: float,
) -> Job:
    """Draw the batches, and measure the base on held-out text."""
    tokenizer = load_tokenizer(base)
    model: Any = load_model(base, device)
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        raise ValueError(f"--model {base}: PEFT's C3A, which this demo compares with, adapts nn.Linear and not Conv1D")
    if tokenizer is None and model.config.vocab_size < corpus.BYTES:
        raise ValueError(f"--model {base}: no tokenizer there, and a vocabulary too small for bytes")
    train, held_out = corpus.tokens_of(text.train, tokenizer), corpus.tokens_of(text.held_out, tokenizer)
    bytes_per_token = len(text.held_out) / len(held_out)
    windows = corpus.spread_windows(held_out, size.held_out_windows, size.length).to(device)
    return Job(
        batches=corpus.sample_batches(train, steps, size.batch, size.length, seed=1),
        windows=windows,
        bytes_per_token=bytes_per_token,
        before=bits_per_byte(model, windows, bytes_per_token),
        evaluations=size.evaluations,
        device=device,
        progress=progress,
        lr_scale=lr_scale,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model saved by transformers")
    parser.add_argument("--data", type=Path, metavar="PATH", help="a text file, or a folder of them, to adapt to")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps per adapter")
    parser.add_argument("--block-size", metavar="B", help='an integer, or "auto", the default for your own model')
    parser.add_argument(
        "--lr-scale", type=float, default=1.0, metavar="F", help="factor on the adapters' learning rates"
    )
    parser.add_argument("--short", action="store_true", help="a few steps of a tiny model, to see that it runs")
    args = parser.parse_args(argv)
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; give a folder written by save_pretrained")
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data}: no such file or folder")
    if args.steps is not None and args.steps < 2:
        parser.error(f"--steps {args.steps}: at least 2 are needed")
    if (
        args.block_size is not None
        and args.block_size != "auto"
        and not (args.block_size.isdecimal() and int(args.block_size))
    ):
        parser.error(f'--block-size {args.block_size}: give a positive integer or "auto"')
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {error}")
    return args


def run_demo(args: argparse.Namespace, console: Console) -> int:
    """Train the base and the adapters, compare, report; returns 0 if the logits agree."""
    size, device, out = SHORT if args.short else Size(), torch.device(args.device), args.out
    text = corpus.split(corpus.standard_library() if args.data is None else corpus.files_at(args.data))
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        if args.model is None:
            base, block_size = out / "base", args.block_size or size.block_size
            train_base(base, size, device, progress)
        else:
            base, block_size = args.model, args.block_size or "auto"
        job = prepare(base, text, args.steps or size.steps, size, device, progress, args.lr_scale)
        block_size = block_size if block_size == "auto" else int(block_size)

        folders = [out / "c3a_triton", out / "peft_c3a", out / "peft_lora"]
        ours, differences, lora_rank = with_c3a_triton(job, base, folders[0], block_size)
        # PEFT reads the configuration that c3a_triton wrote, resolved block sizes included.
        same = peft.C3AConfig.from_pretrained(folders[0])
        same.inference_mode = False
        lora = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        runs = [
            ours,
            with_peft(job, "C3A, PEFT", base, folders[1], same, C3A_LEARNING_RATE),
            with_peft(job, f"LoRA r={lora_rank}, PEFT", base, folders[2], lora, LORA_LEARNING_RATE),
        ]
    for run, folder in zip(runs, folders, strict=True):
        run.adapter_bytes = (folder / "adapter_model.safetensors").stat().st_size
    figures.show_table(console, runs)
    figures.plot(runs, out / "loss.png")
    (out / "report.json").write_text(json.dumps({"runs": [asdict(run) for run in runs], "differences": differences}))
    console.print(
        f"\nwritten to {out}: loss.png, report.json, adapters in {', '.join(folder.name for folder in folders)}"
    )

    bound = AGREEMENT[next(load_model(base, device).parameters()).dtype]
    for name, difference in differences.items():
        verdict = "agrees" if difference <= bound else "DIFFERS"
        console.print(f"logits, {name}: largest difference {difference:.1e} of the largest logit: {verdict}")
    return 0 if all(difference <= bound for difference in differences.values()) else 1


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    # The terminal belongs to the demo's own bars.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        return run_demo(args, console)
    except (OSError, ValueError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
