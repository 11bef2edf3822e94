"""Adapters of requests in flight: each at the values that it had when its request came, in stacks that tokens index.

A packed row holds the tokens of many requests, and which adapter a token has is an integer on the device, its slot. A
slot's kernels are copies in stacks whose addresses stay: whoever trains, exchanges or rescales an adapter meanwhile
touches no request in flight, and a captured graph reads whichever slots hold when it runs.
"""

import functools
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from c3a_triton.bases.parallel import parallel_mesh
from c3a_triton.bases.sharded import is_sharded
from c3a_triton.errors import AdapterStateError, ConfigError, ShapeError
from c3a_triton.operator import routes as routing
from c3a_triton.operator.backends import ROUTED
from c3a_triton.operator.routed import c3a_routed
from c3a_triton.operator.routes import Routes

from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .names import BASE_ROW
from .token_layouts import KEPT, OTHER

__all__ = ["Lease", "PackedRow", "Slot", "TokenSlots"]


class Stacks(NamedTuple):
    """The kernels of all slots. It is replaced when it grows: a call of the model that has begun keeps its own."""

    n_slots: int
    of_layers: Mapping[str, Mapping[int, Tensor]]
    """Layer name → block size → [n_slots, m, n, b]; zeros where a slot has no kernel."""


# What can be computed with a slot for each token.
_KINDS = ("linear", "embedding", "experts")
_LEAST_SLOTS = 4
_SERIALS = itertools.count()


