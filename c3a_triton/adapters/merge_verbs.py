"""Adapters merged into the base weights, for a while or for good, as `AdapterManager` has it."""

import sys
import warnings
from collections.abc import Iterable

from torch import nn

from c3a_triton.bases.agreement import in_step
from c3a_triton.bases.quantized import release_layout
from c3a_triton.errors import ConfigError

from . import merging, pretrained
from .activation import Activation
from .base_model import base_modules, warn_tied
from .beside import unwatch_statistics
from .ensured_ties import of_one_weight
from .injection import put_plain, remove_rows, without_adapters
from .layer import C3ALinear
from .merge_state import leave
from .row_names import RowNames
from .samples import computes_the_same
from .token_rows import TokenRows, modules_with, rows_at
from .untying import Untying, homes_of, plan_parts, tensors_by_name, untie
from .watched import Watch
from .wrapping import unwatch

__all__ = ["Merging"]


class Merging(Activation):
    """The adapters of a model, which of them compute, and which of them the base weights hold.

    Args:
        model: the model.
        backend: how adapters are computed.

    Raises:
        BackendError: an unknown backend.
    """

    def __init__(self, model: nn.Module, backend: str) -> None:
        super().__init__(model, backend)
        # adapter name → layer name → what decided on the layer's block size
        self._chosen_by: dict[str, dict[str, str]] = {}
        self._watch = Watch(model)

    def merge_adapter(
        self,
        adapter_names: str | Iterable[str] | None = None,
        safe_merge: bool = False,
        keep_base: str | None = "cpu",
        *,
        merge_uncalled: bool = False,
    ) -> None:
        """Merge adapters into the base weights, which are kept for `unmerge_adapter`. Other active ones stay applied.

        Layers that the model was seen never to call (a warning has named them) are left out, since their adapters
        compute nothing, while their weights may well be read: the merged model computes what the adapted one did.

        What can be told beforehand is checked in every layer before any is changed. Where a layer fails nevertheless
        (memory runs out, a weight cannot be quantized again), those before it stay merged and the others apply their
        adapters: the model computes the same, `unmerge_adapter` takes it back, and another call goes on.

        Args:
            adapter_names: which; None means the active ones.
            safe_merge: refuse results that are not finite, before any layer is changed.
            keep_base: where the original weights are kept: `"cpu"`, `"device"`, or None, after which nothing can be
                unmerged.
            merge_uncalled: merge into layers that are never called, too.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: a layer that cannot be merged into, or with `safe_merge` a result that is not finite.
        """
        with in_step(self.model, "merge_adapter", parts=True) as shared:
            if keep_base not in merging.KEEP_BASE:
                raise ConfigError(f"keep_base must be one of {merging.KEEP_BASE}, got {keep_base!r}")
            names = self._active if adapter_names is None else self._known(adapter_names)
            shared |= {"adapters": list(names), "safe_merge": bool(safe_merge), "keep_base": keep_base}
        with in_step(self.model, "merge_adapter", parts=True):
            merged = self._merged()
            if merged and not any(part.unmerged(names) for part in self._mergeable()):
                warnings.warn(f"{merged} are merged already, nothing to do", stacklevel=2)
            elif merged and set(names) - set(merged):
                warnings.warn(f"{merged} are merged already; merging the others too", stacklevel=2)
            groups = self._to_merge(names, safe_merge, merge_uncalled)
        self._merge(names, groups, keep_base)

    def _mergeable(self) -> list[C3ALinear | TokenRows]:
        return [*(layer for _, layer in self.layers()), *self._token_rows()]

    def _to_merge(self, names: list[str], safe_merge: bool, merge_uncalled: bool) -> list[merging.Group]:
        """The layers that adapters are to be merged into, in groups of one weight each, if all of them can be."""
        work = [(name, layer, left) for name, layer in self.layers() if (left := layer.unmerged(names))]
        if not merge_uncalled:
            work = self._watch.without_uncalled(work)
        # Layers of one weight are merged into it together.
        groups = merging.by_weight([(layer, left) for _, layer, left in work])
        for group in groups:
            merging.check(group)
        for group in groups if safe_merge else ():
            merging.check_finite(group)
        modules = {name: module for name, module in base_modules(self.model) if name}
        for rows in self._token_rows():
            beside = [name for name in of_one_weight(modules, rows.layer_name) if rows_at(modules[name]) is not rows]
            rows.check_merge(modules_with(self.model, rows), names, safe_merge, beside)
        warn_tied(self.model, [name for name, _, _ in work], "merging changes both")
        return groups

    def _merge(
        self, names: list[str], groups: list[merging.Group], keep_base: str | None, progressbar: bool = False
    ) -> None:
        done, total = 0, sum(map(len, groups))
        with self._scope.lock, in_step(self.model, "merging"):  # memory may run out in one process alone
            self._check_idle("merging would change the weights")
            for group in groups:
                merging.add(group, keep_base)
                done += len(group)
                if progressbar:
                    end = "\n" if done == total else ""
                    print(f"\rmerging {done}/{total}", end=end, file=sys.stderr, flush=True)
            for rows in self._token_rows():
                rows.merge(modules_with(self.model, rows), rows.unmerged(names), keep_base)

    def unmerge_adapter(self) -> None:
        """Bring back the base weights as they were before anything was merged, bit for bit.

        Raises:
            AdapterStateError: a base weight was not kept, or was changed after merging; nothing has changed.
        """
        with in_step(self.model, "unmerge_adapter", parts=True):
            merged, is_merged = self._to_unmerge(), bool(self._merged())
        self._unmerge(merged)
        if not is_merged:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)

    def merge_and_unload(
        self,
        safe_merge: bool = False,
        progressbar: bool = False,
        adapter_names: str | Iterable[str] | None = None,
        *,
        merge_uncalled: bool = False,
    ) -> nn.Module:
        """Merge adapters for good and remove every trace of this library; `model.c3a` is gone afterwards.

        Modules of `modules_to_save` stay in the model as the active adapter trained them. Where that unties embeddings,
        `tie_word_embeddings` becomes false in the model's configuration, if that changes nothing else, and tensors that
        saving or loading would lose get memory of their own.

        Args:
            safe_merge: as in `merge_adapter`.
            progressbar: count the layers on standard error.
            adapter_names: as in `merge_adapter`.
            merge_uncalled: as in `merge_adapter`.

        Returns:
            The model, the same object.

        Raises:
            AdapterNotFoundError, AdapterStateError: as `merge_adapter`.
        """
        with in_step(self.model, "merge_and_unload", parts=True) as shared:
            names = self._active if adapter_names is None else self._known(adapter_names)
            shared |= {"adapters": list(names), "safe_merge": bool(safe_merge)}
        swapped = {*names} ^ {*self._active}
        if other := [name for name, module in self._saved_modules() if swapped & module.modules_to_save.keys()]:
            warnings.warn(
                f"{' and '.join(other)} (modules_to_save) stay as the active adapters {self._active} have them, not as "
                f"those that are merged: call model.c3a.set_adapter({names}) first",
                stacklevel=2,
            )
        with in_step(self.model, "merge_and_unload", parts=True):
            untyings = self._plan_untying()
            groups = self._to_merge(names, safe_merge, merge_uncalled)
        self._merge(names, groups, None, progressbar)
        self._remove(with_copies=True)
        for part, untying in untyings:
            untie(part, untying)
        pretrained.warn_dequantized_save(self.model)
        return self.model

    def unload(self) -> nn.Module:
        """Remove the adapters and give back the base model; `model.c3a` is gone afterwards.

        Merged adapters are unmerged. Trained biases stay as they are; parameters stay frozen, as PEFT leaves them.

        Returns:
            The model, the same object.

        Raises:
            AdapterStateError: a merged layer cannot be unmerged.
        """
        with in_step(self.model, "unload", parts=True):
            self._check_idle("unloading would remove the layers")
            merged = self._to_unmerge()
        self._unmerge(merged)
        self._remove(with_copies=False)
        return self.model

    def _plan_untying(self) -> list[tuple[nn.Module, Untying]]:
        """What becomes of tensors that are tied to those of modules trained whole, in each model of transformers.

        Raises:
            AdapterStateError: the model could not be saved as it is going to be.
        """
        if all(module.active_module() is module.original_module for _, module in self._saved_modules()):
            return []
        with without_adapters(self.model, self._scope, with_copies=False):
            before, homes = {name: id(tensor) for name, tensor in tensors_by_name(self.model)}, homes_of(self.model)
        with without_adapters(self.model, self._scope, with_copies=True):
            after = {name: id(tensor) for name, tensor in tensors_by_name(self.model)}
            return plan_parts(self.model, before, after, homes, computes_the_same)

    def _remove(self, *, with_copies: bool) -> None:
        self._watch.end()
        with self._scope.lock:
            for _, layer in self.layers():
                leave(layer)
            put_plain(self.model, self._scope, with_copies=with_copies)
            for rows in self._token_rows():
                remove_rows(self.model, rows)
        release_layout(self.model)
        self._configs.clear()
        self._chosen_by.clear()
        self._active.clear()
        if self.model.__dict__.get("c3a") is self:
            del self.model.c3a
            if (hooks := RowNames.of(self.model)) is not None:
                hooks.remove(self.model)
            self.wrappers.forget()
            unwatch(self.model)
        pretrained.release(self.model)
        unwatch_statistics(self.model)
