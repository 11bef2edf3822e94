"""What `trainable_token_indices` means for a model: whose rows, which modules share them, and what is wrong."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.parallel import parallel_mesh
from c3a_triton.bases.probe import behaviour
from c3a_triton.bases.sharded import gathered, whole_shape
from c3a_triton.errors import ConfigError
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.values import shown, some

from .base_model import base_modules, embeddings_of, near_names
from .ensured_ties import of_one_weight, own_weight
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .target import sharding_problem
from .token_rows import ROWS_SUFFIX, TokenRows, rows_at

__all__ = ["TokenTarget", "check_tokens_alone", "find_token_targets", "new_rows"]

_FIELD = "trainable_token_indices"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEFAULT_NAME = "embed_tokens"  # as in PEFT, where a model does not tell


@dataclass(frozen=True)
class TokenTarget:
    """Rows to train: the module's name, itself, the tokens in their order, and (name, module) of what shares them."""

    name: str
    module: nn.Module
    indices: list[int]
    tied: list[tuple[str, nn.Module]]

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """(name, module) of all that has these rows."""
        return [(self.name, self.module), *self.tied]


def find_token_targets(model: nn.Module, config: C3AConfig) -> list[TokenTarget]:
    """The rows that a configuration trains, by PEFT's rules: what is tied to the input embeddings follows them.

    Modules are tied that have one weight. Where a dict names several of them, with the same tokens they share their
    rows; with different ones each has its own, and none follows.

    Args:
        model: the model.
        config: the configuration.

    Raises:
        ConfigError: a name that no module has, a module whose rows cannot be trained, a token that it does not have, or
            different tokens for what is to stay tied (`ensure_weight_tying`).
    """
    if config.trainable_token_indices is None:
        return []
    modules = {name: module for name, module in base_modules(model) if name}
    wanted = _wanted(model, modules, config.trainable_token_indices)
    embeddings = embeddings_of(model)[0]
    targets: list[TokenTarget] = []
    done: set[str] = set()
    for name in sorted(wanted, key=lambda name: modules[name] is not embeddings):  # what others follow comes first
        if name in done:
            continue
        module, indices = modules[name], wanted[name]
        _check_module(name, module)
        others = of_one_weight(modules, name)
        different = [other for other in others if wanted.get(other, indices) != indices]
        if different and config.ensure_weight_tying:
            raise ConfigError(
                f"{_FIELD} names other tokens for {name} ({shown(indices)}) than for {different[0]} "
                f"({shown(wanted[different[0]])}), which have one weight: give both the same tokens, in one order, or "
                "leave ensure_weight_tying out"
            )
        follows = module is embeddings and not different
        tied = [other for other in others if other not in different and (other in wanted or follows)]
        for other in tied:
            _check_module(other, modules[other])
        target = TokenTarget(name, module, indices, [(other, modules[other]) for other in tied])
        _check_rows(target)
        targets.append(target)
        done |= {name, *tied}
    return targets


def _wanted(
    model: nn.Module, modules: Mapping[str, nn.Module], tokens: list[int] | dict[str, list[int]]
) -> dict[str, list[int]]:
    """Name of a module → the tokens that are meant there."""
    if isinstance(tokens, list):
        embeddings = embeddings_of(model)[0]
        found = [name for name, module in modules.items() if module is embeddings]
        if embeddings is None:
            found = [name for name in modules if name.rpartition(".")[2] == _DEFAULT_NAME]
        if not found:
            raise ConfigError(
                f"{_FIELD}={shown(tokens)}: this {type(model).__name__} does not tell its input embeddings "
                f"(get_input_embeddings), and has no {_DEFAULT_NAME}: name the embedding, as "
                f'{_FIELD}={{"embedding": {shown(tokens)}}}'
            )
        return {found[0]: tokens}
    wanted: dict[str, list[int]] = {}
    for key, indices in tokens.items():
        names = [name for name in modules if f".{name}".endswith(f".{key}")]
        if not names:
            raise ConfigError(f"{_FIELD}: the model has no module {shown(key)}.{near_names(key, modules)}")
        for name in names:
            if wanted.setdefault(name, indices) != indices:
                raise ConfigError(
                    f"{_FIELD}: {name} is named twice, with the tokens {shown(wanted[name])} and {shown(indices)}: "
                    "name it once"
                )
    return wanted


