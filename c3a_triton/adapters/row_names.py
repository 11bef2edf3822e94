"""Hooks around a model's forward: `adapter_names=`, a keyword that the model does not know, and how large its batch is.

Whether a layer's input can be divided among the rows of the batch is a property of the model. It is tried out, where
rows have different adapters, with calls of the base model: with the batch's first row alone, and beside another; again
with other rows where layers see tokens without a batch, which may fall like rows by chance. If it cannot in some layer,
the model is called once for each adapter.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from c3a_triton.bases.agreement import agree, shared_over
from c3a_triton.bases.parallel import shares_batch
from c3a_triton.errors import AdapterStateError, ShapeError

from .hooks import remove_hooks
from .names import Layout, Scope, expand_rows, uncompiled

__all__ = ["RowNames"]

# What transformers' models call their batch, where it is not their main input.
_BATCHES = ("inputs_embeds", "input_ids", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values")


# Trials with rows that differ, where a layer sees tokens without a batch.
_ENOUGH_TRIALS = 4


class _Begun(NamedTuple):
    """A call of a model that is under way."""

    hooks: "RowNames"
    module: nn.Module
    entry: Any
    divided: "_Divided | None"
    given: bool  # whether the names are of this call alone


_CALLS: ContextVar[tuple[_Begun, ...]] = ContextVar("c3a_triton_model_calls", default=())


class _Trial(NamedTuple):
    """What trials with fewer rows have told.

    Attributes:
        batch_dims: the batch's dimension of each output, None for outputs without one; None where they failed.
        n_to_come: how many more there will be.
    """

    batch_dims: list[int | None] | None
    n_to_come: int


class RowNames:
    """The hooks of one model and of the models in it, which may be called by themselves, as an encoder is.

    Args:
        roots: the model, and whatever else may be called in its place.
        scope: that of its adapted layers.
        check: takes the names of a call, and gives those that hold.
    """

    def __init__(
        self, roots: Sequence[nn.Module], scope: Scope, check: Callable[[Any], tuple[str, ...] | None]
    ) -> None:
        self.scope = scope
        self._check = check
        for module in roots[0].modules():
            if any(module is root for root in roots) or hasattr(type(module), "main_input_name"):
                if (other := RowNames.of(module)) is not None:  # of an adapted model of which this one is a part
                    other._remove_from(module)
                module.register_forward_pre_hook(self.before, with_kwargs=True)
                module.register_forward_hook(self.after, always_call=True)

    @staticmethod
    def of(model: nn.Module) -> "RowNames | None":
        """Those of a model, if it has them."""
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
        return next((hook for hook in hooks if isinstance(hook, RowNames)), None)

    def remove(self, model: nn.Module) -> None:
        """Remove the hooks."""
        for module in model.modules():
            self._remove_from(module)

    def _remove_from(self, module: nn.Module) -> None:
        remove_hooks(module, lambda hook: getattr(hook, "__self__", None) is self)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook: turn `adapter_names=` into what holds for this call, and note the batch's size."""
        if "adapter_names" not in kwargs:
            if torch.compiler.is_compiling():
                return None
            if not self.scope.watched:
                if torch.is_grad_enabled():
                    self.scope.note_silence()
                return None
        begin = self._begin_uncompiled if torch.compiler.is_compiling() else self._begin
        return begin(module, args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook, after errors too: what `before` began ends, and other adapters' rows are computed."""
        if not self.scope.local.n_calls:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                self.scope.note_silence()
            return None
        return (self._end_uncompiled if torch.compiler.is_compiling() else self._end)(module, output)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._drop_interrupted(module)
        given = "adapter_names" in kwargs
        names = self._check(kwargs["adapter_names"]) if given else None
        kwargs = {key: value for key, value in kwargs.items() if key != "adapter_names"}
        call = self.scope.said() if names is not None else self.scope.present()
        if names is None:
            if call is None and torch.is_grad_enabled():
                self.scope.note_silence()
            if call is None or call.kind != "rows" or call.n_rows is not None:
                return (args, kwargs) if given else None
            names = call.names
        assert names is not None
        n_rows = _batch_size(module, args, kwargs)
        rest, tried = None, False
        if n_rows is not None:
            # Only generation makes several consecutive rows of one, and packed images; a batch that was put together
            # twice looks alike, but it does not matter if all rows have one adapter.
            may_repeat = hasattr(module, "generation_config") or len(set(names)) == 1
            if n_rows % len(names) or (n_rows != len(names) and not may_repeat):
                raise ShapeError(f"{len(names)} adapter names for a batch of {n_rows} rows: give one name per row")
            if n_rows > 1 and len(set(names)) > 1 and not (call is not None and call.disabled):
                rest, tried = self._divided(module, args, kwargs, expand_rows(names, n_rows))
        if rest is not None:
            (args, kwargs), names, n_rows = rest.part(0)
        entry = self.scope.enter(names=names, n_rows=n_rows, tried=tried)
        _CALLS.set((*_CALLS.get(), _Begun(self, module, entry, rest, given)))
        self.scope.local.n_calls += 1
        return args, kwargs

    def _end(self, module: nn.Module, output: Any) -> Any:
        calls = _CALLS.get()
        if not calls or calls[-1].hooks is not self or calls[-1].module is not module:
            return None
        self._leave()
        if calls[-1].given and (inspect.isgenerator(output) or inspect.isawaitable(output)):
            raise AdapterStateError(
                f"{type(module).__name__} returns a {type(output).__name__}, which computes when the call with its "
                "adapter_names has ended: enter using(names) around all of it instead"
            )
        divided = calls[-1].divided
        if divided is None or output is None:
            return None
        outputs = [output]
        for number in range(1, len(divided.groups)):
            (args, kwargs), names, n_rows = divided.part(number)
            # What is drawn in evaluation (SpeechT5's dropout, masks of pictures) is drawn for all rows alike.
            same = nullcontext() if module.training else divided.random_numbers.replayed()
            with self.scope.bound(is_open=False, names=names, n_rows=n_rows), same:
                outputs.append(module(*args, **kwargs))
        return divided.joined(outputs)

    _begin_uncompiled, _end_uncompiled = uncompiled(_begin), uncompiled(_end)

    def _leave(self) -> None:
        *calls, last = _CALLS.get()
        _CALLS.set(tuple(calls))
        last.hooks.scope.leave(last.entry)
        last.hooks.scope.local.n_calls -= 1

    def _drop_interrupted(self, module: nn.Module) -> None:
        """End calls of this very module that a keyboard interrupt has left: torch calls no hook then."""
        while any(call.hooks is self and call.module is module for call in _CALLS.get()):
            self._leave()

    def _divided(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]
    ) -> tuple["_Divided | None", bool]:
        """How to call the model once for each adapter, if it has layers whose rows cannot be told; or None.

        Besides, whether trials have shown what its layers see.
        """
        call = _Arguments(args, kwargs, len(names))
        # Replicas of a module have its hooks.
        form = (id(module._forward_pre_hooks), *call.form())
        trial = self.scope.trials.get(form, _Trial(None, _ENOUGH_TRIALS))
        if trial.n_to_come:
            if not shares_batch(module):
                return None, False  # processes that do not all try it out would wait for one another
            agree(shared_over(module), "adapter_names", {"names": names})
            trial = self.scope.trials[form] = self._try_out(module, call, trial.n_to_come)
        batch_dims = trial.batch_dims
        problems = {name: problem for name, problem in self.scope.layouts.items() if problem}
        if batch_dims is None or not problems:
            return None, batch_dims is not None
        agree(shared_over(module), "adapter_names", {"names": names})
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(name, []).append(row)
        layer = next(iter(problems))
        if (what := call.undividable()) is not None:
            raise ShapeError(
                f"{layer}: {len(names)} adapter names for a batch of {len(names)} rows, and the first dimension of "
                f"this layer's input {problems[layer]}, so that each adapter's rows need a call of the model of their "
                f"own; but {what}. Give all rows one adapter, or adapt the model without this layer (exclude_modules)"
            )
        return _Divided(call, groups, batch_dims, layer, _RandomNumbers(module)), True

    def _try_out(self, module: nn.Module, call: "_Arguments", n_to_come: int) -> "_Trial":
        """Learn how the layers' inputs and the model's outputs follow from the batch."""
        noted: list[dict[str, list[Layout]]] = []
        outputs = []
        other = call.other_row()
        try:
            with _undisturbed(module):
                for rows in ([0], [0, other or call.n_rows - 1]):
                    args, kwargs = call.of_rows(rows)
                    probe: dict[str, list[Layout]] = {}
                    with self.scope.bound(is_open=False, probe=probe):
                        outputs.append(
                            [getattr(leaf, "shape", ()) for leaf in pytree.tree_leaves(module(*args, **kwargs))]
                        )
                    noted.append(probe)
        except Exception as error:  # a model need not take fewer rows: nothing is known then, and layers may refuse
            self.scope.why_unknown = f" (a trial with fewer rows failed: {type(error).__name__}: {error})"
            return _Trial(None, 0)
        self.scope.learn(*noted)
        # Tokens that are routed by what they hold may fall like rows by chance, and do where the rows are alike.
        are_tokens = any(layout.n_dims == 2 for layouts in noted[1].values() for layout in layouts)
        n_to_come = 0 if not are_tokens or any(self.scope.layouts.values()) else n_to_come - (other is not None)
        one, two = outputs
        dims = [_doubled(*shapes) for shapes in zip(one, two, strict=True)] if len(one) == len(two) else None
        return _Trial(dims, n_to_come)


