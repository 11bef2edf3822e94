"""transformers' continuous batching with an adapter for each request of a packed row.

Requests come with a lease on a slot (`adapters.token_slots`). transformers writes what its logits processors need into
lines of a tensor that lies beside the other inputs of a batch, at an address that stays; one more such line holds the
slot of each token. Blocks of keys and values are told by hashes of tokens: those of other slots get other hashes.
"""

import inspect
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from c3a_triton.adapters.token_layouts import token_layouts
from c3a_triton.adapters.token_slots import Lease, PackedRow, TokenSlots
from c3a_triton.errors import AdapterStateError, C3AError, ConfigError
from c3a_triton.files.values import shown

__all__ = ["AdapterBatchingManager", "EntryPoints"]

_LEAST_RELEASE = (5, 23)

if tuple(map(int, transformers.__version__.split(".")[:2])) < _LEAST_RELEASE:
    raise ConfigError(
        f"adapters per request need the continuous batching of transformers {'.'.join(map(str, _LEAST_RELEASE))} or "
        f"later, and this is transformers {transformers.__version__}"
    )

from transformers.generation.continuous_batching.cb_logits_processors import (  # noqa: E402
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (  # noqa: E402
    ContinuousBatchingManager,
    ContinuousMixin,
)
from transformers.generation.continuous_batching.requests import RequestState  # noqa: E402
from transformers.generation.continuous_batching.utils import CudaGraphBuffer  # noqa: E402

# Where a request has its lease, among the keywords that transformers keeps for it.
_LEASE = "c3a_lease"


class _Prompt(list[int]):
    """A prompt and the adapter of its request, which pass through transformers' own verbs together."""

    def __init__(self, tokens: Sequence[int], adapter_name: str | None) -> None:
        super().__init__(tokens)
        self.adapter_name = adapter_name


def _tokens_of(prompt: Any) -> list[int]:
    """A prompt's token ids.

    Raises:
        ConfigError: it has none. transformers' loop would end over it, with everybody's requests.
    """
    try:
        tokens = list(map(operator.index, prompt))
    except TypeError:
        tokens = []
    if not tokens:
        raise ConfigError(f"a prompt is a list of one token id or more (a tokenizer's input_ids), got {shown(prompt)}")
    return tokens


def _prompts(inputs: Sequence[Sequence[int]], adapter_names: Sequence[str | None] | None) -> list[list[int]]:
    prompts = list(map(_tokens_of, inputs))
    if adapter_names is None:
        return prompts
    is_list = isinstance(adapter_names, Sequence) and not isinstance(adapter_names, str)
    if not is_list or len(adapter_names) != len(prompts):
        raise ConfigError(
            f"adapter_names must have a name, or None, for each of the {len(prompts)} inputs, got {adapter_names!r}"
        )
    return [_Prompt(tokens, name) for tokens, name in zip(prompts, adapter_names, strict=True)]


class _Tokens(list[int]):
    """Tokens of one slot: their first block has a number more, the slot's, so that its hash is that of no other."""

    def __init__(self, tokens: Sequence[int], serial: int) -> None:
        super().__init__(tokens)
        self.serial = serial

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        is_first_block = isinstance(key, slice) and not key.start and len(found) == key.stop
        return [*found, self.serial] if is_first_block else found

    def __add__(self, other: list[int]) -> "_Tokens":  # type: ignore[override]
        return _Tokens(super().__add__(other), self.serial)


def _lease(state: RequestState) -> Lease | None:
    """A request's lease; those of a warm-up have none."""
    return state.logit_processor_kwargs.get(_LEASE)


class _WithSlots(ContinuousBatchingLogitsProcessorList):
    """The logits processors of a manager, and one line more of what they need."""

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList) -> None:
        self.__dict__.update(processors.__dict__)
        self.tensors_required += 1

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        kwargs[_LEASE].arrived = True  # also of one that is refused now, which a kept traceback may hold
        super().check_kwargs({key: value for key, value in kwargs.items() if key != _LEASE})

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        super().fill_defaults(int32_tensor[:-1])
        int32_tensor[-1].fill_(-1)

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        super().prepare_tensor_args(requests_in_batch, arg_storage[:-1])
        slots: list[int] = []
        for request in requests_in_batch:
            lease = _lease(request.state)
            slots.extend(repeat(-1 if lease is None else lease.slot.index, request.query_length))
        line = arg_storage[-1]
        line[: len(slots)] = torch.tensor(slots, dtype=line.dtype, device=line.device)
        line[len(slots) :] = -1  # padding
        return arg_storage