def _check_module(name: str, module: Any) -> None:
    """Refuse a module whose rows cannot be trained by themselves."""
    if isinstance(module, ModulesToSave):
        raise ConfigError(
            f"{_FIELD}: another adapter trains {name} as a whole (modules_to_save): train tokens of it in a model "
            "without that adapter"
        )
    if isinstance(module, C3ALinear):
        raise ConfigError(
            f"{_FIELD}: {name} is adapted by another adapter (target_modules), so that its rows cannot be trained by "
            "themselves: train tokens of it in a model without that adapter"
        )
    kind, weight = type(module).__name__, own_weight(module)
    if not isinstance(module, (nn.Embedding, nn.Linear)) or weight is None or weight.dtype not in _DTYPES:
        what = f" with a weight of {weight.dtype}" if weight is not None else ""
        raise ConfigError(
            f"{_FIELD}: {name} is a {kind}{what}; rows of nn.Embedding and nn.Linear in floating point can be trained"
        )
    found = behaviour(module)
    changes = getattr(module, "max_norm", None) is not None or getattr(module, "scale_grad_by_freq", False)
    if found.kind != "product" or changes:
        raise ConfigError(
            f"{_FIELD}: the rows of {name}, a {kind}, cannot be trained by themselves, because it "
            + (found.reason or "computes something else than rows of its weight (or max_norm, scale_grad_by_freq)")
        )
    if parallel_mesh(module) is not None:
        raise ConfigError(f"{_FIELD}: the plan spreads {name} over processes: leave it out of the plan")
    if problem := sharding_problem(name, module, "weight"):
        raise ConfigError(f"{_FIELD}: {problem}")


def _check_rows(target: TokenTarget) -> None:
    """Refuse tokens that a module does not have, and other partners than those of adapters that are there."""
    for name, module in target.modules:
        weight = own_weight(module)
        assert weight is not None
        n_rows = whole_shape(weight)[0]
        if beyond := [index for index in target.indices if index >= n_rows]:
            raise ConfigError(
                f"{_FIELD}: {name} has {n_rows} rows, and no token {beyond[0]}: call "
                f"model.resize_token_embeddings({max(beyond) + 1}) before the model is adapted, or check the index"
            )
    rows = {rows_at(module) for _, module in target.modules}
    if rows != {None} and rows != {target.module._modules.get("token_adapter")}:
        raise ConfigError(
            f"{_FIELD}: another adapter trains tokens of {' and '.join(name for name, _ in target.modules)} "
            "together or apart, as they are tied, and this one would not: name the same modules in both"
        )


def check_tokens_alone(
    targets: Collection[TokenTarget], adapted: Collection[str], saved: Collection[str], config: C3AConfig
) -> None:
    """Refuse tokens of a module that the same adapter also adapts, or trains whole.

    Raises:
        ConfigError: it does.
    """
    for target in targets:
        for name, _ in target.modules:
            tied = "" if name == target.name else f" (tied to {target.name})"
            if name in adapted:
                raise ConfigError(
                    f"{_FIELD} means rows of {name}{tied}, which target_modules={shown(config.target_modules)} adapts "
                    f"as well: leave {name} out of target_modules (exclude_modules), or leave {_FIELD} out"
                )
            if whole := [other for other in saved if f"{name}.".startswith(f"{other}.")]:
                raise ConfigError(
                    f"{_FIELD} means rows of {name}{tied}, which modules_to_save={shown(config.modules_to_save)} "
                    f"trains as a whole already ({some(whole)}): leave out one of the two"
                )


@torch.inference_mode(False)  # as for kernels: they are to be trained
def new_rows(target: TokenTarget, tensors: Mapping[str, Tensor] | None) -> tuple[TokenRows, nn.Parameter]:
    """What holds the rows of a target, and rows, a file's or else the embedding's own, which it does not have yet.

    Raises:
        ConfigError: the embedding has no values now, or is in a DeepSpeed engine that takes no more parameters in.
    """
    rows = rows_at(target.module)
    weight = own_weight(target.module)
    assert weight is not None
    if weight.is_meta:
        raise ConfigError(
            f"{_FIELD}: {target.name} is offloaded, or on the meta device, and has no rows to begin with: give it a "
            "device of its own in the device map, or load the model first"
        )
    if hasattr(target.module, "ds_id"):  # as for copies: later parameters do not join
        raise ConfigError(
            f"{_FIELD}: {target.name} is in a DeepSpeed engine of ZeRO-3, which no later rows can join: add or load "
            "the adapter before deepspeed.initialize"
        )
    with torch.no_grad():
        # A tensor of this process's own, whatever the weight was made in.
        values = torch.empty(len(target.indices), whole_shape(weight)[1], dtype=torch.float32, device=weight.device)
        file_values = None if tensors is None else tensors[target.name + ROWS_SUFFIX]
        values.copy_(gathered(weight).detach()[target.indices] if file_values is None else file_values)
    return rows or TokenRows(target.module, target.name), nn.Parameter(values)