def _doubled(one: Sequence[int], two: Sequence[int]) -> int | None:
    """The one dimension that is another, twice as large, for twice the rows."""
    other = [i for i, sizes in enumerate(zip(one, two, strict=False)) if sizes[0] != sizes[1]]
    return other[0] if len(one) == len(two) and len(other) == 1 and two[other[0]] == 2 * one[other[0]] else None


class _Arguments:
    """The arguments of a call, and those of the same call with fewer rows."""

    def __init__(self, args: Any, kwargs: dict[str, Any], n_rows: int) -> None:
        self.n_rows = n_rows
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))
        # Positions of the cache are no rows, however many there are.
        positions = kwargs.get("cache_position")
        self._has_rows = [
            isinstance(leaf, Tensor) and leaf.shape[:1] == (n_rows,) and leaf is not positions for leaf in self._leaves
        ]

    def form(self) -> tuple[Any, ...]:
        """Equal for calls whose layers see the same layouts."""
        dims = [leaf.dim() if isinstance(leaf, Tensor) else None for leaf in self._leaves]
        return str(self._structure), *zip(dims, self._has_rows, strict=True)

    def other_row(self) -> int | None:
        """A row that is not as the first one, if there is one: the last of them."""
        tensors = [leaf for leaf, has_rows in zip(self._leaves, self._has_rows, strict=True) if has_rows]
        rows = range(self.n_rows - 1, 0, -1)
        return next((row for row in rows if any(not torch.equal(leaf[0], leaf[row]) for leaf in tensors)), None)

    def undividable(self) -> str | None:
        """Why the call cannot be made for some of the rows at a time, or None."""
        caches = [leaf for leaf in self._leaves if _is_cache(leaf) and not hasattr(leaf, "batch_select_indices")]
        return f"its {type(caches[0]).__name__} is for all rows at once" if caches else None

    def of_rows(self, rows: list[int]) -> tuple[Any, dict[str, Any]]:
        """The arguments for these rows; what is no tensor is copied, as calls may write into it."""
        leaves = []
        for leaf, has_rows in zip(self._leaves, self._has_rows, strict=True):
            part: Any = leaf[rows] if has_rows else leaf if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
            if _is_cache(part) and part.get_seq_length():
                part.batch_select_indices(torch.tensor(rows))
            leaves.append(part)
        return pytree.tree_unflatten(leaves, self._structure)


