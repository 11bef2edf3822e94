"""Which of a model's adapters compute: the active ones, those of a context, of each row, or none; and by what."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from c3a_triton.bases.agreement import in_step
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, BackendError, ConfigError
from c3a_triton.files.config import C3AConfig
from c3a_triton.operator.dispatch import check_backend

from . import merging
from .base_model import near_names
from .layer import C3ALinear
from .modules_to_save import ModulesToSave
from .names import BASE_ROW, Scope
from .ownership import own_copies, own_layers, own_parts, own_rows
from .saving import AdapterTensors
from .strength import check_strength, strengths_of
from .token_rows import TokenRows, modules_with
from .wrapping import Wrappers

__all__ = ["Activation"]


class Activation:
    """The adapters of a model and which of them compute, as `AdapterManager` documents it, which adds them.

    Args:
        model: the model.
        backend: how adapters are computed.

    Raises:
        BackendError: an unknown backend.
    """

    def __init__(self, model: nn.Module, backend: str) -> None:
        check_backend(backend)
        self.model = model
        self.backend = backend
        self._configs: dict[str, C3AConfig] = {}
        self._active: list[str] = []
        self._n_activations = 0
        self._inference_mode = False  # whether the active ones were left frozen
        self._scope = Scope(managed=True)
        self._embeddings: dict[str, set[str]] = {}  # adapter name → embeddings that its file has brought
        self.wrappers = Wrappers()

    @property
    def adapters(self) -> dict[str, C3AConfig]:
        """Adapter name → configuration, in the order in which they were added."""
        return dict(self._configs)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active)

    def layers(self) -> Iterator[tuple[str, C3ALinear]]:
        """(name, layer) of every adapted layer."""
        return own_layers(self.model, self._scope)

    def _saved_modules(self) -> list[tuple[str, ModulesToSave]]:
        return own_copies(self.model, self._scope)

    def _token_rows(self) -> list[TokenRows]:
        return [rows for _, rows in own_rows(self.model, self._scope)]

    def _parts(self) -> list[C3ALinear | ModulesToSave | TokenRows]:
        return [*(part for _, part in own_parts(self.model, self._scope)), *self._token_rows()]

    def _merged(self, parts: Iterable[C3ALinear | ModulesToSave | TokenRows] | None = None) -> list[str]:
        """Names of the adapters that are merged into any of `_parts`, which may be given."""
        able = [part for part in parts or self._parts() if not isinstance(part, ModulesToSave)]
        return sorted({name for part in able for name in part.merged_adapters})

    def _known(self, adapter_names: str | Iterable[str]) -> list[str]:
        """The names as a list, each once, if all are known."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        for name in names:
            if name not in self._configs:
                known = ", ".join(map(repr, self._configs)) or "none"
                raise AdapterNotFoundError(f"there is no adapter {name!r}; there are: {known}")
        return names

    def _tensors(self, adapter_name: str) -> AdapterTensors:
        self._known(adapter_name)
        held = self._embeddings.get(adapter_name, ())
        return AdapterTensors(self.model, self._scope, adapter_name, self._configs[adapter_name], held)

    def _to_unmerge(self) -> list[C3ALinear]:
        """Layers by which `_unmerge` reaches what is merged into layers, if all that is merged can be unmerged."""
        for rows in self._token_rows():
            rows.check_unmerge(modules_with(self.model, rows))
        return merging.to_unmerge(layer for _, layer in self.layers())

    def _unmerge(self, layers: list[C3ALinear]) -> None:
        with self._scope.lock:
            for layer in layers:
                merging.bring_back(layer, everyone=True)
            for rows in self._token_rows():
                rows.unmerge(modules_with(self.model, rows))

    def _check_idle(self, what: str) -> None:
        """Refuse what would change the model under requests that have not ended.

        Raises:
            AdapterStateError: there are some.
        """
        if names := self._scope.names_served():
            raise AdapterStateError(
                f"{what} under requests of continuous batching that are computed with {sorted(names)}: let them end, "
                "or cancel them, first"
            )

    def set_adapter(
        self,
        adapter_name: str | Iterable[str],
        inference_mode: bool = False,
        *,
        weights: float | Sequence[float] | None = None,
    ) -> None:
        """Activate an adapter, or several whose updates are summed. Active adapters are trainable, others frozen.

        Merged adapters are unmerged first, with a warning.

        Args:
            adapter_name: one name or several.
            inference_mode: leave the active ones frozen too.
            weights: their strengths, as `set_scale` gives them: one for each, or one for all. None: they stay as they
                are.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: two adapters with a copy of the same module (`modules_to_save`) or rows for one token
                (`trainable_token_indices`), or a merged layer that cannot be unmerged; or a DDP that was given to
                `apply` and cannot be built again.
            ConfigError: a weight that is no finite number, or not one for each name. Nothing has changed.
        """
        with in_step(self.model, "set_adapter") as shared:
            given = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
            names = self._known(given)
            strengths = {} if weights is None else strengths_of(given, weights)
            shared |= {"adapters": names, "inference_mode": inference_mode, "weights": strengths}
            for part in self._parts():
                if not isinstance(part, C3ALinear):
                    part.check_set_adapter(names)
            self.wrappers.check()
            merged, is_merged = self._to_unmerge(), bool(self._merged())
        if is_merged:
            self._unmerge(merged)
            warnings.warn("adapters were merged; they have been unmerged before another one was set", stacklevel=2)
        self._set_strengths(strengths)
        self._activate(names, inference_mode)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Give an adapter a strength: the factor of its ΔW in every layer, 1 unless it was set.

        ΔW is linear in the kernels, so it is exact: computed, merged, combined (`add_weighted_adapter`) and for rows of
        their own (`using`). Compiled code sees the new number without being compiled again. Negative ones take away
        what was trained, 0 computes as without the adapter. No file holds it; what is trained beside the kernels
        (`modules_to_save`, biases) has none. A single layer has its own `set_scale`.

        Args:
            adapter_name: which adapter.
            scale: its strength.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: the adapter is merged, with another strength. Nothing has changed.
            ConfigError: no finite number. Nothing has changed.
        """
        with in_step(self.model, "set_scale") as shared:
            strengths = {name: check_strength(scale, f"adapter {name!r}") for name in self._known(adapter_name)}
            shared["scale"] = strengths
            for _, layer in self.layers():
                layer.check_strengths(strengths)
        self._set_strengths(strengths)

    def _set_strengths(self, strengths: Mapping[str, float]) -> None:
        with self._scope.lock:
            for _, layer in self.layers():
                for name, strength in strengths.items():
                    layer.set_scale(name, strength)

    def _activate(self, names: list[str], inference_mode: bool) -> None:
        for part in self._parts():
            part.set_adapter(names, inference_mode)
        self._active = list(names)
        self._n_activations += 1
        self._inference_mode = inference_mode
        for name in self._configs:
            for parameter in self._tensors(name).biases().values():
                parameter.requires_grad_(name in names and not inference_mode)
        self.wrappers.rebuild()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes its base alone. Merged adapters are unmerged, and stay so afterwards.

        It holds in this thread or asyncio task; another one that calls the model meanwhile without a context of its own
        (`using`) is refused. What is trained stays so, and adapters can be added, set and deleted meanwhile.

        Raises:
            AdapterStateError: a merged layer cannot be unmerged.
        """
        trained = [name for name in self._active if self._configs[name].bias != "none"]
        if trained:
            warnings.warn(
                f"the biases that {trained[0]!r} has trained stay as they are while adapters are disabled", stacklevel=3
            )
        with in_step(self.model, "disable_adapter"):
            merged = self._to_unmerge()
        self._unmerge(merged)
        with self._scope.bound(disabled=True):
            yield

    @contextmanager
    def using(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within the context each row of a batch has the adapter of its name, whatever is active.

        The names belong to this thread or asyncio task. Another one that calls the model meanwhile has to say what it
        wants, with a context of its own (`using(None)` for the active adapters) or `adapter_names=`, or is refused: a
        thread that was started within the context does not know its names
        (`contextvars.copy_context().run(function)` tells it). A generator that yields within the context lets whoever
        iterates compute with its names, and computes with theirs: enter it anew for each step. A backward pass that
        computes layers again (gradient checkpointing) uses the names of its forward pass, within the context and after
        it.

        Where a layer sees several consecutive rows for one of the batch (beams, flattened sequences, windows), each
        gets its name. Whether its rows follow from the batch at all is tried out in a few calls of the base model, with
        one and with two of the rows, before the first call of a form with different names (before the first four where
        a layer sees tokens without a batch, which may be routed). Where some layer's do not (sequence-first models,
        relative positions, routed tokens), the model is called once for each adapter, with its rows; where its
        outputs cannot be joined (a loss over all rows), the layer is refused by name.
        `model(..., adapter_names=...)` is the same for one call.

        Args:
            adapter_names: one name per row; `"__base__"` for the base model alone. None: the active adapters.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: adapters are merged.
        """
        with in_step(self.model, "using") as shared:
            names = shared["adapter_names"] = self.check_rows(adapter_names)
        with self._scope.bound(names=names, is_open=adapter_names is not None):
            yield

    def check_rows(self, adapter_names: Sequence[str] | None) -> tuple[str, ...] | None:
        """The names for the rows of a batch, if they can be used; raises as `using`."""
        if adapter_names is None:
            return None
        names = () if isinstance(adapter_names, str) else tuple(adapter_names)
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"using() takes a list with one adapter name per row, got {adapter_names!r}")
        self._known(name for name in names if name != BASE_ROW)
        if merged := self._merged():
            raise AdapterStateError(f"rows cannot have adapters of their own while {merged} are merged: unmerge first")
        return names

    def set_backend(self, name: str, layers: str | Iterable[str] | None = None) -> None:
        """Choose how the adapters of linear layers are computed.

        Args:
            name: a name of `c3a_triton.operator.dispatch.BACKENDS`.
            layers: full names of layers, or what they end with after a dot; None means all, and those adapted later.

        Raises:
            BackendError: an unknown backend, or a layer is named that has no choice.
            ConfigError: a name that no adapted layer has.
        """
        check_backend(name)
        chosen = self._with_backends(layers, needs_choice=name != "auto")
        if layers is None:
            self.backend = name
        for layer in chosen:
            layer.backend = name

    def save_spectra(self, layers: str | Iterable[str] | None = None, *, save: bool = True) -> None:
        """Let linear layers keep the spectrum of their input for the backward pass in place of the input, or not.

        It takes about as many bytes, and the backward pass does not compute it again; where that can be done, and what
        it excludes, `c3a_linear` says.

        Args:
            layers: as in `set_backend`; None means all that there are, but not those adapted later.
            save: whether they do.

        Raises:
            BackendError: a layer is named that is not linear.
            ConfigError: a name that no adapted layer has.
        """
        if isinstance(layers, bool):
            raise ConfigError(f"save_spectra({layers}): layers come first, by name; say save_spectra(save={layers})")
        for layer in self._with_backends(layers, needs_choice=True):
            if layer.kind == "linear":
                layer.save_spectrum = save
            elif layers is not None:
                raise BackendError(
                    f"{layer.layer_name} is of kind {layer.kind}: it keeps its input for the backward pass"
                )

    def _with_backends(self, layers: str | Iterable[str] | None, needs_choice: bool) -> list[C3ALinear]:
        """The layers of these names, or all that have a choice of backend; one without, named, may be an error."""
        adapted = list(self.layers())
        if layers is None:
            return [layer for _, layer in adapted if layer.has_backends]
        chosen = []
        for entry in [layers] if isinstance(layers, str) else layers:
            found = [layer for other, layer in adapted if f".{other}".endswith(f".{entry}")]
            if not found:
                raise ConfigError(f"no adapted layer is named {entry!r}.{near_names(entry, dict(adapted))}")
            chosen += found
        if needs_choice and (fixed := [layer for layer in chosen if not layer.has_backends]):
            raise BackendError(f"{fixed[0].layer_name} is a {fixed[0].kind} layer, which has no choice of backend")
        return chosen

    def freeze_for_inference(self, frozen: bool = True) -> None:
        """Keep what is derived from the adapters' parameters from one call to the next, or end that, in every layer.

        For inference only: `C3ALinear.freeze_for_inference` has the rules. Adapters that are added or loaded later are
        not frozen before it is called again.

        Args:
            frozen: freeze all adapters, whose kernels, modules and biases then want no gradient until `set_adapter`; or
                let go of what is kept.
        """
        for _, layer in self.layers():
            layer.freeze_for_inference(frozen)
        if not frozen:
            return
        for part in self._parts():
            if not isinstance(part, C3ALinear):
                part.requires_grad_(False)
        for name in self._configs:
            for parameter in self._tensors(name).biases().values():
                parameter.requires_grad_(False)
        self._inference_mode = True
