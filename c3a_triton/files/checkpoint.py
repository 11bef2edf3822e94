"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, in PEFT's form, each replaced whole.

The weights file also carries, as text that PEFT ignores, the configuration as the user wrote it; the hash of the
`adapter_config.json` that it belongs to, so that a file of one save beside a file of another is noticed; and a digest
of its own content, because safetensors has none: a bit that flips in a file is an error, not another adapter.
"""

import contextlib
import hashlib
import json
import os
import reprlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from c3a_triton.errors import CheckpointError

from .atomic import abandoned, flush_to_disk, replace_file, temporary_path, write_temporary
from .config import CONFIG_NAME, MAX_CONFIG_BYTES, C3AConfig, read_config_file, with_owners
from .peft_rules import peft_safe_pattern, peft_safe_targets
from .values import some

__all__ = [
    "KERNEL_SUFFIX",
    "WEIGHTS_NAME",
    "AdapterFile",
    "config_state",
    "peft_config",
    "read_adapter",
    "write_adapter",
]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
KERNEL_SUFFIX = ".c3a_kernel"
# PEFT's name of the adapted model inside its own wrappers.
PREFIX = "base_model.model."

# The texts in the weights file's metadata, besides PEFT's "format".
FORMAT_VERSION = "2"
FORMAT_KEY = "c3a_triton_format"
CONFIG_HASH_KEY = "adapter_config_sha256"
SAVED_CONFIG_KEY = "adapter_config"
USER_CONFIG_KEY = "c3a_triton_config"
DIGEST_KEY = "c3a_triton_sha256"

# Fields that say where an adapter comes from, not what it is: a configuration file that differs from the saved one in
# these alone still belongs to its weights.
_BOOKKEEPING = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter read from disk.

    Attributes:
        config: what the user configured, where the file knows it, otherwise what `adapter_config.json` says.
        tensors: every tensor of the file in its own dtype, on the CPU, under its key without "base_model.model.":
            `<module path>.c3a_kernel` [out_blocks, in_blocks, b], `<parameter's name>.c3a_kernel` (of stacked
            matrices [n, out_blocks, in_blocks, b]), and biases and `modules_to_save` as PEFT names them.
        block_sizes: module path or parameter's name → b, from the tensors' shapes, for all that is adapted.
        path: the folder.
    """

    config: C3AConfig
    tensors: dict[str, torch.Tensor]
    block_sizes: dict[str, int]
    path: Path


