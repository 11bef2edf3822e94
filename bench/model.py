"""A training step and a generation of a Llama-3.2-3B-shaped model: `python -m bench.model --out DIR`.

Random weights, batches of 4 with 212 and 768 tokens, adapters of b = 64 on q and v as in PEFT's method comparison, and
on all linear layers: ours, PEFT's C3A, PEFT's LoRA of rank 32 and the frozen model (whose step computes the gradients
of all activations), over the same weights, in turn. `--layers N` is for smaller cards.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c3a_triton.benchmark import cases, models, timing

from . import plots, report, runs, specialisations

__all__ = ["BRIEF", "SUBJECT", "brief", "goals", "launches", "main", "tables", "tasks"]

STEP_SECONDS, GENERATION_SECONDS = 15.0, 1.0
CHECKED_TOKENS = 16
BRIEF_SECONDS = 6.0  # of a step, in the GPU job's share
# Beside PEFT's methods; "fold", which is for inference, takes as long.
BRIEF_METHODS = ("base", "peft_lora", "peft_c3a", "ours:auto")

# The frozen model, and its copies by method.
_Built = Callable[[cases.ModelCase], tuple[Any, dict[str, Any]]]


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """A training step per case, then generation."""
    steps = cases.MODELS_TINY if setting.tiny else cases.MODELS
    built = _builder(setting, models.METHODS)
    for case in steps:
        worth = 0 if case.targets == cases.QV else 1
        step = partial(_measure, case, setting, built, _training, STEP_SECONDS)
        yield runs.Task(_key(case, setting), worth, step, 45.0)
    case = cases.GENERATION_TINY if setting.tiny else cases.GENERATION
    generation = partial(_measure, case, setting, built, _generation, GENERATION_SECONDS)
    yield runs.Task(f"generation, {_key(case, setting)}", 1, generation, 60.0)


def brief(setting: runs.Setting) -> Iterator[runs.Task]:
    """The steps that goals name, with fewer samples."""
    built = _builder(setting, BRIEF_METHODS)
    seconds = 25.0  # with building the models, which the next case finds built
    for case in cases.MODELS_TINY if setting.tiny else cases.MODELS:
        if case.targets == cases.QV:
            step = partial(_measure, case, setting, built, _training, BRIEF_SECONDS)
            yield runs.Task(_key(case, setting), 0, step, seconds)
            seconds = 12.0


def _builder(setting: runs.Setting, methods: Sequence[str]) -> _Built:
    """What builds the model of a case and adapts it, once for cases one after another that differ in tokens alone."""
    methods = [method for method in methods if method in setting.methods]

    @functools.lru_cache(maxsize=1)
    def of(case: cases.ModelCase) -> tuple[Any, dict[str, Any]]:
        base = models.llama(setting.device, tiny=setting.tiny, n_layers=setting.n_layers)
        return base, {method: models.adapted(method, base, case) for method in methods}

    def built(case: cases.ModelCase) -> tuple[Any, dict[str, Any]]:
        return of(replace(case, n_tokens=0, batch=1))

    return built


def _key(case: cases.ModelCase, setting: runs.Setting) -> str:
    size = "" if setting.n_layers is None else f" {setting.n_layers} layers"
    return f"{case.name} b={case.b} batch {case.batch} T={case.n_tokens}{size}"


def _measure(
    case: cases.ModelCase,
    setting: runs.Setting,
    built: _Built,
    make: Callable[[Any, Tensor, cases.ModelCase], Callable[[], object]],
    seconds: float,
    record: runs.Record,
) -> None:
    record |= {"case": asdict(case), "times": {}}
    device = setting.device
    base, adapted = built(case)
    record["n_layers"] = base.config.num_hidden_layers
    ids = torch.randint(base.config.vocab_size, (case.batch, case.n_tokens), device=device)
    models.check(adapted, ids[:1, :CHECKED_TOKENS])
    calls = {method: make(model, ids, case) for method, model in adapted.items()}
    timings = timing.in_turn(
        {method: (lambda: None, lambda _, call=call: call()) for method, call in calls.items()},  # type: ignore[misc]
        device,
        seconds=0.0 if setting.tiny else seconds,
        warm_up=3 if make is _training and not setting.tiny else 1,
    )
    record["times"] = {method: asdict(found) for method, found in timings.items()}


def _training(model: Any, ids: Tensor, case: cases.ModelCase) -> Callable[[], None]:
    return models.training_step(model.train(), ids)


def _generation(model: Any, ids: Tensor, case: cases.ModelCase) -> Callable[[], None]:
    """So many tokens, greedily, after a prompt of an eighth as many."""
    model.eval()
    prompt = ids[:, : max(1, case.n_tokens // 8)]

    @torch.no_grad()
    def generate() -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=case.n_tokens,
            min_new_tokens=case.n_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return generate


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the tasks launch: the linear layers of a decoder layer; see `specialisations`."""
    shape = cases.LLAMA_3B
    kv = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    prompt = cases.GENERATION.n_tokens // 8
    n_tokens = (1, prompt, CHECKED_TOKENS, *(case.batch * case.n_tokens for case in cases.MODELS))
    sizes = shape["hidden_size"], kv, shape["intermediate_size"], cases.MODELS[0].b
    return specialisations.of_layers([cases.DecoderCase(n, *sizes) for n in n_tokens], device)


