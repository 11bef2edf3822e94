"""The tuned table: measured times of backends (and tiles), kept in one JSON file of the user's cache folder.

Standard library only, because the dispatch reads it. The file is replaced whole; writers merge into what they find
under a lock, so that none loses what another has added; a file that cannot be understood is set aside, never trusted
and never fatal.
"""

import contextlib
import json
import math
import os
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Key", "Table", "TileKey", "Times", "add", "clear", "load", "path", "token_bits"]

FILE_NAME = "tuned-1.json"  # with the version of its form: a later one will take another name


class Key(NamedTuple):
    """What a measurement holds for: device, software, and one layer's sizes.

    `token_bits` is the bucket of the number of tokens: 2 ** token_bits is the power of two not below it. `backend` is a
    backend's name, or a peer's that was measured beside them; b is 0 for what knows no block size, LoRA's rank for it.
    """

    device: str
    capability: str
    torch: str
    triton: str
    dtype: str
    token_bits: int
    in_features: int
    out_features: int
    b: int
    backend: str


class Times(NamedTuple):
    """Seconds of a whole layer, base included; backward is None where only the forward was measured."""

    forward: float
    backward: float | None = None


class TileKey(NamedTuple):
    """What a measured tile holds for: device, software, and a `tiles.Lookup`."""

    device: str
    capability: str
    torch: str
    triton: str
    family: str
    arguments: tuple[int | str, ...]


class Table(NamedTuple):
    """What the file holds. A tile is the five numbers of a `TileConfig`."""

    times: dict[Key, Times]
    tiles: dict[TileKey, tuple[int, ...]]


def token_bits(n_tokens: int) -> int:
    """The bucket of a number of tokens: powers of two, rounded up."""
    return (n_tokens - 1).bit_length() if n_tokens else 0


def path() -> Path:
    """Where the table lies: in the folder that C3A_TRITON_CACHE names, else in the user's cache folder."""
    return _folder() / FILE_NAME


def _folder() -> Path:
    """What `platformdirs.user_cache_dir("c3a_triton")` returns, by its rules."""
    if chosen := os.environ.get("C3A_TRITON_CACHE", "").strip():
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "").strip() or "~/AppData/Local"
        return Path(local).expanduser() / "c3a_triton" / "c3a_triton" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/c3a_triton").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache").expanduser() / "c3a_triton"


def load() -> Table:
    """What has been measured so far; empty where there is no file, or none that can be read.

    A file that is no table is renamed to `*.corrupt`, with a warning.
    """
    file = path()
    try:
        return _read(file)
    except ValueError:
        try:
            with _locked(file):
                return _read_or_set_aside(file)
        except OSError as error:
            warnings.warn(f"{file} is not a tuned table and cannot be set aside ({error})", stacklevel=2)
    except OSError as error:
        warnings.warn(f"the tuned table {file} cannot be read: {error}", stacklevel=2)
    return Table({}, {})


def add(times: Mapping[Key, Times], tiles: Mapping[TileKey, tuple[int, ...]] | None = None) -> None:
    """Add measurements to the file, newer ones in the place of older; safe beside other processes that do so.

    A forward alone leaves the backward of an older entry as it was.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        table = _read_or_set_aside(file)
        for key, found in times.items():
            known = table.times.get(key)
            backward = known.backward if known is not None and found.backward is None else found.backward
            table.times[key] = Times(found.forward, backward)
        table.tiles.update(tiles or {})
        _write(file, table)


def clear() -> int:
    """Remove the table; returns how many entries it had.

    Raises:
        OSError: it cannot be removed.
    """
    file = path()
    if not file.exists():
        return 0
    with _locked(file):
        table = _read_or_set_aside(file)
        file.unlink(missing_ok=True)
    return len(table.times) + len(table.tiles)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the writers. The lock is the system's, so that it ends with a process that is killed."""
    try:
        import fcntl
    except ImportError:  # Windows: files are still replaced whole, but the later of two writers wins
        yield
        return
    with file.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever writes one holds the lock: a temporary file that is here now was left by a process that was killed.
        for abandoned in file.parent.glob(f".{file.name}.*.tmp"):
            with contextlib.suppress(OSError):
                abandoned.unlink()
        yield


def _read_or_set_aside(file: Path) -> Table:
    try:
        return _read(file)
    except ValueError as error:
        aside = file.with_suffix(".json.corrupt")
        os.replace(file, aside)
        warnings.warn(f"the tuned table could not be read ({error}); it is set aside as {aside}", stacklevel=3)
        return Table({}, {})


def _read(file: Path) -> Table:
    """The table in a file, an empty one where there is none. ValueError: the file is no table."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return Table({}, {})
    try:
        values = json.loads(content)
        times = dict(map(_parsed_times, values["times"]))
        tiles = dict(map(_parsed_tile, values["tiles"]))
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return Table(times, tiles)


def _parsed_times(entry: Any) -> tuple[Key, Times]:
    key = Key(**{name: _of_type(entry[name], kind) for name, kind in Key.__annotations__.items()})
    times = Times(entry["forward"], entry["backward"])
    for seconds in (times.forward, 0.0 if times.backward is None else times.backward):
        if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"{seconds!r} is no time")
    return key, times


def _parsed_tile(entry: Any) -> tuple[TileKey, tuple[int, ...]]:
    texts = {name: _of_type(entry[name], str) for name in TileKey._fields if name != "arguments"}
    tile = tuple(_of_type(value, int) for value in entry["tile"])
    if len(tile) != 5 or min(tile) < 1:
        raise ValueError(f"{entry['tile']!r} is no tile")
    arguments = tuple(value if isinstance(value, str) else _of_type(value, int) for value in entry["arguments"])
    return TileKey(**texts, arguments=arguments), tile


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _write(file: Path, table: Table) -> None:
    times = [key._asdict() | found._asdict() for key, found in sorted(table.times.items())]
    tiles = [key._asdict() | {"tile": tile} for key, tile in sorted(table.tiles.items(), key=str)]
    # An entry a line: a table is looked at, and compared, by people.
    parts = (
        f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]"
        for name, rows in (("times", times), ("tiles", tiles))
    )
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write("{\n" + ",\n".join(parts) + "\n}\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
