"""Tokens trained beside adapters: their rows of an embedding, and what is tied to it, under PEFT's names.

The embedding stays the module that it is. It gets a child, `token_adapter`, that has the rows, and a forward hook that
puts them in the place of its own; an output layer of the same weight gets such a hook, too. So no tensor of the base
model changes its name, and nothing of the vocabulary's size is made.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c3a_triton.bases.partitioned import changed
from c3a_triton.bases.sharded import gather_with, gathered
from c3a_triton.bases.weights import stored_tensor
from c3a_triton.errors import AdapterStateError
from c3a_triton.files.values import some

from .embedding import fixed_scale, scaled
from .hooks import remove_hooks
from .names import Scope, rows_of_call, uncompiled

__all__ = ["ROWS_SUFFIX", "TokenRows", "check_none_beside", "modules_with", "rows_at"]

ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
"""What follows an embedding's name in the name of its rows."""


class TokenRows(nn.Module):
    """The rows that adapters have in the place of an embedding's own.

    Args:
        embedding: whose rows they are.
        layer_name: its full name in the model, for messages.

    Attributes:
        trainable_tokens_delta: adapter name → the rows [tokens, embedding_dim], float32: in PEFT, too, whole values.
        indices: adapter name → the tokens, in the order of their rows.
        merged_adapters: names of the adapters whose rows the embedding's weight has now.
    """

    def __init__(self, embedding: nn.Module, layer_name: str) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.indices: dict[str, list[int]] = {}
        self.merged_adapters: list[str] = []
        self.layer_name = layer_name
        self._places = nn.ModuleDict()  # adapter name → tokens in ascending order, and where the row of each is
        self._kept: dict[str, list[Tensor | None]] = {}
        self._active: list[str] = []
        self._scope = Scope()
        self._scale = fixed_scale(embedding) if isinstance(embedding, nn.Embedding) else 1.0

    # Adapters

    def install(self, adapter_name: str, indices: list[int], rows: nn.Parameter) -> None:
        """Take rows as this adapter's, frozen until it is set."""
        places = nn.Module()
        places.register_buffer("both", torch.stack(torch.tensor(indices).sort()).to(rows.device), persistent=False)
        self._places[adapter_name] = places
        self.indices[adapter_name] = list(indices)
        self.trainable_tokens_delta[adapter_name] = rows.requires_grad_(False)

    def check_set_adapter(self, adapter_names: Iterable[str]) -> list[str]:
        """Which of these adapters have rows here.

        Raises:
            AdapterStateError: two of them have a row for one token.
        """
        owners: dict[int, str] = {}
        names = [name for name in adapter_names if name in self.indices]
        for name in names:
            if both := [index for index in self.indices[name] if index in owners]:
                raise AdapterStateError(
                    f"{self.layer_name}: {owners[both[0]]!r} and {name!r} each have rows of their own for the tokens "
                    f"{some(map(str, both))} (trainable_token_indices), of which only one can compute: set one of them"
                )
            owners |= dict.fromkeys(self.indices[name], name)
        return names

    def set_adapter(self, adapter_names: Iterable[str], inference_mode: bool = False) -> None:
        """Let the rows of these adapters compute, trainable unless `inference_mode`; raises as `check_set_adapter`."""
        self._active = self.check_set_adapter(adapter_names)
        for name, rows in self.trainable_tokens_delta.items():
            rows.requires_grad_(name in self._active and not inference_mode)

    def computing(self) -> list[str]:
        """Names of the adapters whose rows compute, merged ones included."""
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        """Whether the embedding's own rows compute, within `disable_adapter`."""
        return self._scope.watched and self._scope.kind() in ("base", "tokens")

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's rows, if there are any."""
        if adapter_name in self.indices:
            del self.trainable_tokens_delta[adapter_name], self._places[adapter_name], self.indices[adapter_name]
        self._active = [name for name in self._active if name != adapter_name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its parameter stays the same object."""
        for held in (self.trainable_tokens_delta, self._places, self.indices, self._kept):
            items = [(new if name == old else name, value) for name, value in held.items()]
            held.clear()
            held.update(dict(items))  # type: ignore[arg-type]
        self._active = [new if name == old else name for name in self._active]
        self.merged_adapters[:] = [new if name == old else name for name in self.merged_adapters]

    # Hooks

    def attach(self, module: nn.Module, layer_name: str, *, holds: bool) -> None:
        """Put the rows in the place of a module's own, whenever it is called; one of the modules holds them."""
        if holds:
            module.token_adapter = self
        module.register_forward_hook(partial(self._after, layer_name), with_kwargs=True)

    def detach_from(self, module: nn.Module) -> None:
        """Undo `attach`, and let go of what holds the rows."""
        remove_hooks(module, lambda hook: _rows_of(hook) is self)
        if module._modules.get("token_adapter") is self:
            del module.token_adapter

    def _after(self, layer_name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        """A module's output, with what the rows that hold for this call make of it."""
        kind = self._scope.kind() if self._scope.watched else "active"
        if kind == "ask":
            return self._uncompiled_after(layer_name, module, args, kwargs, y)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not x.dim():
            raise AdapterStateError(f"{layer_name}: it was called without a tensor of tokens or of states")
        if kind == "probe":
            self._scope.note(layer_name, x)
        elif kind == "active":
            for name in self._active:
                y = y if name in self.merged_adapters else self._with_rows(name, module, x, y)
        elif kind == "rows":
            present, rows = rows_of_call(self._scope, layer_name, x, self.indices)
            for i, name in enumerate(present):
                mine = (rows == i).to(y.device).view(-1, *(1,) * (y.dim() - 1))
                y = torch.where(mine, self._with_rows(name, module, x, y), y)
        # Otherwise the base computes; of a packed row, too, since no request has an adapter with rows for its own.
        return y

    @uncompiled
    def _uncompiled_after(self, *args: Any) -> Tensor:
        return self._after(*args)

    def _with_rows(self, name: str, module: Any, x: Tensor, y: Tensor) -> Tensor:
        """A module's output for x, were the adapter's rows those of its weight."""
        rows = stored_tensor(self.trainable_tokens_delta, name)
        gather_with(module, [rows])
        rows = rows.to(y.device, module.weight.dtype)
        tokens, order = self._places[name].both.to(y.device).unbind()  # type: ignore[operator]
        if not isinstance(module, nn.Embedding):
            bias = None if module.bias is None else stored_tensor(module, "bias").to(y.device)[tokens]
            return y.index_copy(-1, tokens, F.linear(x, rows[order], bias).to(y.dtype))
        at = torch.searchsorted(tokens, x.to(tokens.dtype).contiguous()).clamp(max=len(tokens) - 1)
        indices, padding = self.indices[name], module.padding_idx
        # As in the embedding itself, the padding's row gets no gradient.
        padding = indices.index(padding) if padding in indices else None
        found = scaled(F.embedding(order[at], rows, padding), module, self._scale)
        return torch.where((tokens[at] == x).unsqueeze(-1), found.to(y.dtype), y)

    # Merging

    def unmerged(self, adapter_names: Iterable[str]) -> list[str]:
        """Which of these adapters have rows here that are not merged; raises as `check_set_adapter`."""
        names = self.check_set_adapter(dict.fromkeys([*self.merged_adapters, *adapter_names]))
        return [name for name in names if name not in self.merged_adapters]

    def check_merge(
        self, modules: Sequence[nn.Module], adapter_names: Iterable[str], safe_merge: bool, beside: Sequence[str]
    ) -> None:
        """Refuse what cannot be merged.

        Args:
            modules: what `attach` was given.
            adapter_names: which adapters.
            safe_merge: refuse rows that are not finite.
            beside: names of modules that have the weight of one of these, and not the rows.

        Raises:
            AdapterStateError: as `unmerged` and `check_none_beside`, a weight of the modules is sharded or offloaded,
                or with `safe_merge` rows that are not finite.
        """
        for name in self.unmerged(adapter_names):
            check_none_beside(self.layer_name, beside)
            if any(hasattr(weight, "full_tensor") or weight.is_meta for weight in _weights(modules)):
                raise AdapterStateError(
                    f"{self.layer_name}: no rows can be merged into a weight that is sharded, as FSDP2 does it, or "
                    "offloaded. Save the adapter, and merge it in a model that is not, or by c3a-triton merge"
                )
            if safe_merge and not torch.isfinite(gathered(self.trainable_tokens_delta[name])).all():
                raise AdapterStateError(
                    f"{self.layer_name}: the rows that {name!r} has for its tokens are not finite; nothing was merged"
                )

    @torch.no_grad()
    def merge(self, modules: Sequence[nn.Module], adapter_names: Iterable[str], keep_base: str | None) -> None:
        """Write adapters' rows into the weights of the modules that have these hooks, whose own rows are kept.

        Args:
            modules: what `attach` was given; several may have one weight.
            adapter_names: what `unmerged` gave.
            keep_base: where the former rows are kept, of `merging.KEEP_BASE`.
        """
        for name in adapter_names:
            kept: list[Tensor | None] = []
            for weight in _weights(modules):
                former = gathered(weight)[self.indices[name]].clone()
                kept.append(None if keep_base is None else former.cpu() if keep_base == "cpu" else former)
                _write(weight, self.indices[name], gathered(self.trainable_tokens_delta[name]))
            self._kept[name] = kept
            self.merged_adapters.append(name)

    @torch.no_grad()
    def check_unmerge(self, modules: Sequence[nn.Module]) -> None:
        """Refuse to bring back rows that were not kept, or whose place has other values than were merged.

        Raises:
            AdapterStateError: such rows; the message names them.
        """
        for name in self.merged_adapters:
            weights, rows = _weights(modules), gathered(self.trainable_tokens_delta[name])
            kept = self._kept[name]
            if len(kept) != len(weights) or any(former is None for former in kept):
                raise AdapterStateError(
                    f"{self.layer_name}: the rows that {name!r} was merged into were not kept (keep_base=None): "
                    "load the base model again"
                )
            found = [(gathered(w)[self.indices[name]], rows.to(w.device, w.dtype)) for w in weights]
            if not all(torch.allclose(*pair, rtol=0.0, atol=0.0, equal_nan=True) for pair in found):
                raise AdapterStateError(
                    f"{self.layer_name}: its weight, or the rows of {name!r}, were changed after they were merged, "
                    "so that bringing back the original would undo that change. Load the base model again, or keep the "
                    "merged one (merge_and_unload)"
                )

    @torch.no_grad()
    def unmerge(self, modules: Sequence[nn.Module]) -> None:
        """Bring back the rows as they were before any were merged, bit for bit."""
        for name in self.merged_adapters:
            for weight, former in zip(_weights(modules), self._kept.pop(name), strict=True):
                assert former is not None
                _write(weight, self.indices[name], former)
        self.merged_adapters.clear()


def check_none_beside(name: str, beside: Sequence[str]) -> None:
    """Refuse to merge rows into a weight that other modules have, too, without these rows.

    Args:
        name: whose rows they are.
        beside: names of the others.

    Raises:
        AdapterStateError: there are some.
    """
    if beside:
        raise AdapterStateError(
            f"{name}: its weight is that of {' and '.join(beside)} (tied), where other tokens are trained, or none: "
            "rows merged into it would be theirs, too. Keep the adapter unmerged, load the model with "
            "tie_word_embeddings=False, or train the same tokens of both"
        )


def modules_with(model: nn.Module, rows: TokenRows) -> list[nn.Module]:
    """The modules of a model that have these rows, the one that holds them first."""
    found = [module for module in model.modules() if rows_at(module) is rows]
    return sorted(found, key=lambda module: module._modules.get("token_adapter") is not rows)


def rows_at(module: nn.Module) -> TokenRows | None:
    """What puts rows in the place of a module's own, if anything does."""
    return next((rows for hook in module._forward_hooks.values() if (rows := _rows_of(hook)) is not None), None)


def _rows_of(hook: Any) -> TokenRows | None:
    owner = getattr(getattr(hook, "func", None), "__self__", None)
    return owner if isinstance(owner, TokenRows) else None


def _weights(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The weights of modules, each once."""
    weights = [weight for module in modules if (weight := module._parameters["weight"]) is not None]
    return list({id(weight): weight for weight in weights}.values())


def _write(weight: nn.Parameter, indices: list[int], rows: Tensor) -> None:
    with changed([weight], "merging"):
        weight.detach()[indices] = rows.to(weight)