class Slot:
    """An adapter at one state of the model's parameters.

    Args:
        index: its place in the stacks; −1: the base model alone.

    Attributes:
        index: as given.
        serial: a number that no other slot has or will have.
        leases: of the requests that are computed with it.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.serial = next(_SERIALS)
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()


class Lease:
    """A request's hold on a slot; what is copied of the request (its children, its restarts) has the same.

    Args:
        name: the adapter's, or `BASE_ROW`.
        slot: the slot.

    Attributes:
        name, slot: as given.
        arrived: whether the request is among those that a scheduler knows.
    """

    def __init__(self, name: str, slot: Slot) -> None:
        self.name, self.slot, self.arrived = name, slot, False
        slot.leases.add(self)

    def __deepcopy__(self, memo: Any) -> "Lease":
        return self


class PackedRow:
    """What layers compute a packed row with, in the thread whose `Call.tokens` it is.

    Args:
        layouts: of `token_layouts`.

    Attributes:
        stacks: of the slots.
    """

    def __init__(self, layouts: Mapping[str, str]) -> None:
        self._layouts = layouts
        self.stacks = Stacks(0, {})

    def begin(self, slots: Tensor, kept: Tensor | None) -> None:
        """Take what the next call of the model is to compute with. Nothing of it is read on the host.

        Args:
            slots: [T] integers on the model's device, the slot of each token; −1: the base model alone.
            kept: the tokens of which logits are kept, as indices; None: all.
        """
        self._slots = slots
        self._kept = slots if kept is None else slots.index_select(0, kept)
        self._routes: dict[str, Routes] = {}

    def update(self, layer: Any, x: Tensor) -> Tensor | None:
        """What the slots of x's tokens add to the base layer's output, [..., out]; None if no slot has any there.

        Raises:
            ShapeError: x is not the packed row.
        """
        stacks = self._stacks_of(layer)
        if not stacks:
            return None
        layout = self._layouts.get(layer.layer_name, OTHER)
        slots = self._kept if layout == KEPT else self._slots
        tokens = x.shape if layer.kind == "embedding" else x.shape[:-1]
        if layout == OTHER or tokens.numel() != slots.shape[0] or tokens[-1] != slots.shape[0]:
            raise _not_packed(layer, x.shape, slots.shape[0])
        if layer.kind == "embedding":
            return functools.reduce(torch.add, (_looked_up(layer, x, stack, slots) for stack in stacks))
        if layout not in self._routes:
            self._routes[layout] = routing.make(slots[:, None], self.stacks.n_slots, partial=True)
        rows = _of_slots(layer, x.flatten(0, -2), stacks, self._routes[layout])
        return rows.view(*tokens, -1)

    def update_experts(self, part: Any, x: Tensor, routes: Routes) -> Tensor | None:
        """What the slots of tokens add to a projection of their experts, [n_rows, out]; None if no slot has any there.

        Args:
            part: the projection's adapters.
            x: [n_rows, in], sorted by expert.
            routes: the experts of the packed row's tokens.

        Raises:
            ShapeError: these are not its tokens.
        """
        stacks = self._stacks_of(part)
        if not stacks:
            return None
        if routes.order.shape[0] != self._slots.shape[0] * routes.top_k:
            raise _not_packed(part, x.shape, self._slots.shape[0])
        slots, n_experts = self._slots.index_select(0, routes.source), stacks[0].shape[1]
        # A slot has a group for each expert.
        groups = (slots * n_experts + routes.groups).masked_fill((slots < 0) | ~routes.valid(), -1)
        own = routing.make(groups[:, None], self.stacks.n_slots * n_experts, partial=True)
        return _of_slots(part, x, [stack.flatten(0, 1) for stack in stacks], own)

    def has(self, layer: Any) -> bool:
        """Whether any slot has a kernel in a layer."""
        return layer.layer_name in self.stacks.of_layers

    def _stacks_of(self, layer: Any) -> list[Tensor]:
        return list(self.stacks.of_layers.get(layer.layer_name, {}).values())


def _not_packed(layer: Any, shape: torch.Size, n_tokens: int) -> ShapeError:
    return ShapeError(
        f"{layer._label}: {n_tokens} tokens have adapters of their own, and this layer's input has the shape "
        f"{tuple(shape)}, which is not that of their packed row: adapt the model without this layer (exclude_modules)"
    )


def _of_slots(layer: Any, x: Tensor, stacks: Sequence[Tensor], routes: Routes) -> Tensor:
    # Another one may have been set since the requests came.
    backend = layer.backend if layer.backend in ROUTED else "auto"
    rows = c3a_routed(x, None, None, stacks, routes, gather=True, backend=backend)
    return rows.index_select(0, routes.inverse)


def _looked_up(layer: Any, x: Tensor, stack: Tensor, slots: Tensor) -> Tensor:
    """What an embedding's slots add to the rows that are looked up: those of one slot lie behind another's."""
    _, out_blocks, _, b = stack.shape
    rows = x + slots.clamp(min=0) * (out_blocks * b)
    none = slots < 0 if layer.padding_idx is None else (slots < 0) | (x == layer.padding_idx)
    return layer._delta(rows, stack.flatten(0, 1), "auto").masked_fill(none.unsqueeze(-1), 0.0)


class TokenSlots:
    """The slots of one server of a model, as many as its requests need.

    Args:
        adapters: the model's manager, whose scope has `token_layouts`.
        device: where packed rows are.

    Attributes:
        adapters: as given.
        layouts: what layers are given of a packed row.
        stacks: the slots' kernels, for the next call of the model.

    Raises:
        AdapterStateError: processes share the model.
    """

    def __init__(self, adapters: Any, device: torch.device) -> None:
        self.adapters, self._device = adapters, device
        self.layouts: Mapping[str, str] = adapters._scope.token_layouts
        self.stacks = Stacks(0, {})
        self._slots: dict[Any, Slot] = {}  # the least recently used first
        with adapters._scope.lock:
            layers = [layer for _, layer in adapters.layers()]
            for layer in layers:
                if parallel_mesh(layer.get_base_layer()) is not None or any(map(is_sharded, layer._stored_kernels())):
                    raise AdapterStateError(
                        f"{layer._label} is spread over processes, where requests cannot have adapters of their own: "
                        "load the model into one process"
                    )
            # What captured graphs read is there before they are captured.
            possible = [layer for layer in layers if not self._problem(layer)]
            kernels = [found for name in adapters.adapters for found in self._kernels(name, possible)]
            self._publish(self._with_room(kernels, max(_LEAST_SLOTS, 1 << len(adapters.adapters).bit_length())))

    def lease(self, adapter_name: str | None) -> Lease:
        """A hold on the slot of an adapter as it is now.

        Args:
            adapter_name: its name, `BASE_ROW`, or None for the one that the caller's context names (`using`,
                `disable_adapter`), or the active one, if one is.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: adapters are merged.
            ConfigError: no name and several active adapters, or an adapter of which a part has no rows of tokens.
        """
        with self.adapters._scope.lock:
            parts = self.adapters._parts()  # once: a large model has thousands of modules
            if merged := self.adapters._merged(parts):
                raise AdapterStateError(
                    f"requests cannot have adapters of their own while {merged} are merged: unmerge first"
                )
            name = self._resolved(adapter_name)
            layers = [part for part in parts if isinstance(part, C3ALinear)]
            mine = [layer for layer in layers if name in layer.c3a_kernel and not layer._disable_adapters]
            self._check(name, mine, [part for part in parts if isinstance(part, ModulesToSave)])
            key = name, self._state(name, mine, layers)
            slot = self._slots.pop(key, None)
            if slot is None:
                slot = self._new(self._kernels(name, mine))
            self._slots[key] = slot
            return Lease(name, slot)

    def leases(self) -> list[Lease]:
        """Those of requests of which anything is left."""
        with self.adapters._scope.lock:
            return [lease for slot in self._slots.values() for lease in slot.leases]

    def _resolved(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            meant = self._meant()
            if len(meant) > 1:
                raise ConfigError(
                    f"{meant} are active, and a request has one adapter: name it (adapter_name=), or combine them "
                    "(add_weighted_adapter)"
                )
            return meant[0] if meant else BASE_ROW
        if not isinstance(adapter_name, str):
            raise ConfigError(f"adapter_name must be the name of an adapter, got {adapter_name!r}")
        if adapter_name != BASE_ROW:
            self.adapters._known(adapter_name)
        return adapter_name

    def _meant(self) -> list[str]:
        """The adapters that a call of the model would compute with where this is called."""
        call = self.adapters._scope.said()
        if call is None or call.kind == "active":
            return list(self.adapters.active_adapters)
        return [BASE_ROW] if call.disabled else list(dict.fromkeys(call.names))

    def _kernels(self, name: str, layers: Iterable[C3ALinear]) -> list[tuple[C3ALinear, Tensor]]:
        """(layer, kernel) of an adapter, times its strength."""
        return [(layer, layer._kernel_on(name, self._device)) for layer in layers if name in layer.c3a_kernel]

    def _problem(self, layer: Any) -> str:
        """Why tokens cannot have adapters of their own in a layer, as what follows its name; "" where they can."""
        place = layer.layer_name.rpartition(".")[0] if layer.is_part else layer.layer_name
        if layer.kind not in _KINDS:
            return f"is of kind {layer.kind}, which is computed with one adapter for all tokens"
        if self.layouts.get(place) == OTHER:
            return "is given something else than the tokens in their order"
        if layer.backend not in ("auto", *ROUTED):
            return f"has the backend {layer.backend!r}, and only 'auto' and {sorted(ROUTED)} take rows of many adapters"
        return ""

    def _check(self, name: str, layers: Iterable[C3ALinear], copies: Iterable[ModulesToSave]) -> None:
        for layer in layers:
            if problem := self._problem(layer):
                raise ConfigError(
                    f"adapter {name!r} cannot be a request's own: {layer._label} {problem}. Activate it for all "
                    "requests (set_adapter, and model.generate_batch), or train it without this layer"
                )
        what = [f"a copy of {copy.layer_name} (modules_to_save)" for copy in copies if name in copy.modules_to_save]
        if name != BASE_ROW and self.adapters.adapters[name].trainable_token_indices:
            what.append("rows of its own for tokens (trainable_token_indices)")
        if what:
            raise ConfigError(
                f"adapter {name!r} cannot be a request's own: it has {what[0]}, and those of one adapter compute for "
                "all requests. Activate it for all of them (set_adapter, and model.generate_batch)"
            )

    def _state(self, name: str, mine: Sequence[C3ALinear], layers: Iterable[C3ALinear]) -> tuple[Any, ...]:
        """What is another one as soon as the adapter, or a parameter of the base model, has other values."""
        held = {id(kernel) for layer in layers for kernel in layer._stored_kernels()}
        base = [parameter for parameter in self.adapters.model.parameters() if id(parameter) not in held]
        kernels = [layer.c3a_kernel[name] for layer in mine]
        strengths = tuple(layer.scaling[name] for layer in mine)
        return strengths, *(kernel.data_ptr() for kernel in kernels), *map(_version, [*kernels, *base])

    def _new(self, kernels: Sequence[tuple[Any, Tensor]]) -> Slot:
        """A slot with these kernels, which are copied."""
        if not kernels:  # former states of the base model alone, which nobody needs, have no place to be used again
            for key in [key for key, slot in self._slots.items() if slot.index < 0 and not slot.leases]:
                del self._slots[key]
            return Slot(-1)
        index, n_slots = self._free(), self.stacks.n_slots
        if index is None:
            index, n_slots = n_slots, 2 * n_slots
        stacks = self._with_room(kernels, n_slots)
        mine = {(layer.layer_name, kernel.shape[-1]): kernel for layer, kernel in kernels}
        with torch.inference_mode(False), torch.no_grad():
            for layer_name, found in stacks.of_layers.items():
                for b, stack in found.items():
                    kernel = mine.get((layer_name, b))
                    stack[index].zero_() if kernel is None else stack[index].copy_(kernel)
        self._publish(stacks)
        return Slot(index)

    def _free(self) -> int | None:
        """A place in the stacks that no slot has, or the one of the slot that no request has used for longest."""
        places = {slot.index for slot in self._slots.values()}
        if free := set(range(self.stacks.n_slots)) - places:
            return min(free)
        idle = next((key for key, slot in self._slots.items() if not slot.leases and slot.index >= 0), None)
        return None if idle is None else self._slots.pop(idle).index

    def _with_room(self, kernels: Iterable[tuple[Any, Tensor]], n_slots: int) -> Stacks:
        """The stacks, or others in their place that have room for such kernels and for so many slots."""
        stacks = {layer_name: dict(found) for layer_name, found in self.stacks.of_layers.items()}
        is_new = n_slots > self.stacks.n_slots
        with torch.inference_mode(False), torch.no_grad():
            for found in stacks.values() if is_new else ():
                for b, stack in found.items():
                    found[b] = torch.cat([stack, stack.new_zeros(n_slots - len(stack), *stack.shape[1:])])
            for layer, kernel in kernels:
                found = stacks.setdefault(layer.layer_name, {})
                if kernel.shape[-1] not in found:
                    found[kernel.shape[-1]] = kernel.new_zeros(n_slots, *kernel.shape)
                    is_new = True
        return Stacks(n_slots, stacks) if is_new else self.stacks

    def _publish(self, stacks: Stacks) -> None:
        """Let calls of the model read what this thread has written, which they do in the order of another queue."""
        if self._device.type != "cpu":
            torch.accelerator.current_stream(self._device).synchronize()
        self.stacks = stacks


def _version(tensor: Tensor) -> tuple[WeakIdRef, int]:
    # Tensors of inference mode have no version.
    return WeakIdRef(tensor), -1 if tensor.is_inference() else tensor._version
