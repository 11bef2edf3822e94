"""Counters of launches whose programs share sums: by them the last program to finish knows that it is the last.

They lie in lasting memory and are zero while no launch uses them: that last program sets them back, which spares a
launch before it. No two launches that may run at the same time have the same ones:

- An eager launch takes those of its stream and gives them back: whoever takes them next runs behind it. A launch that
  raises gives none back. (On a GPU a kernel runs to its end or costs the process its CUDA context; the interpreter may
  be interrupted.)
- A captured launch keeps its own for good, since graphs that were captured on one stream may be replayed on several. A
  graph does not run beside itself: its launches would write the same results.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import spectra
from .plans import PROGRAMS, round_up

__all__ = ["LENGTH", "take"]

# One for each sum of a launch: sums are split where they are fewer than this. Whole 16 bytes, so that all counters are
# equally aligned, and one specialisation of a kernel takes them.
LENGTH = round_up(PROGRAMS // 4, 4)
# 1.1 MB. Eager launches need one set for each stream, captured ones one each.
_LAUNCHES = 4096

# All of them, which graphs hold by address alone; what no launch has had yet; what launches of a device and stream have
# given back.
_kept: list[Tensor] = []
_fresh: dict[torch.device, Iterator[Tensor]] = {}
_idle: defaultdict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)


def take(device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Zeros [LENGTH] int32 for one launch on the current stream, and the list to append them to once that is made."""
    stream = 0
    if spectra.captures(device):
        if torch.cuda.is_current_stream_capturing():
            kept = next(_fresh.get(device, iter(())), None)
            # Where no call came before, or very many were captured, the graph has a launch more that writes zeros.
            return torch.zeros(LENGTH, dtype=torch.int32, device=device) if kept is None else kept, []
        stream = torch.cuda.current_stream(device).cuda_stream
    idle = _idle[device, stream]
    try:
        return idle.pop(), idle  # at once: other threads may launch on this stream
    except IndexError:
        return _next(device), idle


def _next(device: torch.device) -> Tensor:
    """Counters that no launch has had."""
    found = next(_fresh.get(device, iter(())), None)
    if found is None:
        # Copied from pageable memory, which waits: they are zero on whatever stream they are used first.
        rows = spectra.lasting(
            lambda: torch.zeros(_LAUNCHES, LENGTH, dtype=torch.int32, device="cpu").to(device), device, "counters"
        )
        _kept.append(rows)
        fresh = _fresh[device] = map(rows.__getitem__, range(_LAUNCHES))
        found = next(fresh)
    return found
