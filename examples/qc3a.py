"""QC3A: fine-tune C3A adapters over a base in 4 (or 8) bits, as QLoRA does with LoRA: `python examples/qc3a.py`.

Without arguments it needs no network, no GPU and two to three minutes of one CPU core: it teaches a byte-level Llama
of two million parameters English, loads it in 4 bits through transformers and bitsandbytes, and trains an adapter on
Python source. The adapter is saved, loaded onto the quantized base afresh, and merged, which quantizes the sum again.

`--model FOLDER` takes a causal language model of your own instead, `--data PATH` your own text file or folder.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine: nothing asks the hub

import corpus
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from training import SHORT, Size, bits_per_byte, logits, task_on, train, train_base

import c3a_triton

LEARNING_RATE = 1.0  # for a job as short as this one; longer trainings and larger models usually want about 1e-1


def load_quantized(folder: Path, bits: int, device: torch.device) -> Any:
    """The causal language model in `folder`, its linear layers quantized as they are loaded."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if bits == 4:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": device}, local_files_only=True
    )


def tokenizer_in(folder: Path) -> Any | None:
    """The tokenizer in `folder`; None, meaning bytes, where it holds none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any((folder / name).exists() for name in names):
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def run(args: argparse.Namespace, console: Console) -> int:
    """Quantize, adapt, train, save, reload, merge; returns 0 if the reloaded model agrees with the trained one."""
    size, device, out = SHORT if args.short else Size(), torch.device(args.device), args.out
    text = corpus.split(corpus.standard_library() if args.data is None else corpus.files_at(args.data))
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        folder = args.model or out / "base"
        if args.model is None:
            train_base(folder, size, device, progress)
        tokenizer = tokenizer_in(folder)
        tokens, held_out = corpus.tokens_of(text.train, tokenizer), corpus.tokens_of(text.held_out, tokenizer)
        windows = corpus.spread_windows(held_out, size.held_out_windows, size.length).to(device)
        batches = corpus.sample_batches(tokens, args.steps or size.steps, size.batch, size.length, seed=1)

        def measure(model: Any) -> float:
            return bits_per_byte(model, windows, len(text.held_out) / len(held_out))

        model = load_quantized(folder, args.bits, device)
        megabytes = model.get_memory_footprint() / 2**20
        config = c3a_triton.C3AConfig(block_size="auto", rank=8, target_modules="all-linear")
        model = c3a_triton.apply(model, config)
        with model.c3a.disable_adapter():
            before = measure(model)
        train(model, batches, LEARNING_RATE, device, task_on(progress, f"C3A over {args.bits} bits", len(batches)))

    after, trained = measure(model), logits(model, windows[:8])
    model.c3a.save_pretrained(out / "adapter")
    again = c3a_triton.load_adapter(load_quantized(folder, args.bits, device), out / "adapter")
    difference = float((logits(again, windows[:8]) - trained).abs().max() / trained.abs().max())
    model.c3a.print_trainable_parameters()
    merged = measure(model.c3a.merge_and_unload())

    console.print(f"base in {args.bits} bits: {megabytes:.1f} MiB")
    console.print(f"bits per byte of held-out text: {before:.3f} before, {after:.3f} after, {merged:.3f} merged")
    agrees = difference <= (1e-5 if device.type == "cpu" else 5e-2)
    verdict = "agrees" if agrees else "DIFFERS"
    console.print(
        f"reloaded onto the quantized base: largest difference {difference:.1e} of the largest logit: {verdict}"
    )
    return 0 if agrees else 1


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model saved by transformers")
    parser.add_argument("--data", type=Path, metavar="PATH", help="a text file, or a folder of them, to adapt to")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of the base; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/qc3a"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps")
    parser.add_argument("--short", action="store_true", help="a few steps of a tiny model, to see that it runs")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: at least 1 is needed")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
    torch.manual_seed(0)
    try:
        return run(args, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    except (OSError, ValueError, ImportError) as error:
        print(f"qc3a.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
