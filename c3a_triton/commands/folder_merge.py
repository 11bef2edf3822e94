"""An adapter merged into a model's folder, tensor by tensor, so that the model need not fit into memory.

Shards are copied, and the tensors that the adapter changes are rewritten in the copies, at their places in the file: a
tensor keeps its name, dtype and shape. Everything happens in a temporary folder beside the output, which gets its name
when it is complete.
"""

import contextlib
import copy
import glob
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from c3a_triton.adapters.base_model import warn_tied
from c3a_triton.adapters.file_targets import check_file_values, find_file_targets, with_names_of
from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.adapters.manager import layer_class
from c3a_triton.adapters.names import Scope
from c3a_triton.adapters.report import format_bytes
from c3a_triton.adapters.samples import output_of, sample_inputs
from c3a_triton.adapters.targets import Target, find_modules_to_save
from c3a_triton.adapters.untying import clear_flags, homes_of, plan_untying
from c3a_triton.adapters.watched import Watch
from c3a_triton.bases.model_names import renaming_of
from c3a_triton.bases.structure import load_structure
from c3a_triton.bases.weights import unmergeable
from c3a_triton.errors import AdapterStateError, C3AError, CheckpointError, ConfigError
from c3a_triton.files.atomic import flush_to_disk, temporary_path
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, AdapterFile, read_adapter
from c3a_triton.files.config import CONFIG_NAME, MODEL_CONFIG_NAME

__all__ = ["MergedFolder", "merge_folder"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Where a merged folder needs tensors that the model's files have no place for, and what its one file is called then.
ADDED_NAME = "model-added.safetensors"
ONE_SHARD_NAME = "model-00001-of-00001.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights in other formats would still be those without the adapter.
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")
_COPIED_FOLDERS = ("additional_chat_templates",)
# A temporary folder in which nothing was written for so long was left by a merge that was killed.
_ABANDONED_AFTER_S = 3600.0

Change = Callable[[Tensor], None]


@dataclass(frozen=True)
class MergedFolder:
    """What was written: the folder, its bytes of weights, the layers merged, the names of all changed tensors.

    Attributes:
        untied: whether tensors that were one differ now.
        flag_cleared: whether `tie_word_embeddings` is false in the configuration for that.
    """

    path: Path
    weights_bytes: int
    layers: int
    changed: tuple[str, ...]
    added: tuple[str, ...]
    untied: bool
    flag_cleared: bool


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in its file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class _Checkpoint:
    """A model folder's weights: the files, the tensors in them, and the index of sharded ones."""

    folder: Path
    shards: tuple[str, ...]
    tensors: dict[str, _Stored]
    index: dict[str, Any] | None

    @property
    def weights_bytes(self) -> int:
        """The size of all shards."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)


@dataclass
class _Plan:
    """What becomes of a checkpoint's tensors."""

    layers: int = 0
    changes: dict[str, Change] = field(default_factory=dict)  # key → what is done to its tensor, in place
    # name of a new tensor → (shape, the key whose tensor it starts as, or None, what is done to it)
    added: dict[str, tuple[tuple[int, ...], str | None, Change | None]] = field(default_factory=dict)
    flags: tuple[str, ...] = ()  # the parts of the configuration in which tie_word_embeddings becomes false
    untied: bool = False
    unseen: bool = False  # whether it is not known which layers the model calls


def merge_folder(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    device: torch.device | str = "cpu",
    merge_uncalled: bool = False,
    verify: Callable[[Path], None] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> MergedFolder:
    """Merge an adapter into a model's folder of safetensors, as `merge_and_unload` would merge it in memory.

    Memory is needed for the adapter, the largest tensor that it changes and what the sum takes. The new folder has
    the model's files under their names: weights, index, configuration, tokenizer. It appears when it is complete; a
    process that is killed leaves the former folder, or none; killed in the moment in which the new folder takes the
    former one's place, it leaves that as `.<output>.former`, from which the next merge brings it back.

    Args:
        model: a transformers folder with weights in safetensors.
        adapter: an adapter's folder, saved by this library or by PEFT.
        output: the folder to write.
        force: replace `output` where it is the folder of a model.
        device: where the sums are computed.
        merge_uncalled: merge layers too that the model never calls, whose adapters compute nothing in it.
        verify: called with the complete folder before it gets its name; what it raises undoes the merge.
        progress: told what is being done.

    Raises:
        CheckpointError: a folder or file that is missing, damaged or does not fit the others; an output that is there
            already; too little disk space.
        ConfigError: a configuration that cannot be used, or a quantized model.
        AdapterStateError: a merged weight would not be finite.
    """
    model, adapter, output = Path(model).resolve(), Path(adapter).resolve(), Path(output).resolve()
    _recover(output)
    _check_output(output, (model, adapter), force)
    structure = load_structure(model)
    _refuse_quantized(model)
    checkpoint = _read_checkpoint(model)
    plan = _plan(structure, read_adapter(adapter), checkpoint, merge_uncalled)
    if plan.unseen and verify is None:
        warnings.warn(
            f"without its weights it cannot be seen whether this {type(structure).__name__} calls all {plan.layers} "
            "adapted layers: what is merged into others changes what the model computes. Compare the merged model with "
            "model and adapter (`c3a-triton merge` does)",
            stacklevel=2,
        )
    device = torch.device(device)

    temporary = temporary_path(output)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    try:
        _remove_abandoned(output)
        _check_space(checkpoint, output.parent)
        _copy_other_files(model, temporary, plan)
        for number, shard in enumerate(checkpoint.shards, start=1):
            progress(f"{shard} ({number} of {len(checkpoint.shards)})")
            _write_shard(checkpoint, shard, plan, temporary, device)
        _write_added(checkpoint, plan, temporary)
        if verify is not None:
            verify(temporary)
        _flush(temporary)
        _put_in_place(temporary, output)
    except C3AError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}. Nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    n_bytes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return MergedFolder(
        output, n_bytes, plan.layers, tuple(plan.changes), tuple(plan.added), plan.untied, bool(plan.flags)
    )


# Checks


def _check_output(output: Path, sources: tuple[Path, ...], force: bool) -> None:
    for source in sources:
        if output == source or output in source.parents:
            raise CheckpointError(f"the output {output} is, or holds, {source}, which is read: choose another folder")
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"the output {output} is a file: choose another name")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise CheckpointError(f"the output {output} is not empty: choose another folder, or --force to replace it")
    if not (output / MODEL_CONFIG_NAME).exists():
        raise CheckpointError(
            f"the output {output} is not empty and no model's folder (it has no {MODEL_CONFIG_NAME}): it is not "
            "replaced, --force or not. Choose another folder"
        )
    if (former := _former(output)).exists():
        raise CheckpointError(
            f"{former} is what was here before a merge that was killed while it replaced {output}: move it away first"
        )


