"""Continuous batching with an adapter for each request, as `AdapterManager` has it."""

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from .merge_verbs import Merging

__all__ = ["Serving"]


class Serving(Merging):
    """The adapters of a model, and how it serves requests with them.

    Each request has an adapter of its own, and is computed as if it were alone, with the adapter's values and strength
    at the time when it was added. Biases that an adapter has trained, and embeddings that its file has brought, are the
    base model's, for all requests. transformers is needed, in a release whose continuous batching is known (5.23 or
    later).

    The kernels of a request's adapter are copied, once for each state of their values that requests in flight have, and
    blocks of the KV cache are shared among requests of one such state alone. As everywhere, values that are written
    through `.data` are not seen to be others (`freeze_for_inference` has the rules); train within `manager.pause()`.
    """

    def generate_batch(
        self, inputs: Sequence[Sequence[int]], adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Generate from many prompts at once, each with an adapter of its own: `model.generate_batch` of transformers.

        Args:
            inputs: the prompts, token ids.
            adapter_names: for each prompt an adapter's name, `"__base__"` for the base model alone, or None for what
                the caller's context says (`using`, `disable_adapter`), or the active adapter, if one is. None: so for
                all.
            kwargs: as of `model.generate_batch`.

        Returns:
            Request id → transformers' GenerationOutput, in the order of the prompts. A request whose adapter is unknown
            or cannot be computed fails alone; its `error` says why.

        Raises:
            ConfigError: not as many names as prompts, prompts that are no token ids, an unknown argument, a model that
                transformers does not generate with, or a release of transformers that is too old.
            AdapterStateError: processes share the model, or the model keeps a persistent manager without adapters.
        """
        return self._entry_points().generate(inputs, adapter_names, **kwargs)

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """A manager of continuous batching: `model.init_continuous_batching` of transformers, with adapters.

        Its `add_request(..., adapter_name=)` and `add_requests(..., adapter_names=)` take names as `generate_batch`
        does. While requests use an adapter it can be trained, hot-swapped and set, but not deleted or renamed. While
        the manager computes, call the model elsewhere within `manager.pause()`.

        Args:
            generation_config, continuous_batching_config, workload_hints: as of transformers' method.

        Returns:
            An `AdapterBatchingManager`, a subclass of transformers' ContinuousBatchingManager.

        Raises:
            ConfigError, AdapterStateError: as `generate_batch`.
        """
        return self._entry_points().init_continuous_batching(
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            workload_hints=workload_hints,
        )

    def continuous_batching_context_manager(self, **kwargs: Any) -> AbstractContextManager[Any]:
        """A running manager of `init_continuous_batching` that is stopped in the end.

        Args:
            kwargs: as of transformers' `model.continuous_batching_context_manager`.

        Raises:
            ConfigError, AdapterStateError: as `generate_batch`.
        """
        return self._entry_points().continuous_batching_context_manager(**kwargs)

    def _entry_points(self) -> Any:
        # Integrations stand on adapters and are imported when they are asked for: this one by name.
        return importlib.import_module("c3a_triton.integrations.continuous_batching").EntryPoints(self)