def _median(record: runs.Record | None, method: str) -> float | None:
    return None if record is None else record.get("times", {}).get(method, {}).get("median")


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: a row per case."""
    methods = list(dict.fromkeys(method for record in records.values() for method in record.get("times", {})))
    rows = []
    for key, record in records.items():
        base = _median(record, "base")
        row: list[object] = [key, record.get("n_layers", "-")]
        for method in methods:
            seconds = _median(record, method)
            if seconds is None:
                row.append(record["status"])
                continue
            over = f" ({seconds / base:.2f})" if base and method != "base" else ""
            peak = record["times"][method]["peak_bytes"]
            row.append(report.format_seconds(seconds) + over + (f"; {report.format_bytes(peak)}" if peak else ""))
        rows.append(row)
    lines = ["", "Wall time, median of calls in turn (over the frozen model's); peak memory beyond the weights."]
    return [*lines, "", report.format_table(["case", "layers", *methods], rows)]


def goals(records: runs.Records) -> list[report.Goal]:
    """The goals for a training step of the whole model."""
    found = []
    for case in cases.MODELS:
        if case.targets != cases.QV:
            continue
        record = next((r for r in records.values() if r.get("case") == _as_json(case) and _is_whole(r)), None)
        for method, name, limit in (("peft_lora", "PEFT LoRA r=32", 1.0), ("peft_c3a", "PEFT C3A", 0.8)):
            ours, theirs = _median(record, "ours:auto"), _median(record, method)
            value = ours / theirs if ours and theirs else None
            found.append(report.at_most(f"3B step, q and v, b=64, T={case.n_tokens}: ours / {name}", limit, value))
    return found


def _as_json(case: cases.ModelCase) -> dict[str, Any]:
    return asdict(case) | {"targets": list(case.targets)}


def _is_whole(record: runs.Record) -> bool:
    return record.get("n_layers") == cases.LLAMA_3B["num_hidden_layers"]


def plot(records: runs.Records, path: Path) -> None:
    """Time over the frozen model's: a panel per case, a bar per method."""
    panels = {}
    for key, record in records.items():
        base = _median(record, "base")
        if base:
            panels[key] = {method: found["median"] / base for method, found in record["times"].items()}
    if panels:
        plots.bars(panels, path, y="time / frozen model")


SUBJECT = runs.Subject("model", "A Llama-3.2-3B-shaped model: training step and generation", tasks, tables, goals, plot)
BRIEF = replace(SUBJECT, tasks=brief)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
