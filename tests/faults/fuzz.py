"""The readers of strangers' files, fed with what nobody would write: only this library's own errors may come out.

    python tests/faults/fuzz.py --seconds 600           under atheris, led by coverage, where it is installed
    python tests/faults/fuzz.py --seconds 60 --random   by mutations of the corpus, without atheris

An input's first byte chooses the reader (READERS), the rest is the file. `corpus` holds one small good file for each.
What is found is written to the current folder as `crash-*`; `python tests/faults/fuzz.py FILE` shows it again.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
MAX_BYTES = 4096
FOUND = 3
NAMES = ["first", "norm", "second", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]


def import_readers() -> None:
    """Import what is fuzzed; under atheris with coverage of it."""
    global torch, C3AConfig, C3AError, block_size_rule, checkpoint, model_folder, target_rule, tuned, unmatched_keys
    import torch

    instrumented = contextlib.nullcontext()
    if "atheris" in sys.modules:
        instrumented = sys.modules["atheris"].instrument_imports(include=["c3a_triton"])
    with instrumented:
        from c3a_triton import C3AConfig, C3AError
        from c3a_triton.commands import model_folder
        from c3a_triton.files import checkpoint
        from c3a_triton.files.patterns import block_size_rule, target_rule, unmatched_keys
        from c3a_triton.operator import tuned


def read_config(content: bytes, folder: Path) -> None:
    """`adapter_config.json`, and its patterns matched."""
    (folder / "adapter_config.json").write_bytes(content)
    config = C3AConfig.from_pretrained(folder)
    assert C3AConfig.from_dict(config.to_dict()) == config
    list(map(block_size_rule(config), NAMES))
    unmatched_keys(config, NAMES)
    if config.target_modules not in (None, "all-linear"):
        rule = target_rule(config)
        [rule(name) for name in NAMES]


def read_weights(content: bytes, folder: Path) -> None:
    """`adapter_model.safetensors` beside a good configuration."""
    shutil.copy(CORPUS / "adapter_config.json", folder)
    (folder / "adapter_model.safetensors").write_bytes(content)
    checkpoint.read_adapter(folder)


def read_header(content: bytes, folder: Path) -> None:
    """The header of `adapter_model.safetensors`, its length put right and the tensors' bytes supplied."""
    weights = (CORPUS / "weights.bin").read_bytes()
    values = weights[8 + int.from_bytes(weights[:8], "little") :]
    read_weights(len(content).to_bytes(8, "little") + content + values, folder)


def read_table(content: bytes, folder: Path) -> None:
    """The tuned table, which never fails."""
    (folder / tuned.FILE_NAME).write_bytes(content)
    os.environ["C3A_TRITON_CACHE"] = str(folder)
    try:
        tuned.load()
    except C3AError as error:
        raise AssertionError("a tuned table raised") from error


def read_index(content: bytes, folder: Path) -> None:
    """`model.safetensors.index.json` of a model to merge into."""
    shutil.copy(CORPUS / "weights.bin", folder / "model-1.safetensors")
    (folder / model_folder.INDEX_NAME).write_bytes(content)
    model_folder.read_model_folder(folder)


READERS: tuple[Callable[[bytes, Path], None], ...] = (read_config, read_weights, read_header, read_table, read_index)


def one(data: bytes) -> None:
    """One input: returns, or raises what is a mistake of ours."""
    if not data:
        return
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, warnings.catch_warnings(), contextlib.suppress(C3AError):
        warnings.simplefilter("ignore")
        READERS[data[0] % len(READERS)](data[1:], Path(folder))


def seeds() -> list[bytes]:
    """The corpus as inputs."""
    weights = (CORPUS / "weights.bin").read_bytes()
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    config = (CORPUS / "adapter_config.json").read_bytes()
    files = (config, weights, header, (CORPUS / "table.json").read_bytes(), (CORPUS / "index.json").read_bytes())
    found = [bytes([reader]) + content for reader, content in enumerate(files)]
    return found + [path.read_bytes() for path in sorted(CORPUS.glob("found-*"))]


def mutated(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A few changes of an input, its reader kept."""
    reader, body = data[:1], bytearray(data[1:])
    tokens = (
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"9" * 30,
        b"\\u0000",
        b"\\ud800",
        b"{9}",
        b"(",
        b"F4",
    )
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1)
        kind = draw.randrange(6)
        if kind == 0 and body:
            body[at % len(body)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del body[at : at + draw.randint(1, 16)]
        elif kind == 2:
            body[at:at] = draw.choice(tokens)
        elif kind == 3:
            end = at + draw.randint(1, 8)
            body[at:end] = draw.choice(tokens)
        elif kind == 4:
            other = draw.choice(others)[1:]
            start = draw.randrange(len(other) + 1)
            body[at : at + 16] = other[start : start + draw.randint(1, 64)]
        else:
            body[at:at] = body[at : at + draw.randint(1, 32)]
    return reader + bytes(body[:MAX_BYTES])


def fuzz_randomly(seconds: float, seed: int) -> int:
    """Mutations of the corpus until the time is over; how many inputs were tried."""
    draw, end, tried, kinds = random.Random(seed), time.monotonic() + seconds, 0, set()
    pool = seeds()
    n_seeds = len(pool)
    while time.monotonic() < end:
        data = mutated(draw.choice(pool), draw, pool)
        tried += 1
        start = time.process_time()
        try:
            one(data)
        except BaseException:
            name = f"crash-{hashlib.sha1(data).hexdigest()[:12]}"
            Path(name).write_bytes(data)
            print(f"{name}:\n{traceback.format_exc()}", flush=True)
            kinds.add(name)
            if len(kinds) >= FOUND:
                raise SystemExit(1) from None
        if time.process_time() - start > 5:
            raise SystemExit(f"an input took {time.process_time() - start:.1f} s: {data!r}")
        if draw.random() < 0.01:  # mutations of mutations, too
            pool[n_seeds + draw.randrange(64) :] = [data]
    if kinds:
        raise SystemExit(1)
    return tried


def main() -> None:
    """Fuzz, or show one input again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="without atheris")
    args = parser.parse_args()
    led = not args.random and args.file is None and importlib.util.find_spec("atheris") is not None
    if led:
        import atheris
    import_readers()
    if args.file is not None:
        one(args.file.read_bytes())
    elif not led:
        print(f"without atheris: {fuzz_randomly(args.seconds, args.seed)} inputs, nothing found")
    else:
        corpus = Path(tempfile.mkdtemp())
        for number, data in enumerate(seeds()):
            (corpus / str(number)).write_bytes(data)
        options = [f"-max_total_time={args.seconds}", f"-max_len={MAX_BYTES}", "-timeout=20", "-rss_limit_mb=3000"]
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