def _former(output: Path) -> Path:
    """Where a folder is for the moment in which another one takes its place."""
    return output.with_name(f".{output.name}.former")


def _recover(output: Path) -> None:
    """Give a folder its name back, which a merge that was killed while it replaced it has taken from it."""
    former = _former(output)
    if former.is_dir() and not output.exists():
        try:
            os.rename(former, output)
        except OSError as error:
            raise CheckpointError(
                f"{former} is what was {output} before a merge that was killed, and cannot be renamed: {error}"
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _refuse_quantized(model: Path) -> None:
    values = _read_json(model / MODEL_CONFIG_NAME)
    quantization = values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{model} is quantized ({method}), and what is merged into quantized weights is lost in their rounding: "
            "merge into the original model in 16 or 32 bits and quantize the result, or keep the adapter unmerged"
        )


def _check_space(checkpoint: _Checkpoint, folder: Path) -> None:
    needed, free = checkpoint.weights_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {format_bytes(free)} of free space; the merged weights need {format_bytes(needed)}"
        )


# Reading a checkpoint


def _read_checkpoint(folder: Path) -> _Checkpoint:
    # The one file goes before an index, as in transformers.
    if (folder / SINGLE_NAME).exists():
        return _Checkpoint(folder, (SINGLE_NAME,), _read_header(folder / SINGLE_NAME), None)
    if not (folder / INDEX_NAME).exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        remedy = "load the model with transformers and save it with save_pretrained, which writes safetensors"
        if pickled:
            raise CheckpointError(
                f"{folder} has its weights only as {pickled[0]}, a pickle, which can run any code when it is read. If "
                f"you trust it, {remedy}"
            )
        raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: {remedy}")
    index = _read_json(folder / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map of keys and file names")
    shards = tuple(dict.fromkeys(weight_map.values()))
    tensors: dict[str, _Stored] = {}
    for shard in shards:
        if Path(shard).name != shard or shard == ".." or not shard.isprintable():
            raise CheckpointError(f"{folder / INDEX_NAME} names {shard!r}, which is not a file of this folder")
        tensors |= _read_header(folder / shard)
    if wrong := [key for key, shard in weight_map.items() if key not in tensors or tensors[key].shard != shard]:
        raise CheckpointError(f"{folder / INDEX_NAME}: {wrong[0]} is not in {weight_map[wrong[0]]}")
    return _Checkpoint(folder, shards, tensors, index)


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a file. The library checks the file, but does not tell where in it a tensor lies."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        start = 8 + length
        return {
            key: _Stored(
                path.name, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"])
            )
            for key, entry in entries.items()
        }
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}, it may be damaged or incomplete: {error}") from error


