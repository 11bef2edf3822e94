"""C3A on the experts of mixture-of-experts models: `python examples/moe.py`.

A Qwen3-MoE and a gpt-oss, small and with random weights, so that nothing is downloaded: adapt all experts beside the
attention, train on a text that Python ships, save, load into a new copy of the base, merge. Half a minute on two cores.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import torch
import transformers
from torch import Tensor

import c3a_triton

# Logits in float32 that differ by no more than this part of the largest logit agree.
AGREEMENT = 1e-4


def qwen3_moe() -> Any:
    """A Qwen3-MoE: experts as [E, out, in], gate above up."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=corpus.BYTES,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> Any:
    """A gpt-oss: experts as [E, in, out] with biases, rows of gate and up in turn."""
    config = transformers.GptOssConfig(
        vocab_size=corpus.BYTES,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=64,
    )
    return transformers.GptOssForCausalLM(config)


def train(model: Any, batches: Sequence[Tensor], learning_rate: float) -> list[float]:
    """Losses, step by step."""
    optimizer = torch.optim.AdamW(c3a_triton.param_groups(model, lr=learning_rate))
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Of every position."""
    return model.eval()(input_ids=ids).logits


def run(name: str, folder: Path, steps: int) -> None:
    """All of it for one model; raises where logits differ."""
    build = {"qwen3-moe": qwen3_moe, "gpt-oss": gpt_oss}[name]
    torch.manual_seed(0)
    model = build()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    config = c3a_triton.C3AConfig(block_size=16, target_modules="all-linear", target_parameters="all-experts")
    model = c3a_triton.apply(model, config)
    print(f"{name}:")
    model.c3a.print_trainable_parameters()

    tokens = corpus.tokens_of(corpus.documentation(), None)
    losses = train(model, corpus.sample_batches(tokens, steps, 4, 64, seed=1), 1.0)
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    ids = tokens[:64][None]
    adapted = logits(model, ids)
    model.c3a.save_pretrained(folder)

    fresh = build()
    fresh.load_state_dict(base)
    loaded = c3a_triton.load_adapter(fresh, folder)
    merged = model.c3a.merge_and_unload()
    for what, found in {"loaded": logits(loaded, ids), "merged": logits(merged, ids)}.items():
        difference = float((found - adapted).abs().max() / adapted.abs().max())
        print(f"{what}: logits differ by {difference:.1e} of the largest")
        if not difference <= AGREEMENT:
            raise SystemExit(f"{name}, {what}: that is more than rounding")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("qwen3-moe", "gpt-oss"):
            run(name, Path(folder) / name, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