def _is_cache(leaf: Any) -> bool:
    """Whether something is transformers' cache of keys and values."""
    return hasattr(leaf, "get_seq_length")


def _join_caches(parts: Sequence[Any], inverse: Tensor) -> bool:
    """Put the rows of several caches into the first, if they are of a kind for which that can be done."""
    inner = [
        [getattr(part, name, None) for part in parts] for name in ("self_attention_cache", "cross_attention_cache")
    ]
    if inner[0][0] is not None:
        return all(_join_caches(caches, inverse) for caches in inner)
    layers = [getattr(part, "layers", []) for part in parts]
    if not all(layers) or not all(
        isinstance(getattr(layer, "keys", None), Tensor) for found in layers for layer in found
    ):
        return False
    for same in zip(*layers, strict=True):
        for name in ("keys", "values"):
            tensors = [getattr(layer, name) for layer in same]
            setattr(same[0], name, torch.cat(tensors).index_select(0, inverse.to(tensors[0].device)))
    return True


class _Divided:
    """A call of the model that is made once for each adapter."""

    def __init__(
        self,
        call: _Arguments,
        groups: dict[str, list[int]],
        batch_dims: list[int | None],
        layer_name: str,
        random_numbers: "_RandomNumbers",
    ) -> None:
        self.random_numbers = random_numbers
        self._call = call
        self.groups = list(groups.items())
        self._batch_dims = batch_dims
        self._layer_name = layer_name

    def part(self, number: int) -> tuple[tuple[Any, dict[str, Any]], tuple[str, ...], int]:
        """One adapter's arguments, its name for each of its rows, and how many these are."""
        name, rows = self.groups[number]
        return self._call.of_rows(rows), (name,) * len(rows), len(rows)

    def joined(self, outputs: list[Any]) -> Any:
        """The outputs of all adapters as one, in the order of the batch."""
        order = torch.tensor([row for _, rows in self.groups for row in rows])
        inverse = torch.argsort(order)
        flattened = [pytree.tree_flatten(output) for output in outputs]
        leaves = []
        for i, first in enumerate(flattened[0][0]):
            parts = [leaf[i] for leaf, _ in flattened]
            dim = self._batch_dims[i] if i < len(self._batch_dims) else None
            if isinstance(first, Tensor) and dim is not None and _fit(parts, dim):
                leaves.append(torch.cat(parts, dim).index_select(dim, inverse.to(first.device)))
            elif all(_same(first, part) for part in parts) or (_is_cache(first) and _join_caches(parts, inverse)):
                leaves.append(first)
            else:
                raise ShapeError(
                    f"{self._layer_name}: the rows of its input have no adapters of their own, so that the model is "
                    f"called once for each adapter; but of its outputs a {type(first).__name__} is of no single row, "
                    "such as a loss, or of another length for each. Call the model without labels, give all rows one "
                    "adapter, or adapt the model without this layer (exclude_modules)"
                )
        return pytree.tree_unflatten(leaves, flattened[0][1])


def _fit(parts: Sequence[Tensor], dim: int) -> bool:
    """Whether tensors differ in size in this dimension alone."""
    return len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) == 1


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return isinstance(one, (type(None), bool, int, float, str)) and one == other


class _RandomNumbers:
    """What the generators of a model's devices would draw now."""

    def __init__(self, module: nn.Module) -> None:
        self._devices = sorted({w.device.index for w in module.parameters() if w.device.type == "cuda"})
        self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it that is drawn; afterwards they go on where they were."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """For a call that must leave no trace: no graph, no dropout, no statistics, and random numbers as they were."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad(), _RandomNumbers(module).replayed():
            yield
    finally:
        for part in training:
            part.training = True


def _batch_size(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> int | None:
    """The first dimension of what the module computes from, or None where that is no tensor."""
    main = getattr(module, "main_input_name", "")  # some have several
    named = [kwargs.get(name) for name in (*([main] if isinstance(main, str) else main), *_BATCHES)]
    for value in (*pytree.tree_leaves(args), *named, *pytree.tree_leaves(dict(kwargs))):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None
