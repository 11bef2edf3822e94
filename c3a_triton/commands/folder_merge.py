"""An adapter merged into a model's folder, tensor by tensor, so that the model need not fit into memory.

Shards are copied, and the tensors that the adapter changes are rewritten in the copies, at their places in the file: a
tensor keeps its name, dtype and shape. Everything happens in a temporary folder beside the output, which gets its name
when it is complete.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from c3a_triton.adapters.report import format_bytes
from c3a_triton.adapters.untying import clear_flags
from c3a_triton.bases.structure import load_structure
from c3a_triton.errors import C3AError, CheckpointError, ConfigError
from c3a_triton.files.atomic import abandoned, flush_to_disk, temporary_path
from c3a_triton.files.checkpoint import read_adapter
from c3a_triton.files.config import CONFIG_NAME, MODEL_CONFIG_NAME

from .merge_plan import Plan, plan_merge
from .model_folder import DTYPES, INDEX_NAME, SINGLE_NAME, ModelFolder, read_json, read_model_folder, read_tensor

__all__ = ["MergedFolder", "merge_folder"]

# Where a merged folder needs tensors that the model's files have no place for, and what its one file is called then.
ADDED_NAME = "model-added.safetensors"
ONE_SHARD_NAME = "model-00001-of-00001.safetensors"

# Weights in other formats would still be those without the adapter.
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")
_COPIED_FOLDERS = ("additional_chat_templates",)


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
    checkpoint = read_model_folder(model)
    plan = plan_merge(structure, read_adapter(adapter), checkpoint, merge_uncalled)
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
        for left in abandoned(output):  # of a model's size: they must not fill the disk
            shutil.rmtree(left, ignore_errors=True)
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


def _refuse_quantized(model: Path) -> None:
    values = read_json(model / MODEL_CONFIG_NAME)
    quantization = values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{model} is quantized ({method}), and much of what is merged into quantized weights can be lost in their "
            "rounding: merge into the original model in 16 or 32 bits and quantize the result, keep the adapter "
            "unmerged, or merge into the model that transformers dequantizes as it loads it (docs/quantized.md)"
        )


def _check_space(checkpoint: ModelFolder, folder: Path) -> None:
    needed, free = checkpoint.weights_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {format_bytes(free)} of free space; the merged weights need {format_bytes(needed)}"
        )


# Writing


def _shard_name(shard: str, plan: Plan) -> str:
    # transformers reads a file of the usual name alone, and would not look for what was added.
    return ONE_SHARD_NAME if shard == SINGLE_NAME and plan.added else shard


def _write_shard(checkpoint: ModelFolder, shard: str, plan: Plan, folder: Path, device: torch.device) -> None:
    path = folder / _shard_name(shard, plan)
    shutil.copyfile(checkpoint.folder / shard, path)
    with path.open("r+b") as file:
        for key, stored in checkpoint.tensors.items():
            if stored.shard == shard and key in plan.changes:
                tensor, buffer = read_tensor(file, stored)
                changed = tensor.to(device)
                plan.changes[key](changed)
                if changed is not tensor:
                    tensor.copy_(changed)
                file.seek(stored.start)
                file.write(buffer)


def _write_added(checkpoint: ModelFolder, plan: Plan, folder: Path) -> None:
    """Write tensors that the model's files have no place for, and the index; without any, the index as it was."""
    if not plan.added:
        if checkpoint.index is not None:
            shutil.copyfile(checkpoint.folder / INDEX_NAME, folder / INDEX_NAME)
        return
    dtypes = [DTYPES[stored.dtype] for stored in checkpoint.tensors.values() if stored.dtype in DTYPES]
    tensors = {}
    for name, (shape, source, change) in plan.added.items():
        if source is None:
            tensor = torch.empty(shape, dtype=dtypes[0])
        else:
            stored = checkpoint.tensors[source]
            with (checkpoint.folder / stored.shard).open("rb") as file:
                tensor, _ = read_tensor(file, stored)
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


def _copy_other_files(model: Path, folder: Path, plan: Plan) -> None:
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
        values = clear_flags(read_json(path), plan.flags)
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
