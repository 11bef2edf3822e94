"""A model's folder of safetensors: its files, where each tensor lies in them, and a tensor's values."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from c3a_triton.errors import CheckpointError

__all__ = [
    "DTYPES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "ModelFolder",
    "Stored",
    "are_equal",
    "check_stored",
    "read_json",
    "read_model_folder",
    "read_tensor",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ModelFolder:
    """A model folder's weights: the files, the tensors in them, and the index of sharded ones."""

    folder: Path
    shards: tuple[str, ...]
    tensors: dict[str, Stored]
    index: dict[str, Any] | None

    @property
    def weights_bytes(self) -> int:
        """The size of all shards."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def read_model_folder(folder: Path) -> ModelFolder:
    """Where the tensors of a folder are.

    Raises:
        CheckpointError: it has none in safetensors, or they are damaged or not those of its index.
    """
    # The one file goes before an index, as in transformers.
    if (folder / SINGLE_NAME).exists():
        return ModelFolder(folder, (SINGLE_NAME,), _read_header(folder / SINGLE_NAME), None)
    if not (folder / INDEX_NAME).exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        remedy = "load the model with transformers and save it with save_pretrained, which writes safetensors"
        if pickled:
            raise CheckpointError(
                f"{folder} has its weights only as {pickled[0]}, a pickle, which can run any code when it is read. If "
                f"you trust it, {remedy}"
            )
        raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: {remedy}")
    index = read_json(folder / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map of keys and file names")
    shards = tuple(dict.fromkeys(weight_map.values()))
    tensors: dict[str, Stored] = {}
    for shard in shards:
        if Path(shard).name != shard or shard == ".." or not shard.isprintable():
            raise CheckpointError(f"{folder / INDEX_NAME} names {shard!r}, which is not a file of this folder")
        tensors |= _read_header(folder / shard)
    if wrong := [key for key, shard in weight_map.items() if key not in tensors or tensors[key].shard != shard]:
        raise CheckpointError(f"{folder / INDEX_NAME}: {wrong[0]} is not in {weight_map[wrong[0]]}")
    return ModelFolder(folder, shards, tensors, index)


def _read_header(path: Path) -> dict[str, Stored]:
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
            key: Stored(path.name, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
            for key, entry in entries.items()
        }
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}, it may be damaged or incomplete: {error}") from error


def read_tensor(file: Any, stored: Stored) -> tuple[Tensor, bytearray]:
    """A tensor, and the bytes that it is a view of."""
    buffer = bytearray(stored.end - stored.start)
    file.seek(stored.start)
    if file.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{file.name} has become shorter while it was read")
    return torch.frombuffer(buffer, dtype=DTYPES[stored.dtype]).view(stored.shape), buffer


def are_equal(checkpoint: ModelFolder, *keys: str) -> bool:
    """Whether tensors of the checkpoint are the same, bit for bit."""
    found = []
    for key in keys:
        stored = checkpoint.tensors[key]
        with (checkpoint.folder / stored.shard).open("rb") as file:
            file.seek(stored.start)
            found.append((stored.dtype, stored.shape, file.read(stored.end - stored.start)))
    return all(other == found[0] for other in found[1:])


def check_stored(key: str, checkpoint: ModelFolder, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of the checkpoint into which nothing can be merged.

    Raises:
        CheckpointError: it has another shape than this one, or a dtype that is none of `DTYPES`.
    """
    stored = checkpoint.tensors[key]
    if stored.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder / stored.shard}: {key} has shape {list(stored.shape)}, the model's configuration says "
            f"{list(shape)}"
        )
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{checkpoint.folder / stored.shard}: {key} is stored as {stored.dtype}, into which nothing can be merged: "
            "take the model in 16 or 32 bits"
        )
