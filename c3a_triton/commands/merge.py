"""`c3a-triton merge`: an adapter into a plain model folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from c3a_triton.adapters.report import format_bytes
from c3a_triton.adapters.samples import difference, first_output, output_of, sample_inputs
from c3a_triton.api import load_adapter
from c3a_triton.bases.structure import load_structure
from c3a_triton.benchmark.machine import available_memory
from c3a_triton.errors import CheckpointError, ConfigError

from .folder_merge import merge_folder
from .options import device_option, print_json

__all__ = ["run"]

# Of the largest output, with the sums in float32: what rounding the merged weights once may change.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FLOAT32_BYTES = 4
# A model is loaded in its own dtype and then widened, and its forward takes some.
_ROOM = 1.25


class _NotChecked(Exception):
    """Why the merged model cannot be held against model and adapter."""


def run(args: argparse.Namespace) -> int:
    """The command."""
    device = device_option(args.device)
    checked: dict[str, float] = {}
    not_checked: list[str] = []

    def leave_out(reason: _NotChecked) -> None:
        if args.check:
            raise ConfigError(f"--check: {reason}") from reason
        _tell(f"not checked: {reason}")
        not_checked.append(str(reason))

    def verify(folder: Path) -> None:
        _tell("comparing outputs")
        try:
            checked.update(_compare(args.model, args.adapter, folder, device))
        except _NotChecked as reason:
            leave_out(reason)

    if args.check is not False:
        try:
            _check_possible(load_structure(args.model), device)
        except _NotChecked as reason:
            leave_out(reason)
    merged = merge_folder(
        args.model,
        args.adapter,
        args.output,
        force=args.force,
        device=device,
        merge_uncalled=args.merge_uncalled,
        verify=None if args.check is False or not_checked else verify,
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
            "not_checked": not_checked[0] if not_checked else None,
        }
        print_json(document)
        return 0
    print(f"{merged.layers} layers merged into {merged.path} ({format_bytes(merged.weights_bytes)})")
    if merged.untied:
        what = "is false in its config.json" if merged.flag_cleared else "stays true: transformers 5 can load that"
        print(f"the embeddings are no longer tied; tie_word_embeddings {what}")
    if checked:
        print(
            f"outputs differ by {checked['difference']:.2g} of the largest (allowed: {checked['tolerance']:.2g}); the "
            f"adapter changes them by {checked['effect']:.2g}"
        )
        if checked["effect"] <= checked["tolerance"]:
            print("that is no more than what is allowed: such an effect is not checked, and may be lost in rounding")
        if (reached := checked["reached"]) < merged.layers:
            print(f"the inputs reach {reached:.0f} of the {merged.layers} adapted layers: the others are not checked")
    return 0


def _tell(message: str) -> None:
    print(f"merge: {message}", file=sys.stderr)


def _check_possible(structure: Any, device: torch.device) -> None:
    """Raise why a model cannot be checked, as far as that can be told without its weights.

    Raises:
        _NotChecked: its inputs are not known, or it does not fit into memory.
    """
    if not sample_inputs(structure):
        raise _NotChecked(f"a {type(structure).__name__} takes inputs that are not known here")
    needed = int(sum(parameter.numel() for parameter in structure.parameters()) * _FLOAT32_BYTES * _ROOM)
    free = {"main memory": available_memory()}
    if device.type == "cuda":
        free["GPU memory"] = torch.cuda.mem_get_info(device)[0]
    for where, amount in free.items():
        if amount is not None and amount < needed:
            raise _NotChecked(
                f"the model takes {format_bytes(needed)} of {where} in float32, and {format_bytes(amount)} are free"
            )


def _compare(model: str, adapter: str, merged: Path, device: torch.device) -> dict[str, float]:
    """How far what the merged model computes is from what model and adapter compute, over the largest output.

    And how many of the adapted layers what was made up reaches: text alone passes by those for pictures.

    Raises:
        CheckpointError: farther than rounding explains, or loading the merged model has to make values up.
        _NotChecked: the model does not take the inputs that were made up for it, they reach no adapted layer, or it
            has itself values that loading makes up.
    """
    structure = load_structure(model)
    cls: Any = type(structure)
    # In the folder's own dtype, which transformers 5 takes unasked and transformers 4 does not.
    loaded, info = cls.from_pretrained(model, dtype="auto", output_loading_info=True)
    missing = set(info["missing_keys"])
    loaded = loaded.float().to(device)
    try:
        inputs, before = first_output(loaded, sample_inputs(structure))
    except Exception as error:  # whatever a model says about inputs that are made up
        raise _NotChecked(f"a {cls.__name__} does not take the inputs made up for it: {error}") from error
    adapted = load_adapter(loaded, adapter)
    reached: set[nn.Module] = set()
    for _, layer in adapted.c3a.layers():
        layer.register_forward_pre_hook(lambda module, args: reached.add(module))
    expected = output_of(adapted, inputs)
    if not reached:
        raise _NotChecked(f"the inputs made up for a {cls.__name__} reach none of the adapted layers")
    if expected.isnan().any() or not expected.isfinite().any():
        raise _NotChecked(f"what a {cls.__name__} with the adapter computes of made-up inputs is not finite")
    del loaded
    loaded, info = cls.from_pretrained(merged, dtype="auto", output_loading_info=True)
    still_missing = set(info["missing_keys"])
    if lost := sorted(still_missing - missing):
        raise CheckpointError(
            f"the merged folder has no {', '.join(lost[:5])}, which the model's has; nothing was written"
        )
    if still_missing:
        raise _NotChecked(f"{model} has no {min(still_missing)}, which loading fills with random values")
    tolerance = TOLERANCES[loaded.dtype]
    found = output_of(loaded.float().to(device), inputs)
    away = difference(found, expected)
    if not away <= tolerance:
        raise CheckpointError(
            f"the merged model's output differs from that of model and adapter by {away:.2g} of the largest, more than "
            f"the {tolerance:.2g} that rounding explains; nothing was written. Where the adapter changes a weight that "
            "other layers share (a warning says so), no merged weight computes what it computes: --no-check writes it "
            "all the same"
        )
    effect = difference(before, expected)
    return {"difference": away, "tolerance": tolerance, "effect": effect, "reached": len(reached)}