def write_adapter(
    directory: str | os.PathLike[str],
    config: C3AConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    block_sizes: Mapping[str, int],
    module_names: Sequence[str],
    parameters: Collection[str] = (),
    tokens: Mapping[str, list[int]] | None = None,
) -> None:
    """Writes an adapter into a folder (created where it is missing), in the form of PEFT.

    Each file is complete on disk before it takes the former one's place, the configuration first. When a step fails,
    the adapter that was there is there still (but for the last, waiting for the folder itself to reach the disk: then
    the new one is); when the process is killed between the two, `read_adapter` notices.

    `adapter_config.json` names targets and block sizes so that PEFT arrives at exactly these layers and sizes. It keeps
    the user's patterns where PEFT understands them so, and has full module names where it does not. Parameters that are
    adapted themselves, of which PEFT's C3A knows nothing, are named in full in `target_parameters`; the modules that
    have them are among the targets, so that PEFT refuses an adapter of which it would drop a part.

    Args:
        directory: the folder.
        config: the configuration as the user gave it.
        tensors: what is saved, each under PEFT's key without its "base_model.model.": `<module path>.c3a_kernel`
            [out_blocks, in_blocks, b] for every adapted layer; `<parameter's name>.c3a_kernel` for every adapted
            parameter, [n, out_blocks, in_blocks, b] where it is n stacked matrices; `<module path>.base_layer.bias` for
            the trained bias of an adapted layer, `<module path>.bias` for another's; `<module path>.<parameter>` for
            `modules_to_save`. Any device, any strides; tensors may share memory.
        block_sizes: module path or parameter's name → b for all that is adapted.
        module_names: the names of all modules of the model without adapters, as `named_modules()` gives them. What PEFT
            would target is checked against these.
        parameters: which names of `block_sizes` are parameters'.
        tokens: module path → the tokens whose rows, in this order, are `<module path>.token_adapter.
            trainable_tokens_delta` [tokens, embedding_dim] among the tensors.

    Raises:
        CheckpointError: a file cannot be written, or a tensor has no values to write.
        ConfigError: an adapted module is not in `module_names`, or one that PEFT could not address.
    """
    directory = Path(directory)
    _check_kernels(tensors, block_sizes, parameters)
    said = peft_config(config, block_sizes, module_names, parameters)
    said = replace(said, trainable_token_indices=dict(tokens) if tokens else None)
    said = replace(said, target_modules=with_owners(said))
    content = said.to_json()
    metadata = {
        "format": "pt",
        FORMAT_KEY: FORMAT_VERSION,
        CONFIG_HASH_KEY: hashlib.sha256(content).hexdigest(),
        SAVED_CONFIG_KEY: content.decode(),
        USER_CONFIG_KEY: json.dumps(config.to_dict()),
    }
    stored = _writable(tensors)
    metadata[DIGEST_KEY] = _digest(stored, metadata)
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    new_weights = temporary_path(weights_path)
    new_config = write_temporary(config_path, content)
    try:
        save_file(stored, new_weights, metadata=metadata)
        # The library makes files that only their owner can read; the weights are as readable as the configuration. A
        # courtesy: mounted object stores and network drives have modes of their own and forbid to change them.
        with contextlib.suppress(OSError):
            new_weights.chmod(new_config.stat().st_mode & 0o777)
        flush_to_disk(new_weights)
        _replace_both(new_config, config_path, new_weights, weights_path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot save the adapter to {directory}: {error}") from error
    finally:
        new_config.unlink(missing_ok=True)
        new_weights.unlink(missing_ok=True)
    _remove_abandoned(directory)


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Reads the adapter in a folder, saved by this library or by PEFT. Nothing is ever unpickled.

    Raises:
        CheckpointError: the folder or a file is missing, damaged, or not a C3A adapter's; or the two files are of
            different saves.
        ConfigError: the configuration is another method's, or has a value that cannot be used.
    """
    directory = Path(directory)
    values, content = read_config_file(directory)
    config = C3AConfig.from_file_values(values, directory / CONFIG_NAME)
    stored, metadata = _read_weights(directory)
    config = _config_of_user(config, content, metadata, directory)
    path = directory / WEIGHTS_NAME
    if metadata.get(FORMAT_KEY) == FORMAT_VERSION and metadata[DIGEST_KEY] != _digest(stored, metadata):
        raise CheckpointError(
            f"{path} is damaged: its content is not what was saved (the digest differs). Take a copy that is whole. If "
            f"another program changed it on purpose, let that program leave out the metadata beside the tensors"
        )

    foreign = [key for key in stored if not key.startswith(PREFIX) or f"{KERNEL_SUFFIX}." in key]
    if foreign:
        raise CheckpointError(f"{path} has keys that no C3A adapter on disk has: {some(sorted(foreign))}")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not _is_wrapper_copy(key, tensors)}
    kernels = _kernels(tensors)
    if not kernels:
        raise CheckpointError(f"{path} holds no C3A adapter: no key ends with {KERNEL_SUFFIX!r}")
    for name, kernel in kernels.items():
        # Which kernels may be stacked is for the model to say.
        if kernel.ndim not in (3, 4) or not kernel.is_floating_point() or kernel.numel() == 0:
            raise CheckpointError(
                f"{path}: {name}{KERNEL_SUFFIX} must be floating-point values of shape [out_blocks, in_blocks, "
                f"block_size], or several of these stacked, found {kernel.dtype} of shape {list(kernel.shape)}"
            )
    return AdapterFile(config, tensors, {name: kernel.shape[-1] for name, kernel in kernels.items()}, directory)


def config_state(directory: str | os.PathLike[str]) -> str:
    """How the configuration of a folder that `read_adapter` reads stands to its weights, in words."""
    directory = Path(directory)
    with safe_open(directory / WEIGHTS_NAME, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
    if CONFIG_HASH_KEY not in metadata:
        return "not recorded in the weights (PEFT does not)"
    _, content = read_config_file(directory)
    same = hashlib.sha256(content).hexdigest() == metadata[CONFIG_HASH_KEY]
    return "as it was saved with the weights" if same else "changed since the weights were saved"


def _kernels(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module path → kernel."""
    return {key.removesuffix(KERNEL_SUFFIX): tensor for key, tensor in tensors.items() if key.endswith(KERNEL_SUFFIX)}


def _is_wrapper_copy(key: str, keys: Collection[str]) -> bool:
    """Whether PEFT wrote a key a second time: with bias="all", the biases inside its wrapper of `modules_to_save`."""
    for marker in (".original_module.", ".modules_to_save."):
        module, found, rest = key.partition(marker)
        without_adapter_name = rest.partition(".")[2]
        if found and key.endswith(".bias") and any(f"{module}.{end}" in keys for end in (rest, without_adapter_name)):
            return True
    return False


def _check_kernels(
    tensors: Mapping[str, torch.Tensor], block_sizes: Mapping[str, int], parameters: Collection[str]
) -> None:
    kernels = _kernels(tensors)
    if not kernels:
        raise CheckpointError("there is nothing to save: no layer has a C3A kernel")
    if unpaired := kernels.keys() ^ block_sizes.keys():
        raise CheckpointError(f"layers with a kernel or a block size, but not both: {some(sorted(unpaired))}")
    for name, kernel in kernels.items():
        dims = (3, 4) if name in parameters else (3,)
        if kernel.ndim not in dims or kernel.shape[-1] != block_sizes[name]:
            raise CheckpointError(
                f"{name}{KERNEL_SUFFIX} must have shape [out_blocks, in_blocks, {block_sizes[name]}]"
                f"{', or several of these stacked' if 4 in dims else ''}, got {list(kernel.shape)}"
            )
    if without_values := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(f"tensors on the meta device have no values to save: {some(sorted(without_values))}")


def peft_config(
    config: C3AConfig,
    block_sizes: Mapping[str, int],
    module_names: Sequence[str],
    parameters: Collection[str] = (),
) -> C3AConfig:
    """What `adapter_config.json` says: a configuration that means these layers and sizes to PEFT.

    It has the names of adapted parameters beside them, which mean nothing to PEFT's C3A.
    """
    block_size, pattern = peft_safe_pattern(block_sizes, config)
    modules = [name for name in block_sizes if name not in parameters]
    targets, layers, layers_pattern = peft_safe_targets(modules, config, module_names)
    return replace(
        config,
        block_size=block_size,
        block_size_pattern=pattern,
        rank=None,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        target_parameters=sorted(parameters) or None,
        inference_mode=True,  # as PEFT writes it, whatever the adapter was trained with
    )


def _writable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under PEFT's keys, contiguous, each in memory of its own, as safetensors wants them."""
    writable: dict[str, torch.Tensor] = {}
    memory = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        where = (tensor.device, tensor.untyped_storage().data_ptr())
        writable[PREFIX + key] = tensor.clone() if where in memory else tensor
        memory.add(where)
    return writable


def _digest(stored: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what a weights file says: its notes, and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {DIGEST_KEY}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for key in sorted(stored):
        # A copy: numpy takes hold of the memory it is shown, and FSDP could not resize a parameter's any more.
        tensor = stored[key].detach().to("cpu", copy=True).contiguous()
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace_both(new_config: Path, config_path: Path, new_weights: Path, weights_path: Path) -> None:
    """Puts both files in place, the weights last; when that fails, the former configuration is put back."""
    former = config_path.read_bytes() if config_path.exists() else None
    os.replace(new_config, config_path)
    try:
        os.replace(new_weights, weights_path)
    except OSError as error:
        try:
            if former is None:
                config_path.unlink()
            else:
                replace_file(config_path, former)
        except OSError as second_error:
            raise CheckpointError(
                f"cannot replace {weights_path}: {error}. And {config_path}, which was replaced already, cannot be put "
                f"back: {second_error}. The two are of different saves now"
            ) from error
        raise
    flush_to_disk(config_path.parent)  # the names are on disk only when the folder is


def _remove_abandoned(directory: Path) -> None:
    """Removes temporary files of saves that were killed. A courtesy: what cannot be removed stays."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        for path in abandoned(directory / name):
            with contextlib.suppress(OSError):
                path.unlink()


def _read_weights(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = directory / WEIGHTS_NAME
    if not path.exists():
        if (directory / PICKLED_WEIGHTS_NAME).exists():
            raise CheckpointError(
                f"{directory} has its weights only as {PICKLED_WEIGHTS_NAME}, a pickle, which can run any code when "
                "it is read. If you trust it, load it with PEFT and save it with safe_serialization=True"
            )
        raise CheckpointError(f"{directory} has no {WEIGHTS_NAME}")
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is not a regular file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}, it may be damaged or incomplete: {error}") from error


def _config_of_user(config: C3AConfig, content: bytes, metadata: Mapping[str, str], directory: Path) -> C3AConfig:
    """The configuration as the user wrote it, after checking that the two files belong together.

    Files that PEFT wrote say nothing of this: theirs is `config`.
    """
    if FORMAT_KEY not in metadata:
        return config
    path = directory / WEIGHTS_NAME
    if metadata[FORMAT_KEY] != FORMAT_VERSION:
        warnings.warn(
            f"{path} was written by another version of c3a_triton (its format is {metadata[FORMAT_KEY]!r}, this "
            f"version knows {FORMAT_VERSION!r}): its notes are ignored, and {CONFIG_NAME} holds",
            stacklevel=3,
        )
        return config
    if len(metadata.get(USER_CONFIG_KEY, "") + metadata.get(SAVED_CONFIG_KEY, "")) > 2 * MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path}: the notes of c3a_triton in it are larger than any adapter's configuration")
    try:
        user_config = C3AConfig.from_dict(json.loads(metadata[USER_CONFIG_KEY]))
        saved_config = C3AConfig.from_file_values(json.loads(metadata[SAVED_CONFIG_KEY]), path)
        config_hash, _ = metadata[CONFIG_HASH_KEY], metadata[DIGEST_KEY]
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the notes of c3a_triton in it are damaged: {error!r}") from error
    if hashlib.sha256(content).hexdigest() == config_hash:
        return user_config

    changed = _changed_fields(saved_config, config)
    if essential := {name: values for name, values in changed.items() if name not in _BOOKKEEPING}:
        details = "; ".join(
            f"{name} is {reprlib.repr(now)}, was {reprlib.repr(then)}" for name, (then, now) in essential.items()
        )
        raise CheckpointError(
            f"{directory / CONFIG_NAME} is not the configuration that {path} was saved with ({details}). A save "
            "may have been interrupted, or files of two adapters mixed: take both files from one save. If the "
            "configuration was edited, set these fields back"
        )
    if changed:
        warnings.warn(
            f"{directory / CONFIG_NAME} was changed after {path} was saved, in {', '.join(changed)}: it holds",
            stacklevel=3,
        )
    return replace(user_config, **{name: now for name, (_, now) in changed.items()})


def _changed_fields(then: C3AConfig, now: C3AConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ. Target lists are sets to PEFT, which writes them in any order."""

    def comparable(value: Any) -> Any:
        return set(value) if isinstance(value, list) else value

    pairs = {item.name: (getattr(then, item.name), getattr(now, item.name)) for item in fields(C3AConfig)}
    return {name: pair for name, pair in pairs.items() if comparable(pair[0]) != comparable(pair[1])}
