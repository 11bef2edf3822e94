"""`autotune`: block sizes and backends for a model, under a budget, on this machine."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from c3a_triton import __version__
from c3a_triton._public import public
from c3a_triton.adapters.base_model import base_module_names, model_name_or_path
from c3a_triton.adapters.targets import with_task_heads
from c3a_triton.bases import structure
from c3a_triton.benchmark import peers
from c3a_triton.errors import CheckpointError, ConfigError
from c3a_triton.files.atomic import replace_file
from c3a_triton.files.config import CONFIG_NAME, C3AConfig
from c3a_triton.operator import bounds, dispatch
from c3a_triton.operator.launch import specs

from . import page, plots
from .costs import LORA_RANKS, PEFT_C3A, PEFT_LORA, Case, Costs, Setting, layer_cases, predicted_times
from .goal import MODES, OBJECTIVES, parse_count
from .groups import Group, affordable_sizes, find_groups
from .measurement import Progress, Timer, measured
from .outcome import Budget, Outcome, choose_sizes
from .settings import chosen_config
from .solver import scipy_optimize
from .tile_search import measure_tiles

__all__ = ["TuningResult", "autotune", "check_writable"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in specs.DTYPES}
# The ending of a class's name → PEFT's task type.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class TuningResult:
    """What `autotune` returns; in a notebook it shows itself as its report."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    @property
    def config(self) -> C3AConfig:
        """The adapter configuration, for `c3a_triton.apply`."""
        return self.outcome.config

    @property
    def table(self) -> str:
        """The choice of each group of layers, as text."""
        return self.outcome.table()

    def __str__(self) -> str:
        return self.table

    def _repr_html_(self) -> str:
        return page.fragment(self.outcome)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for machines."""
        return self.outcome.to_dict()

    def plot(self) -> Any:
        """The Pareto front and the heat map of times, as one `matplotlib.figure.Figure`.

        Raises:
            C3AError: matplotlib is not installed.
        """
        return plots.overview(self.outcome)

    def report(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write a self-contained HTML page, and the plot as a PNG beside it; returns both paths.

        Raises:
            C3AError: matplotlib is not installed.
            CheckpointError: a file cannot be written.
        """
        html = Path(path)
        check_writable(html, "the report")
        png = html.with_suffix(".png")
        replace_file(html, page.document(self.outcome).encode())
        replace_file(png, plots.png(self.plot()))
        return html, png

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the configuration: to a file that ends with `.json`, or as `adapter_config.json` into a folder.

        `C3AConfig.from_pretrained` reads both. PEFT's `from_pretrained` reads a folder.

        Returns:
            The file.

        Raises:
            CheckpointError: it cannot be written.
        """
        file = config_file(path)
        check_writable(file, "the configuration")
        replace_file(file, self.config.to_json())
        return file


@public
def autotune(
    model_or_config: nn.Module | str | os.PathLike[str] | Any,
    budget: int | str | None = None,
    tokens: int = 8192,
    *,
    like_lora_rank: int | None = None,
    max_adapter_mb: float | None = None,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    target_parameters: Sequence[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    objective: str = "latency",
    mode: str = "train",
    device: torch.device | str | None = None,
    measure: bool = True,
    compare: bool = False,
    tiles: bool = False,
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Choose block sizes for a model under a budget of parameters, by measured times or by the cost model's.

    Layers of one role and shape form a group and get one block size. On a GPU every candidate is measured with every
    backend and kept in the tuned table, which `"auto"` reads from then on; what is in it already is not measured again.
    Without a GPU, or with `measure=False`, times are the cost model's predictions (for the GPU that is there, or an
    H200), and are labelled so.

    Args:
        model_or_config: a model (its weights are not read, it may be on the meta device), a transformers
            configuration, or the folder or name of a transformers model, of which only `config.json` is read.
        budget: the most parameters, a number or text such as `"500k"` or `"2M"`. Exactly one of `budget`,
            `like_lora_rank` and `max_adapter_mb` has to be given.
        tokens: tokens per step. Times are for the next power of two, as `"auto"` decides by these.
        like_lora_rank: as many parameters as LoRA of this rank has on the same layers.
        max_adapter_mb: the size of the adapter's weights file, in 10⁶ bytes.
        target_modules, exclude_modules: as in `C3AConfig`; None means the default for the model's type.
        target_parameters: as in `C3AConfig`; of stacked experts alone, whose times are predicted and never measured.
        dtype: what x and the base weights are; by default the model's, or bfloat16 where that is none of float32,
            float16 and bfloat16 or not known.
        objective: `"latency"` (the least time; among equally fast choices the block sizes nearest the authors' rule
            √(in·out)/rank), `"params"` (the most parameters, then the least time) or `"balanced"` (the knee of the
            front between the two). `c3a_triton.tuning.solver.solve` defines them.
        mode: `"train"`: forward and backward count; `"infer"`: the forward alone.
        device: where it is going to run; by default the GPU if there is one. `"cpu"` measures the torch backend on the
            CPU; `"cuda"` with `measure=False` needs no GPU.
        measure: whether to measure, where there is something to measure on.
        compare: measure LoRA and PEFT's C3A too, for the plot (predictions need no asking).
        tiles: measure variants of the kernels' tiles too, for the block sizes that were chosen; needs a GPU.
        timer: how a call is timed, for example in tests; by default `triton.testing.do_bench`, on a CPU the clock.
        progress: called before each measurement with the number done, the number in all, and what comes next.

    Returns:
        The result: `.config`, `.table`, `.plot()`, `.report(path)`, `.save(path)`.

    Raises:
        ConfigError: an argument that cannot be used, a model that cannot be built, no layer that is meant, or a budget
            that cannot be met; the message says by how much.
        CheckpointError: there is no such model folder.
        BackendError: nothing could be measured.
        C3AError: a package is missing.

    Example:
        >>> result = c3a_triton.autotune("path/to/model", budget="2M", tokens=8192, target_modules="all-linear")
        >>> print(result.table)
        >>> model = c3a_triton.apply(model, result.config)
    """
    for name, value, known in (("objective", objective, OBJECTIVES), ("mode", mode, MODES)):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigError(f"tokens must be a positive number, got {tokens!r}")
    place, to_measure = _place(device, measure)
    scipy_optimize()  # which is needed last, and missed before anything is measured
    if tiles and not (to_measure and place.type == "cuda"):
        raise ConfigError("tiles can only be measured, and on a GPU: there is nothing to predict them by")
    max_params = parse_count(budget) if isinstance(budget, str) else budget

    model = model_or_config if isinstance(model_or_config, nn.Module) else structure.load_structure(model_or_config)
    config = C3AConfig(
        # Every layer takes blocks of one, so that none is refused for its size.
        block_size=1,
        target_modules=target_modules if isinstance(target_modules, str | None) else list(target_modules),
        exclude_modules=exclude_modules if isinstance(exclude_modules, str | None) else list(exclude_modules),
        target_parameters=target_parameters if isinstance(target_parameters, str | None) else list(target_parameters),
        task_type=next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None),
        base_model_name_or_path=_source(model_or_config),
    )
    groups = find_groups(model, with_task_heads(model, config))
    stacks = [name for group in groups if group.stack for name in group.names]
    if stacks and place.type == "cpu":
        raise ConfigError(
            f"{stacks[0]}: the times of stacked experts are predicted by the cost model, which knows GPUs only: leave "
            "the device out, or target_parameters"
        )
    stated = Budget.of(groups, max_params, like_lora_rank, max_adapter_mb)
    sizes = affordable_sizes(groups, stated.max_params)

    n_tokens = 1 << (tokens - 1).bit_length()
    setting = Setting(place, _dtype(dtype, model), n_tokens, mode == "train")
    costs = _costs(layer_cases(groups, sizes, setting), setting, to_measure, timer, progress)
    chosen = choose_sizes(groups, sizes, costs, stated, objective)
    if tiles:
        used = _triton_cases(groups, chosen, costs)
        measure_tiles(used, setting, timer, progress)
        costs.times |= measured(used, setting, timer, progress, again=True)
    compared = [Case.of(group, rank, PEFT_LORA) for rank in LORA_RANKS for group in groups]
    compared += [Case.of(group, b, PEFT_C3A) for group, b in zip(groups, chosen, strict=True)]
    # PEFT's C3A has no stacked experts, and what its LoRA does with them is another thing.
    if stacks or (to_measure and not (compare and peers.why_no_peft() is None)):
        compared = []
    resolved = {name: b for group, b in zip(groups, chosen, strict=True) for name in group.names}
    names = [name for name in base_module_names(model) if name]
    return TuningResult(
        Outcome(
            model=_source(model_or_config) or type(model).__name__,
            config=chosen_config(config, _in_order(resolved, [*names, *stacks]), names, stacks),
            groups=groups,
            sizes=sizes,
            chosen=chosen,
            costs=costs,
            peer_costs=_costs(list(dict.fromkeys(compared)), setting, to_measure, timer, progress),
            budget=stated,
            objective=objective,
            tokens=tokens,
            environment=_environment(setting, to_measure),
        )
    )