class _Model:
    """What computes a batch in the model's place: it tells the layers the slots of the packed row first."""

    def __init__(self, model: nn.Module, row: PackedRow) -> None:
        self._model, self._row = model, row

    def __call__(self, **batch: Any) -> Any:
        lines, n_tokens = batch["logits_processor_args"], batch["input_ids"].shape[1]
        # A view of the lines with as many columns as there are requests; the last line has one for each token.
        self._row.begin(lines[-1].as_strided((n_tokens,), (1,)), batch.get("logits_to_keep"))
        return self._model(**batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' manager of continuous batching, whose requests have adapters of their own.

    A request is computed with its adapter as that is when the request is added: whatever is trained, exchanged
    (`hotswap_adapter`) or loaded afterwards is for requests to come. Deleting or renaming an adapter, or merging any,
    is refused while requests use it.
    """

    batch_processor: Any
    logit_processor: Any
    _slots: TokenSlots
    _row: PackedRow

    def _begin(self, slots: TokenSlots) -> None:
        """Become one of these, of transformers' own, before anything has been computed."""
        self._slots, self._row = slots, PackedRow(slots.layouts)
        self.logit_processor = _WithSlots(self.logit_processor)
        slots.adapters._scope.servers.add(self)

    # Requests

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *args: Any,
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Add a request, as transformers' method of this name does.

        Args:
            input_ids: the prompt.
            request_id: its name, or None for one that is made up.
            args, kwargs: transformers' other arguments.
            adapter_name: its adapter; `"__base__"` for the base model alone; None for what the caller's context
                says (`using`, `disable_adapter`), or the active one, if one is. A request whose adapter is unknown, or
                cannot be computed here, fails alone: its output's `error` says so.

        Raises:
            ConfigError: the prompt is no list of token ids, or an empty one.
        """
        tokens = _tokens_of(input_ids)
        try:
            lease = self._slots.lease(getattr(input_ids, "adapter_name", adapter_name))
        except (C3AError, torch.OutOfMemoryError) as error:
            return self._refuse(tokens, request_id, error)
        return super().add_request(tokens, request_id, *args, **{**kwargs, _LEASE: lease})

    def add_requests(
        self,
        inputs: list[list[int]],
        *args: Any,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add several requests, as transformers' method of this name does.

        Args:
            inputs: the prompts.
            args, kwargs: transformers' other arguments.
            adapter_names: as many adapters, each as in `add_request`; None: those that the prompts have.

        Raises:
            ConfigError: not as many names as prompts, or prompts without token ids; nothing was added.
        """
        inputs = inputs if adapter_names is None else _prompts(inputs, adapter_names)
        return super().add_requests(inputs, *args, **kwargs)

    def check_adapter(self, adapter_name: str) -> None:
        """Raise what a request with this adapter would fail with, as it is now.

        Raises:
            AdapterNotFoundError: an unknown name.
            AdapterStateError: adapters are merged.
            ConfigError: a part of it computes for all requests alike (`modules_to_save`, convolutions, ...).
        """
        self._slots.lease(adapter_name)

    def _refuse(self, input_ids: list[int], request_id: str | None, error: Exception) -> str:
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        children = [f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1)]
        for name in (*children, request_id):
            self.output_router.fail_and_deliver(RequestState(name, list(input_ids)), error)
        return request_id

    def names_in_use(self) -> set[str]:
        """The adapters of requests that have not ended."""
        scheduler = None
        with ExitStack() as paused:
            with suppress(RuntimeError):  # no loop runs, and a new one begins with no requests but those of its queue
                with self.pause():  # the step after it drops what was cancelled before it
                    pass
                paused.enter_context(self.pause())
                scheduler = getattr(self.batch_processor, "scheduler", None)
            groups = () if scheduler is None else (scheduler.active_requests, scheduler.waiting_requests)
            known = {lease.name for group in groups for state in group.values() if (lease := _lease(state)) is not None}
            return known | {lease.name for lease in self._slots.leases() if not lease.arrived}

    # Steps

    def warmup(self) -> None:
        """As transformers' own."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        with self._computing() as model:
            self.batch_processor.warmup(model)
        self.warmed_up = True

    def _generation_step(self) -> None:
        with self._computing() as model:
            self.batch_processor._generation_step(model)

    @contextmanager
    def _computing(self) -> Iterator[Any]:
        """Within it layers compute with the slots of the packed row, which the yielded model tells them."""
        row, slots = self._row, self._slots
        if getattr(self.model, "c3a", slots.adapters) is not slots.adapters:
            raise AdapterStateError(
                "the model has been unloaded and adapted again since this manager of continuous batching was made: "
                "make a new one"
            )
        stacks = slots.stacks  # who changes adapters may wait for this thread, which must not wait for him
        if stacks is not row.stacks:
            _forget_graphs(self.batch_processor.inputs_and_outputs)
            row.stacks = stacks
        scope = slots.adapters._scope
        with scope.steps, scope.bound(is_open=False, tokens=row):
            yield _Model(self.model, row)

    def _create_batch_processor(self) -> Any:
        former = self.batch_processor
        processor = super()._create_batch_processor()
        if processor is not former:
            _separate(processor.cache, processor.scheduler)
        return processor


def _forget_graphs(inputs_and_outputs: Any) -> None:
    """Drop captured graphs, which read stacks that have been replaced, when none of them runs any more."""
    if inputs_and_outputs.compute_stream is not None:
        inputs_and_outputs.compute_stream.synchronize()
    pairs = getattr(inputs_and_outputs, "io_pairs", None)
    for io in [inputs_and_outputs] if pairs is None else [pair.device_io for pair in pairs]:
        io.graphs = CudaGraphBuffer()


def _separate(cache: Any, scheduler: Any) -> None:
    """Let requests share blocks of a cache with those of their own slot alone."""
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests[request_id]
        lease = _lease(state)
        return search(request_id, prompt_ids if lease is None else _Tokens(prompt_ids, lease.slot.serial))

    def mark_complete_blocks(state: RequestState, complete_blocks: dict[str, int]) -> None:
        lease = _lease(state)
        if lease is None or not complete_blocks:
            return mark(state, complete_blocks)
        tokens = _Tokens(state.initial_tokens, lease.slot.serial)
        of_slot = SimpleNamespace(
            request_id=state.request_id,
            status=state.status,
            initial_tokens=tokens,
            generated_tokens=state.generated_tokens,
        )
        return mark(of_slot, complete_blocks)

    cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks


class EntryPoints(ContinuousMixin):
    """transformers' entry points to continuous batching, standing on managers that know adapters.

    Args:
        adapters: the model's manager of adapters.

    Raises:
        ConfigError: a model that transformers does not generate with, or (`init_continuous_batching`) whose layers'
            inputs cannot be told.
    """

    def __init__(self, adapters: Any) -> None:
        if not isinstance(adapters.model, ContinuousMixin):
            raise ConfigError(
                f"{type(adapters.model).__name__} is no model that transformers generates with: continuous batching "
                "is for its causal language models"
            )
        self._adapters = adapters
        self.generation_config = adapters.model.generation_config

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> AdapterBatchingManager:
        """As transformers' own."""
        adapters, model = self._adapters, self._adapters.model
        kept = getattr(model, "_cached_continuous_batching_manager", None)
        if kept is not None:
            if not isinstance(kept, AdapterBatchingManager) or kept._slots.adapters is not adapters:
                raise AdapterStateError(
                    "the model keeps a persistent manager that was made without these adapters: call "
                    "model.destroy_cached_continuous_batching_manager() first"
                )
            return model.init_continuous_batching(*args, **kwargs)
        if adapters._scope.token_layouts is None:
            self._try_out()
        slots = TokenSlots(adapters, model.device)
        manager = model.init_continuous_batching(*args, **kwargs)
        manager.__class__ = AdapterBatchingManager  # of which transformers' method makes none
        manager._begin(slots)
        return manager

    def _try_out(self) -> None:
        """Learn what layers see, by calls outside of continuous batching, which one implementation is for alone."""
        model, scope = self._adapters.model.eval(), self._adapters._scope
        with scope.steps:
            is_paged = model.config._attn_implementation == "paged|eager"
            if is_paged:
                model.set_attn_implementation("eager")
            try:
                scope.token_layouts = token_layouts(model, scope)
            finally:
                if is_paged:
                    model.set_attn_implementation("paged|eager")

    def generate(self, inputs: Any, adapter_names: Sequence[str | None] | None, **kwargs: Any) -> Any:
        """transformers' `generate_batch`, with an adapter for each prompt.

        Raises:
            ConfigError: an argument that transformers would pass over without a word.
        """
        known = {*inspect.signature(self.generate_batch).parameters, "max_new_tokens"} - {"kwargs"}
        if unknown := kwargs.keys() - known:
            raise ConfigError(
                f"generate_batch takes no {', '.join(sorted(unknown))}: adapters are named by adapter_names=, sampling "
                "is said by generation_config="
            )
        return self.generate_batch(_prompts(inputs, adapter_names), **kwargs)
