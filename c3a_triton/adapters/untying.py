"""What becomes of a transformers model whose tied tensors are to differ: its configuration, and which tensors it saves.

`tie_word_embeddings` says more than that in some models: T5 and its relatives scale the decoder's output by it, others
tie encoder and decoder, or whole blocks, by it too. It is set to false only where that says what is the case and no
more; otherwise it stays, which transformers 5 loads as it is, because it does not tie what differs in the files.
transformers is not imported. A model on the meta device will do.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from c3a_triton.bases.sharded import gathered, is_partitioned
from c3a_triton.errors import AdapterStateError

__all__ = [
    "FLAG",
    "Untying",
    "clear_flags",
    "flags",
    "homes_of",
    "plan_parts",
    "plan_untying",
    "tensors_by_name",
    "untie",
    "with_flags",
]

FLAG = "tie_word_embeddings"

Names = tuple[str, ...]


@dataclass(frozen=True)
class Untying:
    """What has to be done.

    Attributes:
        flags: paths of the configurations in which `tie_word_embeddings` becomes false, `""` for the model's own; none
            where it has to stay as it is.
        own: groups of names that need a tensor of their own, equal to the one that they have.
    """

    flags: Names
    own: tuple[Names, ...]


def plan_untying(
    model: Any,
    before: Mapping[str, Hashable],
    after: Mapping[str, Hashable],
    homes: Mapping[str, Hashable],
    values: Mapping[str, Any] | None = None,
    same: Callable[[Names], bool] = lambda paths: True,
) -> Untying | None:
    """What to do about tensors that were one and are no longer; None where there are none, or transformers ties none.

    Args:
        model: the model, under the names that transformers gives its tensors.
        before: name → something that is equal for those that were one tensor.
        after: name → something that is equal for those that are one tensor now.
        homes: name → what `homes_of` said of it before.
        values: the configuration as it is saved; by default what `model.config` makes of itself.
        same: a further test: whether the model computes the same if the flags of these configurations become false.

    Raises:
        AdapterStateError: the flag cannot be cleared without changing what the model computes, and the transformers
            that is installed would tie the tensors again; or a module that the model uses under several names was
            trained under one of them.
    """
    split = [names for names in _groups(before) if len({after[name] for name in names}) > 1]
    if not split or not _is_of_transformers(model):
        return None
    config = model.config
    for one, other in (pair for names in split for pair in combinations(names, 2)):
        if homes[one] == homes[other] and after[one] != after[other]:
            raise AdapterStateError(
                f"{one} and {other} belong to one module of this {type(model).__name__}, of which only one use was "
                "trained (modules_to_save): what is saved cannot hold both. Keep the adapter unmerged"
            )
    shapes = _shapes(model)
    lengths = {shapes[name][:1] for names in split for name in names}
    if hasattr(model, "get_expanded_tied_weights_keys"):
        owners, pairs = _owners(model, before, after), model.get_expanded_tied_weights_keys(all_submodels=True)
        names = {*pairs, *pairs.values()}
    else:  # transformers 4, which ties by the flag alone, whatever is saved
        owners, pairs = [config], None
        names = {name for name in after if shapes[name][:1] in lengths}
    tops = [path for path, part in flags(config) if any(part is owner for owner in owners)]
    paths = tuple(path for path, _ in flags(config) if any(_is_in(path, top) for top in tops))
    if not owners or (pairs is None and not paths):
        return None

    with with_flags(config, paths):
        left = {} if pairs is None else model.get_expanded_tied_weights_keys(all_submodels=True)
    own = _own(after, left, names)
    # What else the flag ties must be of the embeddings' kind: whole blocks would be saved several times.
    small = all(shapes[name][:1] in lengths for group in own for name in group)
    if paths and small and _survives(config, paths, values) and not _reads_flag(model) and same(paths):
        return Untying(paths, own)
    if pairs is None:
        raise AdapterStateError(
            f"{' and '.join(split[0])} are tied in this {type(model).__name__} and would differ once merged. Its "
            f"configuration's {FLAG} decides on more than that here, so that it can neither become false nor, with "
            "transformers 4, stay true: merge with transformers 5, or keep the adapter unmerged"
        )
    return Untying((), _own(after, pairs, names))


def plan_parts(
    model: nn.Module,
    before: Mapping[str, Hashable],
    after: Mapping[str, Hashable],
    homes: Mapping[str, Hashable],
    same: Callable[[nn.Module, Names], bool],
) -> list[tuple[nn.Module, Untying]]:
    """`plan_untying` of a model, or of the models of transformers that a module of somebody's own holds."""
    found: list[tuple[nn.Module, Untying]] = []
    inner: tuple[str, ...] = ()
    for prefix, part in model.named_modules():
        start = f"{prefix}." if prefix else ""
        if start.startswith(inner) or not _is_of_transformers(part):
            continue
        inner += (start,)

        def within(keys: Mapping[str, Hashable], start: str = start) -> dict[str, Hashable]:
            return {name.removeprefix(start): key for name, key in keys.items() if name.startswith(start)}

        untying = plan_untying(part, within(before), within(after), within(homes), same=partial(same, part))
        if untying is not None:
            found.append((part, untying))
    return found


def _is_of_transformers(model: Any) -> bool:
    return getattr(model, "config", None) is not None and callable(getattr(type(model), "save_pretrained", None))


