"""One adapter's tensors: where a model holds them, and under which names its file has them."""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from c3a_triton.bases.model_names import unwrapped_name
from c3a_triton.bases.weights import stored_tensor
from c3a_triton.errors import AdapterStateError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, write_adapter
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.model_card import write_model_card

from . import pretrained
from .base_model import base_module_names
from .beside import embeddings_to_save
from .layer import C3ALinear
from .names import Scope
from .ownership import own_copies, own_layers, own_rows
from .token_rows import ROWS_SUFFIX, TokenRows

__all__ = ["AdapterTensors"]


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter in a model.

    Attributes:
        model: the adapted model.
        scope: its manager's.
        name: the adapter's name.
        config: its configuration.
        held: the embeddings that its own file has brought, by the base model's names.
    """

    model: nn.Module
    scope: Scope
    name: str
    config: C3AConfig
    held: Collection[str] = ()

    def layers(self) -> Iterator[tuple[str, C3ALinear]]:
        """(name, layer) of the layers that have the adapter."""
        layers = own_layers(self.model, self.scope)
        return ((name, layer) for name, layer in layers if self.name in layer.c3a_kernel)

    def biases(self) -> dict[str, nn.Parameter]:
        """Full name → parameter of the biases that it trains."""
        bias = self.config.bias
        if bias == "none":
            return {}
        own = [f"{name}.base_layer.bias" for name, _ in self.layers()]
        whole = tuple(f"{name}." for name, _ in own_copies(self.model, self.scope))
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if (name in own if bias == "c3a_only" else f".{name}".endswith(".bias") and not name.startswith(whole))
        }

    def rows(self) -> list[tuple[str, TokenRows]]:
        """(name of the embedding, its rows) where the adapter trains tokens."""
        return [(name, rows) for name, rows in own_rows(self.model, self.scope) if self.name in rows.indices]

    def _embeddings(self, choice: bool | str) -> dict[str, nn.Parameter]:
        embeddings = embeddings_to_save(self.model, self.config, choice, held=self.held)
        for name, layer in own_layers(self.model, self.scope):
            own = list(layer.get_base_layer().parameters()) if layer.merged else ()
            if any(parameter is other for parameter in own for other in embeddings.values()):
                raise AdapterStateError(
                    f"{name} is to be saved beside the adapter, but {layer.merged_adapters} are merged into it: "
                    "unmerge them first (model.c3a.unmerge_adapter()), or save with save_embedding_layers=False"
                )
        for name, rows in own_rows(self.model, self.scope) if embeddings else ():
            if rows.merged_adapters:
                raise AdapterStateError(
                    f"{name} is to be saved beside the adapter, but {rows.merged_adapters} have tokens merged into it: "
                    "unmerge them first (model.c3a.unmerge_adapter()), or save with save_embedding_layers=False"
                )
        return embeddings

    def held_by_model(self, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """Name in the adapter's file → tensor, as the model holds it.

        Args:
            save_embedding_layers: as in `AdapterManager.state_dict`.

        Raises:
            AdapterStateError: an adapter is merged into embeddings that are among them.
            ConfigError: a value of `save_embedding_layers` that means nothing.
        """
        tensors = {name + KERNEL_SUFFIX: stored_tensor(layer.c3a_kernel, self.name) for name, layer in self.layers()}
        for name, module in own_copies(self.model, self.scope):
            if self.name in module.modules_to_save:
                values = module.modules_to_save[self.name].state_dict(keep_vars=True)
                tensors |= {f"{name}.{key}": value for key, value in values.items()}
        tensors |= {
            name + ROWS_SUFFIX: stored_tensor(rows.trainable_tokens_delta, self.name) for name, rows in self.rows()
        }
        return tensors | self.biases() | self._embeddings(save_embedding_layers)

    def found_in(self, state_dict: Mapping[str, Tensor], save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """What `held_by_model` gives, taken from the model's state_dict, which others have put together."""
        names = {unwrapped_name(name) for name in self.biases() | self._embeddings(save_embedding_layers)}
        ends, copy = (
            tuple(f"{end}.{self.name}" for end in (KERNEL_SUFFIX, ROWS_SUFFIX)),
            f".modules_to_save.{self.name}.",
        )
        tensors = {}
        for key, tensor in state_dict.items():
            name = unwrapped_name(key)
            if name.endswith(ends):
                tensors[name.removesuffix(f".{self.name}")] = tensor
            elif copy in name or name in names:
                tensors[name.replace(copy, ".")] = tensor
        return tensors

    def write_card(self, directory: str | os.PathLike[str]) -> None:
        """Write the model card, or bring it up to date: what PEFT cannot read is not said to be PEFT's.

        Raises:
            CheckpointError: it cannot be written.
        """
        tags = ["c3a", "c3a_triton", *(getattr(self.model, "model_tags", None) or ())]
        if any(cls.__module__.startswith("transformers.") for cls in type(self.model).__mro__):
            tags.append("transformers")
        write_model_card(
            directory,
            library_name="c3a_triton" if self._beyond_peft() or self.rows() else "peft",
            base_model=self.config.base_model_name_or_path,
            tags=tags,
            pipeline_tag="text-generation" if self.config.task_type == "CAUSAL_LM" else None,
        )

    def _beyond_peft(self) -> list[str]:
        """Names of the adapted layers that are none of PEFT's C3A."""
        return [name for name, layer in self.layers() if not isinstance(layer.get_base_layer(), nn.Linear)]

    def warn_unreadable(self) -> None:
        """Warn, at the caller's caller, where PEFT cannot read the adapter."""
        if own := self._beyond_peft():
            warnings.warn(
                "PEFT adapts linear layers alone (nn.Linear) by C3A: it cannot load this adapter, which has "
                f"{len(own)} others ({', '.join(own[:3])}{', …' if len(own) > 3 else ''}); "
                "c3a_triton.load_adapter does",
                stacklevel=3,
            )
        elif names := [name for name, _ in self.rows()]:
            warnings.warn(
                "PEFT's C3A trains no tokens (trainable_token_indices): it refuses to load this adapter, which has "
                f"rows of {' and '.join(names)}; c3a_triton.load_adapter does. For PEFT merge it into the model "
                "(merge_and_unload)",
                stacklevel=3,
            )

    def write(self, directory: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors, under the names of its file, and its configuration into a folder.

        Raises:
            CheckpointError: they cannot be written.
        """
        layers = {unwrapped_name(name): layer for name, layer in self.layers()}
        write_adapter(
            directory,
            pretrained.with_auto_mapping(self.model, self.config),
            {unwrapped_name(name): tensor for name, tensor in tensors.items()},
            block_sizes={name: layer.block_size[self.name] for name, layer in layers.items()},
            module_names=[unwrapped_name(name) for name in base_module_names(self.model)],
            parameters=[name for name, layer in layers.items() if layer.is_part],
            tokens={unwrapped_name(name): rows.indices[self.name] for name, rows in self.rows()},
        )