def _read_tensor(file: Any, stored: _Stored) -> tuple[Tensor, bytearray]:
    """A tensor, and the bytes that it is a view of."""
    buffer = bytearray(stored.end - stored.start)
    file.seek(stored.start)
    if file.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{file.name} has become shorter while it was read")
    return torch.frombuffer(buffer, dtype=_DTYPES[stored.dtype]).view(stored.shape), buffer


# What is to be done


def _plan(structure: nn.Module, adapter: AdapterFile, checkpoint: _Checkpoint, merge_uncalled: bool) -> _Plan:
    adapter = with_names_of(structure, adapter)
    targets = find_file_targets(structure, adapter)
    called = targets if merge_uncalled else _called(structure, targets)
    targets = targets if called is None else called
    saved_modules = find_modules_to_save(structure, adapter.config)
    replaced = check_file_values(structure, adapter, saved_modules, on_meta=True)
    warn_tied(structure, [target.name for target in targets], "merging changes both")

    tensors = structure.state_dict(keep_vars=True)
    keys = _keys_by_name(structure, checkpoint, tensors)
    one = _tied(structure, tensors, keys, checkpoint)
    groups: dict[str, list[str]] = {}
    for name, first in one.items():
        groups.setdefault(first, []).append(name)
    changes: dict[str, list[Change]] = {}
    for target in targets:
        changes.setdefault(one[f"{target.name}.weight"], []).append(_merge_into(target, adapter))
    values = {id(parameter): value for parameter, value in replaced}
    for name, tensor in tensors.items():
        if id(tensor) in values and one[name] == name:
            changes.setdefault(name, []).append(partial(_replace, value=values[id(tensor)]))
    saved = {
        f"{name}.{key}": adapter.tensors[f"{name}.{key}"]
        for name, module in saved_modules
        for key in module.state_dict()
    }

    config = _read_json(checkpoint.folder / MODEL_CONFIG_NAME)
    after = one | {name: f"{name} saved" for name in saved}
    untying = plan_untying(structure, one, after, homes_of(structure), config)
    plan = _Plan(len(targets), flags=() if untying is None else untying.flags, untied=untying is not None)
    plan.unseen = called is None
    own = () if untying is None else untying.own
    for first, group in groups.items():
        if first in changes or any(name in saved or any(name in names for names in own) for name in group):
            _plan_group(plan, group, tuple(tensors[first].shape), changes.get(first, []), saved, own, keys, checkpoint)
    return plan


def _called(structure: Any, targets: list[Target]) -> list[Target] | None:
    """The targets without those that a forward of the model does not call, of which a warning tells, as in memory.

    None where that cannot be seen: inputs that are not known, or a forward that needs values.
    """
    watch, scope = Watch(structure), Scope()
    layers = [layer_class(target.module)(target.module, block_size=target.block_size) for target in targets]
    places = [(*_parent_of(structure, target.name), target.module) for target in targets]
    try:
        for (parent, child, _), layer, target in zip(places, layers, targets, strict=True):
            layer.layer_name, layer._scope = target.name, scope
            setattr(parent, child, layer)
        watch.begin()
        with scope.bound(disabled=True):
            for inputs in sample_inputs(structure):
                # Made up, and without values: whatever a model says about them, it says nothing of its layers.
                with contextlib.suppress(Exception):
                    output_of(structure, inputs)
                    break
            else:
                return None
    finally:
        watch.end()
        for parent, child, module in places:
            setattr(parent, child, module)
    work = watch.without_uncalled([(target.name, layer, target) for layer, target in zip(layers, targets, strict=True)])
    return [target for _, _, target in work]


