"""`c3a-triton merge`: an adapter into a plain model folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from c3a_triton.api import load_adapter
from c3a_triton.errors import CheckpointError, ConfigError
from c3a_triton.folder_merge import merge_folder
from c3a_triton.report import format_bytes
from c3a_triton.structure import load_structure

from .options import add_command, device_option, print_json

__all__ = ["add"]

# Of the largest logit, with the sums in float32: what rounding the merged weights once may change.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROMPT_TOKENS = 16
_EXAMPLES = """\
  c3a-triton merge --model path/to/model --adapter path/to/adapter --output merged
  c3a-triton merge --model path/to/model --adapter path/to/adapter --output merged --force --check"""


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "merge",
        "merge an adapter into a plain model folder, shard by shard",
        "Write a model folder with an adapter merged into its weights, tensor by tensor: the model need not fit into\n"
        "memory. The folder appears when it is complete. Every weight is summed in float32 and rounded once.",
        _EXAMPLES,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a transformers folder with safetensors")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace the output where it is a model's folder")
    parser.add_argument("--device", default="cpu", help="where the sums are computed: cpu (the default) or cuda")
    parser.add_argument(
        "--check",
        action="store_true",
        help="load both models in float32 and compare the logits of a random prompt; where they differ by more than "
        "rounding explains, nothing is written",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    device = device_option(args.device)
    checked: dict[str, float] = {}
    if args.check and not hasattr(_text_config(load_structure(args.model)), "vocab_size"):
        raise ConfigError(f"{args.model} takes no tokens: --check compares the logits of language models")

    def verify(folder: Path) -> None:
        _tell("comparing logits")
        checked.update(_compare_logits(args.model, args.adapter, folder, device))

    merged = merge_folder(
        args.model,
        args.adapter,
        args.output,
        force=args.force,
        device=device,
        verify=verify if args.check else None,
        progress=_tell,
    )
    if args.json:
        document = {
            "output": str(merged.path),
            "layers": merged.layers,
            "changed": list(merged.changed),
            "added": list(merged.added),
            "untied": merged.untied,
            "weights_bytes": merged.weights_bytes,
            "check": checked or None,
        }
        print_json(document)
        return 0
    print(f"{merged.layers} layers merged into {merged.path} ({format_bytes(merged.weights_bytes)})")
    if merged.untied:
        what = "is false in its config.json" if merged.flag_cleared else "stays true: transformers 5 can load that"
        print(f"the embeddings are no longer tied; tie_word_embeddings {what}")
    if checked:
        print(
            f"logits differ by {checked['difference']:.2g} of the largest (allowed: {checked['tolerance']:.2g}); the "
            f"adapter changes them by {checked['effect']:.2g}"
        )
    return 0


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _tell(message: str) -> None:
    print(f"merge: {message}", file=sys.stderr)


@torch.no_grad()
def _compare_logits(model: str, adapter: str, merged: Path, device: torch.device) -> dict[str, float]:
    """How far the merged model's logits are from those of model and adapter, over the largest logit.

    Raises:
        CheckpointError: farther than rounding explains.
    """
    cls: Any = type(load_structure(model))

    def logits(loaded: Any) -> torch.Tensor:
        prompt = torch.Generator().manual_seed(0)
        ids = torch.randint(_text_config(loaded).vocab_size, (1, PROMPT_TOKENS), generator=prompt).to(device)
        decoder = {"decoder_input_ids": ids} if loaded.config.is_encoder_decoder else {}
        return loaded(input_ids=ids, **decoder)[0]

    # In the folder's own dtype, which transformers 5 takes unasked and transformers 4 does not.
    loaded = cls.from_pretrained(model, dtype="auto").float().to(device).eval()
    before = logits(loaded)
    expected = logits(load_adapter(loaded, adapter))
    del loaded
    loaded = cls.from_pretrained(merged, dtype="auto")
    tolerance = TOLERANCES[loaded.dtype]
    found = logits(loaded.float().to(device).eval())
    largest = expected.abs().max()
    difference = ((found - expected).abs().max() / largest).item()
    effect = ((before - expected).abs().max() / largest).item()
    if not difference <= tolerance:
        raise CheckpointError(
            f"the merged model's logits differ from those of model and adapter by {difference:.2g} of the largest, "
            f"more than the {tolerance:.2g} that rounding explains; nothing was written"
        )
    return {"difference": difference, "tolerance": tolerance, "effect": effect}
