"""`c3a-triton cache`: what autotune has measured, shown or cleared."""

import argparse

from c3a_triton.adapters.report import format_seconds, format_table
from c3a_triton.errors import C3AError
from c3a_triton.operator import tuned

from .options import print_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    path = tuned.path()
    if args.action == "clear":
        try:
            removed = tuned.clear()
        except OSError as error:
            raise C3AError(f"{path} cannot be removed: {error}") from error
        if args.json:
            print_json({"path": str(path), "removed": removed})
        else:
            print(f"{removed} measurements removed: {path}")
        return 0
    table = tuned.load()
    if args.json:
        times = [key._asdict() | found._asdict() for key, found in sorted(table.times.items())]
        tiles = [key._asdict() | {"tile": tile} for key, tile in sorted(table.tiles.items())]
        print_json({"path": str(path), "times": times, "tiles": tiles})
        return 0
    print(f"{path}: {len(table.times)} measured layers, {len(table.tiles)} measured tiles")
    machines: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key, found in sorted(table.times.items()):
        sizes = (str(2**key.token_bits), str(key.in_features), str(key.out_features), str(key.b))
        backward = "" if found.backward is None else format_seconds(found.backward)
        row = (key.dtype, *sizes, key.backend, format_seconds(found.forward), backward)
        machines.setdefault(key[:4], []).append(row)
    header = ("dtype", "tokens", "in", "out", "b", "backend", "forward", "backward")
    for (device, capability, torch_version, triton_version), rows in machines.items():
        print(f"\n{device} ({capability}), torch {torch_version}, triton {triton_version}")
        print(format_table([header, *rows], {1, 2, 3, 4, 6, 7}))
    return 0