def _parent_of(structure: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return structure.get_submodule(parent), child


def _tied(
    structure: Any, tensors: Mapping[str, Tensor], keys: Mapping[str, str], checkpoint: _Checkpoint
) -> dict[str, str]:
    """Name → the first name of those that are one tensor as the model is loaded."""
    groups: dict[int, list[str]] = {}  # tied ones share an object
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    one: dict[str, str] = {}
    for group in groups.values():
        present = [name for name in group if name in keys]
        apart = [name for name in present[1:] if not _equal(checkpoint, keys[present[0]], keys[name])]
        if not apart:
            one |= dict.fromkeys(group, group[0])
            continue
        if not hasattr(structure, "get_expanded_tied_weights_keys"):
            raise CheckpointError(
                f"{checkpoint.folder} ties {' and '.join(group)} by its configuration, but stores different values for "
                f'them: set "tie_word_embeddings": false in its {MODEL_CONFIG_NAME}, if transformers 4 is to load it'
            )
        # transformers 5 ties each target to its source, unless both are there and differ.
        pairs = structure.get_expanded_tied_weights_keys(all_submodels=True)
        for name in group:
            source = pairs.get(name, name)
            if name in keys and source in keys and not _equal(checkpoint, keys[name], keys[source]):
                source = name
            one[name] = one.get(source, source)
    return one


def _plan_group(
    plan: _Plan,
    group: list[str],
    shape: tuple[int, ...],
    changes: list[Change],
    saved: Mapping[str, Tensor],
    own: tuple[tuple[str, ...], ...],
    keys: Mapping[str, str],
    checkpoint: _Checkpoint,
) -> None:
    """Plan one tensor of the model, which has several names where it is tied."""
    present = [keys[name] for name in group if name in keys]
    if not present and (changes or any(name not in saved for name in group)):
        raise CheckpointError(
            f"{checkpoint.folder} has no tensor of its own for {group[0]} (transformers may build it from others): "
            "merge this model in memory, with model.c3a.merge_and_unload()"
        )
    for key in present:
        _check_stored(key, checkpoint, shape)
    # A module that is trained whole is a copy of its own: what it was tied to goes on with the former values, in one
    # tensor if loading ties it again, otherwise in several.
    parts: dict[Any, list[str]] = {}
    for name in group:
        parts.setdefault(name if name in saved else next((names for names in own if name in names), None), []).append(
            name
        )
    for part in parts.values():
        done: list[Change] = [partial(_replace, value=saved[part[0]])] if part[0] in saved else changes
        if done:
            plan.changes |= {keys[name]: partial(_in_order, changes=done) for name in part if name in keys}
        if not any(name in keys for name in part):
            plan.added[part[0]] = (shape, None if part[0] in saved else present[0], partial(_in_order, changes=done))


def _check_stored(key: str, checkpoint: _Checkpoint, shape: tuple[int, ...]) -> None:
    stored = checkpoint.tensors[key]
    if stored.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder / stored.shard}: {key} has shape {list(stored.shape)}, the model's configuration says "
            f"{list(shape)}"
        )
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            f"{checkpoint.folder / stored.shard}: {key} is stored as {stored.dtype}, into which nothing can be merged: "
            "take the model in 16 or 32 bits"
        )


def _equal(checkpoint: _Checkpoint, *keys: str) -> bool:
    """Whether tensors of the checkpoint are the same, bit for bit."""
    found = []
    for key in keys:
        stored = checkpoint.tensors[key]
        with (checkpoint.folder / stored.shard).open("rb") as file:
            file.seek(stored.start)
            found.append((stored.dtype, stored.shape, file.read(stored.end - stored.start)))
    return all(other == found[0] for other in found[1:])


