"""Layers of which each process computes a part: what the plan does with them, and where an adapter's part joins.

A plan is one of transformers (`DistributedConfig`: each of its styles puts another forward into a module, around the
module's own) or what torch's `parallelize_module` was given (hooks). Neither library notes the mesh on the module, but
what they put there has it in its closure.

What adapters add to a linear layer joins its innermost forward, behind what the plan does with x and before it reduces
y: so the forward pass sends nothing more, and base and adapters have one sum of gradients of x, which the plan reduces
once. Both libraries pass a call's keywords on to that forward; `beside` calls a layer with one that `_Joining` knows.

A kernel is whole on every process, which computes with those blocks that cover its rows and columns of W. So any block
size is right for any shard: even, uneven, of whole blocks or not, in one piece or several. Where processes compute
different parts of dw, they are summed: one all-reduce in the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from c3a_triton.errors import AdapterStateError

from .linear_like import geometry, is_transposed
from .sharded import is_sharded

__all__ = ["Part", "beside", "entered", "leave", "meshes", "parallel_mesh", "part_of", "shares_batch"]

Ranges = tuple[tuple[int, int], ...]
Add = Callable[[Tensor, Tensor, "Part | None"], Tensor]
"""(x, y, part) → y with what adapters add, all of one process."""

# Which dimension of W a style of transformers splits between processes, 0 being that of rows; None: they have all of W.
# No style: torch's plan, whose weights are DTensors.
_STYLES = {
    None: None,
    "TensorParallelLayer": None,
    "ColwiseParallel": 0,
    "PackedColwiseParallel": 0,
    "RowwiseParallel": 1,
    "MlaKvAProjParallel": None,
    "ReplicatedWithGradAllReduce": None,
    "SequenceParallel": None,
}


def _functions(module: nn.Module) -> Iterator[Any]:
    """What a plan may have put into a module."""
    yield module.__dict__.get("forward")
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    yield from module._backward_hooks.values()  # transformers 5.17, for one style


def _is_changed(module: nn.Module) -> bool:
    """Whether there is any of `_functions`."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__