def config_file(path: str | os.PathLike[str]) -> Path:
    """The file that `TuningResult.save` writes for a path."""
    target = Path(path)
    return target if target.suffix == ".json" and not target.is_dir() else target / CONFIG_NAME


def check_writable(path: Path, what: str) -> None:
    """Refuse a file that cannot be written, without writing it.

    Raises:
        CheckpointError: naming what stands in the way.
    """
    if path.is_dir():
        raise CheckpointError(f"{what} cannot be written to {path}: it is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise CheckpointError(f"{what} cannot be written to {path}: {folder} is not a folder")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CheckpointError(f"{what} cannot be written to {path}: there is no permission")


def _costs(
    cases: list[Case], setting: Setting, to_measure: bool, timer: Timer | None, progress: Progress | None
) -> Costs:
    by_model = [case for case in cases if case.stack or not to_measure]
    times = {case: predicted_times(case, setting) for case in by_model}
    if to_measure:
        times |= measured([case for case in cases if not case.stack], setting, timer, progress)
    return Costs(setting, times, measured=to_measure)


def _triton_cases(groups: Sequence[Group], chosen: Sequence[int], costs: Costs) -> list[Case]:
    """The chosen cases whose kernels have tiles."""
    found = []
    for group, b in zip(groups, chosen, strict=True):
        if group.stack:
            continue
        fastest = costs.fastest(group, b)
        assert fastest is not None, "a block size that nothing is known of was chosen"
        names = [name for name in fastest[0].split("/") if name in dispatch.TRITON_BACKENDS]
        found += [Case.of(group, b, name) for name in names]
    return list(dict.fromkeys(found))


def _place(device: torch.device | str | None, measure: bool) -> tuple[torch.device, bool]:
    """The device, and whether to measure on it.

    Raises:
        ConfigError: it is not here, or nothing is known about it without measuring.
    """
    has_gpu = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda"), measure and has_gpu
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown: choose cuda or cpu") from error
    if place.type not in ("cuda", "cpu"):
        raise ConfigError(f"device {device!r}: choose cuda or cpu")
    if place.type == "cpu" and not measure:
        raise ConfigError("the cost model knows GPUs only: measure on the CPU, or leave the device out")
    if place.type == "cuda" and measure and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is nothing to measure on {place}: torch sees {torch.cuda.device_count()} GPUs here. Without "
            "measuring (--no-measure, measure=False) times are predicted"
        )
    return place, measure


def _dtype(dtype: torch.dtype | str | None, model: nn.Module) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        return DTYPES[dtype]
    if dtype is None:
        own = getattr(getattr(model, "config", None), "dtype", None)
        return next((known for known in DTYPES.values() if known == own), torch.bfloat16)
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return dtype


def _source(model_or_config: Any) -> str | None:
    """Where the model is from, as a name or path."""
    if isinstance(model_or_config, (str, os.PathLike)):
        return os.fspath(model_or_config)
    return model_name_or_path(model_or_config)


def _in_order(sizes: dict[str, int], names: list[str]) -> dict[str, int]:
    return {name: sizes[name] for name in names if name in sizes}


def _environment(setting: Setting, was_measured: bool) -> dict[str, str]:
    versions = {"torch": torch.__version__, "c3a_triton": __version__, "python": platform.python_version()}
    if not was_measured:
        at = dispatch.ceilings_of(setting.device)
        family = next(name for name, ceilings in bounds.CARDS.items() if ceilings is at)
        return {"device": f"none: the cost model's {family}"} | versions
    key = Case(1, 1, 0, dispatch.BASE).key(setting)
    return {"device": key.device, "capability": key.capability, "triton": key.triton} | versions
