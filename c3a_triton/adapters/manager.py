"""`AdapterManager`: the adapters of one model, from injection to removal. It is what `model.c3a` refers to."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.bases.agreement import broadcast, in_step, shared_over
from c3a_triton.bases.partitioned import changed
from c3a_triton.bases.quantized import hold_layout
from c3a_triton.bases.sharded import gathered, is_partitioned, is_sharded, put_values
from c3a_triton.errors import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
)
from c3a_triton.files.checkpoint import peft_config, read_adapter
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.values import shown

from .base_model import base_module_names, base_modules, base_name, model_name_or_path
from .beside import (
    embedding_parameters,
    embeddings_in,
    warn_embeddings,
    warn_statistics,
    warn_unsaved,
)
from .combine import combination, combined
from .ensured_ties import tie_copies, with_tied_modules
from .file_targets import check_file_values, find_file_targets, same_tensors, with_names_of
from .injection import Addition, new_copy, new_layer, put, put_rows, remove_rows, replace_module
from .ownership import check_owner, own_parts, own_rows
from .parameters import check_adapter_name
from .report import count_parameters, summary_table
from .serving import Serving
from .spread import check_spread
from .status import LayerStatus, ModelStatus, layer_status, model_status
from .strength import strengths_of
from .targets import Target, find_modules_to_save, find_targets, with_task_heads
from .token_rows import TokenRows
from .token_targets import TokenTarget, check_tokens_alone, find_token_targets, new_rows

__all__ = ["AdapterManager"]


@public
class AdapterManager(Serving):
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
        self._told_unsaved: set[str] = set()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(adapters={list(self._configs)}, active_adapters={self._active})"

    def _check_free(self, name: str) -> None:
        check_adapter_name(name)
        if name in self._configs:
            raise AdapterStateError(
                f"there is an adapter {name!r} already: choose another name, or delete that one first"
            )

    def _check_unused(self, name: str) -> None:
        if name in self._scope.names_in_use():
            raise AdapterStateError(
                f"rows are computed with the adapter {name!r} (using() or adapter_names=), in this thread or another, "
                "or requests of continuous batching: they would get the base model alone. Leave the context, or let "
                "the requests end, first"
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
        with in_step(self.model, "add_adapter") as shared:
            self._check_free(adapter_name)
            check_owner(self.model, self._scope)
            config = with_task_heads(self.model, C3AConfig.from_any(config))
            if config.base_model_name_or_path is None:
                config = replace(config, base_model_name_or_path=model_name_or_path(self.model))
            targets = find_targets(self.model, config)
            saved, tokens = find_modules_to_save(self.model, config), find_token_targets(self.model, config)
            config = with_tied_modules(self.model, config, [target.name for target in targets], saved)
            saved = find_modules_to_save(self.model, config) if config.ensure_weight_tying else saved
            new = self._build(adapter_name, config, targets, saved, tokens)
            shared |= new.shared()
        self._put(new)

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
        with in_step(self.model, "load_adapter", parts=True):
            self._check_free(adapter_name)
            check_owner(self.model, self._scope)
        # Whoever saved the file has written it by now: in a model of several processes one of them did.
        with in_step(self.model, "load_adapter", parts=True) as shared:
            file = with_names_of(self.model, read_adapter(directory))
            config = replace(file.config, inference_mode=not is_trainable)
            targets = find_file_targets(self.model, file)
            saved = find_modules_to_save(self.model, config)
            tokens = find_token_targets(self.model, config)
            replaced = check_file_values(self.model, file, saved, tokens)
            if self._configs:
                warn_embeddings(self.model, replaced, self._configs)
            shared["tensors"] = file.tensors
        with in_step(self.model, "load_adapter", parts=True) as shared:
            new = self._build(adapter_name, config, targets, saved, tokens, file.tensors, replaced)
            shared |= new.shared()
        self._put(new)
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
        with in_step(self.model, "add_weighted_adapter", parts=True) as shared:
            self._check_free(adapter_name)
            names = self._known(adapters)
            combine = combination(combination_type, density, majority_sign_method)
            if isinstance(adapters, str) or not names or not len(names) == len(adapters) == len(weights):
                raise ConfigError(
                    f"adapters must name each adapter once, with a weight for each, got {adapters!r} and {weights!r}"
                )
            for name in names:
                config = self._configs[name]
                if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
                    raise ConfigError(
                        f"adapter {name!r} also trains biases, whole modules or tokens (bias, modules_to_save, "
                        "trainable_token_indices), of which no weighted sum is taken: combine adapters without them"
                    )
            factors = list(strengths_of(names, weights).values())
            shared |= {
                "adapters": names,
                "weights": factors,
                "combination": (combination_type, density, majority_sign_method),
            }
        with in_step(self.model, "add_weighted_adapter", parts=True) as shared:
            tensors, targets = combined(self.layers(), names, factors, combine, combination_type)
            block_sizes = {target.name: target.block_size for target in targets}
            parameters = [target.name for target in targets if target.parameter]
            config = peft_config(self._configs[names[0]], block_sizes, base_module_names(self.model), parameters)
            new = self._build(adapter_name, replace(config, inference_mode=False), targets, [], [], tensors)
            shared |= new.shared()
        self._put(new)

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
        with in_step(self.model, "hotswap_adapter", parts=True):
            self._known(adapter_name)
            if adapter_name in self._merged():
                raise AdapterStateError(
                    f"adapter {adapter_name!r} is merged: unmerge it before its values are replaced"
                )
            stored = self._tensors(adapter_name)
            offloaded = [name for name, layer in stored.layers() if layer.c3a_kernel[adapter_name].is_meta]
            offloaded += [name for name, rows in stored.rows() if rows.trainable_tokens_delta[adapter_name].is_meta]
            if offloaded:
                raise AdapterStateError(
                    f"{offloaded[0]} is offloaded: delete the adapter and load the other one in its place"
                )
            for name, layer in stored.layers():
                kernel = layer.c3a_kernel[adapter_name]
                if is_sharded(kernel) and not (is_partitioned(kernel) or layer.is_spread()):
                    raise AdapterStateError(f"{name} is sharded: load the adapter into the model before it is sharded")
        with in_step(self.model, "hotswap_adapter", parts=True) as shared:  # as in `load_adapter`
            file = with_names_of(self.model, read_adapter(directory))
            present = self._tensors(adapter_name).held_by_model(save_embedding_layers=False)
            targets = find_token_targets(self.model, file.config)
            _check_same_tokens(self._tensors(adapter_name).rows(), adapter_name, targets)
            held = embeddings_in(file, self.model)
            embeddings = embedding_parameters(self.model)
            present |= {name: p for name, p in embeddings.items() if base_name(name) in held}
            pairs = same_tensors(present, file)
            shared |= {"adapter name": adapter_name, "tensors": file.tensors}
        with self._scope.lock:
            if held or self._configs[adapter_name].bias != "none":
                self._check_idle("these values would replace embeddings or biases of the base model")
            for old, new in pairs:
                with changed([old], "hotswap_adapter"):
                    put_values(old.detach(), new)
        self._embeddings[adapter_name] = held

    def _build(
        self,
        adapter_name: str,
        config: C3AConfig,
        targets: Sequence[Target],
        saved: Sequence[tuple[str, nn.Module]],
        tokens: Sequence[TokenTarget],
        tensors: Mapping[str, Tensor] | None = None,
        replaced: Sequence[tuple[nn.Parameter, Tensor]] = (),
    ) -> Addition:
        """All that an adapter needs, with a file's tensors as its values; nothing is put into the model."""
        biased = [name for name, other in self._configs.items() if other.bias != "none"]
        if config.bias != "none" and biased:
            raise ConfigError(
                f"bias={config.bias!r}: adapter {biased[0]!r} trains biases already, and they can follow only one "
                'adapter; use bias="none"'
            )
        check_tokens_alone(tokens, [target.name for target in targets], [name for name, _ in saved], config)
        check_spread(self.model, config, [target.name for target in targets], saved)
        new = partial(new_layer, self.model, backend=self.backend, active=self._active)
        layers = [(target, *new(target, adapter_name, config.init_weights, tensors)) for target in targets]
        copies = [(name, module, *new_copy(name, module, tensors)) for name, module in saved]
        tie_copies(self.model, config, {name: module_copy for name, *_, module_copy in copies})
        rows = [(target, *new_rows(target, tensors)) for target in tokens]
        return Addition(adapter_name, config, layers, copies, rows, replaced)

    def _put(self, new: Addition) -> None:
        """Put what was built into the model."""
        with self._scope.lock:
            if new.replaced:
                self._check_idle("the adapter's file would replace embeddings or biases of the base model")
            self._put_unlocked(new)

    def _put_unlocked(self, new: Addition) -> None:
        adapter_name, is_first = new.adapter_name, not self._configs
        broadcast(over := shared_over(self.model), new.tensors())
        if is_first:
            self.model.requires_grad_(False)
            hold_layout(self.model)  # a layer that is not adapted must pass gradients on to those below it, too
        for parameter, value in new.replaced:
            with changed([parameter], "load_adapter"):
                put_values(parameter.detach(), value)
        for target, layer, kernel in new.layers:
            layer._install(adapter_name, kernel, trainable=False)
            layer.agreed = bool(over) and (layer.agreed or layer is not target.module)
            put(self.model, target, layer)
        for name, module, wrapper, module_copy in new.copies:
            wrapper.install(adapter_name, module_copy)
            if wrapper is not module:
                replace_module(self.model, name, wrapper)
        for token_target, rows, values in new.rows:
            put_rows(adapter_name, token_target, rows, values)
        self._scope.trials.clear()  # the new layers were in none
        for part in self._parts():
            part._scope = self._scope
        self._configs[adapter_name] = new.config
        self._chosen_by[adapter_name] = {target.name: target.chosen_by for target, _, _ in new.layers}
        if is_first:
            self._activate([adapter_name], inference_mode=new.config.inference_mode)
        self._watch.begin()

    # Removing and renaming

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If no active one is left, the first remaining by name becomes active, with a warning.

        Other active ones stay trainable or frozen, as they are.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the adapter is merged, or rows are computed with it (`using`).
        """
        with self._scope.lock:  # no request takes the adapter meanwhile
            with in_step(self.model, "delete_adapter") as shared:
                shared["adapter name"] = adapter_name
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
            for rows in self._token_rows():
                if not rows.indices:
                    remove_rows(self.model, rows)
            del self._configs[adapter_name], self._chosen_by[adapter_name]
            self._embeddings.pop(adapter_name, None)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its parameters stay the same objects.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the new name is taken, or rows are computed with the adapter (`using`).
            ConfigError: a name that cannot be used.
        """
        with self._scope.lock:  # no request takes the adapter meanwhile
            with in_step(self.model, "rename_adapter") as shared:
                shared["adapter names"] = old, new
                self._known(old)
                self._check_unused(old)
                self._check_free(new)
            for part in self._parts():
                part.rename_adapter(old, new)
            self._configs = {new if name == old else name: config for name, config in self._configs.items()}
            self._chosen_by = {new if name == old else name: keys for name, keys in self._chosen_by.items()}
            self._active = [new if name == old else name for name in self._active]
            self._embeddings = {new if name == old else name: held for name, held in self._embeddings.items()}

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
        is_main_process: bool = True,
    ) -> None:
        """Save an adapter to a folder, as PEFT does and reads it. PEFT reads adapters of `nn.Linear` alone.

        Warns, once for each, about parameters that were made trainable after `apply` and are in no file. A model card
        (`README.md`) is written too, as PEFT writes it, or brought up to date; that needs huggingface_hub, and where it
        cannot be written that is warned about.

        Where parameters are sharded (FSDP2), every process has to call; the first one writes, the others wait for it.
        In a model that a plan spreads over processes (tensor or expert parallel), the first of these writes, and every
        one may call: the others do not wait, but where the adapter's own tensors are sharded. `load_adapter` and
        `hotswap_adapter` of such a model read when all of its processes have come to it.

        Args:
            directory: the folder.
            adapter_name: which adapter.
            state_dict: the model's, from which the values are taken instead; the caller alone writes then.
            save_embedding_layers: whether the embeddings are saved with it, as in `state_dict`.
            is_main_process: whether this process may write, as in PEFT.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: an adapter is merged into embeddings that are to be saved.
            CheckpointError: it cannot be written.
            ConfigError: a value of `save_embedding_layers` that means nothing.
        """
        stored, over = self._tensors(adapter_name), shared_over(self.model)
        if state_dict is None:
            held = stored.held_by_model(save_embedding_layers)
            sharded = any(map(is_sharded, held.values() if over else self.model.parameters()))
            if sharded and over:
                with in_step(self.model, "save_pretrained") as shared:
                    shared |= {"adapter name": adapter_name, "tensors": list(held)}
            tensors = {name: gathered(tensor).detach() for name, tensor in held.items()}
        else:
            sharded, tensors = False, stored.found_in(state_dict, save_embedding_layers)
        self._warn_unsaved(tensors)
        stored.warn_unreadable()
        if sharded:
            is_first = torch.distributed.get_rank() == 0
        else:
            is_first = state_dict is not None or not any(any(mesh.get_coordinate() or ()) for mesh in over)
        try:
            if is_first and is_main_process:
                stored.write(directory, tensors)
                try:
                    stored.write_card(directory)
                except CheckpointError as error:
                    warnings.warn(f"the adapter is saved, without its model card: {error}", stacklevel=2)
        finally:
            if sharded:
                torch.distributed.barrier()

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Write an adapter's model card, `README.md`, or bring the one that is there up to date, as PEFT does.

        What others wrote in it stays. Without huggingface_hub none is written.

        Raises:
            AdapterNotFoundError: an unknown name.
            CheckpointError: it cannot be written.
        """
        self._tensors(adapter_name).write_card(output_dir)

    def _warn_unsaved(self, tensors: Mapping[str, Tensor]) -> None:
        saved = [parameter for _, layer in self.layers() for parameter in layer.c3a_kernel.parameters()]
        saved += [parameter for _, module in self._saved_modules() for parameter in module.parameters()]
        saved += [parameter for rows in self._token_rows() for parameter in rows.parameters()]
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

    def get_layer_status(self) -> list[LayerStatus]:
        """The status of each adapted layer, module trained whole and embedding with trained tokens, as PEFT has it."""
        parts: list[tuple[str, Any]] = list(own_parts(self.model, self._scope))
        parts += [(f"{name}.token_adapter", rows) for name, rows in own_rows(self.model, self._scope)]
        return layer_status(parts, self._active)

    def get_model_status(self) -> ModelStatus:
        """The status of all adapters together, as PEFT has it."""
        return model_status(self.model, self, self.get_layer_status())

    def summary(self) -> str:
        """A table as text: for each layer and adapter the widths, b and what decided on it, parameters and backend.

        "chosen by" is the key of `block_size_pattern` that matched, `block_size` or `auto` where none did, or `file`
        where an adapter file has another size than its configuration says.
        """
        return summary_table(base_modules(self.model), self._active, self._chosen_by)


def _check_same_tokens(
    rows: Sequence[tuple[str, TokenRows]], adapter_name: str, targets: Sequence[TokenTarget]
) -> None:
    """Refuse a file whose rows are of other tokens than an adapter's.

    Raises:
        CheckpointError: they are.
    """
    own = {name: held.indices[adapter_name] for name, held in rows}
    if own != (others := {target.name: target.indices for target in targets}):
        raise CheckpointError(
            f"the file trains other tokens (trainable_token_indices {shown(others)}) than adapter {adapter_name!r} "
            f"({shown(own)}): load it as another adapter"
        )
