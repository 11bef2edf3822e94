"""What is remembered of a base weight while adapters are merged into it, in common for all layers that have it."""

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

__all__ = ["MergeState", "enter", "find", "leave"]


class MergeState:
    """One weight's original, and what the weight is now.

    Args:
        kept: the original, or None with `keep_base=None`.
        where: where it is kept, of `KEEP_BASE`.
        transposed: whether the layer that kept it is a `Conv1D`, which has the matrix in the other order.

    Attributes:
        mark: fingerprint of the merged weight; None where it is known to have been changed.
        layers: those that have merged adapters into this weight. Copies and pickles of a layer enter themselves.
    """

    def __init__(self, kept: Tensor | nn.Module | None, where: str | None, transposed: bool) -> None:
        self.kept = kept
        self.where = where
        self.transposed = transposed
        self.mark: int | None = None
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, layers=weakref.WeakSet())

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that any layer has merged into the weight."""
        return sorted({name for layer in self.layers for name in layer.merged_adapters})

    def others(self, layer: Any) -> list[Any]:
        """The other layers that have merged into the memory that is a layer's weight now."""
        place = layer.weight_place()
        return [
            other
            for other in self.layers
            if other is not layer and other._merge_state is self and place is not None and other.weight_place() == place
        ]

    def split(self, layer: Any, others: list[Any]) -> "MergeState":
        """The state of a layer whose weight was moved: one of its own if others of that weight did not follow."""
        if all(other.weight_place() == layer.weight_place() for other in others):
            return self
        own = MergeState(self.kept, self.where, self.transposed)
        own.mark, layer._merge_state = self.mark, own
        self.layers.discard(layer)
        return own


# Where a weight is in memory → its state. A weight may have moved since, so that what is found here is asked again.
_states: weakref.WeakValueDictionary[Hashable, MergeState] = weakref.WeakValueDictionary()


def enter(state: MergeState, layer: Any) -> None:
    """Let a state be a layer's, and be found by other layers of the same weight. One that keeps nothing guards none."""
    if state.kept is None:
        return
    state.layers.add(layer)
    place = layer.weight_place()
    if place is not None:
        _states[place] = state


def leave(layer: Any) -> None:
    """Let go of the state of a layer that is taken out of its model: what it has merged is the weight's for good.

    Somebody may hold the layer still, which must not make a state found by those that are merged into the weight next.
    Layers of other models that have merged into it cannot bring back an original that lacks what is now for good.
    """
    state = layer._merge_state
    if state is None:
        return
    if any(other.merged for other in state.others(layer)):
        state.kept = None
    state.layers.discard(layer)
    layer._merge_state = None


def find(place: Hashable | None) -> MergeState | None:
    """The state of the weight at a place, if any layer has merged into it."""
    state = None if place is None else _states.get(place)
    if state is None:
        return None
    held = any(layer._merge_state is state and layer.merged and layer.weight_place() == place for layer in state.layers)
    return state if held else None
