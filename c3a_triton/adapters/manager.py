"""`AdapterManager`: the adapters of one model, from injection to removal. It is what `model.c3a` refers to."""

import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.bases.quantized import hold_layout, release_layout
from c3a_triton.bases.sharded import gathered, is_sharded
from c3a_triton.errors import (
    AdapterStateError,
    ConfigError,
)
from c3a_triton.files.checkpoint import peft_config, read_adapter
from c3a_triton.files.config import C3AConfig

from . import merging, pretrained
from .activation import Activation
from .base_model import base_module_names, base_modules, base_name, model_name_or_path, warn_tied
from .beside import (
    embedding_parameters,
    embeddings_in,
    unwatch_statistics,
    warn_embeddings,
    warn_statistics,
    warn_unsaved,
)
from .combine import combination, combined
from .file_targets import check_file_values, find_file_targets, same_tensors, with_names_of
from .injection import new_copy, new_layer, put, put_plain, replace_module, without_adapters
from .ownership import check_owner
from .parameters import check_adapter_name
from .report import count_parameters, summary_table
from .row_names import RowNames
from .samples import computes_the_same
from .targets import Target, find_modules_to_save, find_targets, with_task_heads
from .untying import Untying, homes_of, plan_parts, tensors_by_name, untie
from .watched import Watch
from .wrapping import unwatch

__all__ = ["AdapterManager"]


