"""A transformers model's structure from its configuration alone: modules and shapes on the meta device, no weights."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from c3a_triton.errors import C3AError, CheckpointError, ConfigError
from c3a_triton.files.config import CONFIG_NAME, MODEL_CONFIG_NAME

__all__ = ["load_structure", "transformers_package"]


def transformers_package() -> Any:
    """The package transformers.

    Raises:
        C3AError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise C3AError(f"this needs the package transformers: pip install 'transformers>=5.0' ({error})") from error


def load_structure(model: str | os.PathLike[str]) -> nn.Module:
    """A model as transformers would build it, on the meta device. No weights are read, and none of the model's code.

    It is of the class that its configuration names; where it names none, of a causal language model, or else the bare
    model.

    Args:
        model: a folder with a `config.json`, such a file, or a model's name (its configuration comes from the local
            cache or the hub, as transformers finds it); or a configuration of transformers.

    Raises:
        CheckpointError: there is no such folder or file.
        ConfigError: the configuration cannot be read, or transformers cannot build the model from it.
        C3AError: transformers is not installed.
    """
    if isinstance(model, (str, os.PathLike)):
        _check_path(model)
    transformers = transformers_package()
    if not isinstance(model, (str, os.PathLike, transformers.PretrainedConfig)):
        raise ConfigError(f"expected a model, its configuration, folder or name, got {type(model).__name__}")
    # Whatever transformers raises about a user's file is a statement about that file: the types differ from model to
    # model and from release to release.
    try:
        is_path = isinstance(model, (str, os.PathLike))
        config = (
            transformers.AutoConfig.from_pretrained(os.fspath(model), trust_remote_code=False) if is_path else model
        )
    except Exception as error:
        raise ConfigError(
            f"transformers cannot read the configuration of {_named(model)}: {_first_line(error)}"
        ) from error
    try:
        with torch.device("meta"):
            return _build(transformers, config)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot build a model from the configuration of {model}: {_first_line(error)}"
        ) from error


def _named(model: str | os.PathLike[str]) -> str:
    return str(model) if Path(model).exists() else f"{model} (no folder here, so taken for a model's name)"


def _build(transformers: Any, config: Any) -> nn.Module:
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named(config)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)


def _check_path(model: str | os.PathLike[str]) -> None:
    """Refuse what is not there, before transformers asks the hub for it."""
    path = Path(model)
    text = os.fspath(model)
    if path.is_dir():
        if (path / MODEL_CONFIG_NAME).exists():
            return
        what = "an adapter's folder" if (path / CONFIG_NAME).exists() else "not the folder of a transformers model"
        raise CheckpointError(f"{path} has no {MODEL_CONFIG_NAME}: it is {what}")
    is_no_hub_name = path.is_absolute() or text.startswith((".", "~")) or len(path.parts) > 2 or path.suffix == ".json"
    if is_no_hub_name and not path.exists():
        raise CheckpointError(f"there is no folder or file {path}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
