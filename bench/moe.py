"""C3A on stacked experts against PEFT's LoRA of them: `python -m bench.moe [--json FILE]`.

A small Qwen3-MoE with random weights: a training step, and what a forward keeps for its backward, of the frozen model,
of PEFT's LoRA (`target_parameters`) and of C3A in several block sizes, over the same weights, in turn, medians. On a
CPU in float32, the time of one thread; with `--device cuda` in bfloat16, wall time. A layer of Qwen3-30B-A3B is

    --layers 1 --hidden 2048 --inter 768 --experts 128 --top-k 8 --tokens 8192 --block-sizes 128
"""

import argparse
import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import c3a_triton
from c3a_triton.benchmark import models, peers, timing

from . import report

__all__ = ["main", "summary"]

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def random_model(device: torch.device, n_layers: int, hidden: int, inter: int, n_experts: int, top_k: int) -> Any:
    """A frozen Qwen3-MoE; little of it but experts."""
    transformers = importlib.import_module("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        moe_intermediate_size=inter,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=n_experts,
        num_experts_per_tok=top_k,
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return models.random_model(transformers.Qwen3MoeForCausalLM, config, device, dtype)


def adapted(method: str, base: Any, rank: int) -> Any:
    """A copy of `base` over the same weights, all its experts adapted: "base", "peft_lora" or "ours, b=…"."""
    model = models.shared_copy(base)
    if method == "base":
        # As an adapter in the first layer would: the gradient passes through every layer.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        return model
    if method == "peft_lora":
        peft = importlib.import_module("peft")
        return peft.get_peft_model(
            model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=PARAMETERS)
        )
    config = c3a_triton.C3AConfig(block_size=int(method.rpartition("=")[2]), target_parameters=PARAMETERS)
    return c3a_triton.apply(model, config)


def measure(adapted_models: dict[str, Any], ids: Tensor, seconds: float) -> list[dict[str, Any]]:
    """A row per method."""
    steps = {method: models.training_step(model, ids) for method, model in adapted_models.items()}
    if ids.device.type == "cpu":
        times = timing.alternate(steps, seconds=seconds)
    else:
        calls: Any = {method: (lambda: None, lambda _, step=step: step()) for method, step in steps.items()}
        times = timing.in_turn(calls, ids.device, seconds=seconds, warm_up=3)
    return [
        {
            "method": method,
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "step": asdict(times[method]),
            "saved": asdict(timing.saved_bytes(model, ids)),
        }
        for method, model in adapted_models.items()
    ]


def summary(rows: list[dict[str, Any]]) -> str:
    """The results as a markdown table."""
    peft = next(row for row in rows if row["method"] == "peft_lora")
    cells = [
        [
            row["method"],
            f"{row['trained']:,}",
            report.format_seconds(row["step"]["median"]),
            f"{row['step']['median'] / peft['step']['median']:.2f}",
            report.format_bytes(row["saved"]["activations"]),
            f"{row['saved']['activations'] / peft['saved']['activations']:.2f}",
        ]
        for row in rows
    ]
    return report.format_table(["method", "trained", "step", "/ LoRA's", "saved for backward", "/ LoRA's"], cells)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and, with `--json`, write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--device", type=torch.device, default="cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="time in all (default: %(default)s)")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64], metavar="B", help="default: 16 64")
    for name, default, what in (
        ("layers", 8, "of the model"),
        ("hidden", 512, "width"),
        ("inter", 256, "width inside an expert"),
        ("experts", 16, "in a layer"),
        ("top-k", 4, "experts of a token"),
        ("tokens", 512, "in a batch"),
        ("rank", 16, "of LoRA"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    args = parser.parse_args(argv)
    missing = peers.why_no_peft()
    if missing is not None:
        print(f"bench.moe compares with PEFT: install it with `pip install peft`. {missing}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    base = random_model(args.device, args.layers, args.hidden, args.inter, args.experts, args.top_k)
    methods = ["base", "peft_lora", *(f"ours, b={b}" for b in args.block_sizes)]
    ids = torch.randint(base.config.vocab_size, (1, args.tokens), device=args.device)
    rows = measure({method: adapted(method, base, args.rank) for method in methods}, ids, args.seconds)
    print(summary(rows))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "device")}
        report.write_json(args.json, {"environment": report.environment(args.device), **settings, "rows": rows})
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
