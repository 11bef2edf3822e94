"""The demo's text: Python's documentation as English, the standard library as code, or a user's own files."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BYTES",
    "Text",
    "documentation",
    "files_at",
    "sample_batches",
    "split",
    "spread_windows",
    "standard_library",
    "tokens_of",
]

BYTES = 256  # the byte-level vocabulary; special tokens come after it
MAX_BYTES = 32 << 20
MIN_BYTES = 512  # of either part

# Not code that a person wrote as code: tests, tables of characters, and the documentation the base has read.
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "lib2to3"}


@dataclass(frozen=True)
class Text:
    """Text to train on and text held out."""

    train: bytes
    held_out: bytes


def documentation() -> bytes:
    """The English of Python's own documentation topics, about half a megabyte."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def standard_library() -> dict[str, bytes]:
    """The standard library's Python files by their path in it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if not SKIPPED & set(file.relative_to(root).parts))
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def files_at(path: Path) -> dict[str, bytes]:
    """A text file, or the text files below a folder (up to 32 MiB), by name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no text in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"--data {path}: no such file or folder")
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files: dict[str, bytes] = {}
    left = MAX_BYTES
    for file in found:
        text = file.read_bytes()[:left]
        if text and b"\0" not in text:  # a NUL byte: no text
            files[file.relative_to(path).as_posix() if file != path else file.name] = text
            left -= len(text)
        if left == 0:
            break
    if not files:
        raise ValueError(f"--data {path}: no text files in it")
    return files


def split(files: dict[str, bytes]) -> Text:
    """About a tenth of the files, chosen by a hash of their names, is held out; of a single file the last tenth.

    Raises:
        ValueError: there is too little text.
    """
    if len(files) == 1:
        (text,) = files.values()
        cut = len(text) - len(text) // 10
        parts = text[:cut], text[cut:]
    else:
        names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
        n_held_out = max(1, len(names) // 10)
        held_out, train = sorted(names[:n_held_out]), sorted(names[n_held_out:])
        parts = b"\n".join(files[name] for name in train), b"\n".join(files[name] for name in held_out)
    if min(map(len, parts)) < MIN_BYTES:
        raise ValueError(f"{len(parts[0])} bytes to train on and {len(parts[1])} held out are too few: give more text")
    return Text(*parts)


def tokens_of(text: bytes, tokenizer: Any | None) -> Tensor:
    """`text` as token ids: its bytes themselves where there is no tokenizer."""
    if tokenizer is None:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    ids = tokenizer(text.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def sample_batches(tokens: Tensor, n_batches: int, batch_size: int, length: int, seed: int) -> list[Tensor]:
    """Batches `(batch_size, length)` of windows at random places; the same for the same seed.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} tokens where windows of {length} are wanted: give more text")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (n_batches, batch_size), generator=generator)
    return [torch.stack([tokens[start : start + length] for start in row]) for row in starts.tolist()]


def spread_windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """Windows `(count, length)` spread evenly over the text.

    Raises:
        ValueError: the text is shorter than a window.
    """
    last = len(tokens) - length
    if last < 0:
        raise ValueError(f"the text has {len(tokens)} tokens where windows of {length} are wanted: give more text")
    starts = torch.linspace(0, last, count).long().tolist()
    return torch.stack([tokens[start : start + length] for start in starts])
