"""What the commands share: options of the same meaning, output for machines."""

import json
import re
from typing import Any

import torch

from c3a_triton.errors import ConfigError

__all__ = ["device_option", "module_choice", "parameter_choice", "print_json"]


def module_choice(values: list[str] | None) -> list[str] | str | None:
    """What a user's words mean to `C3AConfig`: "all-linear", one regular expression, or a list of names."""
    if values is None:
        return None
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"[\w.,-]+", values[0])):
        return values[0]
    return [name for value in values for name in value.split(",") if name]


def parameter_choice(values: list[str] | None) -> list[str] | str | None:
    """What a user's words mean to `C3AConfig`: "all-experts", or a list of parameters' names."""
    if values is None or values == ["all-experts"]:
        return values and values[0]
    return [name for value in values for name in value.split(",") if name]


def device_option(text: str | None) -> torch.device:
    """The device of this name; by default the GPU where there is one.

    Raises:
        ConfigError: torch knows no such device, or it is not here.
    """
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {text}: torch knows no such device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {text}: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {text}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def print_json(document: Any) -> None:
    """The one JSON document that a command with `--json` prints."""
    print(json.dumps(document, indent=2, ensure_ascii=False))