def untie(model: Any, untying: Untying) -> None:
    """Do what was planned, with a warning."""
    for path, part in list(flags(model.config)):
        if path in untying.flags:
            setattr(part, FLAG, False)
    tensors = dict(tensors_by_name(model))
    for names in untying.own:
        tensor = tensors[names[0]]
        own = gathered(tensor) if is_partitioned(tensor) else tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(own, requires_grad=tensor.requires_grad)
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, own)
    for part in model.modules():
        # transformers 5 remembers what it has tied.
        tied: Any = getattr(part, "all_tied_weights_keys", None)
        tensors = dict(tensors_by_name(part)) if tied else {}
        for target, source in list(tied.items()) if tied else ():
            if tensors.get(target) is not tensors.get(source):
                del tied[target]
    if untying.flags:
        what = f"{FLAG}=False is set in the model's config"
    else:
        what = (
            f"{FLAG} stays true in the model's config, where it decides on more than that. from_pretrained of "
            "transformers 5 loads the saved model as it is, other programs may tie them; so would tie_weights()"
        )
    warnings.warn(f"the embeddings are no longer tied: {what}", stacklevel=3)


def flags(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, configuration) of a configuration and those in it whose `tie_word_embeddings` is true."""
    if getattr(config, FLAG, False):
        yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from flags(value, f"{path}.{name}".lstrip("."))


@contextmanager
def with_flags(config: Any, paths: Iterable[str]) -> Iterator[None]:
    """Within it the flags of the configurations at these paths are false."""
    parts = [part for path, part in flags(config) if path in paths]
    for part in parts:
        setattr(part, FLAG, False)
    try:
        yield
    finally:
        for part in parts:
            setattr(part, FLAG, True)


def clear_flags(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any] | None:
    """A saved configuration with the flags at these paths false, or None where it has no place for one."""
    cleared = copy.deepcopy(dict(values))
    for path in paths:
        part: Any = cleared
        for name in path.split(".") if path else ():
            part = part.get(name)
            if not isinstance(part, dict):
                return None
        part[FLAG] = False
    return cleared


def tensors_by_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter or buffer) of a model, each under all of its names."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def homes_of(model: nn.Module) -> dict[str, Hashable]:
    """Name → the module that a parameter or buffer belongs to, which may be known under several names itself."""
    owners = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {name: (owners[name.rpartition(".")[0]], name.rpartition(".")[2]) for name, _ in tensors_by_name(model)}


def _is_in(path: str, top: str) -> bool:
    return not top or f"{path}.".startswith(f"{top}.")


def _groups(keys: Mapping[str, Hashable]) -> list[Names]:
    """Names of equal keys, where there are several."""
    groups: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _owners(model: nn.Module, before: Mapping[str, Hashable], after: Mapping[str, Hashable]) -> list[Any]:
    """The configurations by which transformers 5 ties what is no longer one."""
    owners = []
    for prefix, part in model.named_modules():
        if hasattr(part, "get_expanded_tied_weights_keys"):
            start = f"{prefix}." if prefix else ""
            pairs = part.get_expanded_tied_weights_keys(all_submodels=False).items()
            named = [(start + target, start + source) for target, source in pairs]
            # A pair may be one by way of a third name.
            if any(before.get(a) == before.get(b) and after.get(a) != after.get(b) for a, b in named):
                owners.append(part.config)
    return owners


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model)}


def _own(after: Mapping[str, Hashable], pairs: Mapping[str, str], names: Iterable[str]) -> tuple[Names, ...]:
    """Groups of names that share a tensor which loading, with these ties, would not give them back.

    transformers saves a shared tensor once and, as it loads, ties each target to its source where one of them is
    missing. So what shares a tensor has to be connected by ties, and both ends of a tie that no longer holds have to be
    saved under their own names.
    """
    loose = {target for target, source in pairs.items() if after.get(target) != after.get(source)}
    loose |= {pairs[target] for target in loose if pairs[target] in pairs}
    own = []
    declared = set(names)
    for group in _groups(after):
        parts: list[set[str]] = [{name for name in group if name not in declared}]
        rest = [name for name in group if name in declared]
        roots = {name: name if name in loose else pairs.get(name, name) for name in rest}
        for root in dict.fromkeys(roots.values()):
            parts.append({name for name in rest if roots[name] == root})
        parts = [part for part in parts if part]
        own += [tuple(name for name in group if name in part) for part in parts[1:]]
    return tuple(own)


def _survives(config: Any, paths: Names, values: Mapping[str, Any] | None) -> bool:
    """Whether flags that are saved as false are false when they are loaded, and everything else is as it was."""
    values = config.to_dict() if values is None else values
    cleared = clear_flags(values, paths)
    if cleared is None:
        return False
    now, then = (dict(_leaves(type(config).from_dict(saved).to_dict())) for saved in (clear_flags(values, ()), cleared))
    changed = {path for path in now.keys() | then.keys() if now.get(path) != then.get(path)}
    return changed == {f"{path}.{FLAG}".lstrip(".") for path in paths} and not any(then[path] for path in changed)


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + str(name), value


def _reads_flag(model: nn.Module) -> bool:
    """Whether a method of the model's classes that may compute something reads the flag.

    Such a method need not be called, and the flag may stay without need; nothing is wrong then.
    """
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        if cls.__module__.partition(".")[0] == "torch" or cls.__name__ == "PreTrainedModel":
            continue
        for name, function in vars(cls).items():
            # What builds, initialises, resizes or ties.
            if isinstance(function, FunctionType) and not any(word in name for word in ("init", "embeddings", "tie")):
                function = inspect.unwrap(function)
                if isinstance(function, FunctionType) and _mentions_flag(function.__code__):
                    return True
    return False


def _mentions_flag(code: CodeType) -> bool:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return FLAG in code.co_names or FLAG in code.co_consts or any(map(_mentions_flag, inner))
