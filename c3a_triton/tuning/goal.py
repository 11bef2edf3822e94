"""What a run can be asked for, in words: for what, for which use, and how many parameters. It imports no torch."""

import re

from c3a_triton.errors import ConfigError

__all__ = ["MODES", "OBJECTIVES", "parse_count"]

MODES = ("train", "infer")
OBJECTIVES = ("latency", "params", "balanced")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_count(text: str) -> int:
    """A number of parameters: `"500k"`, `"2M"`, `"1.5m"`, `"1b"`, `"1_000_000"`.

    Raises:
        ConfigError: it is no such number, or not a positive one.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([kmbg]?)", text.strip(), re.IGNORECASE)
    count = 0 if match is None else round(float(re.sub("[_,]", "", match[1])) * _UNITS[match[2].lower()])
    if count < 1:
        raise ConfigError(f"{text!r} is not a number of parameters: give for example 500000, 500k or 2M")
    return count
