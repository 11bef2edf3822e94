"""What the processes that share a model decide together."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from c3a_triton.errors import AdapterStateError

from .parallel import meshes
from .sharded import is_sharded, partitioned_over
from .weights import fingerprint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["agree", "all_or_none", "broadcast", "in_step", "shared_over"]

_TOLD = "_c3a_told"  # the meshes whose processes know of an error


def shared_over(model: nn.Module) -> list["DeviceMesh"]:
    """The meshes over which a plan spreads a model, as `meshes`; none where the processes have parted already."""
    is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return meshes(model) if is_running else []


@contextmanager
def in_step(model: nn.Module, verb: str, *, parts: bool = False) -> Iterator[dict[str, Any]]:
    """Around what a verb checks before it changes a model: in each of the processes that share it, or in none.

    A model that no plan spreads is one process's alone, and nothing happens.

    Args:
        model: the model.
        verb: the verb's name, for messages.
        parts: whether processes that hold ZeRO-3's parts of the model share it, too: the verb puts some together.

    Yields:
        A dict for what has to be the same in every process, as `agree` compares it.

    Raises:
        AdapterStateError: another process calls another verb, has other values, or an error of its own.
    """
    over = [*shared_over(model), *(partitioned_over(model.parameters()) if parts else ())]
    with all_or_none(over, verb) as shared:
        yield shared


@contextmanager
def all_or_none(meshes: Sequence["DeviceMesh"], what: str) -> Iterator[dict[str, Any]]:
    """Where something fails within it in one process of the meshes, it fails in all of them, which all enter.

    Args:
        meshes: as in `agree`.
        what: as in `agree`.

    Yields:
        A dict for what has to be the same in every process.

    Raises:
        AdapterStateError: as `agree`.
    """
    shared: dict[str, Any] = {}
    try:
        yield shared
    except Exception as problem:
        agree(meshes, what, None, problem)
    agree(meshes, what, shared)


def agree(meshes: Sequence["DeviceMesh"], what: str, value: Any, problem: Exception | None = None) -> None:
    """Go on only if all processes of the meshes do the same, for which each of them has to call.

    Args:
        meshes: what the processes share, in the same order in each of them. Without any nothing is compared.
        what: the verb.
        value: what has to be equal: tensors, by their bits, and anything that has a repr; mappings and lists of these.
        problem: why this process cannot go on.

    Raises:
        Exception: `problem`, where there is one.
        AdapterStateError: another process has a problem, or another verb or value; the message names it.
    """
    # What an inner step has told to all of them needs no telling again, of which the other processes know nothing.
    if meshes and not set(meshes) <= getattr(problem, _TOLD, set()):
        problem = _verdict(meshes, what, value, problem)
        if problem is not None:
            problem.__dict__[_TOLD] = set(meshes)
    if problem is not None:
        raise problem


def _verdict(meshes: Sequence["DeviceMesh"], what: str, value: Any, problem: Exception | None) -> Exception | None:
    """Why this process cannot go on, as all of them know then, or None: they all go on."""
    text = None if problem is None else f"{type(problem).__name__}: {problem}"
    parts = dict(_flat(value))
    digest = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
    told = _exchanged(meshes, (what, digest, text))
    if problem is not None:
        return problem
    for rank, (verb, _, other) in told.items():
        if other is not None:
            where = "" if verb == what else f" in {verb}"
            return AdapterStateError(f"{what}: process {rank}, which shares this model, fails{where} with {other}")
    if len({(verb, digest) for verb, digest, _ in told.values()}) < 2:
        return None
    # Each of them sees that, so that each can ask the others for more.
    everything = _exchanged(meshes, {"the verb": what} | parts)
    (first, own), *others = everything.items()
    rank, other = next((rank, other) for rank, other in others if other != own)
    key = next(key for key in [*own, *other] if own.get(key) != other.get(key))
    return AdapterStateError(
        f"{what}: the processes that share this model do not do the same: {key} is {own.get(key, 'missing')[:200]} in "
        f"process {first} and {other.get(key, 'missing')[:200]} in process {rank}. Nothing has changed. Each of them "
        "has to call the same verbs in the same order, with the same arguments and files"
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of each part of a value; equal texts mean equal parts."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _flat(part, f"{name}[{index}]")
    elif isinstance(value, Tensor):
        bits = fingerprint(value.reshape(len(value) if value.dim() else 1, -1)) if value.numel() else 0
        yield name, f"{value.dtype} {list(value.shape)} with the fingerprint {bits & (2**64 - 1):016x}"
    else:
        yield name, repr(value)


def _exchanged(meshes: Sequence["DeviceMesh"], own: Any) -> dict[int, Any]:
    """Rank → what each process of the meshes has, in the order of ranks."""
    if not meshes:
        return {}
    known = {torch.distributed.get_rank(): own}
    for mesh in meshes:
        for group in mesh.get_all_groups():
            told: list[Any] = [None] * group.size()
            torch.distributed.all_gather_object(told, known, group=group)
            for other in told:
                known |= other
    return dict(sorted(known.items()))


def broadcast(meshes: Sequence["DeviceMesh"], tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have in the first process of each mesh, in place.

    Of a sharded one each process has a part of its own, which it keeps.
    """
    for tensor in tensors if meshes else ():
        held = tensor.detach()
        if is_sharded(tensor) or held.is_meta:
            continue
        for mesh in meshes:
            sent = held.to(mesh.device_type).contiguous()
            for group in mesh.get_all_groups():
                torch.distributed.broadcast(sent, group=group, group_src=0)
            held.copy_(sent)