@public
class AdapterManager(Activation):
    """The C3A adapters of a model, with PEFT's verbs. `c3a_triton.apply` makes it and binds it to the model as `c3a`.

    It is no module and holds no tensors of its own: the model's `state_dict` does not know it, and copies and pickles
    of the model have a manager of their own. A verb that fails leaves the model as it was.

    Args:
        model: the model to adapt; nothing happens to it before the first adapter is added.
        backend: how adapters are computed, a name of `c3a_triton.operator.dispatch.BACKENDS`; `set_backend` changes it.

    Attributes:
        model: the adapted model.
        backend: what layers that are adapted from now on get.
        wrappers: the DDPs and DataParallels through which adapters were added.

    Raises:
        BackendError: an unknown backend.
    """

    def __init__(self, model: nn.Module, *, backend: str = "auto") -> None:
        super().__init__(model, backend)
        # adapter name → layer name → what decided on the layer's block size
        self._chosen_by: dict[str, dict[str, str]] = {}
        self._told_unsaved: set[str] = set()
        self._watch = Watch(model)

    def _check_free(self, name: str) -> None:
        check_adapter_name(name)
        if name in self._configs:
            raise AdapterStateError(
                f"there is an adapter {name!r} already: choose another name, or delete that one first"
            )

    def _check_unused(self, name: str) -> None:
        if name in self._scope.names_in_use():
            raise AdapterStateError(
                f"rows are computed with the adapter {name!r} (using() or adapter_names=), in this thread or another: "
                "they would get the base model alone. Leave the context first"
            )

    # Adding and loading

    def add_adapter(self, adapter_name: str, config: C3AConfig | Mapping[str, Any] | Any) -> None:
        """Add an adapter. The first one is active and trained; further ones wait for `set_adapter`.

        Args:
            adapter_name: its name.
            config: a `C3AConfig`, a `peft.C3AConfig`, or a dict.

        Raises:
            AdapterStateError: the name is taken, or another manager has layers in the model.
            ConfigError: a name or configuration that cannot be used on this model, or one that matches nothing.
            ShapeError: a block size that does not divide a layer's widths.
        """
        self._check_free(adapter_name)
        check_owner(self.model, self._scope)
        config = with_task_heads(self.model, C3AConfig.from_any(config))
        if config.base_model_name_or_path is None:
            config = replace(config, base_model_name_or_path=model_name_or_path(self.model))
        targets = find_targets(self.model, config)
        self._inject(adapter_name, config, targets, find_modules_to_save(self.model, config))

    def load_adapter(
        self, directory: str | os.PathLike[str], adapter_name: str = "default", *, is_trainable: bool = False
    ) -> None:
        """Add an adapter from a folder, as this library or PEFT saved it. It is active if it is the first.

        Args:
            directory: the folder.
            adapter_name: its name here.
            is_trainable: whether it is to be trained on; otherwise it is frozen until `set_adapter`.

        Raises:
            AdapterStateError: the name is taken, or another manager has layers in the model.
            CheckpointError: the folder cannot be read, or does not fit the model; nothing has changed.
            ConfigError: a configuration that is not C3A's or cannot be used.
        """
        self._check_free(adapter_name)
        check_owner(self.model, self._scope)
        file = with_names_of(self.model, read_adapter(directory))
        config = replace(file.config, inference_mode=not is_trainable)
        targets = find_file_targets(self.model, file)
        saved = find_modules_to_save(self.model, config)
        replaced = check_file_values(self.model, file, saved)
        if self._configs:
            warn_embeddings(self.model, replaced, self._configs)
        self._inject(adapter_name, config, targets, saved, file.tensors, replaced)
        self._embeddings[adapter_name] = embeddings_in(file, self.model)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others, for `set_adapter`. Where one has no kernel in a layer, the rest decide.

        `"linear"` is exact: its ΔW is Σ weight · ΔW of the adapters. The other combinations prune kernels first and are
        PEFT's (`peft.utils.merge_utils`), applied to the kernels of each layer.

        Args:
            adapters: names of the adapters to combine.
            weights: as many factors.
            adapter_name: the new adapter's name.
            combination_type: `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"` or `"magnitude_prune"`.
            density: the share of each kernel's elements that pruning leaves, in (0, 1]; all but `"linear"` need it.
            majority_sign_method: with `"ties"` and `"dare_ties"`, `"total"` or `"frequency"`.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the new name is taken.
            ConfigError: a value that cannot be used, an adapter that also trains biases or whole modules, or a
                combination that needs PEFT where there is none.
            ShapeError: a layer in which the adapters' block sizes differ.
        """
        self._check_free(adapter_name)
        names = self._known(adapters)
        combine = combination(combination_type, density, majority_sign_method)
        if isinstance(adapters, str) or not names or not len(names) == len(adapters) == len(weights):
            raise ConfigError(
                f"adapters must name each adapter once, with a weight for each, got {adapters!r} and {weights!r}"
            )
        for name in names:
            if self._configs[name].modules_to_save or self._configs[name].bias != "none":
                raise ConfigError(
                    f"adapter {name!r} also trains biases or whole modules (bias, modules_to_save), of which no "
                    "weighted sum is taken: combine adapters without them"
                )
        tensors, targets = combined(self.layers(), names, weights, combine, combination_type)
        block_sizes = {target.name: target.block_size for target in targets}
        parameters = [target.name for target in targets if target.parameter]
        config = peft_config(self._configs[names[0]], block_sizes, base_module_names(self.model), parameters)
        self._inject(adapter_name, replace(config, inference_mode=False), targets, [], tensors)

    def hotswap_adapter(self, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Replace an adapter's values by those of a folder, in place: the same layers, shapes and parameters.

        Nothing is compiled again, and optimizers and captured graphs keep their parameters. The adapter's configuration
        stays.

        Args:
            directory: an adapter's folder, as this library or PEFT saved it.
            adapter_name: which adapter's values.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the adapter is merged, or a kernel is offloaded or sharded.
            CheckpointError: the folder cannot be read, or has other tensors than the adapter. Nothing has changed.
        """
        self._known(adapter_name)
        if adapter_name in self._merged():
            raise AdapterStateError(f"adapter {adapter_name!r} is merged: unmerge it before its values are replaced")
        for name, layer in self._tensors(adapter_name).layers():
            if layer.c3a_kernel[adapter_name].is_meta:
                raise AdapterStateError(f"{name} is offloaded: delete the adapter and load the other one in its place")
            if is_sharded(layer.c3a_kernel[adapter_name]):
                raise AdapterStateError(f"{name} is sharded: load the adapter into the model before it is sharded")
        file = with_names_of(self.model, read_adapter(directory))
        present = self.state_dict(adapter_name, save_embedding_layers=False)
        held = embeddings_in(file, self.model)
        present |= {name: p.detach() for name, p in embedding_parameters(self.model).items() if base_name(name) in held}
        for old, new in same_tensors(present, file):
            old.copy_(new)
        self._embeddings[adapter_name] = held

    def _inject(
        self,
        adapter_name: str,
        config: C3AConfig,
        targets: Sequence[Target],
        saved: Sequence[tuple[str, nn.Module]],
        tensors: Mapping[str, Tensor] | None = None,
        replaced: Sequence[tuple[nn.Parameter, Tensor]] = (),
    ) -> None:
        """Build all that an adapter needs, with a file's tensors as its values, and only then put it into the model."""
        biased = [name for name, other in self._configs.items() if other.bias != "none"]
        if config.bias != "none" and biased:
            raise ConfigError(
                f"bias={config.bias!r}: adapter {biased[0]!r} trains biases already, and they can follow only one "
                'adapter; use bias="none"'
            )
        is_first = not self._configs
        new = partial(new_layer, self.model, backend=self.backend, active=self._active)
        layers = [new(target, adapter_name, config.init_weights, tensors) for target in targets]
        copies = [new_copy(name, module, tensors) for name, module in saved]

        if is_first:
            self.model.requires_grad_(False)
            hold_layout(self.model)  # a layer that is not adapted must pass gradients on to those below it, too
        for parameter, value in replaced:
            parameter.detach().copy_(value)
        for target, (layer, kernel) in zip(targets, layers, strict=True):
            layer._install(adapter_name, kernel, trainable=False)
            put(self.model, target, layer)
        for (name, module), (wrapper, module_copy) in zip(saved, copies, strict=True):
            wrapper.install(adapter_name, module_copy)
            if wrapper is not module:
                replace_module(self.model, name, wrapper)
        self._scope.trials.clear()  # the new layers were in none
        for part in self._parts():
            part._scope = self._scope
        self._configs[adapter_name] = config
        self._chosen_by[adapter_name] = {target.name: target.chosen_by for target in targets}
        if is_first:
            self._activate([adapter_name], inference_mode=config.inference_mode)
        self._watch.begin()

    # Removing and renaming

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If no active one is left, the first remaining by name becomes active, with a warning.

        Other active ones stay trainable or frozen, as they are.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the adapter is merged, or rows are computed with it (`using`).
        """
        self._known(adapter_name)
        self._check_unused(adapter_name)
        if adapter_name in self._merged():
            raise AdapterStateError(f"adapter {adapter_name!r} is merged: unmerge it before deleting it")
        if adapter_name in self._active:
            active, inference_mode = [name for name in self._active if name != adapter_name], self._inference_mode
            if not active and len(self._configs) > 1:
                active = [min(name for name in self._configs if name != adapter_name)]
                inference_mode = self._configs[active[0]].inference_mode
                warnings.warn(
                    f"the active adapter {adapter_name!r} is deleted; {active[0]!r} is active now", stacklevel=2
                )
            self._activate(active, inference_mode)
        for part in self._parts():
            part.delete_adapter(adapter_name)
        del self._configs[adapter_name], self._chosen_by[adapter_name]
        self._embeddings.pop(adapter_name, None)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its parameters stay the same objects.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the new name is taken, or rows are computed with the adapter (`using`).
            ConfigError: a name that cannot be used.
        """
        self._known(old)
        self._check_unused(old)
        self._check_free(new)
        for part in self._parts():
            part.rename_adapter(old, new)
        self._configs = {new if name == old else name: config for name, config in self._configs.items()}
        self._chosen_by = {new if name == old else name: keys for name, keys in self._chosen_by.items()}
        self._active = [new if name == old else name for name in self._active]
        self._embeddings = {new if name == old else name: held for name, held in self._embeddings.items()}

    # Merging

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
        if keep_base not in merging.KEEP_BASE:
            raise ConfigError(f"keep_base must be one of {merging.KEEP_BASE}, got {keep_base!r}")
        names = self._active if adapter_names is None else self._known(adapter_names)
        merged = self._merged()
        if merged and not any(layer.unmerged(names) for _, layer in self.layers()):
            warnings.warn(f"{merged} are merged already, nothing to do", stacklevel=2)
        elif merged and set(names) - set(merged):
            warnings.warn(f"{merged} are merged already; merging the others too", stacklevel=2)
        self._merge(names, safe_merge, keep_base, progressbar=False, merge_uncalled=merge_uncalled)

    def _merge(
        self, names: list[str], safe_merge: bool, keep_base: str | None, progressbar: bool, merge_uncalled: bool
    ) -> None:
        work = [(name, layer, left) for name, layer in self.layers() if (left := layer.unmerged(names))]
        if not merge_uncalled:
            work = self._watch.without_uncalled(work)
        # Layers of one weight are merged into it together.
        groups = merging.by_weight([(layer, left) for _, layer, left in work])
        for group in groups:
            merging.check(group)
        for group in groups if safe_merge else ():
            merging.check_finite(group)
        warn_tied(self.model, [name for name, _, _ in work], "merging changes both")
        done = 0
        for group in groups:
            merging.add(group, keep_base)
            done += len(group)
            if progressbar:
                end = "\n" if done == len(work) else ""
                print(f"\rmerging {done}/{len(work)}", end=end, file=sys.stderr, flush=True)

    def unmerge_adapter(self) -> None:
        """Bring back the base weights as they were before anything was merged, bit for bit.

        Raises:
            AdapterStateError: a base weight was not kept, or was changed after merging; nothing has changed.
        """
        if not self._unmerge_all():
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
        names = self._active if adapter_names is None else self._known(adapter_names)
        swapped = {*names} ^ {*self._active}
        if other := [name for name, module in self._saved_modules() if swapped & module.modules_to_save.keys()]:
            warnings.warn(
                f"{' and '.join(other)} (modules_to_save) stay as the active adapters {self._active} have them, not as "
                f"those that are merged: call model.c3a.set_adapter({names}) first",
                stacklevel=2,
            )
        untyings = self._plan_untying()
        self._merge(names, safe_merge, None, progressbar, merge_uncalled)
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
        self._unmerge_all()
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
        put_plain(self.model, self._scope, with_copies=with_copies)
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

    # Saving

    def state_dict(
        self, adapter_name: str = "default", *, save_embedding_layers: bool | str = "auto"
    ) -> dict[str, Tensor]:
        """An adapter's tensors under the names of its file, without PEFT's prefix "base_model.model.".

        `<module>.c3a_kernel` for every layer, `<module>.<parameter>` for modules trained whole, trained biases, and
        embeddings.

        Sharded tensors (DTensors, as of FSDP2) are put together, for which every process has to call.

        Args:
            adapter_name: which adapter.
            save_embedding_layers: whether the model's input and output embeddings are among them. `"auto"`, as in PEFT:
                where the vocabulary is not that of the base model (`resize_token_embeddings`), which is looked up on
                this machine alone; besides, where they are trained, or the adapter's own file has brought them.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: an adapter is merged into embeddings that are among them.
            ConfigError: a value of `save_embedding_layers` that means nothing.
        """
        tensors = self._tensors(adapter_name).held_by_model(save_embedding_layers)
        return {name: gathered(tensor).detach() for name, tensor in tensors.items()}

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str = "default",
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: bool | str = "auto",
    ) -> None:
        """Save an adapter to a folder, as PEFT does and reads it. PEFT reads adapters of `nn.Linear` alone.

        Warns, once for each, about parameters that were made trainable after `apply` and are in no file.

        Where parameters are sharded (FSDP2), every process has to call; the first one writes, the others wait for it.

        Args:
            directory: the folder.
            adapter_name: which adapter.
            state_dict: the model's, from which the values are taken instead; the caller alone writes then.
            save_embedding_layers: whether the embeddings are saved with it, as in `state_dict`.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: an adapter is merged into embeddings that are to be saved.
            CheckpointError: it cannot be written.
            ConfigError: a value of `save_embedding_layers` that means nothing.
        """
        stored = self._tensors(adapter_name)
        sharded = state_dict is None and any(map(is_sharded, self.model.parameters()))
        if state_dict is None:
            tensors = self.state_dict(adapter_name, save_embedding_layers=save_embedding_layers)
        else:
            tensors = stored.found_in(state_dict, save_embedding_layers)
        self._warn_unsaved(tensors)
        stored.warn_unreadable()
        try:
            if not sharded or torch.distributed.get_rank() == 0:
                stored.write(directory, tensors)
        finally:
            if sharded:
                torch.distributed.barrier()

    def _warn_unsaved(self, tensors: Mapping[str, Tensor]) -> None:
        saved = [parameter for _, layer in self.layers() for parameter in layer.c3a_kernel.parameters()]
        saved += [parameter for _, module in self._saved_modules() for parameter in module.parameters()]
        for name in self._configs:
            saved += self._tensors(name).biases().values()
        saved += [parameter for name, parameter in embedding_parameters(self.model).items() if name in tensors]
        warn_unsaved(self.model, saved, self._told_unsaved)
        warn_statistics(self.model, self._told_unsaved)  # of compiled models, whose calls nobody sees

    # What it looks like

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters), counted as PEFT counts them."""
        return count_parameters(self.model)

    def print_trainable_parameters(self) -> None:
        """Print the counts of `get_nb_trainable_parameters` in PEFT's form."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def summary(self) -> str:
        """A table as text: for each layer and adapter the widths, b and what decided on it, parameters and backend.

        "chosen by" is the key of `block_size_pattern` that matched, `block_size` or `auto` where none did, or `file`
        where an adapter file has another size than its configuration says.
        """
        return summary_table(base_modules(self.model), self._active, self._chosen_by)
