"""`c3a-triton bench`: one layer or one model against PEFT on this machine."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from c3a_triton.adapters.report import format_bytes, format_seconds, format_table
from c3a_triton.adapters.targets import find_targets
from c3a_triton.bases.structure import load_structure, transformers_package
from c3a_triton.benchmark import cases, gate, layer, models, peers, timing
from c3a_triton.benchmark.machine import cpu_name
from c3a_triton.errors import C3AError, ConfigError
from c3a_triton.files.block_sizes import check_block_size
from c3a_triton.files.config import C3AConfig
from c3a_triton.operator import dispatch

from .options import device_option, module_choice, print_json

__all__ = ["run"]

MODEL_CHECKED_TOKENS = 16
MODEL_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 1e-1}
_LABELS = {"base": "frozen base", "peft_lora": "PEFT LoRA", "peft_c3a": "PEFT C3A", "dense": "dense ΔW"}


def run(args: argparse.Namespace) -> int:
    """The command."""
    device = device_option(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    missing = peers.why_no_peft()
    try:
        document = (_layer if args.model is None else _model)(args, device, dtype, missing is None)
    except gate.GateError as error:
        raise C3AError(f"nothing was measured, because a result is wrong: {error}") from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    document = {"device": str(device), "device_name": name, "dtype": dtype, "peft_missing": missing} | document
    if args.json:
        print_json(document)
    else:
        print(_text(document))
    return 0


def _layer(args: argparse.Namespace, device: torch.device, dtype: str, with_peft: bool) -> dict[str, Any]:
    case = cases.LayerCase(args.tokens, args.in_features, args.out_features, args.block_size, dtype)
    check_block_size(case.b, case.in_features, case.out_features, case.label)
    backends = args.backends or ["auto"]
    if args.backends is None and device.type == "cuda":
        others = ("direct", "fft", "expand", "torch", "fold")
        backends += [name for name in others if dispatch.why_not(name, device, getattr(torch, dtype)) is None]
    timer = timing.CudaTimer(device) if device.type == "cuda" else None
    times: dict[str, dict[str, Any]] = {}
    works = {}
    for method in peers.methods(tuple(backends), with_peft=with_peft):
        work = layer.Workload.of(case, method, device)
        work.check()
        if timer is not None:
            times[method] = {mode: asdict(timer.measure(work.calls()[mode])) for mode in ("forward", "both")}
        else:
            works[method] = work
    for mode in ("forward", "both") if works else ():
        calls = {method: work.calls()[mode] for method, work in works.items()}
        for method, found in _in_turn(calls, device, args.seconds / 2).items():
            times.setdefault(method, {})[mode] = asdict(found)
    return {"case": asdict(case), "times": times}


def _in_turn(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, timing.Timing]:
    return timing.in_turn(
        {method: (lambda: None, lambda _, call=call: call()) for method, call in calls.items()},  # type: ignore[misc]
        device,
        seconds=seconds,
    )


def _model(args: argparse.Namespace, device: torch.device, dtype: str, with_peft: bool) -> dict[str, Any]:
    structure: Any = load_structure(args.model)
    if not isinstance(structure, transformers_package().GenerationMixin) or structure.config.is_encoder_decoder:
        raise ConfigError(f"{args.model} is a {type(structure).__name__}: only causal language models are measured")
    if args.layers is not None:
        structure.config.get_text_config().num_hidden_layers = args.layers
        with torch.device("meta"):
            structure = type(structure)(structure.config)
    config = C3AConfig(
        block_size=args.block_size,
        target_modules=module_choice(args.target_modules),
        exclude_modules=module_choice(args.exclude_modules),
    )
    targets = tuple(target.name for target in find_targets(structure, config))
    case = cases.ModelCase(f"{len(targets)} layers", args.tokens, targets, args.batch, args.block_size)
    model = models.random_model(type(structure), structure.config, device, getattr(torch, dtype))
    peft_methods = ("peft_lora", "peft_c3a") if with_peft else ()
    methods = ("base", *peft_methods, *(f"ours:{backend}" for backend in args.backends or ["auto"]))
    adapted = {method: models.adapted(method, model, case) for method in methods}
    ids = torch.randint(model.config.get_text_config().vocab_size, (args.batch, args.tokens), device=device)
    _check_model(adapted, ids[:1, :MODEL_CHECKED_TOKENS])
    steps: dict[str, Callable[[], object]] = {method: models.training_step(adapted[method], ids) for method in methods}
    times = _in_turn(steps, device, args.seconds)
    case = replace(case, targets=())  # each by its full name: too many to tell
    return {
        "model": args.model,
        "class": type(structure).__name__,
        "case": asdict(case),
        "times": {method: {"step": asdict(found)} for method, found in times.items()},
    }


@torch.no_grad()
def _check_model(adapted: dict[str, Any], ids: torch.Tensor) -> None:
    """Hold our models against PEFT's C3A of the same circulants by their logits.

    Raises:
        GateError: they differ by more than the roundings of all layers explain.
    """
    if "peft_c3a" not in adapted:
        return
    truth = adapted["peft_c3a"](input_ids=ids).logits
    tolerance = MODEL_TOLERANCES[truth.dtype]
    for method, model in adapted.items():
        if method.startswith("ours:"):
            error = gate.relative_error(model(input_ids=ids).logits, truth)
            if not error <= tolerance:
                raise gate.GateError(f"logits of {method}: {error:.2g} from PEFT's, allowed: {tolerance:.2g}")


def _text(document: dict[str, Any]) -> str:
    case = document["case"]
    if "model" in document:
        what = f"training step of {document['class']}, {case['name']} adapted, b = {case['b']}, {case['batch']} × "
    else:
        what = f"layer {case['in_features']} → {case['out_features']}, b = {case['b']}, "
    times = document["times"]
    modes = {"forward": "forward", "both": "forward + backward", "step": "step"}
    modes = {mode: label for mode, label in modes.items() if mode in times["base"]}
    header = ["", *(column for label in modes.values() for column in (label, "× base")), "peak memory"]
    rows = [header]
    for method, found in times.items():
        row = [_LABELS.get(method, method.replace("ours:", "c3a_triton, "))]
        for mode in modes:
            seconds = found[mode]["median"]
            row += [format_seconds(seconds), f"{seconds / times['base'][mode]['median']:.2f}"]
        peak = found[list(modes)[-1]]["peak_bytes"]
        rows.append([*row, "" if peak is None else format_bytes(peak)])
    lines = [
        f"{document['device_name']} ({document['device']}), {document['dtype']}: {what}{case['n_tokens']} tokens",
        "",
        format_table(rows, set(range(1, len(header)))),
    ]
    if document["peft_missing"]:
        lines += ["", f"{document['peft_missing']}. To compare: pip install peft"]
    return "\n".join(lines)