def _keys_by_name(structure: Any, checkpoint: _Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The model's names → keys of its checkpoint, as transformers relates them: renamed, with or without the prefix.

    Tensors that transformers computes from several of the checkpoint have no key.
    """
    rename = renaming_of(structure)
    prefix = f"{structure.base_model_prefix}."
    keys = {}
    for key in checkpoint.tensors:
        name, converted = rename(key)
        if converted:
            continue
        candidates = (name.removeprefix(prefix), prefix + name, name)
        found = next((candidate for candidate in candidates if candidate in tensors), None)
        if found is not None:
            keys[found] = key
    return keys


# What is done to a tensor, in place


def _merge_into(target: Target, adapter: AdapterFile) -> Change:
    """What merges a target's adapter into its weight as `merge_and_unload` does: by a layer that has this weight.

    Raises:
        AdapterStateError: nothing can be merged into a layer of this kind.
        ConfigError: it cannot be adapted.
    """

    def adapted(weight: nn.Parameter | None) -> C3ALinear:
        base = copy.copy(target.module)
        base.__dict__["_parameters"] = {**base._parameters, "weight": weight}
        return layer_class(base)(base, "default", target.block_size, True, layer_name=target.name)

    def merge(weight: Tensor) -> None:
        layer = adapted(nn.Parameter(weight, requires_grad=False))
        layer.c3a_kernel["default"].data.copy_(adapter.tensors[target.name + KERNEL_SUFFIX])
        layer.merge(keep_base=None)
        if not torch.isfinite(weight).all():
            raise AdapterStateError(f"{target.name}: merging gives a weight that is not finite; nothing was written")

    if reason := unmergeable(target.module):
        raise AdapterStateError(
            f"{target.name}: nothing can be merged into this {type(target.module).__name__}: {reason}. Keep the "
            "adapter unmerged"
        )
    adapted(target.module._parameters["weight"])
    return merge


def _replace(tensor: Tensor, *, value: Tensor) -> None:
    tensor.copy_(value)


def _in_order(tensor: Tensor, *, changes: list[Change]) -> None:
    for change in changes:
        change(tensor)


# Writing


def _shard_name(shard: str, plan: _Plan) -> str:
    # transformers reads a file of the usual name alone, and would not look for what was added.
    return ONE_SHARD_NAME if shard == SINGLE_NAME and plan.added else shard


def _write_shard(checkpoint: _Checkpoint, shard: str, plan: _Plan, folder: Path, device: torch.device) -> None:
    path = folder / _shard_name(shard, plan)
    shutil.copyfile(checkpoint.folder / shard, path)
    with path.open("r+b") as file:
        for key, stored in checkpoint.tensors.items():
            if stored.shard == shard and key in plan.changes:
                tensor, buffer = _read_tensor(file, stored)
                changed = tensor.to(device)
                plan.changes[key](changed)
                if changed is not tensor:
                    tensor.copy_(changed)
                file.seek(stored.start)
                file.write(buffer)


def _write_added(checkpoint: _Checkpoint, plan: _Plan, folder: Path) -> None:
    """Write tensors that the model's files have no place for, and the index; without any, the index as it was."""
    if not plan.added:
        if checkpoint.index is not None:
            shutil.copyfile(checkpoint.folder / INDEX_NAME, folder / INDEX_NAME)
        return
    dtypes = [_DTYPES[stored.dtype] for stored in checkpoint.tensors.values() if stored.dtype in _DTYPES]
    tensors = {}
    for name, (shape, source, change) in plan.added.items():
        if source is None:
            tensor = torch.empty(shape, dtype=dtypes[0])
        else:
            stored = checkpoint.tensors[source]
            with (checkpoint.folder / stored.shard).open("rb") as file:
                tensor, _ = _read_tensor(file, stored)
        if change is not None:
            change(tensor)
        tensors[name] = tensor
    save_file(tensors, folder / ADDED_NAME, metadata={"format": "pt"})
    index = checkpoint.index or {"metadata": {}, "weight_map": {}}
    weight_map = {key: _shard_name(stored.shard, plan) for key, stored in checkpoint.tensors.items()}
    n_bytes = sum(stored.end - stored.start for stored in checkpoint.tensors.values())
    metadata = {"total_size": n_bytes + sum(tensor.nbytes for tensor in tensors.values())}
    index = index | {
        "metadata": index.get("metadata", {}) | metadata,
        "weight_map": weight_map | dict.fromkeys(tensors, ADDED_NAME),
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_other_files(model: Path, folder: Path, plan: _Plan) -> None:
    """Copy configuration, tokenizer and whatever else lies beside the weights."""
    for path in model.iterdir():
        if path.name.startswith(".") or path.name in (CONFIG_NAME, INDEX_NAME):
            continue
        if path.is_dir() and path.name in _COPIED_FOLDERS:
            _copy_folder(path, folder / path.name)
        elif path.is_file() and not path.name.endswith((*_WEIGHTS_SUFFIXES, ".index.json")):
            shutil.copyfile(path, folder / path.name)
    if plan.flags:
        path = folder / MODEL_CONFIG_NAME
        values = clear_flags(_read_json(path), plan.flags)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_folder(source: Path, copy: Path) -> None:
    """Copy what is in a folder, without modes and times, which not every file system takes."""
    copy.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy_folder(path, copy / path.name)
        else:
            shutil.copyfile(path, copy / path.name)


def _flush(folder: Path) -> None:
    """Wait until everything in the folder is on disk: its name is to promise that."""
    for path in [*folder.rglob("*"), folder]:
        flush_to_disk(path)


def _put_in_place(temporary: Path, output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        os.rename(temporary, output)  # an empty folder gives way
        return
    # Two names cannot be exchanged in one step. A process that is killed between these two leaves the former folder
    # under a name from which the next merge brings it back.
    former = _former(output)
    os.rename(output, former)
    try:
        os.rename(temporary, output)
    except OSError:
        os.rename(former, output)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    """Remove what killed merges into this folder have left; one of a model's size must not fill the disk."""
    for folder in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        # Another merge may remove or rename its own folder meanwhile: then it is not abandoned.
        with contextlib.suppress(FileNotFoundError):
            times = [path.stat().st_mtime for path in [folder, *folder.rglob("*")]]
            if folder.is_dir() and time.time() - max(times) > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