def _cells(function: Any) -> dict[str, CellType]:
    """The variables around a nested function that have a value; of anything else none."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = function.__closure__ if names else ()
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell != CellType()}


def parallel_mesh(module: nn.Module) -> DeviceMesh | None:
    """The mesh over which a plan, of tensor or of expert parallelism, spreads one module, or None.

    FSDP2's meshes are none of a plan.
    """
    values = [cell.cell_contents for function in _functions(module) for cell in _cells(function).values()]
    # One style has it in a function that its forward calls.
    values += [cell.cell_contents for value in values for cell in _cells(value).values()]
    return next((value for value in values if isinstance(value, DeviceMesh)), None)


def meshes(model: nn.Module) -> list[DeviceMesh]:
    """The distinct meshes over which a plan spreads modules of a model, in the order of `modules()`."""
    # What most modules have nothing of is asked first: verbs of any model come here.
    found = map(parallel_mesh, filter(_is_changed, model.modules()))
    return list(dict.fromkeys(mesh for mesh in found if mesh is not None))


def shares_batch(model: nn.Module) -> bool:
    """Whether the processes that have parts of a model all compute the same batch: a plan's, if FSDP2 does no more.

    Of expert parallelism transformers notes whether it is so.
    """
    over = meshes(model)
    if any(is_sharded(p) and getattr(p, "device_mesh", None) not in over for p in model.parameters()):
        return False
    implementations = (_value(module, "implementation") for module in model.modules())
    return all(getattr(implementation, "shares_batch", True) for implementation in implementations)


# What a process computes


@dataclass(frozen=True)
class Part:
    """What one process computes of a linear layer.

    Attributes:
        mesh: the processes.
        split: the dimension of W of which each of them has some; None: each has all of W.
        rows, columns: those of W [out_features, in_features] that this process has, as ranges in its order.
        out_features, in_features: of the whole layer.
        summed: whether each process computes a summand of dw.
    """

    mesh: DeviceMesh
    split: int | None
    rows: Ranges
    columns: Ranges
    out_features: int
    in_features: int
    summed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of this process's part of W."""
        rows, columns = (sum(stop - start for start, stop in ranges) for ranges in (self.rows, self.columns))
        return rows, columns

    def of_weight(self, weight: Tensor) -> Tensor:
        """This process's part of the layer's weight, the very memory; where FSDP2 shards it once more, as it is."""
        is_ours = getattr(weight, "device_mesh", None) == self.mesh
        return weight.to_local() if is_ours else weight  # type: ignore[attr-defined]

    def product(
        self, x: Tensor, kernels: Sequence[Tensor], compute: Callable[[Tensor, list[Tensor]], Tensor]
    ) -> Tensor:
        """This process's part of y.

        Args:
            x: [..., this process's columns].
            kernels: whole w's [out_features / b, in_features / b, b].
            compute: (x, kernels) → y, of blocks that cover more than this process's part where b does not divide that.
        """
        rows, columns = self._covers(kernels)
        y = compute(_padded(x, -1, self.columns, columns), [self._blocks(w, rows, columns) for w in kernels])
        return _cut(y, -1, self.rows, rows)

    @torch.no_grad()
    def add_(self, weight: Tensor, kernels: Sequence[Tensor], add: Callable[[Tensor, list[Tensor]], None]) -> None:
        """Add ΔW's to this process's part of W, in place.

        Args:
            weight: the part of W.
            kernels: as in `product`.
            add: (weight, kernels) adds in place, rounded once; of blocks that cover more, as in `product`.
        """
        rows, columns = self._covers(kernels)
        blocks = [self._blocks(w, rows, columns) for w in kernels]
        if (rows, columns) == (self.rows, self.columns):
            add(weight, blocks)
            return
        cover = _padded(_padded(weight, -1, self.columns, columns), -2, self.rows, rows)
        add(cover, blocks)
        weight.copy_(_cut(_cut(cover, -1, self.columns, columns), -2, self.rows, rows))

    def _covers(self, kernels: Sequence[Tensor]) -> tuple[Ranges, Ranges]:
        """Rows and columns, extended to whole blocks of every kernel."""
        step = lcm(*(w.shape[-1] for w in kernels))
        return _extended(self.rows, step, self.out_features), _extended(self.columns, step, self.in_features)

    def _blocks(self, w: Tensor, rows: Ranges, columns: Ranges) -> Tensor:
        """The blocks of w at these rows and columns."""
        if self.summed and w.requires_grad and torch.is_grad_enabled():
            from torch.distributed.tensor import DTensor, Partial, Replicate

            w = DTensor.from_local(w, self.mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        b = w.shape[-1]
        for dim, ranges, size in ((0, rows, self.out_features), (1, columns, self.in_features)):
            if ranges != ((0, size),):
                pieces = [w.narrow(dim, start // b, (stop - start) // b) for start, stop in ranges]
                w = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return w

    def join(self, label: str, add: Add, x: Tensor, y: Tensor) -> Tensor:
        """What `add` makes of a base layer's y, where x and y are as its innermost forward has them.

        Raises:
            AdapterStateError: x and y are spread in another way than W; in the backward pass, second derivatives.
        """
        if not hasattr(y, "placements"):
            # Another object in each call: an x that is refilled behind torch's back is told by the kernel that reads
            # it again (`operator.spectra`), but blocks of a kernel are objects of one call.
            return self._once(label, add(x.view_as(x), y, self))
        from torch.distributed.tensor import DTensor, Partial

        assert isinstance(y, DTensor)
        (of_x,), (of_y,) = x.placements, y.placements  # type: ignore[attr-defined]
        fits = of_y.is_partial() == (self.split == 1) and not of_x.is_partial()
        if not fits or (self.split == 0 and not of_x.is_replicate()):
            raise AdapterStateError(
                f"{label}: no adapter can be computed beside an x placed as {of_x} and a y placed as {of_y} where W is "
                f"{'whole' if self.split is None else f'split in dimension {self.split}'}: leave this layer out of the "
                "plan, or do not adapt it"
            )
        # Tokens that are spread over the processes are others' in each.
        part = self if of_x.is_replicate() else replace(self, summed=True)
        inner = x.to_local(grad_placements=[Partial()] if self.split == 0 else None)  # type: ignore[attr-defined]
        local = part._once(label, add(inner, y.to_local(), part))
        return DTensor.from_local(local, self.mesh, [of_y], run_check=False, shape=y.shape, stride=y.stride())

    def _once(self, label: str, y: Tensor) -> Tensor:
        """y, which refuses second derivatives: torch loses what other processes have a part in, and says nothing."""

        def check(dy: Tensor) -> None:
            if torch.is_grad_enabled():
                raise AdapterStateError(
                    f"{label}: create_graph=True: a layer that is spread over processes has no second derivatives, "
                    "which torch's DTensors get wrong. Load the model into one process"
                )

        if self.summed and y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(check)
        return y


def _extended(ranges: Ranges, step: int, size: int) -> Ranges:
    """Ranges extended to multiples of `step`, which divides `size`; an empty one to one step."""
    starts = [min(start, size - step) // step * step for start, _ in ranges]
    return tuple(
        (first, max(-(-stop // step) * step, first + step)) for first, (_, stop) in zip(starts, ranges, strict=True)
    )


def _padded(x: Tensor, dim: int, ranges: Ranges, cover: Ranges) -> Tensor:
    """What lies in these ranges of a negative dimension, with zeros around it up to those that cover them."""
    if ranges == cover:
        return x
    pieces = x.split([stop - start for start, stop in ranges], dim)
    around = [(start - first, last - stop) for (start, stop), (first, last) in zip(ranges, cover, strict=True)]
    padded = [F.pad(piece, (0, 0) * (-dim - 1) + pad) for piece, pad in zip(pieces, around, strict=True)]
    return padded[0] if len(padded) == 1 else torch.cat(padded, dim)


def _cut(y: Tensor, dim: int, ranges: Ranges, cover: Ranges) -> Tensor:
    """`_padded` taken back."""
    if ranges == cover:
        return y
    pieces = y.split([last - first for first, last in cover], dim)
    inner = [(start - first, stop - start) for (start, stop), (first, _) in zip(ranges, cover, strict=True)]
    cut = [piece.narrow(dim, *where) for piece, where in zip(pieces, inner, strict=True)]
    return cut[0] if len(cut) == 1 else torch.cat(cut, dim)


# What a plan says


def part_of(base: nn.Module) -> Part | str | None:
    """What this process computes of a linear layer; None where no plan spreads it; or why no adapter can join it.

    The reason is what follows a layer's name in a sentence.
    """
    mesh = parallel_mesh(base)
    if mesh is None:
        return None
    sizes, style = geometry(base), _style(base)
    if sizes is None or sizes.kind != "linear" or is_transposed(base):
        return f"is a tensor-parallel {type(base).__name__}; of a plan only linear layers can be adapted"
    if mesh.ndim != 1:
        return f"is spread over a mesh of {mesh.ndim} dimensions, where tensor parallelism has one"
    if style not in _STYLES:
        return f"is spread by {style}, which is none of the styles that an adapter can join"
    weight: Any = base._parameters.get("weight")
    # Of a weight that FSDP2 shards once more the last one is the plan's.
    placement = getattr(weight, "placements", (None,))[-1]
    if placement is None:
        split, pieces = _STYLES[style], getattr(_value(base, "self"), "split_factor", 1)
    else:
        split, pieces = getattr(placement, "dim", None), getattr(placement, "split_factor", 1)
    whole = sizes.out_features, sizes.in_features
    rows, columns = (_held(size, pieces, mesh) if dim == split else ((0, size),) for dim, size in enumerate(whole))
    summed = split is not None or style == "ReplicatedWithGradAllReduce"
    part = Part(mesh, split, rows, columns, *whole, summed)
    shape = None if weight is None else tuple(weight.shape)
    if shape != (part.shape if placement is None else whole) or (placement is not None and placement.is_partial()):
        return (
            f"has a weight of shape {shape} placed as {placement}, which is none of the ways in which processes share "
            f"a layer with out_features={whole[0]} and in_features={whole[1]}"
        )
    return part


def _held(size: int, pieces: int, mesh: DeviceMesh) -> Ranges:
    """What this process has of a dimension that is cut into pieces, each shared by all: as `torch.chunk` does both."""
    whole = _chunks(0, size, pieces)
    return tuple(_chunks(start, stop, mesh.size())[mesh.get_local_rank()] for start, stop in whole)


def _chunks(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    length = -(-(stop - start) // count)
    bounds = [min(start + length * i, stop) for i in range(count + 1)]
    return list(pairwise(bounds))


def _style(base: nn.Module) -> str | None:
    """The class of transformers' style by which a layer is spread, the nearest that is known; None: it is torch's."""
    cells = _cells(base.__dict__.get("forward"))
    if "original_forward" not in cells:
        # A style of transformers 5.17 is but a hook, which does not use itself either.
        names = (getattr(hook, "__qualname__", "").partition(".")[0] for hook in base._backward_hooks.values())
        return next((name for name in names if name in _STYLES), None)
    style = _value(base, "self")
    if style is None:  # the one style whose forward does not use itself
        return base.__dict__["forward"].__qualname__.partition(".")[0]
    nearest = (cls.__name__ for cls in type(style).__mro__[:-2])  # of all styles one base, beside `object`
    return next((name for name in nearest if name in _STYLES), type(style).__name__)


def _value(base: nn.Module, name: str) -> Any:
    """A variable around the forward that transformers has put into a layer, or None."""
    cell = _cells(base.__dict__.get("forward")).get(name)
    return None if cell is None else cell.cell_contents


# Where an adapter's part joins


class _Joining:
    """A layer's innermost forward, with a place for what adapters add."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(
        self, x: Tensor, *args: Any, c3a_join: Callable[[Tensor, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> Tensor:
        y = self.forward(x, *args, **kwargs)
        return y if c3a_join is None else c3a_join(x, y)


def beside(owner: Any, add: Add, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a layer's base computes and what `add` adds to it: beside it, or where a plan has its place.

    Args:
        owner: the layer, with `base_layer`, `get_base_layer()`, `_label`, `_entered()`, which is `entered` of it, and
            `_part`, which that sets.
        add: what its adapters add.
        x, args, kwargs: of the call.

    Raises:
        AdapterStateError: a plan beside which no adapter can be computed.
    """
    base = owner.get_base_layer()
    if not _is_changed(base) or not owner._entered():
        return add(x, owner.base_layer(x, *args, **kwargs), None)
    part, label = owner._part, owner._label

    def join(inner_x: Tensor, y: Tensor) -> Tensor:
        return part.join(label, add, inner_x, y)

    return owner.base_layer(x, *args, **kwargs, c3a_join=join)


def entered(owner: Any) -> bool:
    """Whether a plan spreads a layer; which then knows its part, and has a place for it in its base's own forward."""
    base = owner.get_base_layer()
    cell = _cells(base.__dict__.get("forward")).get("original_forward")
    forward = base.forward if cell is None else cell.cell_contents
    part, is_known = owner.__dict__.get("_part"), isinstance(forward, _Joining)
    if part is not None and is_known and parallel_mesh(base) is part.mesh:
        return True  # another plan would have put itself around that place
    part = part_of(base)
    if isinstance(part, str):
        raise AdapterStateError(f"{owner._label} {part}. Leave it out of the plan, or do not adapt it")
    owner.__dict__["_part"] = part
    if part is None:
        return False
    if not is_known:
        if cell is None:
            base.forward = _Joining(forward)
        else:
            cell.cell_contents = _Joining(forward)
    return True


def leave(base: nn.Module) -> None:
    """Take `_Joining` out of a layer again."""
    cell = _cells(base.__dict__.get("forward")).get("original_forward")
    forward = base.__dict__.get("forward") if cell is None else cell.cell_contents
    if not isinstance(forward, _Joining):
        return
    if cell is not None:
        cell.cell_contents = forward.forward
    elif getattr(forward.forward, "__func__", None) is type(base).forward:
        del base.forward
    else:
        base.forward = forward.forward
